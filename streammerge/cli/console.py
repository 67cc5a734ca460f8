"""What all commands share: text that is safe to print, and errors that become exit codes."""

from __future__ import annotations

import functools
import json
import signal
from collections.abc import Callable
from typing import Any, NoReturn

import click

from streammerge.errors import StreammergeError, printable


def say(*lines: object) -> None:
    """Print lines of the result to standard output."""
    for line in lines:
        click.echo(printable(line))


def remark(text: object) -> None:
    """Print a line about the run to standard error."""
    click.echo(printable(text), err=True)


def say_json(value: Any) -> None:
    """Print a result for machines to standard output."""
    click.echo(json.dumps(value, allow_nan=False))


def with_exit_codes(command: Callable[..., None]) -> Callable[..., None]:
    """Turn errors into a message and their exit code; with --json also into a JSON object."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        signal.signal(signal.SIGTERM, _terminate)
        try:
            command(*args, **kwargs)
        except StreammergeError as error:
            _report(type(error).__name__, str(error), error.exit_code, kwargs)
            raise SystemExit(error.exit_code) from error
        except KeyboardInterrupt as error:
            message = "stopped; the output is there as a whole or not at all"
            _report("Stopped", message, 1, kwargs)
            raise SystemExit(1) from error

    return run


def _report(kind: str, message: str, exit_code: int, options: dict[str, Any]) -> None:
    if options.get("as_json"):
        say_json({"error": {"type": kind, "message": message}, "exit_code": exit_code})
    remark(f"error: {message}")


def _terminate(_signum: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def table(rows: list[tuple[object, ...]], header: tuple[str, ...]) -> list[str]:
    """Return the lines of a table with aligned columns."""
    lines = [header, *[tuple(printable(cell) for cell in row) for row in rows]]
    widths = [max(len(str(line[i])) for line in lines) for i in range(len(header))]
    return [
        "  ".join(str(cell).ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
