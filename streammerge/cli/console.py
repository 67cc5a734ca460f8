"""What all commands share: text that is safe to print, and errors that become exit codes."""

from __future__ import annotations

import functools
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import click

from streammerge.cli.tables import lay_out, lay_out_facts
from streammerge.cli.terminal import is_terminal, styled, width
from streammerge.errors import StreammergeError, printable


def say(*lines: object) -> None:
    """Print lines of the result to standard output."""
    for line in lines:
        click.echo(printable(line))


def remark(text: object) -> None:
    """Print a line about the run to standard error; to nobody, where that is closed."""
    with suppress(OSError):
        click.echo(printable(text), err=True)


def note(text: object) -> None:
    """Print what the user should know and what stops nothing."""
    _labelled("note", text, colour="yellow")


def tip(*lines: object) -> None:
    """Print what could be done next; only to a terminal, where a person reads it."""
    if is_terminal(sys.stderr):
        for line in lines:
            _to_stderr(styled(line, sys.stderr, colour=None))


def _labelled(label: str, text: object, *, colour: str) -> None:
    _to_stderr(f"{styled(f'{label}:', sys.stderr, colour=colour, bold=True)} {printable(text)}")


def _to_stderr(text: str) -> None:
    with suppress(OSError):  # nobody may listen any more
        # Colours have been decided on: click is not to take them out again.
        click.echo(text, err=True, color=True)


def say_json(value: Any) -> None:
    """Print a result for machines to standard output."""
    click.echo(json.dumps(value, allow_nan=False))


@dataclass(frozen=True)
class Wishes:
    """How a caller wants to be told."""

    as_json: bool = False
    quiet: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Wishes:
        """Return the wishes among a command's options."""
        return cls(bool(options.get("as_json")), bool(options.get("quiet")))

    @property
    def only_json(self) -> bool:
        """Whether nothing but JSON is to be printed, for what else there is stands in it."""
        return self.as_json and self.quiet


def with_exit_codes(command: Callable[..., None]) -> Callable[..., None]:
    """Turn errors into a message and their exit code; with --json also into a JSON object."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except StreammergeError as error:
            wishes = Wishes.of(kwargs)
            report(type(error).__name__, str(error), error.exit_code, wishes)
            if not wishes.only_json:
                for more in getattr(error, "__notes__", ()):
                    remark(more)
            raise SystemExit(error.exit_code) from error
        except KeyboardInterrupt as error:
            report("Stopped", "stopped", 130, Wishes.of(kwargs))
            raise SystemExit(130) from error

    return run


def command_line(*words: str) -> str:
    """Return a command line as a shell takes it."""
    return " ".join(map(_quoted, ["streammerge", *words]))


def _quoted(word: str) -> str:
    """Return a word as a shell takes it, and a terminal shows it: without control characters."""
    if word.isprintable():
        return shlex.quote(word)
    shown = {byte: chr(byte) for byte in range(0x20, 0x7F) if chr(byte) not in "\\'"}
    return "$'" + "".join(shown.get(byte, f"\\x{byte:02x}") for byte in os.fsencode(word)) + "'"


def report(
    kind: str, message: str, exit_code: int, wishes: Wishes, *, resume: str | None = None
) -> None:
    """Print what went wrong: for people, and as JSON where that was asked for.

    Args:
        kind: of the error, as its class is called.
        message: for people.
        exit_code: that the command ends with.
        wishes: of the caller.
        resume: the command that goes on, where one does.
    """
    with suppress(OSError):  # nobody may listen any more
        if wishes.as_json:
            click.echo(as_json(kind, message, exit_code, resume), nl=False)
    if not wishes.only_json:
        _labelled("error", message, colour="red")


def as_json(kind: str, message: str, exit_code: int, resume: str | None) -> str:
    """Return a line that says for machines what went wrong."""
    error = {"type": kind, "message": message} | ({"resume": resume} if resume else {})
    return json.dumps({"error": error, "exit_code": exit_code}) + "\n"


def table(rows: list[tuple[object, ...]], header: tuple[str, ...]) -> list[str]:
    """Return the lines of a table with aligned columns, as wide as the terminal at most."""
    return lay_out([[printable(cell) for cell in row] for row in rows], header, width())


def facts(rows: list[tuple[str, object]]) -> list[str]:
    """Return a line for each name and value; on a terminal long values go on below themselves."""
    return lay_out_facts([(name, printable(value)) for name, value in rows], width())
