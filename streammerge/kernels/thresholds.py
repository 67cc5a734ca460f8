"""The threshold of magnitude pruning over all tiles of a tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from streammerge.select import (
    KEEP_ALL,
    KEEP_NONE,
    Cut,
    Search,
    count_digit,
    digits,
    found_value,
    settle_digit,
)


@dataclass(frozen=True)
class Threshold:
    """Where a tensor is cut: above `value` all is kept, of the equals a number in each tile."""

    cuts: tuple[Cut, ...]

    def cut(self, t: int) -> Cut:
        """Return the cut of tile `t`."""
        return self.cuts[t] if len(self.cuts) > 1 else self.cuts[0]


def find_threshold(
    tile_at: Callable[[int], torch.Tensor], spans: Sequence[tuple[int, int]], density: float
) -> Threshold:
    """Find the cut that keeps the int(density·numel) largest magnitudes of a tensor.

    Of magnitudes equal to the threshold those with the lowest flat index are kept, so that their
    number is exact whatever the tiles.

    Args:
        tile_at: the tensor's tiles.
        spans: each tile's range of flat indices, in order.
        density: share of elements kept.
    """
    numel = spans[-1][1]
    keep = int(density * numel)
    if keep <= 0:
        return Threshold((KEEP_NONE,))
    if keep >= numel:
        return Threshold((KEEP_ALL,))
    search, dtype = Search(remaining=keep), None
    while dtype is None or search.settled < digits(dtype):
        counts: torch.Tensor | None = None
        for t in range(len(spans)):
            tile = tile_at(t)
            dtype = tile.dtype
            more = count_digit(tile, search)
            counts = more if counts is None else counts.add_(more)
        assert counts is not None, "a tensor has at least one tile"
        search = settle_digit(search, counts)
    value = found_value(search, dtype)
    if search.remaining == search.occurrences:
        return Threshold((Cut(value, search.occurrences),))
    return Threshold(tuple(_share_equals(tile_at, len(spans), value, search.remaining)))


def _share_equals(
    tile_at: Callable[[int], torch.Tensor], tiles: int, value: float, remaining: int
) -> list[Cut]:
    """Give the equals that are kept to the tiles, in order."""
    cuts = []
    for t in range(tiles):
        equals = int((tile_at(t).abs() == value).sum()) if remaining else 0
        cuts.append(Cut(value, min(equals, remaining)))
        remaining -= cuts[-1].equals
    return cuts
