"""The Hugging Face Hub: ids, what they mean there, files by ranges and as downloads.

Without torch. huggingface_hub is imported when the first id is looked up: a merge of local adapters
does without.
"""

from streammerge.hub.ids import HubId, find_id, parse_id
from streammerge.hub.ranges import Ranges, Span

__all__ = ["HubId", "Ranges", "Span", "find_id", "parse_id"]
