"""How work on many items is handed out: a `map`, one after another or over several cores; and work
on the panels of a target, wherever they are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

import torch

from streammerge.tiling import panels

T = TypeVar("T")
R = TypeVar("R")


class Each(Protocol):
    """Applies a function to every item and yields the results in order; `map` is one."""

    def __call__(self, function: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]:
        """Yield function(item) for every item."""


class Over(Protocol):
    """Applies an operation to all panels of something, which may lie in several processes."""

    def __call__(self, operation: Callable[..., R], *args: Any) -> Iterator[R]:
        """Yield operation(thing, panel, *args) for every panel, in order.

        Operations are functions of modules, and their arguments and results are small, so that
        both can be sent to where the panels are.
        """


class Here:
    """The panels of a thing in this process."""

    def __init__(self, thing: Any, count: int, each: Each) -> None:
        """Make it.

        Args:
            thing: what operations are applied to.
            count: how many tiles, or groups of adapters, it has.
            each: goes over the panels.
        """
        self._thing = thing
        self._count = count
        self._each = each

    def __call__(self, operation: Callable[..., R], *args: Any) -> Iterator[R]:
        """Yield operation(thing, panel, *args) for every panel, in order."""
        return self._each(lambda panel: operation(self._thing, panel, *args), panels(self._count))


def accumulate(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the sum of tensors, in order, in the first one."""
    total: torch.Tensor | None = None
    for part in parts:
        total = part if total is None else total.add_(part)
    assert total is not None, "there is at least one"
    return total


class Pool(Generic[T]):
    """Things that are lent to one user at a time; as many are made as are in use at once."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._idle: list[T] = []
        self._lock = threading.Lock()

    @contextmanager
    def lend(self) -> Iterator[T]:
        """Lend one for as long as the block lasts."""
        with self._lock:
            lent = self._idle.pop() if self._idle else None
        lent = self._make() if lent is None else lent
        try:
            yield lent
        finally:
            with self._lock:
                self._idle.append(lent)
