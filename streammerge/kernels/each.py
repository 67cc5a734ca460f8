"""How work on many items is handed out: a `map`, one after another or over several cores."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class Each(Protocol):
    """Applies a function to every item and yields the results in order; `map` is one."""

    def __call__(self, function: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]:
        """Yield function(item) for every item."""


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
