"""What a task holds at most: the one formula, in bytes, above what the process has reserved.

Every buffer of a route is a term here, in the order in which the worker makes them.
`docs/memory.md` holds the projections against what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from streammerge.catalog import RuleSpec
from streammerge.planner.routes import DOUBLE, PROBES, Course, Shape, seen_shape, whole_side
from streammerge.tiling import (
    RANKED_ELEMENTS,
    TILE_ELEMENTS,
    Pieces,
    factor_groups,
    factor_rows,
    flat_tiles,
    fold_tiles,
    gram_blocks,
    gram_rows,
    inner_groups,
    longest,
    row_tiles,
)

SLACK_BYTES = 8 * 1024**2
"""Allocator rounding, small tensors of a task, and pages of files at both ends of a window."""

LANE_BYTES = 2 * 1024**2
"""The same for each further lane, and the buffer that its thread reads into."""

CONNECTIONS_BYTES = 8 * 1024**2
"""Threads and buffers of the requests of one task."""

PAGE_BYTES = 4096

QR_ROWS = 1024
"""Rows of a tall matrix that are decomposed at once."""

PINNED_BYTES = 4 * 1024**2
"""Of pinned memory for a piece of a factor on its way to a device."""

PINNED_SLOTS = 2
"""One is filled while the other is on its way."""

COUNTER_BYTES = 2 * 1024**2
"""Sample, histogram and chunk buffers of a threshold's search."""

DIGITS = 2**16
"""Values of a digit that are counted apart."""

COUNT_BYTES = 8
"""Of a count."""

DRAWN = 2**18
"""Elements of a stream of random bits that are drawn at once."""

SIGNED = 2**20
"""Entries of a basis that are looked at together for the signs, unless one vector has more."""

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


@lru_cache(maxsize=1024)  # most targets of a model have one of a few shapes
def project(course: Course, rule: RuleSpec, shape: Shape, holding: Holding) -> int:
    """Return the bytes that a task holds at most."""
    lanes = holding.lanes
    parts = {
        "concatenate": lambda: _concatenate(shape, holding),
        "fold": lambda: _fold(rule, shape, holding),
        "core": lambda: _core(shape),
        "gram": lambda: _gram(shape, lanes),
        "sum": lambda: _sum(shape, course, holding),
        "dense": lambda: _streamed(rule, shape, holding) + _dense(shape),
        # A tile less its approximation, where the residual is too small to be a difference.
        "krylov": lambda: (
            _streamed(rule, shape, holding)
            + _krylov(shape, course, lanes)
            + lanes * tile_bytes(shape)
        ),
        "copy": lambda: 2 * longest(flat_tiles(shape.m * shape.n)) * shape.out_item,
        "mean": lambda: _averaged(shape),
        "bias": lambda: _averaged(shape),
        "left_basis": lambda: _in_bases(rule, shape, course, holding),
        "both_bases": lambda: _in_bases(rule, shape, course, holding),
        "shared_bases": lambda: _in_shared_bases(rule, shape, course, holding),
        "spectral": lambda: _spectral(shape, course, lanes),
    }
    held = parts[course.route]()
    if rule.kind == "coefficient":
        # What inner products take is free again before the sum is begun.
        held = max(held, _inner(shape, lanes))
    picking = lanes * turned_bytes(shape)
    return held + picking + SLACK_BYTES + (lanes - 1) * LANE_BYTES


@lru_cache(maxsize=1024)
def project_census(course: Course, rule: RuleSpec, shape: Shape, lanes: int) -> int:
    """Return the bytes that are held of a target while its elements are counted, without what is
    counted."""
    picking = lanes * turned_bytes(shape)
    parts = {
        "fold": lambda: _counted_factors(rule, shape, lanes),
        "left_basis": lambda: _counted_in_bases(rule, shape, course, lanes),
        "both_bases": lambda: _counted_in_bases(rule, shape, course, lanes),
        "shared_bases": lambda: _counted_in_bases(rule, shape, course, lanes),
    }
    held = parts.get(course.route, lambda: _counted_deltas(rule, shape, lanes))()
    return held + picking + SLACK_BYTES + (lanes - 1) * LANE_BYTES


def tally_bytes(rule: RuleSpec, targets: int) -> int:
    """Return what is counted of an adapter for each target in flight: its own counts, and those
    that they are added to."""
    return rule.cuts * (DIGITS + max(DIGITS, 2 * targets)) * COUNT_BYTES


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
    return incoming + picking + PINNED_SLOTS * PINNED_BYTES + _pair(shape) + SLACK_BYTES


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


def joined_tile_bytes(shape: Shape) -> int:
    """Bytes of a tile of B's side by side as it is written, and of the widest part of it."""
    each = shape.item + shape.stored_item + shape.out_item
    rows = longest(factor_rows(shape.m, shape.total_rank))
    return rows * (shape.total_rank * shape.out_item + max(shape.ranks) * each)


def turned_bytes(shape: Shape) -> int:
    """Bytes that are read at once of a factor that is stored transposed, to pick rows of it."""
    if not shape.turned:
        return 0
    side = max(shape.m, shape.n)
    # As many whole lines as make a tile, one at least.
    elements = min(max(TILE_ELEMENTS, side), max(shape.ranks) * side)
    return elements * shape.stored_item


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
        return _with_shared_bases(shape, lanes, used)
    return _with_bases(shape, course, lanes, used)


def _counting(rule: RuleSpec, elements: int) -> int:
    """A histogram and its chunk buffers for each cut; among equals two masks and the places."""
    return max(rule.cuts * COUNTER_BYTES, elements * (2 + 8))


def _concatenate(shape: Shape, holding: Holding) -> int:
    """A tile of A: stored, converted, cast. Or tiles of B, and of one part of them the same."""
    elements = max(longest(flat_tiles(rank * shape.n)) for rank in shape.ranks)
    flat = elements * (shape.item + shape.stored_item + shape.out_item)
    return max(flat, max(1, holding.tiles) * joined_tile_bytes(shape))


def _averaged(shape: Shape) -> int:
    """Tiles of a tensor that is no factor: the first source's, the next one's, their sum; cast."""
    elements = longest(flat_tiles(shape.m * shape.n))
    return elements * (3 * shape.item + shape.stored_item + shape.out_item)


def _fold(rule: RuleSpec, shape: Shape, holding: Holding) -> int:
    """Tiles of A or B: of the sources, stored and converted; the rule's buffers; cast, twice."""
    sides = factor_tiles(rule, shape)
    elements = max(map(longest, sides))
    stored = elements * (shape.stored_item + 2 * shape.out_item)
    return holding.lanes * stored + _rule(rule, shape, (max(map(len, sides)), elements), holding)


def factor_tiles(rule: RuleSpec, shape: Shape) -> tuple[Pieces, Pieces]:
    """Return the tiles of A and of B in which a rule goes over factors."""
    sides = (shape.rank, shape.n), (shape.m, shape.rank)
    a, b = (fold_tiles(*side, whole_rows=rule.whole_rows) for side in sides)
    return a, b


def _core(shape: Shape) -> int:
    """The stacked factors and Q of the first QR, then those of the second; the triangles, and the
    core with its SVD, a copy of it, and LAPACK's room of four times its size; the pair."""
    k = shape.total_rank
    stack_b, stack_a = shape.m * k * shape.item, shape.n * k * shape.item
    largest = max(shape.ranks)
    reading = largest * max(shape.m, shape.n) * (shape.item + shape.stored_item)
    high, low = min(k, shape.m), min(k, shape.n)
    core = ((high + low) * k + 8 * high * low) * DOUBLE
    return stack_a + stack_b + 2 * max(stack_a, stack_b) + max(reading, core) + _pair(shape)


def _gram(shape: Shape, lanes: int) -> int:
    """The stacked factors; their Gram matrices and what is made of them; rows in float64."""
    k = shape.total_rank
    stacks = (shape.m + shape.n) * k * shape.item
    reading = 2 * max(shape.ranks) * max(shape.m, shape.n) * (shape.item + shape.stored_item)
    rows = longest(gram_rows(max(shape.m, shape.n)))
    return stacks + 9 * k * k * DOUBLE + max(reading, lanes * 2 * rows * k * DOUBLE) + _pair(shape)


def _inner(shape: Shape, lanes: int) -> int:
    """The stacks of two groups, a factor as it is read; two products of theirs, and what they are
    added up by; rows in float64."""
    sides = shape.m + shape.n
    groups = inner_groups(shape.ranks, sides)
    columns = max(sum(shape.ranks[i] for i in group) for group in groups)
    stacks = min(2, len(groups)) * columns * sides * shape.item
    reading = max(shape.ranks) * max(shape.m, shape.n) * (shape.item + shape.stored_item)
    rows = longest(gram_rows(max(shape.m, shape.n)))
    block = longest(gram_blocks(columns))
    working = max(reading, lanes * rows * 2 * block * DOUBLE)
    count = len(shape.ranks)
    return stacks + 3 * columns * columns * DOUBLE + working + 4 * count * count * DOUBLE


def _spectral(shape: Shape, course: Course, lanes: int) -> int:
    """Singular vectors of all sources side by side, one source's as they are found in float64, one
    side made orthonormal, with Gram matrices and what LAPACK works in; or what truncates them."""
    k, sides = shape.total_rank, shape.m + shape.n
    stacks = k * sides * shape.item
    largest, longer = max(shape.ranks), max(shape.m, shape.n)
    finding = 6 * largest * sides * DOUBLE + (shape.rank * shape.m * (DOUBLE + shape.item))
    order = max(min(k, side) for side in (shape.m, shape.n))
    rows = longest(gram_rows(longer))
    turning = 6 * order * order * DOUBLE
    turning += lanes * 2 * rows * k * DOUBLE
    if course.passes:
        truncating = _krylov(shape, course, lanes) + 3 * longer * PROBES * shape.item
        truncating += 2 * (k + longer) * (course.block + PROBES) * shape.item
    elif shape.item != DOUBLE and k <= shape.small:
        truncating = _gram(shape, lanes) - stacks
    else:
        # V lies by rows, which LAPACK copies; the triangles of a QR by blocks, and theirs.
        above = -(-longer // QR_ROWS) * min(k, QR_ROWS) * k * (2 * DOUBLE + shape.item)
        truncating = _core(shape) - stacks + k * longer * shape.item + above
    return stacks + max(finding, turning, truncating) + _pair(shape)


def _in_shared_bases(rule: RuleSpec, shape: Shape, course: Course, holding: Holding) -> int:
    """The bases, and with them what the merged coordinates take; the pair."""
    merging = _coordinates(rule, seen_shape(course.route, shape), course, holding)
    return _with_shared_bases(shape, holding.lanes, merging) + _pair(shape)


def _with_shared_bases(shape: Shape, lanes: int, used: int) -> int:
    """The stacked factors and their Gram matrices; one of them turned, with its eigenvectors and
    what LAPACK works in; afterwards the bases, the factors' coordinates in them and what is done
    with those."""
    k, sides, r = shape.total_rank, shape.m + shape.n, shape.rank
    stacks = k * sides * shape.item
    rows = longest(gram_rows(max(shape.m, shape.n)))
    reading = 2 * max(shape.ranks) * max(shape.m, shape.n) * (shape.item + shape.stored_item)
    blocks = 3 * sum(rank * rank for rank in shape.ranks) * DOUBLE
    working = max(4 * k * k * DOUBLE + blocks, lanes * 2 * rows * max(k, r) * DOUBLE)
    iterating = 8 * k * r * DOUBLE + 2 * len(shape.ranks) * r * r * DOUBLE
    finding = stacks + 2 * k * k * DOUBLE + max(reading, working) + iterating
    later = 2 * r * k * shape.item + max(lanes * reading * 2, used)
    return r * sides * shape.item + max(finding, later)


def _sum(shape: Shape, course: Course, holding: Holding) -> int:
    """The factors that are kept; for each lane the stacks of a group, one factor as it is read,
    and the stacks' products, to be added up; the bases."""
    sides = shape.m + shape.n
    columns = max(sum(shape.ranks[i] for i in group) for group in factor_groups(shape.ranks, sides))
    reading = max(shape.ranks) * max(shape.m, shape.n) * (shape.item + shape.stored_item)
    products = (columns + max(shape.m, shape.n)) * (course.block + PROBES) * shape.item
    lane = columns * sides * shape.item + reading + products
    probed = 3 * max(shape.m, shape.n) * PROBES * shape.item
    kept = factor_bytes(shape, holding.factors)
    return kept + holding.lanes * lane + probed + _krylov(shape, course, holding.lanes)


def _in_bases(rule: RuleSpec, shape: Shape, course: Course, holding: Holding) -> int:
    """The bases, and with them what the merged coordinates take; the pair."""
    merging = _coordinates(rule, seen_shape(course.route, shape), course, holding)
    return _with_bases(shape, course, holding.lanes, merging) + _pair(shape)


def _with_bases(shape: Shape, course: Course, lanes: int, used: int) -> int:
    """The bases; while they are made, what that takes, and later the factors' coordinates in them
    and what is done with those."""
    seen, k = seen_shape(course.route, shape), shape.total_rank
    sides = (shape.m,) if course.route == "left_basis" else (shape.m, shape.n)
    bases = sum(side * min(side, k) for side in sides) * shape.item
    if len(sides) == 1:
        bases += sum(rank * rank for rank in shape.ranks) * DOUBLE  # the L's
    making = max(_basis(shape, side, lanes) for side in sides)
    # A's coordinates are as wide as A in the one route, and read when they are needed.
    coordinates = (seen.m if len(sides) == 1 else seen.m + seen.n) * k * shape.item
    reading = max(shape.ranks) * max(shape.m, shape.n) * (shape.item + shape.stored_item)
    projecting = 2 * max(seen.m, seen.n) * shape.item + max(shape.m, shape.n) * DOUBLE
    reading += max(shape.ranks) * projecting
    later = coordinates + max(lanes * reading, used)
    return bases + max(making, later)


def _basis(shape: Shape, side: int, lanes: int) -> int:
    """The stacked factors; their Gram matrix, its eigenvectors and what LAPACK works in; rows in
    float64 as they are multiplied. Or their QR and the SVD of the triangle."""
    k = shape.total_rank
    order, stack = min(side, k), side * k * shape.item
    largest = max(shape.ranks)
    reading = largest * max(shape.m, shape.n) * (shape.item + shape.stored_item)
    rooting = lanes * (2 * reading + 5 * largest * largest * DOUBLE)
    signs = min(side * order, max(side, SIGNED)) * (2 * shape.item + 2)
    if shape.item == DOUBLE:
        return max(rooting, 4 * stack + 8 * order * order * DOUBLE + max(reading, signs))
    rows = longest(gram_rows(side)) * max(k, order) + longest(gram_rows(k)) * order
    working = max(reading, signs, lanes * 2 * rows * DOUBLE)
    return max(rooting, stack + 5 * order * order * DOUBLE + working)


def _coordinates(rule: RuleSpec, seen: Shape, course: Course, holding: Holding) -> int:
    """The A's that are kept, tiles, and what an iteration takes; or the whole of a matrix that
    turns out to have a short side; the triples before they are brought back."""
    kept = holding.factors and sum(seen.ranks[: holding.factors]) * seen.n * seen.item
    tiles = _streamed(rule, seen, replace(holding, factors=0))
    short = min(seen.small, whole_side(seen.rank))
    whole = replace(seen, m=short, n=max(seen.m, seen.n))
    truncating = _dense(whole)
    if course.passes:
        iterating = _krylov(seen, course, holding.lanes) + holding.lanes * tile_bytes(seen)
        truncating = max(truncating, iterating)
    return kept + tiles + truncating


def _streamed(rule: RuleSpec, shape: Shape, holding: Holding) -> int:
    """What is kept, one more A as it is read, or B, and the buffers of a tile in the making."""
    rows, rank = longest(row_tiles(shape.m, shape.n)), max(shape.ranks)
    incoming = rank * (max(shape.m, shape.n) + rows) * (shape.item + shape.stored_item)
    kept = holding.tiles * tile_bytes(shape) + factor_bytes(shape, holding.factors)
    tiles = len(row_tiles(shape.m, shape.n)), rows * shape.n
    return kept + holding.lanes * incoming + _rule(rule, shape, tiles, holding)


def stack_bytes(shape: Shape, tile_elements: int) -> int:
    """Bytes of the tiles that a stack holds beyond the one that is always there."""
    return (len(shape.ranks) - 1) * tile_elements * shape.item


def _rule(rule: RuleSpec, shape: Shape, tiles: tuple[int, int], holding: Holding) -> int:
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


def _dense(shape: Shape) -> int:
    """The merged matrix, its QR, and the SVD of what is left, in float64."""
    small = shape.small
    return 3 * shape.m * shape.n * shape.item + 8 * small * small * 8 + _pair(shape)


def _krylov(shape: Shape, course: Course, lanes: int) -> int:
    """Both bases, the newest images as they are made and orthogonalised, each lane's share of
    them, and the triangle."""
    columns = course.block * course.passes
    bases = (shape.m * columns + shape.n * (columns + course.block)) * shape.item
    newest = 3 * (shape.m + shape.n) * course.block * shape.item
    shares = (lanes + 1) * max(shape.m, shape.n) * (course.block + PROBES) * shape.item
    return bases + newest + shares + 8 * columns * columns * DOUBLE + _pair(shape)


def _pair(shape: Shape) -> int:
    """U and V, A turned, and some rows of either as they are written and judged."""
    pair = (shape.m + 2 * shape.n) * shape.rank * shape.item
    rows = max(
        longest(factor_rows(side, other)) * other
        for side, other in ((shape.m, shape.rank), (shape.n, shape.rank), (shape.rank, shape.n))
    )
    return pair + rows * (2 * shape.item + shape.out_item + 2 * 8)
