"""SIGTERM and SIGINT: a command ends within seconds, with the exit code that was promised."""

from __future__ import annotations

import atexit
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn, TypeVar

import click

from streammerge.cli.console import Wishes, as_json, command_line, remark, report
from streammerge.errors import StoppedError, StreammergeError

STOPPED = 75
"""Exit code of a merge that was stopped and can be gone on with: EX_TEMPFAIL of sysexits.h."""

GRACE_SECONDS = 4.0
"""How long after a signal the process is ended in any case; what is done is in the journal."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)

HOSTED = "hosted"
"""What a context's object is where the program runs inside another, whose signals it gives back."""

Result = TypeVar("Result")


_RESUMABLE = ("merge", "run", "compress")
"""Commands that go on with --resume."""


def resuming_line() -> str:
    """Return the command line that goes on with a merge: this one, with --resume."""
    words = list(sys.argv[1:])
    if "--resume" not in words:
        commands = [place for place, word in enumerate(words) if word in _RESUMABLE]
        words.insert(commands[0] + 1 if commands else len(words), "--resume")
    return command_line(*words)


def until_stopped(command: Callable[[Stops], Result], *, resuming: str, wishes: Wishes) -> Result:
    """Run what stops within seconds at SIGTERM and SIGINT, and says how to go on.

    What takes longer than GRACE_SECONDS to end is cut off, as is all at a second signal: a merge
    can be gone on with from whatever state it dies in.

    Args:
        command: what can be gone on with; it may say how at what stage.
        resuming: the command line that goes on.
        wishes: how the caller wants to be told.
    """
    stops = Stops(resuming, wishes)
    message = "stopped"
    cause: BaseException
    # Interrupts are caught outside the rest: one may come while another error is dealt with.
    try:
        try:
            stops.begin()
            result = command(stops)
            stops.over(0)
            return result
        except StoppedError as error:
            stops.over(STOPPED)
            message, cause = str(error), error
        except StreammergeError as error:
            stops.over(error.exit_code)
            raise
    except KeyboardInterrupt as interrupt:
        cause = interrupt
    report("Stopped", message, STOPPED, wishes, resume=stops.resuming)
    if not wishes.only_json:
        remark(f"go on with: {stops.resuming}")
    stops.told = True
    raise SystemExit(STOPPED) from cause


class Stops:
    """What signals do to a command, from its beginning to the end of the process.

    A thread hears of them at once, for the main one may be in a call that takes minutes. It is
    there up to the end: on its way there, too, the process may get stuck.
    """

    def __init__(self, resuming: str, wishes: Wishes) -> None:
        """Say how to go on, and to whom."""
        self.resuming = resuming
        self.told = False
        """Whether it has been said how to go on."""
        self._wishes = wishes
        self._outcome = STOPPED
        self._ends = os.pipe()
        # A shell has what it starts in the background ignore SIGINT, and that stays so.
        handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        self._before = {
            number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN
        }

    def begin(self) -> None:
        """Have signals stop the command from here on."""
        hears, told = self._ends
        os.set_blocking(told, False)
        fd_before = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(hears,), daemon=True).start()

        def give_back() -> None:
            signal.set_wakeup_fd(fd_before)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            os.close(told)

        context = click.get_current_context().find_root()
        if context.obj is HOSTED:
            context.call_on_close(give_back)
        for number in self._before:
            signal.signal(number, self._stop)

    def over(self, outcome: int) -> None:
        """Have signals change nothing any more: what the command comes to is decided.

        Args:
            outcome: the exit code that it comes to.
        """
        self._outcome = outcome
        self._disarm()

    def _stop(self, _signum: int, _frame: object) -> None:
        self._disarm()
        if self._outcome == STOPPED:
            raise KeyboardInterrupt

    def _disarm(self) -> None:
        """Leave further signals to the thread, up to the last step.

        When the interpreter is taken down it gives its signals back to the system, where they
        would end the process with another exit code than the one that was promised.
        """
        for number in self._before:
            signal.signal(number, self._pass)
        atexit.register(self._ignore)

    def _pass(self, _signum: int, _frame: object) -> None:
        """Do nothing about a signal; the thread has heard of it."""

    def _ignore(self) -> None:
        for number in self._before:
            if signal.getsignal(number) == self._pass:
                signal.signal(number, signal.SIG_IGN)

    def _listen(self, hears: int) -> None:
        stopping = {bytes([number]) for number in self._before}
        heard = b"\0"
        while heard and heard not in stopping:
            heard = os.read(hears, 1)
        if heard:
            # A second signal, or the end of what hosts the command.
            again, _, _ = select.select([hears], [], [], GRACE_SECONDS)
            if not again or os.read(hears, 1):
                self._cut_off()
        os.close(hears)

    def _cut_off(self) -> NoReturn:
        """End the process at once, whatever its threads hold and whether anybody listens."""
        said = []
        tell = self._outcome == STOPPED and not self.told
        if tell and not self._wishes.only_json:
            said.append((2, f"error: stopped\ngo on with: {self.resuming}\n"))
        if tell and self._wishes.as_json:
            said.append((1, as_json("Stopped", "stopped", STOPPED, self.resuming)))
        try:
            for descriptor, text in said:
                with suppress(OSError):
                    os.set_blocking(descriptor, False)
                    os.write(descriptor, text.encode())
        finally:
            os._exit(self._outcome)
