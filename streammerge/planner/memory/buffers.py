"""The buffers that several routes have: tiles, factors, what a rule works in, the pair."""

from __future__ import annotations

from dataclasses import dataclass

from streammerge.catalog import RuleSpec
from streammerge.planner.routes import DOUBLE, Shape
from streammerge.tiling import (
    RANKED_ELEMENTS,
    TILE_ELEMENTS,
    factor_rows,
    longest,
    row_tiles,
)

SLACK_BYTES = 8 * 1024**2
"""Allocator rounding, small tensors of a task, and pages of files at both ends of a window."""

LANE_BYTES = 2 * 1024**2
"""The same for each further lane, and the buffer that its thread reads into."""


PAGE_BYTES = 4096

QR_ROWS = 1024
"""Rows of a tall matrix that are decomposed at once."""

COUNTER_BYTES = 2 * 1024**2
"""Sample, histogram and chunk buffers of a threshold's search."""

DRAWN = 2**18
"""Elements of a stream of random bits that are drawn at once."""

GATHERED = 16 * 2**16
"""Elements of a bracket around a threshold that are gathered at most, over all tiles."""


@dataclass(frozen=True)
class Holding:
    """How much of a streamed target is kept in memory instead of being made or read again."""

    tiles: int = 0
    """Tiles of the merged matrix, or of the B's side by side."""
    factors: int = 0
    """Sources whose factors are kept, in the compute dtype."""
    stacked: bool = False
    """Whether a tile of every source is kept between a rule's sweeps."""
    lanes: int = 1
    """Threads that work on the target at once, each with buffers of its own."""


def tile_bytes(shape: Shape) -> int:
    """Bytes of the largest tile of the merged matrix, with the pages that it begins and ends in."""
    return longest(row_tiles(shape.m, shape.n)) * shape.n * shape.item + 2 * PAGE_BYTES


def factor_bytes(shape: Shape, count: int) -> int:
    """Bytes of the `count` first sources' factors in the compute dtype."""
    return sum(shape.ranks[:count]) * (shape.m + shape.n) * shape.item


def turned_bytes(shape: Shape) -> int:
    """Bytes that are read at once of a factor that is stored transposed, to pick rows of it."""
    if not shape.turned:
        return 0
    side = max(shape.m, shape.n)
    # As many whole lines as make a tile, one at least.
    elements = min(max(TILE_ELEMENTS, side), max(shape.ranks) * side)
    return elements * shape.stored_item


def streamed_bytes(rule: RuleSpec, shape: Shape, holding: Holding) -> int:
    """What is kept, one more A as it is read, or B, and the buffers of a tile in the making."""
    rows, rank = longest(row_tiles(shape.m, shape.n)), max(shape.ranks)
    incoming = rank * (max(shape.m, shape.n) + rows) * (shape.item + shape.stored_item)
    kept = holding.tiles * tile_bytes(shape) + factor_bytes(shape, holding.factors)
    tiles = len(row_tiles(shape.m, shape.n)), rows * shape.n
    return kept + holding.lanes * incoming + rule_bytes(rule, shape, tiles, holding)


def stack_bytes(shape: Shape, tile_elements: int) -> int:
    """Bytes of the tiles that a stack holds beyond the one that is always there."""
    return (len(shape.ranks) - 1) * tile_elements * shape.item


def rule_bytes(rule: RuleSpec, shape: Shape, tiles: tuple[int, int], holding: Holding) -> int:
    """For each lane a tile of one source, or of all, and the answer; the rule's buffers; what
    finds its thresholds or draws its masks. `tiles`: how many, and elements of the largest."""
    count, elements = tiles
    held = elements * (2 + rule.tile_buffers) * shape.item
    if holding.stacked:
        held += stack_bytes(shape, elements)
    if rule.sparsity == "none":
        return holding.lanes * held
    if rule.sparsity == "random":
        return holding.lanes * (held + 3 * min(elements, DRAWN) * 4)
    if rule.sparsity == "ranked":
        return holding.lanes * (held + 3 * min(elements, DRAWN) * 4 + _ranking(shape, elements))
    # Two masks and the places found; among equals at a threshold magnitudes and 64-bit places.
    places = elements * (shape.item + 2 + 8)
    gathered = 3 * min(GATHERED, elements * count) * shape.item
    return holding.lanes * (held + COUNTER_BYTES + places) + gathered


def _ranking(shape: Shape, elements: int) -> int:
    """The odds of a row's elements; of rows that are sorted at once the magnitudes, twice, their
    places, twice while a row is sorted, and the odds of each element."""
    row = min(elements, max(shape.m, shape.n, shape.rank))
    sorted_at_once = min(elements, max(row, 2 * RANKED_ELEMENTS))
    return row * (3 * DOUBLE + shape.item + 4) + sorted_at_once * (3 * shape.item + 2 * 8 + 4)


def pair_bytes(shape: Shape) -> int:
    """U and V, A turned, and some rows of either as they are written and judged."""
    pair = (shape.m + 2 * shape.n) * shape.rank * shape.item
    rows = max(
        longest(factor_rows(side, other)) * other
        for side, other in ((shape.m, shape.rank), (shape.n, shape.rank), (shape.rank, shape.n))
    )
    return pair + rows * (2 * shape.item + shape.out_item + 2 * 8)


def common_bytes(shape: Shape, lanes: int) -> int:
    """What every task has beside its own buffers: rows as they are picked, and the small things."""
    return lanes * turned_bytes(shape) + SLACK_BYTES + (lanes - 1) * LANE_BYTES
