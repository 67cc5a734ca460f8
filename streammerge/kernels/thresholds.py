"""The threshold of magnitude pruning over all tiles of a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from streammerge.select import (
    KEEP_ALL,
    KEEP_NONE,
    Cut,
    DigitCounter,
    Search,
    digits,
    found_value,
    keep_largest_,
    settle_digit,
)


@dataclass(frozen=True)
class Threshold:
    """Where a tensor is cut: above a value all is kept, of the equals a number in each tile."""

    value: float
    equals: tuple[int, ...] | None
    """How many of the equals each tile keeps; None where all are kept."""

    def prune_(self, x: torch.Tensor, t: int) -> torch.Tensor:
        """Set what tile `t` loses to zero, in place, and return it."""
        equals = 0 if self.equals is None else self.equals[t]
        return keep_largest_(x, Cut(self.value, equals), all_equals=self.equals is None)


def find_threshold(
    tile_at: Callable[[int], torch.Tensor], spans: Sequence[tuple[int, int]], density: float
) -> Threshold:
    """Find the cut that keeps the int(density·numel) largest magnitudes of a tensor.

    Of magnitudes equal to the threshold those with the lowest flat index are kept, so that their
    number is exact whatever the tiles.

    Args:
        tile_at: the tensor's tiles, contiguous.
        spans: each tile's range of flat indices, in order.
        density: share of elements kept.

    Raises:
        FloatingPointError: the threshold is infinite.
    """
    numel = spans[-1][1]
    keep = int(density * numel)
    if keep <= 0:
        return Threshold(KEEP_NONE.value, None)
    if keep >= numel:
        return Threshold(KEEP_ALL.value, None)
    tile = tile_at(0)
    dtype, device = tile.dtype, tile.device
    search = Search(remaining=keep)
    while search.settled < digits(dtype):
        counter = DigitCounter(search, dtype, device)
        for t in range(len(spans)):
            counter.add(tile_at(t))
        search = settle_digit(search, counter.counts)
    value = found_value(search, dtype)
    if math.isinf(value):
        raise FloatingPointError("a tensor overflows: its threshold is infinite")
    # An element equal to a threshold of zero is zero, kept or not.
    if search.remaining == search.occurrences or value == 0.0:
        return Threshold(value, None)
    return Threshold(value, _share_equals(tile_at, len(spans), value, search.remaining))


def _share_equals(
    tile_at: Callable[[int], torch.Tensor], tiles: int, value: float, remaining: int
) -> tuple[int, ...]:
    """Give the equals that are kept to the tiles, in order."""
    shares = []
    for t in range(tiles):
        equals = int(torch.count_nonzero(tile_at(t).abs() == value)) if remaining else 0
        shares.append(min(equals, remaining))
        remaining -= shares[-1]
    return tuple(shares)
