"""What the Hub's answers, and silences, mean to who pushes.

What huggingface_hub raises depends on its version, and on that of what it talks HTTP with: so it is
the answer that is looked at, wherever it hangs in the chain of errors.
"""

from __future__ import annotations

from typing import Any

from streammerge.errors import printable

_CHANGED = "somebody else has changed it at the same time"

_ANSWERS = {
    400: "the Hub does not take what was sent",
    401: "the Hub does not take the token; log in with `hf auth login`, or set HF_TOKEN",
    402: "the Hub asks for a payment, or the storage is used up",
    403: "the token may not write there; it needs the right to, and you a role in the organization",
    404: "the Hub does not find it, or hides it from this token; check the name",
    409: _CHANGED,
    412: _CHANGED,
    413: "the Hub finds a file too large",
    429: "the Hub has had too many requests; wait",
}


def explain(error: Exception) -> tuple[int | None, str]:
    """Return the status that the Hub answered with, if it did, and what went wrong, without the
    token."""
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
    if isinstance(root, OSError) and root.filename:
        return None, f"{root.filename} cannot be read ({root.strerror})"
    said = f"{type(root).__name__}: {_line(root)}"
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
    return _line(said or response.reason_phrase)


def _line(text: object) -> str:
    """Return the first line of a text, not too long, without the token, whoever has put it in."""
    from huggingface_hub import get_token  # noqa: PLC0415  # takes a while to load

    token, shown = get_token(), str(text)
    shown = shown.replace(token, "***") if token else shown
    first, *_ = [*shown.strip().splitlines(), "nothing more was said"]
    return printable(first)[:200]
