"""How targets, factors and passes are cut: by shapes alone, never by the budget or the threads.

So the arithmetic, and with it every byte of the result, is the same however much is held or
worked on at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import overload

TILE_ELEMENTS = 2**18
"""Elements of a tile, about: 1 MiB of float32, which stays in a core's cache."""

PANELS = 16
"""Ranges of tiles, or of adapters, that a pass is cut into. Sums are taken inside each and then
over all of them in order, so that they come out the same however many are worked on at once."""

GROUP_ELEMENTS = 2**20
"""Elements of the factors that are stacked for a pass over them, unless one source has more."""

INNER_ELEMENTS = 2**23
"""Elements of the factors that are stacked for inner products with those of other sources, unless
one source has more: what is stacked meets every other stack."""

GRAM_BLOCK = 64
"""Columns of a block of a Gram matrix, at least; blocks are what cores share."""

GRAM_ROWS = 1024
"""Rows that are converted to float64 at once for a Gram matrix, at least."""

MIN_TILE_ROWS = 8
"""A tile of one row would go to another BLAS routine, with another rounding."""

RANKED_ELEMENTS = 2**15
"""Elements that are sorted at once, about: few enough for the places to stay in a cache."""

SAMPLE = 2**15
"""Elements of a sample at most, about."""


@dataclass(frozen=True)
class Pieces(Sequence[tuple[int, int]]):
    """Near-equal pieces of a length, each made when it is asked for: a header may promise 10⁹."""

    length: int
    """In units."""
    pieces: int
    unit: int = 1
    """What the ends of all pieces are multiples of."""

    def __len__(self) -> int:
        return self.pieces

    @overload
    def __getitem__(self, place: int) -> tuple[int, int]: ...
    @overload
    def __getitem__(self, place: slice) -> list[tuple[int, int]]: ...
    def __getitem__(self, place: int | slice) -> tuple[int, int] | list[tuple[int, int]]:
        if isinstance(place, slice):
            return [self[i] for i in range(self.pieces)[place]]
        number = range(self.pieces)[place]
        start, stop = (self.length * end // self.pieces for end in (number, number + 1))
        return self.unit * start, self.unit * stop

    @property
    def longest(self) -> int:
        """The length of the longest one."""
        return self.unit * -(-self.length // self.pieces)


def split(length: int, size: int) -> Pieces:
    """Cut `length` into near-equal pieces of at least `size` (one piece if it is shorter)."""
    return Pieces(length, max(1, length // size))


def sample_size(elements: int) -> int:
    """Return how many elements are to stand for a tensor: few enough to cost little to sort."""
    return min(SAMPLE, max(SAMPLE // 8, elements // 16))


def sample_step(elements: int, width: int) -> int:
    """Return the step that takes a sample from a matrix so wide, coming by every column."""
    return coprime_step(elements // sample_size(elements), width)


def coprime_step(step: int, width: int) -> int:
    """Return a step of at least this size that comes by every column of a matrix so wide."""
    step = max(1, step)
    while math.gcd(step, width) > 1:
        step += 1
    return step


def panels(count: int) -> list[range]:
    """Cut `count` tiles into ranges, by their number alone."""
    return [range(start, stop) for start, stop in split(count, -(-count // PANELS))]


def row_tiles(m: int, n: int) -> Pieces:
    """Return the row ranges of an m × n target's tiles. Shape alone decides, never the budget."""
    return split(m, max(MIN_TILE_ROWS, TILE_ELEMENTS // n))


def flat_tiles(elements: int) -> Pieces:
    """Return the ranges of a factor's tiles, over its elements in file order."""
    return split(elements, TILE_ELEMENTS)


def fold_tiles(rows: int, width: int, *, whole_rows: bool) -> Pieces:
    """Return the ranges of a rows × width factor's tiles, over its elements in file order.

    Args:
        rows: of it.
        width: its columns.
        whole_rows: whether tiles begin and end with rows, however long these are.
    """
    if not whole_rows:
        return flat_tiles(rows * width)
    return replace(factor_rows(rows, width), unit=width)


def ranked_rows(rows: int, width: int) -> Pieces:
    """Return the ranges of a tile's rows whose elements are sorted at once."""
    return split(rows, max(1, RANKED_ELEMENTS // width))


def factor_rows(rows: int, width: int) -> Pieces:
    """Return the row ranges in which a rows × width factor is read."""
    return split(rows, max(1, TILE_ELEMENTS // width))


def factor_groups(ranks: Sequence[int], sides: int) -> list[range]:
    """Return which sources' factors are stacked for a pass over them: neighbours, by size alone.

    Args:
        ranks: of the sources.
        sides: m + n of the target.
    """
    return _groups(ranks, sides, GROUP_ELEMENTS)


def inner_groups(ranks: Sequence[int], sides: int) -> list[range]:
    """Return which sources' factors are stacked for inner products; as `factor_groups`."""
    return _groups(ranks, sides, INNER_ELEMENTS)


def _groups(ranks: Sequence[int], sides: int, size: int) -> list[range]:
    groups: list[range] = []
    filled = size
    for source, rank in enumerate(ranks):
        if filled + rank * sides > size:
            groups.append(range(source, source))
            filled = 0
        groups[-1] = range(groups[-1].start, source + 1)
        filled += rank * sides
    return groups


def gram_blocks(columns: int) -> Pieces:
    """Return the ranges of columns whose products make a Gram matrix, each pair on its own."""
    return split(columns, max(GRAM_BLOCK, -(-columns // 4)))


def gram_rows(rows: int) -> Pieces:
    """Return the ranges of rows that are converted to float64 at once for a Gram matrix."""
    return split(rows, GRAM_ROWS)


def longest(tiles: Sequence[tuple[int, int]]) -> int:
    """Return the length of the longest range."""
    if isinstance(tiles, Pieces):
        return tiles.longest
    return max(stop - start for start, stop in tiles)
