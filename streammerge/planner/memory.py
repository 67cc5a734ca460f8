"""What a task holds at most: the one formula, in bytes, above what the process has reserved.

Every buffer of a route is a term here, in the order in which the worker makes them.
`docs/memory.md` holds the projections against what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from streammerge.catalog import RuleSpec
from streammerge.planner.routes import Course, Shape
from streammerge.plans import factor_rows, flat_tiles, longest, row_tiles

HISTOGRAM_BYTES = 65536 * 8
"""One count for each 16-bit digit."""

SLACK_BYTES = 6 * 1024**2
"""Allocator rounding, small tensors of a task, and pages of files at both ends of a window."""

PAIR_COPIES = 4
"""Output factors: as combined, balanced, as written and for the certificate."""


@dataclass(frozen=True)
class Holding:
    """How much of a streamed target is kept in memory instead of being made or read again."""

    tiles: int = 0
    """Tiles of the merged matrix."""
    factors: int = 0
    """Sources whose A is kept, in the compute dtype."""


def tile_bytes(shape: Shape) -> int:
    """Bytes of the largest tile of the merged matrix."""
    return longest(row_tiles(shape.m, shape.n)) * shape.n * shape.item


def factor_bytes(shape: Shape, count: int) -> int:
    """Bytes of the `count` first A's in the compute dtype."""
    return sum(shape.ranks[:count]) * shape.n * shape.item


def project(course: Course, rule: RuleSpec, shape: Shape, holding: Holding) -> int:
    """Return the bytes that a task holds at most."""
    parts = {
        "concatenate": lambda: _concatenate(shape),
        "fold": lambda: _fold(rule, shape),
        "core": lambda: _core(shape),
        "sum": lambda: _sum(shape, course),
        "dense": lambda: _streamed(rule, shape, holding) + _dense(shape),
        "krylov": lambda: _streamed(rule, shape, holding) + _krylov(shape, course),
    }
    return parts[course.route]() + SLACK_BYTES


def _concatenate(shape: Shape) -> int:
    """A tile of A: stored, converted, cast. Or some rows of B: the parts, joined, cast."""
    elements = max(
        longest(flat_tiles(rank * side)) for rank in shape.ranks for side in (shape.m, shape.n)
    )
    elements = max(elements, longest(factor_rows(shape.m, shape.total_rank)) * shape.total_rank)
    return elements * (2 * shape.item + shape.stored_item + shape.out_item)


def _fold(rule: RuleSpec, shape: Shape) -> int:
    """The rule's buffers for one tile, the incoming one stored and converted, the result cast."""
    elements = max(longest(flat_tiles(shape.rank * side)) for side in (shape.m, shape.n))
    return elements * (_rule_bytes(rule, shape) + shape.stored_item + shape.out_item) + _selection(
        rule
    )


def _core(shape: Shape) -> int:
    """The stacked factors and Q of the first QR, then those of the second; the core; the pair."""
    k = shape.total_rank
    stack_b, stack_a = shape.m * k * shape.item, shape.n * k * shape.item
    largest = max(shape.ranks)
    reading = largest * max(shape.m, shape.n) * (shape.item + shape.stored_item)
    core = 6 * min(k, shape.m) * min(k, shape.n) * 8
    return stack_a + stack_b + 2 * max(stack_a, stack_b) + max(reading, core) + _pair(shape)


def _sum(shape: Shape, course: Course) -> int:
    """The basis, a block's images, and a tile of one factor, stored and converted."""
    elements = max(longest(factor_rows(rank, shape.n)) * shape.n for rank in shape.ranks)
    elements = max(elements, *(longest(factor_rows(shape.m, rank)) * rank for rank in shape.ranks))
    images = max(shape.ranks) * course.block * shape.item
    return elements * (shape.item + shape.stored_item) + images + _krylov(shape, course)


def _streamed(rule: RuleSpec, shape: Shape, holding: Holding) -> int:
    """What is kept, one more A as it is read, and the buffers of a tile in the making."""
    rows, rank = longest(row_tiles(shape.m, shape.n)), max(shape.ranks)
    incoming = rank * (shape.n + rows) * (shape.item + shape.stored_item)
    tile = rows * shape.n * (_rule_bytes(rule, shape) + shape.item)
    kept = holding.tiles * tile_bytes(shape) + factor_bytes(shape, holding.factors)
    return kept + incoming + tile + _selection(rule)


def _rule_bytes(rule: RuleSpec, shape: Shape) -> int:
    """Bytes that a rule holds for each element of a tile; random bits are 64-bit integers."""
    return rule.tile_buffers * shape.item + (24 if rule.needs_seed else 0)


def _selection(rule: RuleSpec) -> int:
    return 4 * HISTOGRAM_BYTES if rule.sparsity == "largest" else 0


def _dense(shape: Shape) -> int:
    """The merged matrix, its QR, and the SVD of what is left, in float64."""
    small = shape.small
    return 3 * shape.m * shape.n * shape.item + 8 * small * small * 8 + _pair(shape)


def _krylov(shape: Shape, course: Course) -> int:
    """Both bases, the newest images as they are made and orthogonalised, and the triangle."""
    columns = course.block * course.passes
    bases = (shape.m * columns + shape.n * (columns + course.block)) * shape.item
    newest = 3 * (shape.m + shape.n) * course.block * shape.item
    return bases + newest + 8 * columns * columns * 8 + _pair(shape)


def _pair(shape: Shape) -> int:
    return (shape.m + shape.n) * shape.rank * (PAIR_COPIES * shape.item + shape.out_item + 16)
