"""A fixture's worth of Hub: this process takes a Hub on this machine for the real one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hub_uploads import TOKEN, Hub, serving


def hub_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Yield a Hub of its own; nothing waits for it long."""
    from huggingface_hub import constants
    from huggingface_hub.hf_api import api
    from huggingface_hub.utils import _http

    with serving() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        settings = {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_TOKEN_PATH": str(tmp_path / "no-token"),
        }
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(api, "endpoint", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(_http.time, "sleep", lambda _: None)
        yield server
        _http.close_session()
