"""Merged tiles: a rule applied to one tile of N tensors after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from streammerge.catalog import RULES
from streammerge.draw import keep_limit, random_bits
from streammerge.kernels.thresholds import Threshold, find_threshold
from streammerge.rules import FUNCTIONS, Tile
from streammerge.select import keep_largest

TileAt = Callable[[int], torch.Tensor]


@dataclass(frozen=True)
class Operands:
    """N tensors of one shape, cut into the same tiles."""

    spans: Sequence[tuple[int, int]]
    """Each tile's range of flat indices."""
    tile: Callable[[int, int], torch.Tensor]
    """Returns tile t of tensor i; valid until the next call, and may be overwritten."""
    keys: Sequence[int]
    """Each tensor's stream of random bits."""
    weights: Sequence[float]

    def __len__(self) -> int:
        return len(self.weights)


@dataclass(frozen=True)
class RuleOptions:
    """What of a recipe a rule needs."""

    rule: str
    density: float
    majority_sign: str


def merged_tiles(operands: Operands, options: RuleOptions) -> TileAt:
    """Return the function from a tile's number to that tile of the merged tensor.

    Thresholds over whole tensors are found first, by going over their tiles; after that any tile
    may be asked for, in any order and again, and is the same each time.
    """
    rule = FUNCTIONS[options.rule]
    thresholds: list[Threshold] = []
    if RULES[options.rule].sparsity == "largest":
        thresholds = [
            find_threshold(_tiles_of(operands, i), operands.spans, options.density)
            for i in range(len(operands))
        ]

    def tile_at(t: int) -> torch.Tensor:
        def tensors() -> Iterator[torch.Tensor]:
            return (operands.tile(i, t) for i in range(len(operands)))

        def largest(i: int, x: torch.Tensor) -> torch.Tensor:
            return keep_largest(x, thresholds[i].cut(t))

        def random(i: int, x: torch.Tensor) -> torch.Tensor:
            return keep_random(x, operands.keys[i], operands.spans[t][0], options.density)

        return rule(Tile(tensors, largest, random, operands.weights, options.majority_sign))

    return tile_at


def _tiles_of(operands: Operands, i: int) -> TileAt:
    return lambda t: operands.tile(i, t)


def keep_random(x: torch.Tensor, key: int, start: int, density: float) -> torch.Tensor:
    """Return `x` with elements kept at the rate `density` and divided by it, in place.

    Args:
        x: the elements from flat index `start` on.
        key: of the tensor's stream.
        start: flat index of the first element.
        density: 1 keeps all, 0 none (and divides by nothing).
    """
    if density >= 1:
        return x
    if density <= 0:
        return x.zero_()
    bits = random_bits(key, start, x.numel(), x.device)
    return x.div_(density).mul_((bits < keep_limit(density)).view(x.shape))


class TileStore(Protocol):
    """Somewhere to put tiles that do not fit into memory."""

    def put(self, t: int, tile: torch.Tensor) -> None:
        """Store tile `t`."""

    def get(self, t: int) -> torch.Tensor:
        """Return tile `t` as it was stored."""


def hold_tiles(tile_at: TileAt, count: int, store: TileStore | None, stored: int) -> TileAt:
    """Return `tile_at`, making some tiles only once.

    The first `count` are held in memory, the next `stored` are put into the store; the others
    are made again each time.
    """
    held: dict[int, torch.Tensor] = {}
    put: set[int] = set()

    def tile(t: int) -> torch.Tensor:
        if t in held:
            return held[t]
        if store is not None and t in put:
            return store.get(t)
        made = tile_at(t)
        if t < count:
            held[t] = made
        elif store is not None and t < count + stored:
            store.put(t, made)
            put.add(t)
        return made

    return tile
