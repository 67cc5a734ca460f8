"""Merged tiles: a rule applied to one tile of N tensors after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from streammerge.catalog import RULES, Sparsity
from streammerge.draw import random_mask
from streammerge.kernels.thresholds import Threshold, find_threshold
from streammerge.rules import FUNCTIONS, Tile

TileAt = Callable[[int], torch.Tensor]


@dataclass(frozen=True)
class Operands:
    """N tensors of one shape, cut into the same tiles."""

    spans: Sequence[tuple[int, int]]
    """Each tile's range of flat indices."""
    fill: Callable[[int, int, torch.Tensor], torch.Tensor]
    """Puts tile t of tensor i into a flat buffer that is large enough, and returns it, shaped."""
    new_buffer: Callable[[int], torch.Tensor]
    """Returns a flat buffer for so many elements."""
    keys: Sequence[int]
    """Each tensor's stream of random bits."""
    weights: Sequence[float]

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def largest_tile(self) -> int:
        """Elements of the largest tile."""
        return max(stop - start for start, stop in self.spans)


@dataclass(frozen=True)
class RuleOptions:
    """What of a recipe a rule needs."""

    rule: str
    density: float
    majority_sign: str


def merged_tiles(operands: Operands, options: RuleOptions, *, stacked: bool = False) -> TileAt:
    """Return the function from a tile's number to that tile of the merged tensor.

    Thresholds over whole tensors are found first, by going over their tiles; after that any tile
    may be asked for, in any order and again, and is the same each time.

    Args:
        operands: the tensors.
        options: the rule and what it needs.
        stacked: whether the N tensors of a tile are kept while the rule goes over them again,
            instead of being made again.
    """
    rule = FUNCTIONS[options.rule]
    maker = _TileMaker(operands, options, stacked=stacked)

    def tile_at(t: int) -> torch.Tensor:
        return rule(
            Tile(
                tensors=lambda: maker.go_over(t, "none"),
                largest=lambda: maker.go_over(t, "largest"),
                random=lambda: maker.go_over(t, "random"),
                weights=operands.weights,
                majority_sign=options.majority_sign,
            )
        )

    return tile_at


class _TileMaker:
    """Makes the N tensors of a tile, in buffers that serve every tile."""

    def __init__(self, operands: Operands, options: RuleOptions, *, stacked: bool) -> None:
        self._operands = operands
        self._density = options.density
        size = operands.largest_tile
        self._buffers = [operands.new_buffer(size) for _ in range(len(operands) if stacked else 1)]
        self._stacked = stacked
        self._made: tuple[int, Sparsity, list[torch.Tensor]] | None = None
        self._mask: torch.Tensor | None = None
        self._thresholds: list[Threshold] = []
        if RULES[options.rule].sparsity == "largest":
            self._thresholds = [
                find_threshold(self._tiles_of(i), operands.spans, options.density)
                for i in range(len(operands))
            ]

    def go_over(self, t: int, kept: Sparsity) -> Iterator[torch.Tensor]:
        """Yield tile t of each tensor, with all, the largest or random elements kept."""
        if self._made is not None and self._made[:2] == (t, kept):
            yield from self._made[2]
            return
        self._made, made = None, []
        for i in range(len(self._operands)):
            buffer = self._buffers[i if self._stacked else 0]
            x = self._operands.fill(i, t, buffer)
            if kept == "largest":
                x = self._thresholds[i].prune_(x, t)
            elif kept == "random":
                x = self._drop_(i, t, x)
            made.append(x)
            yield x
        if self._stacked:
            self._made = (t, kept, made)

    def _drop_(self, i: int, t: int, x: torch.Tensor) -> torch.Tensor:
        """Keep random elements at the rate of the density, and divide them by it."""
        if self._density >= 1:
            return x
        if self._density <= 0:
            return x.zero_()
        if self._mask is None:
            self._mask = self._operands.new_buffer(self._operands.largest_tile)
        key, (start, stop) = self._operands.keys[i], self._operands.spans[t]
        mask = random_mask(key, start, self._density, out=self._mask[: stop - start])
        return x.mul_(mask.view(x.shape)).div_(self._density)

    def _tiles_of(self, i: int) -> TileAt:
        return lambda t: self._operands.fill(i, t, self._buffers[0])


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
