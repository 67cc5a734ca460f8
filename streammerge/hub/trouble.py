"""What went wrong at the Hub, in words that say what to do; never with an address or a token.

Links to files are signed, and a signature is as good as a token while it lasts.
"""

from __future__ import annotations

from typing import NamedTuple

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""What all errors of the HTTP library are, whichever of httpx's names the Hub's client uses."""

TROUBLES = (HTTP_ERROR, HfHubHTTPError, HFValidationError, OSError, ValueError)
"""What the Hub's client raises; its own errors are among them."""


class Trouble(NamedTuple):
    """What went wrong."""

    reason: str
    """A word for programs; see HubError."""
    message: str
    again: bool = False
    """Whether the same may work a little later."""


_KNOWN: tuple[tuple[type[Exception], Trouble], ...] = (
    (
        GatedRepoError,
        Trouble(
            "gated",
            "access to this repository has to be granted; ask for it on its page, and give a token "
            "of that account (HF_TOKEN, or `hf auth login`)",
        ),
    ),
    (
        RepositoryNotFoundError,
        Trouble(
            "repository",
            "is neither here nor a repository on the Hub that can be seen: mistyped, or private; "
            "give a token of an account that may read it (HF_TOKEN, or `hf auth login`)",
        ),
    ),
    (
        RevisionNotFoundError,
        Trouble("revision", "there is no such revision; name a branch, a tag or a commit"),
    ),
    (
        OfflineModeIsEnabled,
        Trouble(
            "offline",
            "is not in the cache, and the Hub is not asked (HF_HUB_OFFLINE); download it first",
        ),
    ),
    (
        LocalEntryNotFoundError,
        Trouble("offline", "is not in the cache, and the Hub does not answer; try later"),
    ),
    (EntryNotFoundError, Trouble("file", "there is no such file at this revision")),
    (HFValidationError, Trouble("id", "is no id of the Hub; write user/repo@revision")),
)
"""From the special to the general, for some are kinds of others."""


def explain(error: BaseException) -> Trouble:
    """Return what an error of the Hub's client means."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, TROUBLES):
        # It was asked for, and the answer did not come.
        return explain(error.__cause__)
    for kind, trouble in _KNOWN:
        if isinstance(error, kind):
            return trouble
    if isinstance(error, HfHubHTTPError):
        return _of_status(error.response.status_code if error.response is not None else 0)
    return Trouble(
        "network",
        f"the Hub cannot be reached ({type(error).__name__}); HF_HUB_OFFLINE=1 has what is in the "
        "cache used without it",
        again=True,
    )


def _of_status(status: int) -> Trouble:
    if status in (401, 403):
        return Trouble(
            "token",
            f"the Hub refuses it ({status}); give a token of an account that may read it "
            "(HF_TOKEN, or `hf auth login`)",
        )
    if status == 429:
        return Trouble("busy", "the Hub takes no more requests for now (429); wait", again=True)
    return Trouble("network", f"the Hub answers {status}", again=status >= 500 or status == 408)
