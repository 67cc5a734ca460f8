"""How long something takes, on a machine that is busy with other things too."""

from __future__ import annotations

import os
import time
from collections.abc import Callable


def processor_seconds(call: Callable[[], object], times: int) -> list[float]:
    """What the processor does in the children that a call starts; the first call is not counted.

    Their files may have to be compiled, or to be read from the disk.
    """
    call()
    took = []
    for _ in range(times):
        before = os.times()
        call()
        after = os.times()
        user = after.children_user - before.children_user
        took.append(user + after.children_system - before.children_system)
    return took


def within(seconds: float) -> float:
    """What so many seconds of an idle machine are on this one now: it may be busy, or be stolen."""
    began, worked = time.monotonic(), time.process_time()
    while time.process_time() - worked < 0.1:
        pass
    return seconds * max(1.0, (time.monotonic() - began) / (time.process_time() - worked))
