"""Merged tiles of which some are kept, in memory or on disk, instead of being made again."""

from __future__ import annotations

import threading
from typing import Protocol

import torch

from streammerge.kernels.tiles import TileAt


class TileStore(Protocol):
    """Somewhere to put tiles that do not fit into memory."""

    def put(self, t: int, tile: torch.Tensor) -> None:
        """Store tile `t`, flat."""

    def get(self, t: int, out: torch.Tensor) -> torch.Tensor:
        """Read tile `t` as it was stored into the head of a flat buffer and return it."""


class HeldTiles:
    """Tiles of which some are made only once.

    Of those that are asked for the first `count` are held in memory, the next `stored` are put
    into the store; the others are made again each time.
    """

    def __init__(self, make: TileAt, count: int, store: TileStore | None, stored: int) -> None:
        self._make = make
        self._free = {"held": count, "stored": stored if store is not None else 0}
        self._store = store
        self._places: dict[int, str] = {}
        self._lock = threading.Lock()
        # Each tile is asked for by one thread at a time; entries of dictionaries are atomic.
        self._held: dict[int, torch.Tensor] = {}
        self._put: set[int] = set()

    def __call__(self, t: int, out: torch.Tensor) -> torch.Tensor:
        """Return tile `t`, flat; in `out` unless it is held."""
        place = self._places.get(t) or self._place(t)
        if place == "held":
            if t not in self._held:
                # Made in memory of its own: the buffer is needed for others.
                self._held[t] = self._make(t, torch.empty_like(out))
            return self._held[t]
        if place == "made":
            return self._make(t, out)
        assert self._store is not None, "tiles are only stored where there is a store"
        if t in self._put:
            return self._store.get(t, out)
        made = self._make(t, out)
        self._store.put(t, made)
        self._put.add(t)
        return made

    def _place(self, t: int) -> str:
        """Decide where a tile lies, for good."""
        with self._lock:
            place = next((name for name, free in self._free.items() if free > 0), "made")
            if place in self._free:
                self._free[place] -= 1
            self._places[t] = place
        return place
