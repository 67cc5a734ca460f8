"""What a task holds at most: the one formula, in bytes, above what the process has reserved.

Every buffer of a route is a term here, in the order in which the worker makes them.
`docs/memory.md` holds the projections against what was measured.
"""

from __future__ import annotations

from functools import lru_cache

from streammerge.catalog import RuleSpec
from streammerge.planner.memory import bases, factors
from streammerge.planner.memory.bases import CONVERTED, SIGNED
from streammerge.planner.memory.buffers import (
    PAGE_BYTES,
    QR_ROWS,
    SLACK_BYTES,
    Holding,
    common_bytes,
    factor_bytes,
    pair_bytes,
    stack_bytes,
    streamed_bytes,
    tile_bytes,
    turned_bytes,
)
from streammerge.planner.memory.census import project_census, tally_bytes
from streammerge.planner.memory.factors import factor_tiles, joined_tile_bytes
from streammerge.planner.memory.matrices import core_bytes, dense_bytes, gram_bytes, krylov_bytes
from streammerge.planner.routes import DOUBLE, PROBES, Course, Shape
from streammerge.tiling import TILE_ELEMENTS, flat_tiles, longest

CONNECTIONS_BYTES = 8 * 1024**2
"""Threads and buffers of the requests of one task."""

PINNED_BYTES = 4 * 1024**2
"""Of pinned memory for a piece of a factor on its way to a device."""

PINNED_SLOTS = 2
"""One is filled while the other is on its way."""

__all__ = [
    "CONVERTED",
    "PINNED_BYTES",
    "PINNED_SLOTS",
    "QR_ROWS",
    "SIGNED",
    "Holding",
    "factor_bytes",
    "factor_tiles",
    "joined_tile_bytes",
    "project",
    "project_beside",
    "project_census",
    "project_compared",
    "project_fetched",
    "project_host",
    "project_team",
    "stack_bytes",
    "tally_bytes",
    "tile_bytes",
]


@lru_cache(maxsize=1024)  # most targets of a model have one of a few shapes
def project(course: Course, rule: RuleSpec, shape: Shape, holding: Holding) -> int:
    """Return the bytes that a task holds at most."""
    lanes = holding.lanes
    parts = {
        "concatenate": lambda: factors.concatenate(shape, holding),
        "fold": lambda: factors.fold(rule, shape, holding),
        "core": lambda: core_bytes(shape),
        "gram": lambda: gram_bytes(shape, lanes),
        "sum": lambda: factors.summed(shape, course, holding),
        "dense": lambda: streamed_bytes(rule, shape, holding) + dense_bytes(shape),
        # A tile less its approximation, where the residual is too small to be a difference.
        "krylov": lambda: (
            streamed_bytes(rule, shape, holding)
            + krylov_bytes(shape, course, lanes)
            + lanes * tile_bytes(shape)
        ),
        "copy": lambda: 2 * longest(flat_tiles(shape.m * shape.n)) * shape.out_item,
        "mean": lambda: factors.averaged(shape),
        "bias": lambda: factors.averaged(shape),
        "left_basis": lambda: bases.in_bases(rule, shape, course, holding),
        "both_bases": lambda: bases.in_bases(rule, shape, course, holding),
        "shared_bases": lambda: bases.in_shared_bases(rule, shape, course, holding),
        "spectral": lambda: factors.spectral(shape, course, lanes),
    }
    held = parts[course.route]()
    if rule.kind == "coefficient":
        # What inner products take is free again before the sum is begun.
        held = max(held, factors.inner(shape, lanes))
    return held + common_bytes(shape, lanes)


def project_team(shape: Shape, course: Course) -> int:
    """Return what is on its way between workers that share a target, in the memory of each.

    A block to all of them, as its file is read and as it is used; the images of a panel as they
    are written; where they are added up, as they are read, and their sum.
    """
    return 6 * max(shape.m, shape.n) * (course.block + PROBES) * shape.item


def project_host(shape: Shape) -> int:
    """Return what a task holds in the process's memory while it computes on a device.

    The factor in hand, as it is stored, and what is pinned; the pair on its way back.
    """
    incoming = max(shape.ranks) * max(shape.m, shape.n) * (shape.stored_item + shape.item)
    picking = 2 * turned_bytes(shape)  # as it is stored, and in the order that it is sent in
    return incoming + picking + PINNED_SLOTS * PINNED_BYTES + pair_bytes(shape) + SLACK_BYTES


def project_fetched(shape: Shape) -> int:
    """Return what a task holds of its sources that are fetched from the Hub, with what is on its
    way."""
    return shape.fetched + CONNECTIONS_BYTES if shape.fetched else 0


def project_beside(shape: Shape) -> int:
    """Return what is held beside a task's own buffers as long as it runs."""
    return project_fetched(shape) + shape.kept


def project_compared(shape: Shape) -> int:
    """Return what a comparison holds of a target beside the task of a method.

    All factors as they are stored, each from a page on; the pair, as it is written; and what the
    pair is measured in: four tiles, and Gram matrices of the pair's rank and of a source's, in
    float64.
    """
    widest = max(shape.rank, *shape.ranks)
    stored = shape.source_bytes + 2 * len(shape.ranks) * 2 * PAGE_BYTES
    pair = shape.rank * (shape.m + shape.n) * shape.out_item
    tile = max(TILE_ELEMENTS, shape.n, widest) * DOUBLE
    grams = 3 * shape.rank**2 + 5 * widest * max(shape.ranks)
    return stored + pair + 4 * tile + grams * DOUBLE + turned_bytes(shape)
