"""Routes that never go over tiles of a delta."""

from __future__ import annotations

from streammerge.catalog import RuleSpec
from streammerge.planner.memory.buffers import (
    QR_ROWS,
    Holding,
    factor_bytes,
    pair_bytes,
    rule_bytes,
)
from streammerge.planner.memory.matrices import core_bytes, gram_bytes, krylov_bytes
from streammerge.planner.routes import DOUBLE, PROBES, Course, Shape
from streammerge.tiling import (
    Pieces,
    factor_groups,
    factor_rows,
    flat_tiles,
    fold_tiles,
    gram_blocks,
    gram_rows,
    inner_groups,
    longest,
)


def joined_tile_bytes(shape: Shape) -> int:
    """Bytes of a tile of B's side by side as it is written, and of the widest part of it."""
    each = shape.item + shape.stored_item + shape.out_item
    rows = longest(factor_rows(shape.m, shape.total_rank))
    return rows * (shape.total_rank * shape.out_item + max(shape.ranks) * each)


def concatenate(shape: Shape, holding: Holding) -> int:
    """A tile of A: stored, converted, cast. Or tiles of B, and of one part of them the same."""
    elements = max(longest(flat_tiles(rank * shape.n)) for rank in shape.ranks)
    flat = elements * (shape.item + shape.stored_item + shape.out_item)
    return max(flat, max(1, holding.tiles) * joined_tile_bytes(shape))


def averaged(shape: Shape) -> int:
    """Tiles of a tensor that is no factor: the first source's, the next one's, their sum; cast."""
    elements = longest(flat_tiles(shape.m * shape.n))
    return elements * (3 * shape.item + shape.stored_item + shape.out_item)


def factor_tiles(rule: RuleSpec, shape: Shape) -> tuple[Pieces, Pieces]:
    """Return the tiles of A and of B in which a rule goes over factors."""
    sides = (shape.rank, shape.n), (shape.m, shape.rank)
    a, b = (fold_tiles(*side, whole_rows=rule.whole_rows) for side in sides)
    return a, b


def fold(rule: RuleSpec, shape: Shape, holding: Holding) -> int:
    """Tiles of A or B: of the sources, stored and converted; the rule's buffers; cast, twice."""
    sides = factor_tiles(rule, shape)
    elements = max(map(longest, sides))
    stored = elements * (shape.stored_item + 2 * shape.out_item)
    return holding.lanes * stored + rule_bytes(
        rule, shape, (max(map(len, sides)), elements), holding
    )


def summed(shape: Shape, course: Course, holding: Holding) -> int:
    """The factors that are kept; for each lane the stacks of a group, one factor as it is read,
    and the stacks' products, to be added up; the bases."""
    sides = shape.m + shape.n
    columns = max(sum(shape.ranks[i] for i in group) for group in factor_groups(shape.ranks, sides))
    reading = max(shape.ranks) * max(shape.m, shape.n) * (shape.item + shape.stored_item)
    products = (columns + max(shape.m, shape.n)) * (course.block + PROBES) * shape.item
    lane = columns * sides * shape.item + reading + products
    probed = 3 * max(shape.m, shape.n) * PROBES * shape.item
    kept = factor_bytes(shape, holding.factors)
    return kept + holding.lanes * lane + probed + krylov_bytes(shape, course, holding.lanes)


def inner(shape: Shape, lanes: int) -> int:
    """The stacks of two groups; two products of theirs, and what they are added up by; rows in
    float64, which stay in the heap while the next factor is read; that factor."""
    sides = shape.m + shape.n
    groups = inner_groups(shape.ranks, sides)
    columns = max(sum(shape.ranks[i] for i in group) for group in groups)
    stacks = min(2, len(groups)) * columns * sides * shape.item
    reading = max(shape.ranks) * max(shape.m, shape.n) * (shape.item + shape.stored_item)
    rows = longest(gram_rows(max(shape.m, shape.n)))
    block = longest(gram_blocks(columns))
    working = reading + lanes * rows * 2 * block * DOUBLE
    count = len(shape.ranks)
    return stacks + 3 * columns * columns * DOUBLE + working + 4 * count * count * DOUBLE


def spectral(shape: Shape, course: Course, lanes: int) -> int:
    """Singular vectors of all sources side by side; one source's as they are found in float64,
    small blocks that stay in the heap; one side made orthonormal, with Gram matrices and what
    LAPACK works in, or what truncates them."""
    k, sides = shape.total_rank, shape.m + shape.n
    stacks = k * sides * shape.item
    largest, longer = max(shape.ranks), max(shape.m, shape.n)
    finding = 6 * largest * sides * DOUBLE + (shape.rank * shape.m * (DOUBLE + shape.item))
    order = max(min(k, side) for side in (shape.m, shape.n))
    rows = longest(gram_rows(longer))
    turning = 6 * order * order * DOUBLE
    turning += lanes * 2 * rows * k * DOUBLE
    if course.passes:
        truncating = krylov_bytes(shape, course, lanes) + 3 * longer * PROBES * shape.item
        truncating += 2 * (k + longer) * (course.block + PROBES) * shape.item
    elif shape.item != DOUBLE and k <= shape.small:
        truncating = gram_bytes(shape, lanes) - stacks
    else:
        # V lies by rows, which LAPACK copies; the triangles of a QR by blocks, and theirs.
        above = -(-longer // QR_ROWS) * min(k, QR_ROWS) * k * (2 * DOUBLE + shape.item)
        truncating = core_bytes(shape) - stacks + k * longer * shape.item + above
    return stacks + finding + max(turning, truncating) + pair_bytes(shape)
