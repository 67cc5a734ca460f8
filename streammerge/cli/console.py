"""What all commands share: text that is safe to print, and errors that become exit codes."""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import click

from streammerge.cli.tables import lay_out, lay_out_facts
from streammerge.cli.terminal import is_terminal, styled, width
from streammerge.errors import StoppedError, StreammergeError, printable


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
            _leave_signals_to_the_watch()
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
                _leave_signals_to_the_watch()
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


def _leave_signals_to_the_watch() -> None:
    """Have no further signal disturb the way out, up to its last step.

    When the interpreter is taken down it gives its signals back to the system, where they would
    end the process with another exit code than the one that was promised.
    """
    for number in _SIGNALS:
        signal.signal(number, lambda *_: None)
    atexit.register(_ignore_signals)


def _ignore_signals() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


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
    wishes = Wishes.of(options)
    said = []
    if not wishes.only_json:
        said.append((2, f"error: stopped\ngo on with: {command}\n"))
    if wishes.as_json:
        said.append((1, _as_json("Stopped", "stopped", STOPPED, command)))
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
        commands = [place for place, word in enumerate(words) if word in ("merge", "run")]
        words.insert(commands[0] + 1 if commands else len(words), "--resume")
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
    wishes = Wishes.of(options)
    report("Stopped", message, STOPPED, wishes, resume=command)
    if not wishes.only_json:
        remark(f"go on with: {command}")


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
            click.echo(_as_json(kind, message, exit_code, resume), nl=False)
    if not wishes.only_json:
        _labelled("error", message, colour="red")


def _as_json(kind: str, message: str, exit_code: int, resume: str | None) -> str:
    """Return a line that says for machines what went wrong."""
    error = {"type": kind, "message": message} | ({"resume": resume} if resume else {})
    return json.dumps({"error": error, "exit_code": exit_code}) + "\n"


def table(rows: list[tuple[object, ...]], header: tuple[str, ...]) -> list[str]:
    """Return the lines of a table with aligned columns, as wide as the terminal at most."""
    return lay_out([[printable(cell) for cell in row] for row in rows], header, width())


def facts(rows: list[tuple[str, object]]) -> list[str]:
    """Return a line for each name and value; on a terminal long values go on below themselves."""
    return lay_out_facts([(name, printable(value)) for name, value in rows], width())
