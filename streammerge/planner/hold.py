"""What a task keeps in memory beside what it cannot do without: as much as there is room for."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from streammerge.catalog import RuleSpec
from streammerge.planner.align import Group
from streammerge.planner.memory import (
    Holding,
    factor_bytes,
    factor_tiles,
    joined_tile_bytes,
    project,
    project_census,
    stack_bytes,
    tile_bytes,
)
from streammerge.planner.routes import COORDINATES, Course, Shape, seen_shape
from streammerge.tiling import factor_rows, longest, row_tiles


@dataclass(frozen=True)
class Draft:
    """A task before the budget has had its say."""

    group: Group
    shape: Shape
    course: Course
    tally: int = 0
    """Bytes of what is counted of an adapter's elements, of each target in flight, where its
    threshold is one over all targets."""

    @property
    def seen(self) -> Shape:
        """The shape of what the rule sees."""
        return seen_shape(self.course.route, self.shape)


def least(draft: Draft, rule: RuleSpec, lanes: int = 1) -> int:
    """Return what a task holds with nothing kept, on so many threads; and, where that is more,
    what it holds while one adapter is counted."""
    held = project(draft.course, rule, draft.shape, Holding(lanes=lanes))
    if not draft.tally:
        return held
    return max(held, project_census(draft.course, rule, draft.shape, lanes) + draft.tally)


def hold(draft: Draft, rule: RuleSpec, room: int, lanes: int) -> Holding:
    """Return what a task keeps in memory: first factors, then tiles, as many as fit."""
    shape = draft.shape
    if draft.course.route in COORDINATES.values():
        return _hold_in_bases(draft.course, rule, shape, room, lanes)
    room -= least(draft, rule, lanes)
    if draft.course.route == "concatenate":
        return Holding(tiles=_joined_tiles(shape, room))
    if draft.course.route not in ("fold", "sum", "dense", "krylov"):
        return Holding(lanes=lanes)
    if draft.course.route == "sum":
        return Holding(factors=_held_factors(shape, room), lanes=lanes)
    factors = _held_factors(shape, room) if draft.course.route != "fold" else 0
    room -= factor_bytes(shape, factors)
    stack = lanes * stack_bytes(shape, _tile_elements(draft, rule))
    stacked = rule.sweeps > 1 and stack <= room
    room -= stack if stacked else 0
    if draft.course.route != "krylov":
        # Each tile is made once: for the output, or for a matrix that is held as a whole.
        return Holding(factors=factors, stacked=stacked, lanes=lanes)
    tiles = min(len(row_tiles(shape.m, shape.n)), room // tile_bytes(shape))
    return Holding(tiles, factors, stacked, lanes)


@lru_cache(maxsize=1024)
def _hold_in_bases(course: Course, rule: RuleSpec, shape: Shape, room: int, lanes: int) -> Holding:
    """Return what is kept while a rule sees coordinates: tiles, then A's, then a tile of all.

    The bases take more while they are made than afterwards, so that tiles may cost nothing.
    """
    seen = seen_shape(course.route, shape)

    def most(holdings: list[Holding]) -> Holding:
        """Return the last of some rising holdings that fits; the first one does."""
        sizes = [project(course, rule, shape, holding) for holding in holdings]
        return holdings[max(0, bisect_right(sizes, room) - 1)]

    tiles = len(row_tiles(seen.m, seen.n)) if course.passes else 0
    held = most([Holding(tiles=count, lanes=lanes) for count in range(tiles + 1)])
    if held.tiles < tiles:
        return held
    if course.route == "left_basis":
        held = most([replace(held, factors=count) for count in range(len(shape.ranks) + 1)])
    if rule.sweeps > 1:
        held = most([held, replace(held, stacked=True)])
    return held


def _joined_tiles(shape: Shape, room: int) -> int:
    """Return how many tiles of the B's side by side are made at once.

    The more adapters, the lower their tiles; so many are taken together that a part of an adapter
    that is read for them is no trifle.
    """
    tiles = factor_rows(shape.m, shape.total_rank)
    wanted = min(len(tiles), -(-PART_ELEMENTS // max(shape.ranks)) // longest(tiles))
    return 1 + max(0, min(wanted - 1, room // joined_tile_bytes(shape)))


PART_ELEMENTS = 2**15
"""Elements of a part of a factor that is read on its own: with fewer, the reading of parts costs
more than what is read."""


def _held_factors(shape: Shape, room: int) -> int:
    """Return of how many sources the factors fit into `room` bytes."""
    sizes = np.cumsum(shape.ranks) * (shape.m + shape.n) * shape.item
    return int(np.searchsorted(sizes, room, side="right"))


def _tile_elements(draft: Draft, rule: RuleSpec) -> int:
    shape = draft.shape
    if draft.course.route == "fold":
        return max(map(longest, factor_tiles(rule, shape)))
    return longest(row_tiles(shape.m, shape.n)) * shape.n
