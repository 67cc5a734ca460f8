"""What is held while the elements of whole adapters are counted."""

from __future__ import annotations

from functools import lru_cache

from streammerge.catalog import RuleSpec
from streammerge.planner.memory.bases import with_bases, with_shared_bases
from streammerge.planner.memory.buffers import COUNTER_BYTES, common_bytes
from streammerge.planner.routes import Course, Shape, seen_shape
from streammerge.tiling import flat_tiles, longest, row_tiles

DIGITS = 2**16
"""Values of a digit that are counted apart."""

COUNT_BYTES = 8
"""Of a count."""


def tally_bytes(rule: RuleSpec, targets: int) -> int:
    """Return what is counted of an adapter for each target in flight: its own counts, and those
    that they are added to."""
    return rule.cuts * (DIGITS + max(DIGITS, 2 * targets)) * COUNT_BYTES


@lru_cache(maxsize=1024)
def project_census(course: Course, rule: RuleSpec, shape: Shape, lanes: int) -> int:
    """Return the bytes that are held of a target while its elements are counted, without what is
    counted."""
    parts = {
        "fold": lambda: _counted_factors(rule, shape, lanes),
        "left_basis": lambda: _counted_in_bases(rule, shape, course, lanes),
        "both_bases": lambda: _counted_in_bases(rule, shape, course, lanes),
        "shared_bases": lambda: _counted_in_bases(rule, shape, course, lanes),
    }
    held = parts.get(course.route, lambda: _counted_deltas(rule, shape, lanes))()
    return held + common_bytes(shape, lanes)


def _counted_factors(rule: RuleSpec, shape: Shape, lanes: int) -> int:
    """For each lane a tile of a factor, stored and converted, and what counts it."""
    elements = max(longest(flat_tiles(shape.rank * side)) for side in (shape.m, shape.n))
    return lanes * (elements * (shape.stored_item + shape.item) + _counting(rule, elements))


def _counted_deltas(rule: RuleSpec, shape: Shape, lanes: int) -> int:
    """One A, and the next one as it is read, stored and converted; for each lane some rows of B,
    their tile, and what counts it."""
    rows, rank = longest(row_tiles(shape.m, shape.n)), max(shape.ranks)
    elements = rows * shape.n
    reading = rank * (shape.item + shape.stored_item)
    tile = elements * shape.item + _counting(rule, elements)
    held = rank * shape.n * shape.item
    return held + reading * shape.n + lanes * (reading * rows + tile)


def _counted_in_bases(rule: RuleSpec, shape: Shape, course: Course, lanes: int) -> int:
    """The bases and the coordinates of the factors, as in the task, and for each lane a tile."""
    seen = seen_shape(course.route, shape)
    elements = longest(row_tiles(seen.m, seen.n)) * seen.n
    incoming = max(shape.ranks) * (max(seen.m, seen.n) + seen.m) * (shape.item + shape.stored_item)
    used = lanes * (incoming + elements * shape.item + _counting(rule, elements))
    if course.route == "shared_bases":
        return with_shared_bases(shape, lanes, used)
    return with_bases(shape, course, lanes, used)


def _counting(rule: RuleSpec, elements: int) -> int:
    """A histogram and its chunk buffers for each cut; among equals two masks and the places."""
    return max(rule.cuts * COUNTER_BYTES, elements * (2 + 8))
