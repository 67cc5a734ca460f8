"""How targets, factors and passes are cut: by shapes alone, never by the budget or the threads.

So the arithmetic, and with it every byte of the result, is the same however much is held or
worked on at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

TILE_ELEMENTS = 2**18
"""Elements of a tile, about: 1 MiB of float32, which stays in a core's cache."""

PANELS = 16
"""Ranges of tiles, or of adapters, that a pass is cut into. Sums are taken inside each and then
over all of them in order, so that they come out the same however many are worked on at once."""

GROUP_ELEMENTS = 2**20
"""Elements of the factors that are stacked for a pass over them, unless one source has more."""

GRAM_BLOCK = 64
"""Columns of a block of a Gram matrix, at least; blocks are what cores share."""

GRAM_ROWS = 1024
"""Rows that are converted to float64 at once for a Gram matrix, at least."""

MIN_TILE_ROWS = 8
"""A tile of one row would go to another BLAS routine, with another rounding."""

SAMPLE = 2**15
"""Elements of a sample at most, about."""


def split(length: int, size: int) -> list[tuple[int, int]]:
    """Cut `length` into near-equal pieces of at least `size` (one piece if it is shorter)."""
    count = max(1, length // size)
    edges = [length * i // count for i in range(count + 1)]
    return list(itertools.pairwise(edges))


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


def row_tiles(m: int, n: int) -> list[tuple[int, int]]:
    """Return the row ranges of an m × n target's tiles. Shape alone decides, never the budget."""
    return split(m, max(MIN_TILE_ROWS, TILE_ELEMENTS // n))


def flat_tiles(elements: int) -> list[tuple[int, int]]:
    """Return the ranges of a factor's tiles, over its elements in file order."""
    return split(elements, TILE_ELEMENTS)


def factor_rows(rows: int, width: int) -> list[tuple[int, int]]:
    """Return the row ranges in which a rows × width factor is read."""
    return split(rows, max(1, TILE_ELEMENTS // width))


def factor_groups(ranks: Sequence[int], sides: int) -> list[range]:
    """Return which sources' factors are stacked for a pass over them: neighbours, by size alone.

    Args:
        ranks: of the sources.
        sides: m + n of the target.
    """
    groups: list[range] = []
    filled = GROUP_ELEMENTS
    for source, rank in enumerate(ranks):
        if filled + rank * sides > GROUP_ELEMENTS:
            groups.append(range(source, source))
            filled = 0
        groups[-1] = range(groups[-1].start, source + 1)
        filled += rank * sides
    return groups


def gram_blocks(columns: int) -> list[tuple[int, int]]:
    """Return the ranges of columns whose products make a Gram matrix, each pair on its own."""
    return split(columns, max(GRAM_BLOCK, -(-columns // 4)))


def gram_rows(rows: int) -> list[tuple[int, int]]:
    """Return the ranges of rows that are converted to float64 at once for a Gram matrix."""
    return split(rows, GRAM_ROWS)


def longest(tiles: list[tuple[int, int]]) -> int:
    """Return the length of the longest range."""
    return max(stop - start for start, stop in tiles)
