"""An output brought to the Hugging Face Hub, with a model card.

What of it is uploaded: `publication`.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from streammerge.adapter import INDEX_NAME
from streammerge.errors import (
    MissingFileError,
    PushError,
    RecipeError,
)
from streammerge.output.staging import MARK_NAME, OWN_FILES
from streammerge.publishing.answers import explain
from streammerge.publishing.card import CARD_NAME, is_own_card
from streammerge.publishing.public import is_model_id
from streammerge.publishing.publication import MAX_TEXT_BYTES, publication_of
from streammerge.verification import verify

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

_ADAPTER_FILES = ("adapter_config.json", INDEX_NAME)
_WEIGHTS = re.compile(r"[^/]+\.(safetensors|bin|pt|pth|ckpt)")
"""Where a repository has one of these, it holds an adapter or another model."""


_LEFT_ALONE = (
    f"{{}}: its {CARD_NAME} is not streammerge's, or was edited, and is left as it is; "
    "`streammerge push --overwrite` replaces it"
)


@dataclass(frozen=True)
class Pushed:
    """What lies on the Hub now."""

    repo: str
    url: str
    commit: str
    files: tuple[str, ...]
    """What was uploaded, or was there already and is the same."""
    notices: tuple[str, ...]


def check_push(repo: str) -> None:
    """Check what can be checked without the Hub: the id, and that there is a token.

    Raises:
        RecipeError: one of them is not as it should be.
    """
    if not isinstance(repo, str) or "/" not in repo or not is_model_id(repo):
        raise RecipeError(
            f"push: {repo!r} is not the id of a repository, such as user/name", option="push"
        )
    from huggingface_hub import constants, get_token  # noqa: PLC0415  # takes a while to load

    if constants.HF_HUB_OFFLINE:
        raise RecipeError(
            "push: the Hub is not to be reached, for HF_HUB_OFFLINE is set; unset it", option="push"
        )
    if not get_token():
        raise RecipeError(
            "push: there is no token for the Hub; log in with `hf auth login`, or set HF_TOKEN",
            option="push",
        )


def push(
    output: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = False,
    overwrite: bool = False,
    message: str | None = None,
) -> Pushed:
    """Bring an output of streammerge to the Hugging Face Hub, verified first, with a model card.

    The repository is made if need be. An earlier output of streammerge in it is replaced; its
    history stays. What is on the Hub already is not sent again, so that a push that failed goes on.

    Args:
        output: directory of a merge, or of `consolidate`.
        repo: "user/name".
        private: make the repository a private one; one that exists and is public is refused.
        overwrite: replace an adapter that is not streammerge's, and a README.md that is not a card
            of streammerge's, or was edited. Else the one is refused, and the other is left alone.
        message: of the commit.

    Raises:
        RecipeError: the id is none, or there is no token; nothing was tried.
        AdapterError: a subclass of it: the output is none.
        VerificationError: a byte of it is not as it was written.
        PushError: the Hub refused, failed, or was not reached. The output stays as it is.
    """
    check_push(repo)
    if not verify(output).checksums:
        raise MissingFileError(
            "no such file; only what streammerge has written is pushed",
            path=str(Path(output) / MARK_NAME),
        )
    return upload(Path(output), repo, private=private, overwrite=overwrite, message=message)


def upload(
    output: Path, repo: str, *, private: bool, overwrite: bool = False, message: str | None = None
) -> Pushed:
    """Do what `push` does with an output that is known to be right."""
    found = publication_of(output, repo)
    files, notices = dict(found.files), list(found.notices)
    with _explained(output, repo):
        from huggingface_hub import (  # noqa: PLC0415  # takes a while to load
            CommitOperationAdd,
            CommitOperationDelete,
            HfApi,
        )

        api = HfApi(library_name="streammerge")
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        info = api.model_info(repo, files_metadata=True)
        there = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
        _check_repository(output, repo, info, there, private=private, overwrite=overwrite)
        if CARD_NAME in there and not overwrite and not _is_ours(api, info, there[CARD_NAME]):
            del files[CARD_NAME]
            notices.append(_LEFT_ALONE.format(repo))
        stale = [name for name in there if OWN_FILES.fullmatch(name) and name not in files]
        commit = api.create_commit(
            repo,
            [
                *(CommitOperationDelete(name) for name in stale),
                *(CommitOperationAdd(name, _content(data)) for name, data in files.items()),
            ],
            commit_message=message or "Upload a merge by streammerge",
            parent_commit=info.sha,
        )
    return Pushed(repo, str(url), commit.oid, tuple(sorted(files)), tuple(notices))


def _content(data: bytes | Path) -> bytes | str:
    return data if isinstance(data, bytes) else str(data)


def _check_repository(
    output: Path,
    repo: str,
    info: ModelInfo,
    there: Mapping[str, int],
    *,
    private: bool,
    overwrite: bool,
) -> None:
    """Check that what a repository is, and holds, may be added to and replaced.

    Raises:
        PushError: it may not.
    """
    if private and not info.private:
        raise PushError(
            "exists and is public; make it private on the Hub, or choose another name",
            repo=repo,
            output=str(output),
        )
    held = [name for name in there if name in _ADAPTER_FILES or _WEIGHTS.fullmatch(name)]
    if held and MARK_NAME not in there and not overwrite:
        raise PushError(
            f"holds an adapter that is not streammerge's ({held[0]}); choose another name, or "
            "replace it with `streammerge push --overwrite`",
            repo=repo,
            output=str(output),
        )


def _is_ours(api: HfApi, info: ModelInfo, size: int) -> bool:
    """Return whether a repository's README.md is a card that nobody has edited."""
    if size > MAX_TEXT_BYTES:
        return False
    with tempfile.TemporaryDirectory() as folder:
        path = api.hf_hub_download(info.id, CARD_NAME, revision=info.sha, cache_dir=folder)
        return is_own_card(Path(path).read_bytes().decode(errors="replace"))


@contextmanager
def _explained(output: Path, repo: str) -> Iterator[None]:
    """Turn what goes wrong on the way to the Hub into an error that says what to do.

    What huggingface_hub raises depends on its version, and on that of what it talks HTTP with.

    Raises:
        PushError: something did.
    """
    try:
        with _without_bars():
            yield
    except PushError:
        raise
    except Exception as error:
        status, reason = explain(error)
        raise PushError(reason, repo=repo, output=str(output), status=status) from None


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep huggingface_hub's bars to terminals."""
    from huggingface_hub.utils.tqdm import (  # noqa: PLC0415  # takes a while to load
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
