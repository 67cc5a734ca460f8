"""What all commands share: text that is safe to print, and errors that become exit codes."""

from __future__ import annotations

import functools
import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import click

from streammerge.errors import StoppedError, StreammergeError, printable


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


STOPPED = 75
"""Exit code of a merge that was stopped and can be gone on with: EX_TEMPFAIL of sysexits.h."""

GRACE_SECONDS = 4.0
"""How long after a signal the process is ended in any case; what is done is in the journal."""


def with_exit_codes(command: Callable[..., None]) -> Callable[..., None]:
    """Turn errors into a message and their exit code; with --json also into a JSON object."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except StreammergeError as error:
            _report(type(error).__name__, str(error), error.exit_code, kwargs)
            for note in getattr(error, "__notes__", ()):
                remark(note)
            raise SystemExit(error.exit_code) from error
        except KeyboardInterrupt as error:
            _report("Stopped", "stopped", 130, kwargs)
            raise SystemExit(130) from error

    return run


def stopped_by_signals(command: Callable[..., None]) -> Callable[..., None]:
    """Have a merge stop within seconds at SIGTERM and SIGINT, and say how to go on.

    What takes longer than GRACE_SECONDS to end is cut off, as is all at a second signal: a merge
    can be gone on with from whatever state it dies in.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        def cut_off() -> None:
            _report_stopped("stopped", kwargs)
            sys.stdout.flush()
            os._exit(STOPPED)

        def stop(_signum: int, _frame: object) -> NoReturn:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: cut_off())
            timer = threading.Timer(GRACE_SECONDS, cut_off)
            timer.daemon = True
            timer.start()
            raise KeyboardInterrupt

        # A shell has what it starts in the background ignore SIGINT, and that stays so.
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, stop)
        try:
            command(*args, **kwargs)
        except StoppedError as error:
            _report_stopped(str(error), kwargs)
            raise SystemExit(STOPPED) from error
        except KeyboardInterrupt as error:
            _report_stopped("stopped", kwargs)
            raise SystemExit(STOPPED) from error
        else:
            for number, handler in before.items():
                signal.signal(number, handler)

    return run


def _report_stopped(message: str, options: dict[str, Any]) -> None:
    words = ["streammerge", *sys.argv[1:]]
    command = shlex.join(words if "--resume" in words else [*words, "--resume"])
    _report("Stopped", message, STOPPED, options, resume=command)
    remark(f"go on with: {command}")


def _report(kind: str, message: str, exit_code: int, options: dict[str, Any], **more: str) -> None:
    if options.get("as_json"):
        error = {"type": kind, "message": message, **more}
        say_json({"error": error, "exit_code": exit_code})
    remark(f"error: {message}")


def table(rows: list[tuple[object, ...]], header: tuple[str, ...]) -> list[str]:
    """Return the lines of a table with aligned columns."""
    lines = [header, *[tuple(printable(cell) for cell in row) for row in rows]]
    widths = [max(len(str(line[i])) for line in lines) for i in range(len(header))]
    return [
        "  ".join(str(cell).ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
