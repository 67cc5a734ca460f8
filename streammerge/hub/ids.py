"""What names an adapter on the Hub: user/repo, a folder or a file in it, and a revision."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from streammerge.errors import HubError

PREFIX = "hf://"

_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_REVISION = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._/+-]{0,254}[A-Za-z0-9_])?")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubId:
    """An adapter on the Hub, as it was asked for."""

    text: str
    """As it was written."""
    repo: str
    """user/repo."""
    inner: str
    """Path of a folder or a file in it; empty for the repository itself."""
    revision: str
    """A branch, a tag, a reference or a commit."""


def find_id(text: str) -> HubId | None:
    """Return what a text names on the Hub; None where it means a place on this machine.

    What exists here is meant, and so is what looks like a path: what starts with a dot, a slash or
    a tilde, holds a backslash, or has fewer than two parts.

    Raises:
        HubError: it begins with hf:// and is no id.
    """
    if not text.startswith(PREFIX) and (os.path.lexists(text) or _looks_local(text)):
        return None
    return parse_id(text)


def _looks_local(text: str) -> bool:
    # A name of two parts that ends like a file of weights is such a file.
    file = text.count("/") == 1 and text.endswith(_WEIGHTS)
    return text.startswith((".", "/", "~")) or "\\" in text or "/" not in text or file


def parse_id(text: str) -> HubId | None:
    """Return the parts of an id; None where a text is none.

    Raises:
        HubError: it begins with hf:// and is no id.
    """
    path, at, revision = text.removeprefix(PREFIX).partition("@")
    user, _, rest = path.partition("/")
    repo, _, inner = rest.partition("/")
    revision = revision if at else "main"
    sound = (
        not path.endswith("/")
        and all(map(_is_name, (user, repo)))
        and (not inner or all(map(_is_part, inner.split("/"))))
        and _REVISION.fullmatch(revision) is not None
        and not {"", ".", ".."} & set(revision.split("/"))
    )
    if sound:
        return HubId(text, f"{user}/{repo}", inner, revision)
    if text.startswith(PREFIX):
        raise HubError(
            "is no id of the Hub; write user/repo, user/repo@revision or user/repo/folder@revision",
            path=text,
            reason="id",
        )
    return None


def _is_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None and "--" not in name and ".." not in name


def _is_part(part: str) -> bool:
    return 0 < len(part) <= 255 and part.isprintable() and part not in (".", "..")


def file_path(repo: str, commit: str, name: str) -> str:
    """Return what a file on the Hub is called in manifests and messages."""
    return f"{repo}@{commit}/{name}"


def split_path(path: str) -> tuple[str, str, str]:
    """Return repository, commit and name of a file: what `file_path` was given."""
    repo, _, rest = path.partition("@")
    commit, _, name = rest.partition("/")
    return repo, commit, name
