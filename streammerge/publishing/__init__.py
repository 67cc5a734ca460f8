"""An output on the Hugging Face Hub: what may be told of it, its model card, the upload."""

from streammerge.publishing.pushing import Pushed, check_push, push, upload

__all__ = ["Pushed", "check_push", "push", "upload"]
