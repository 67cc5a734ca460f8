"""How long something takes, on a machine that is busy with other things too."""

from __future__ import annotations

import os
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
