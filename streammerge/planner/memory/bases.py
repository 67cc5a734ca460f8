"""Routes in bases: what makes them, the coordinates in them, and what is done with those."""

from __future__ import annotations

from dataclasses import replace

from streammerge.catalog import RuleSpec
from streammerge.planner.memory.buffers import Holding, pair_bytes, streamed_bytes, tile_bytes
from streammerge.planner.memory.matrices import dense_bytes, krylov_bytes
from streammerge.planner.routes import DOUBLE, Course, Shape, seen_shape, whole_side
from streammerge.tiling import GRAM_ROWS, gram_rows, longest

SIGNED = 2**20
"""Entries of a basis that are looked at together for the signs, unless one vector has more."""

CONVERTED = 2**16
"""Entries of a factor that are converted to float64 at once, for the lengths of its columns."""


def in_bases(rule: RuleSpec, shape: Shape, course: Course, holding: Holding) -> int:
    """The A's that are kept; the bases, and with them what the merged coordinates take; the
    pair."""
    kept = sum(shape.ranks[: holding.factors]) * shape.n * shape.item
    merging = _coordinates(rule, seen_shape(course.route, shape), course, holding)
    return kept + with_bases(shape, course, holding.lanes, merging) + pair_bytes(shape)


def with_bases(shape: Shape, course: Course, lanes: int, used: int) -> int:
    """The bases and the factors' coordinates in them; while they are made, what that takes, and
    later what is done with the coordinates."""
    seen, k = seen_shape(course.route, shape), shape.total_rank
    sides = (shape.m,) if course.route == "left_basis" else (shape.m, shape.n)
    bases = sum(side * min(side, k) for side in sides) * shape.item
    if len(sides) == 1:
        bases += sum(rank * rank for rank in shape.ranks) * DOUBLE  # the L's
        # A's coordinates are as wide as A, and read when they are needed.
        reading = max(shape.ranks) * shape.n * (shape.item + shape.stored_item)
        used = max(lanes * reading, used)
    coordinates = (seen.m if len(sides) == 1 else seen.m + seen.n) * k * shape.item
    making = max(_basis(shape, side, lanes) for side in sides)
    return bases + coordinates + max(making, used)


def _basis(shape: Shape, side: int, lanes: int) -> int:
    """The stacked factors; their Gram matrix, its eigenvectors and what LAPACK works in; rows in
    float64 as they are multiplied. Or their QR and the SVD of the triangle. Coordinates before they
    are turned and cut into those of each factor, as many as the lanes have in hand, and a mask of
    them; rows in float64."""
    k = shape.total_rank
    order, stack = min(side, k), side * k * shape.item
    largest = max(shape.ranks)
    reading = largest * max(shape.m, shape.n) * (shape.item + shape.stored_item)
    rooting = lanes * (2 * reading + 5 * largest * largest * DOUBLE)
    signs = min(side * order, max(side, SIGNED)) * (2 * shape.item + 2)
    together = min(k, lanes * max(largest, GRAM_ROWS))
    projecting = stack + together * order * (2 * shape.item + 1) + lanes * CONVERTED * DOUBLE
    if shape.item == DOUBLE:
        return max(
            rooting, projecting, 4 * stack + 9 * order * order * DOUBLE + max(reading, signs)
        )
    rows = longest(gram_rows(side)) * max(k, order) + longest(gram_rows(k)) * order
    working = max(reading, signs, lanes * 2 * rows * DOUBLE)
    return max(rooting, projecting, stack + 5 * order * order * DOUBLE + working)


def _coordinates(rule: RuleSpec, seen: Shape, course: Course, holding: Holding) -> int:
    """Tiles, and what an iteration takes; or the whole of a matrix that turns out to have a short
    side; the triples before they are brought back."""
    tiles = streamed_bytes(rule, seen, replace(holding, factors=0))
    short = min(seen.small, whole_side(seen.rank))
    whole = replace(seen, m=short, n=max(seen.m, seen.n))
    truncating = dense_bytes(whole)
    if course.passes:
        iterating = krylov_bytes(seen, course, holding.lanes) + holding.lanes * tile_bytes(seen)
        truncating = max(truncating, iterating)
    return tiles + truncating


def in_shared_bases(rule: RuleSpec, shape: Shape, course: Course, holding: Holding) -> int:
    """The bases, and with them what the merged coordinates take; the pair."""
    merging = _coordinates(rule, seen_shape(course.route, shape), course, holding)
    return with_shared_bases(shape, holding.lanes, merging) + pair_bytes(shape)


def with_shared_bases(shape: Shape, lanes: int, used: int) -> int:
    """The stacked factors and their Gram matrices; one of them turned, with its eigenvectors and
    what LAPACK works in; afterwards the bases, the factors' coordinates in them and what is done
    with those."""
    k, sides, r = shape.total_rank, shape.m + shape.n, shape.rank
    stacks = k * sides * shape.item
    rows = longest(gram_rows(max(shape.m, shape.n)))
    reading = 2 * max(shape.ranks) * max(shape.m, shape.n) * (shape.item + shape.stored_item)
    blocks = 3 * sum(rank * rank for rank in shape.ranks) * DOUBLE
    working = max(4 * k * k * DOUBLE + blocks, lanes * 2 * rows * max(k, r) * DOUBLE)
    iterating = (14 * k + 8 * r) * r * DOUBLE
    finding = stacks + 2 * k * k * DOUBLE + max(reading, working) + iterating
    later = 2 * r * k * shape.item + max(lanes * reading * 2, used)
    # Small blocks of the one stay in the heap while the other takes its own.
    return r * sides * shape.item + finding + later
