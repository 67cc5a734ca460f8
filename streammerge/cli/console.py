"""What all commands share: text that is safe to print, and errors that become exit codes."""

from __future__ import annotations

import functools
import json
import os
import select
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import click

from streammerge.errors import StoppedError, StreammergeError, printable


def say(*lines: object) -> None:
    """Print lines of the result to standard output."""
    for line in lines:
        click.echo(printable(line))


def remark(text: object) -> None:
    """Print a line about the run to standard error; to nobody, where that is closed."""
    with suppress(OSError):
        click.echo(printable(text), err=True)


def say_json(value: Any) -> None:
    """Print a result for machines to standard output."""
    click.echo(json.dumps(value, allow_nan=False))


STOPPED = 75
"""Exit code of a merge that was stopped and can be gone on with: EX_TEMPFAIL of sysexits.h."""

GRACE_SECONDS = 4.0
"""How long after a signal the process is ended in any case; what is done is in the journal."""


Result = TypeVar("Result")


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


def stopped_by_signals(
    command: Callable[..., Result], resuming: Callable[[], str] | None = None
) -> Callable[..., Result]:
    """Have a merge stop within seconds at SIGTERM and SIGINT, and say how to go on.

    What takes longer than GRACE_SECONDS to end is cut off, as is all at a second signal: a merge
    can be gone on with from whatever state it dies in.

    Args:
        command: what can be gone on with; its keyword `as_json` says how its errors are told.
        resuming: returns the command line that goes on; this one with --resume when None.
    """
    again = resuming or _resuming

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Result:
        def stop(_signum: int, _frame: object) -> NoReturn:
            for number in _SIGNALS:
                signal.signal(number, lambda *_: None)  # the watch hears of it
            raise KeyboardInterrupt

        # A shell has what it starts in the background ignore SIGINT, and that stays so.
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        with _Watch(lambda: _cut_off(again(), kwargs)):
            for number, handler in before.items():
                if handler is not signal.SIG_IGN:
                    signal.signal(number, stop)
            try:
                result = command(*args, **kwargs)
            except StoppedError as error:
                _report_stopped(str(error), again(), kwargs)
                raise SystemExit(STOPPED) from error
            except KeyboardInterrupt as error:
                _report_stopped("stopped", again(), kwargs)
                raise SystemExit(STOPPED) from error
            else:
                for number, handler in before.items():
                    signal.signal(number, handler)
                return result

    return run


_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class _Watch:
    """A thread that hears of signals at once; the main one may be in a call that takes minutes."""

    def __init__(self, cut_off: Callable[[], None]) -> None:
        self._cut_off = cut_off
        self._ends = os.pipe()
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> _Watch:
        told = self._ends[1]
        os.set_blocking(told, False)
        self._before = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not (isinstance(error, SystemExit) and error.code == STOPPED):
            # Else the process is on its way to its end, and may still be cut off on it.
            signal.set_wakeup_fd(self._before)
            os.close(self._ends[1])

    def _listen(self) -> None:
        hears = self._ends[0]
        stopping = {bytes([number]) for number in _SIGNALS}
        while (number := os.read(hears, 1)) not in stopping:
            if not number:
                return
        # A second signal, or the end of the command.
        again, _, _ = select.select([hears], [], [], GRACE_SECONDS)
        if not again or os.read(hears, 1):
            self._cut_off()


def _cut_off(command: str, options: dict[str, Any]) -> NoReturn:
    """End the process at once, whatever its other threads hold and whether anybody listens."""
    said = [(2, f"error: stopped\ngo on with: {command}\n")]
    if options.get("as_json"):
        said.append((1, _as_json("Stopped", "stopped", STOPPED, resume=command)))
    try:
        for descriptor, text in said:
            with suppress(OSError):
                os.set_blocking(descriptor, False)
                os.write(descriptor, text.encode())
    finally:
        os._exit(STOPPED)


def _resuming() -> str:
    """Return the command line that goes on."""
    words = list(sys.argv[1:])
    if "--resume" not in words:
        words.insert(words.index("merge") + 1 if "merge" in words else len(words), "--resume")
    return command_line(*words)


def command_line(*words: str) -> str:
    """Return a command line as a shell takes it."""
    return " ".join(map(_quoted, ["streammerge", *words]))


def _quoted(word: str) -> str:
    """Return a word as a shell takes it, and a terminal shows it: without control characters."""
    if word.isprintable():
        return shlex.quote(word)
    shown = {byte: chr(byte) for byte in range(0x20, 0x7F) if chr(byte) not in "\\'"}
    return "$'" + "".join(shown.get(byte, f"\\x{byte:02x}") for byte in os.fsencode(word)) + "'"


def _report_stopped(message: str, command: str, options: dict[str, Any]) -> None:
    _report("Stopped", message, STOPPED, options, resume=command)
    remark(f"go on with: {command}")


def _report(kind: str, message: str, exit_code: int, options: dict[str, Any], **more: str) -> None:
    with suppress(OSError):  # nobody may listen any more
        if options.get("as_json"):
            click.echo(_as_json(kind, message, exit_code, **more), nl=False)
    remark(f"error: {message}")


def _as_json(kind: str, message: str, exit_code: int, **more: str) -> str:
    """Return a line that says for machines what went wrong."""
    error = {"type": kind, "message": message, **more}
    return json.dumps({"error": error, "exit_code": exit_code}) + "\n"


def table(rows: list[tuple[object, ...]], header: tuple[str, ...]) -> list[str]:
    """Return the lines of a table with aligned columns."""
    lines = [header, *[tuple(printable(cell) for cell in row) for row in rows]]
    widths = [max(len(str(line[i])) for line in lines) for i in range(len(header))]
    return [
        "  ".join(str(cell).ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
