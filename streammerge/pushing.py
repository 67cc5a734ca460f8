"""An output brought to the Hugging Face Hub, with a model card.

What is uploaded is streammerge's own: weights, config, index, record, and the card. Record and
config go without places on this machine (see `public`), so that their checksums are other ones
than those of the local files, and as true. Timings, and what was carried over from elsewhere, stay.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streammerge.adapter import CONFIG_NAME, INDEX_NAME
from streammerge.card import CARD_NAME, is_own_card, render_card
from streammerge.errors import (
    CorruptFileError,
    MissingFileError,
    PushError,
    RecipeError,
    printable,
    shorten,
)
from streammerge.files import check_inside, read_whole
from streammerge.output.record import (
    digest,
    read_record,
    reading_record,
    render_json,
    render_record,
)
from streammerge.output.staging import MARK_NAME, OWN_FILES
from streammerge.public import is_model_id, is_place, public_config, public_record
from streammerge.verification import verify

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

MAX_TEXT_BYTES = 2**24
"""Of a config, or of a card."""

_ADAPTER_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    INDEX_NAME,
)
"""Where a repository has one of these, it holds an adapter."""


@dataclass(frozen=True)
class Pushed:
    """What lies on the Hub now."""

    repo: str
    url: str
    commit: str
    files: tuple[str, ...]
    """What was uploaded, or was there already and is the same."""
    notices: tuple[str, ...]


@dataclass(frozen=True)
class Publication:
    """What of an output is to be uploaded: bytes, or the file that holds them, by name."""

    files: Mapping[str, bytes | Path]
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
    publication = publish(output, repo)
    with _explained(output, repo):
        from huggingface_hub import (  # noqa: PLC0415  # takes a while to load
            CommitOperationAdd,
            CommitOperationDelete,
            HfApi,
        )

        api = HfApi(library_name="streammerge")
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        info = api.model_info(repo, files_metadata=True)
        files, notices = dict(publication.files), list(publication.notices)
        there = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
        _check_repository(output, repo, info, there, private=private, overwrite=overwrite)
        if CARD_NAME in there and not overwrite and not _is_ours(api, info, there[CARD_NAME]):
            del files[CARD_NAME]
            notices.append(
                f"{repo}: its {CARD_NAME} is not streammerge's, or was edited, and is left as it "
                "is; --overwrite replaces it"
            )
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


def publish(output: Path, repo: str) -> Publication:
    """Return what of an output is to be uploaded.

    Raises:
        AdapterError: record or config cannot be read, or is none.
    """
    record = read_record(output)
    with reading_record(output):
        shown = public_record(record)
        others: dict[str, bytes | Path] = {}
        stay = []
        for name in record["other_files"]:
            if name not in (CARD_NAME, CONFIG_NAME) and OWN_FILES.fullmatch(name) is None:
                stay.append(name)
            elif name != CARD_NAME:
                others[name] = output / name
        notices = (
            [f"{', '.join(stay)}: not uploaded, for a merge does not make them"] if stay else []
        )
        config = _config(output) if CONFIG_NAME in others else None
        if config is not None:
            others[CONFIG_NAME], more = _public_config(output, config)
            notices += more
        shown["other_files"] = {name: _digest(data) for name, data in others.items()}
        files: dict[str, bytes | Path] = {name: output / name for name in _weights(output, record)}
        own = output / CARD_NAME
        card = own if own.is_file() else render_card(record, config, repo).encode()
        files |= {**others, MARK_NAME: render_record(shown), CARD_NAME: card}
    for data in files.values():
        if isinstance(data, Path):
            check_inside(data)  # what a link leads to is not meant to be published
    return Publication(files, tuple(notices))


def _weights(output: Path, record: Mapping[str, Any]) -> list[str]:
    """Return the names of the files of weights.

    Raises:
        CorruptFileError: one is no name of such a file; it may lead anywhere.
    """
    names = [str(facts["name"]) for facts in record["files"]]
    for name in names:
        if not OWN_FILES.fullmatch(name):
            raise CorruptFileError(
                f"names {shorten(name)} as a file of weights", path=str(output / MARK_NAME)
            )
    return names


def _config(output: Path) -> dict[str, Any]:
    try:
        config = json.loads(read_whole(output / CONFIG_NAME, MAX_TEXT_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptFileError(
            f"cannot be read ({error})", path=str(output / CONFIG_NAME)
        ) from error
    if not isinstance(config, dict):
        raise CorruptFileError("is not a JSON object", path=str(output / CONFIG_NAME))
    return config


def _public_config(output: Path, config: dict[str, Any]) -> tuple[bytes | Path, list[str]]:
    """Return the config to upload: the file as it is, unless it names a place on this machine."""
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not is_place(base):
        return output / CONFIG_NAME, []
    notice = (
        f"{CONFIG_NAME}: its base model {base} is a place on this machine, and is left out of what "
        "is uploaded"
    )
    return render_json(public_config(config)), [notice]


def _digest(data: bytes | Path) -> str:
    return digest(data if isinstance(data, bytes) else data.read_bytes())


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
    held = [name for name in _ADAPTER_FILES if name in there]
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
        status, reason = _reason(error)
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


_ANSWERS = {
    400: "the Hub does not take what was sent",
    401: "the Hub does not take the token; log in with `hf auth login`, or set HF_TOKEN",
    402: "the Hub asks for a payment, or the storage is used up",
    403: "the token may not write there; it needs the right to, and you a role in the organization",
    404: "the Hub does not find it, or hides it from this token; check the name",
    409: "somebody else has changed it at the same time",
    412: "somebody else has changed it at the same time",
    413: "the Hub finds a file too large",
    429: "the Hub has had too many requests; wait",
}


def _reason(error: Exception) -> tuple[int | None, str]:
    """Return the Hub's answer, and a sentence about what went wrong."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        response = getattr(link, "response", None)
        status = getattr(response, "status_code", None)
        if isinstance(status, int):
            said = f"{status}: {_said(link, response)}"
            usual = "the Hub fails; try later" if status >= 500 else "the Hub refuses"
            wait = _wait(response) if status == 429 else ""
            return status, f"{_ANSWERS.get(status, usual)}{wait} ({said})"
    root = chain[-1]
    said = f"{type(root).__name__}: {' '.join(_safe(str(root)).splitlines()[:1])}"
    cut = any(isinstance(link, OSError) or _speaks_http(link) for link in chain)
    return None, f"{'the Hub was not reached, or the line was cut' if cut else 'fails'} ({said})"


def _speaks_http(error: BaseException) -> bool:
    """Whether an error comes from the library that talks HTTP; there have been several."""
    return type(error).__module__.split(".")[0].startswith(("httpx", "httpcore", "requests"))


def _wait(response: Any) -> str:
    seconds = response.headers.get("retry-after", "")
    return f" {seconds} s" if seconds.isdecimal() and len(seconds) < 7 else ""


def _said(error: BaseException, response: Any) -> str:
    """Return what the Hub said, on one line and not too long."""
    said = getattr(error, "server_message", None) or response.headers.get("x-error-message")
    return printable(_safe(str(said or response.reason_phrase)).splitlines()[0])[:200]


def _safe(text: str) -> str:
    """Return a text without the token, whoever has put it in."""
    from huggingface_hub import get_token  # noqa: PLC0415  # takes a while to load

    token = get_token()
    return text.replace(token, "***") if token else text
