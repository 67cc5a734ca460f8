"""Work on parts of one target, several at once."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, wait
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class Lanes:
    """A `map` over a pool of threads, with no more items in hand than there are lanes."""

    def __init__(self, pool: Executor, width: int, stopped: threading.Event) -> None:
        """Make it; `stopped` is set at a failure, so that what is running ends at its next read."""
        self._pool = pool
        self._width = width
        self._stopped = stopped

    def __call__(self, function: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]:
        """Yield function(item) for every item, in order."""
        in_hand: deque[Future[R]] = deque()
        try:
            for item in items:
                if len(in_hand) == self._width:
                    yield in_hand.popleft().result()
                in_hand.append(self._pool.submit(_run, function, item))
            while in_hand:
                yield in_hand.popleft().result()
        except BaseException:
            self._stopped.set()
            # Nothing may go on in buffers that the caller takes for its own.
            for future in in_hand:
                future.cancel()
            wait(in_hand)
            raise


def _run(function: Callable[[T], R], item: T) -> R:
    # Both belong to the thread, not to the process.
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)
    with torch.inference_mode():
        return function(item)
