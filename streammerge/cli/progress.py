"""Progress on a terminal as a bar, elsewhere as a line now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from streammerge import events
from streammerge.budget import format_size
from streammerge.cli.console import note, remark
from streammerge.cli.terminal import is_terminal

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Listens to a run's events and shows how far it is, on standard error."""

    def __init__(self, *, quiet: bool, notes: bool = True) -> None:
        self._quiet = quiet
        self._notes = notes
        self._bar: Any = None
        self._what = ""
        self._total = 0
        self._done = 0
        self._began = self._last = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, event: events.Event) -> None:
        """Take one event."""
        if isinstance(event, events.Notice) and self._notes:
            note(event.message)
        if self._quiet:
            return
        if isinstance(event, events.Resumed):
            remark(f"going on: {event.done} of {event.targets} targets are done")
        if isinstance(event, events.Downloading):
            remark(f"downloading {event.files} file(s), {format_size(event.nbytes)}")
        if isinstance(event, events.Downloaded):
            remark(f"downloaded {event.path}, {format_size(event.nbytes)}")
        if isinstance(event, events.Counting):
            self._begin(f"counting, pass {event.number} of {event.passes}", event.read_bytes)
        elif isinstance(event, events.Planned):
            self._begin("merging", event.read_bytes)
        elif isinstance(event, events.TaskDone | events.Counted):
            self._advance(event.read_bytes)

    def _begin(self, what: str, nbytes: int) -> None:
        self._what, self._total, self._done = what, nbytes, 0
        self._began = self._last = time.monotonic()
        if is_terminal(sys.stderr):
            self._open_bar()

    def _open_bar(self) -> None:
        from tqdm import tqdm

        if self._bar is not None:
            self._bar.close()
        self._bar = tqdm(
            total=self._total, unit="B", unit_scale=True, desc=self._what, dynamic_ncols=True
        )

    def _advance(self, nbytes: int) -> None:
        self._done += nbytes
        if self._bar is not None:
            self._bar.update(nbytes)
            return
        now = time.monotonic()
        if now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            share = self._done / max(1, self._total)
            left = (now - self._began) * (1 - share) / max(share, 1e-9)
            remark(f"{self._what}: {share:.0%} of {self._total} bytes, about {left:.0f} s left")
