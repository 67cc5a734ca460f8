"""What is at the other end of standard output and error: its width, its colours, its characters."""

from __future__ import annotations

import codecs
import io
import os
import sys
from typing import IO, Any

import click

from streammerge.errors import printable

SPELT = {"…": "...", "×": "x", "·": "*", "–": "-", "√": "sqrt", "Δ": "delta ", "Σ": "sum "}
"""How our own texts are spelt where the other end cannot show a character."""


def width() -> int | None:
    """Return the columns of the terminal that is standard output; None where it is not one."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or None
    except (OSError, ValueError, AttributeError):  # a pipe, closed, or not a file at all
        return None


def is_terminal(stream: IO[Any] | None) -> bool:
    """Return whether a person may be looking at it."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def shows_colours(stream: IO[Any] | None) -> bool:
    """Return whether to colour what goes there: terminals, unless it was asked otherwise.

    NO_COLOR forbids it (no-color.org), FORCE_COLOR and CLICOLOR_FORCE ask for it, in that order.
    """
    asked = os.environ
    if asked.get("NO_COLOR"):
        return False
    if asked.get("FORCE_COLOR") or asked.get("CLICOLOR_FORCE", "0") not in ("", "0"):
        return True
    plain = asked.get("CLICOLOR") == "0" or asked.get("TERM") == "dumb"
    return not plain and is_terminal(stream)


def styled(text: object, stream: IO[Any] | None, *, colour: str | None, bold: bool = False) -> str:
    """Return text that is safe to print there, in a colour (None: dim) where there are colours."""
    safe = printable(text)
    if not shows_colours(stream):
        return safe
    return click.style(safe, fg=colour, bold=bold or None, dim=colour is None or None)


def forgive_characters() -> None:
    """Have no character fail to be printed, whatever the locale."""
    codecs.register_error("streammerge.spelt", _spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="streammerge.spelt")


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    left = error.object[error.start : error.end]
    spelt = "".join(SPELT.get(c, c.encode("ascii", "backslashreplace").decode()) for c in left)
    return spelt, error.end
