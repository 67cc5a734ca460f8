"""What a task holds at most: the one formula, in bytes, above what the process has reserved.

Every buffer of a route is a term here. `docs/memory.md` holds the projections against what was
measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from streammerge.catalog import RuleSpec
from streammerge.plans import Route, flat_tiles, row_tiles

HISTOGRAM_BYTES = 65536 * 8
"""One count for each 16-bit digit."""

SLACK_BYTES = 4 * 1024**2
"""Allocator rounding and small tensors of a task."""


@dataclass(frozen=True)
class Shape:
    """What the formula needs to know about a task."""

    m: int
    n: int
    rank: int
    """Of the output."""
    ranks: tuple[int, ...]
    """Of the sources."""
    source_bytes: int
    """Of all source factors, as stored."""
    item: int
    """Bytes of a number in the compute dtype."""
    out_item: int
    """Bytes of a number in the output."""

    @property
    def total_rank(self) -> int:
        """Rows of all A's together."""
        return sum(self.ranks)


def tile_bytes(shape: Shape) -> int:
    """Bytes of the largest tile of the merged matrix."""
    return max(stop - start for start, stop in row_tiles(shape.m, shape.n)) * shape.n * shape.item


def project(
    route: Route,
    rule: RuleSpec,
    shape: Shape,
    *,
    resident: int = 0,
    block: int = 0,
    passes: int = 0,
) -> int:
    """Return the bytes that a task holds at most."""
    if route == "concatenate":
        held = _concatenate(shape)
    elif route == "fold":
        held = _fold(rule, shape)
    elif route == "core":
        held = _core(shape)
    else:
        held = _streamed(rule, shape) + resident * tile_bytes(shape)
        held += _dense(shape) if route == "dense" else _krylov(shape, block * passes)
    return held + SLACK_BYTES


def _concatenate(shape: Shape) -> int:
    """One tile of A, or one tile of B's rows with all its parts: read, scaled, cast."""
    widest = max(
        stop - start
        for side in (shape.total_rank * shape.n, shape.total_rank * shape.m)
        for start, stop in flat_tiles(side)
    )
    rows = max(widest, shape.total_rank * 2)
    return rows * (3 * shape.item + shape.out_item)


def _fold(rule: RuleSpec, shape: Shape) -> int:
    """The rule's buffers for one tile, the histogram of one threshold, the cast tile."""
    elements = max(
        stop - start
        for side in (shape.rank * shape.n, shape.rank * shape.m)
        for start, stop in flat_tiles(side)
    )
    selection = HISTOGRAM_BYTES * 2 if rule.sparsity == "largest" else 0
    return elements * ((rule.tile_buffers + 3) * shape.item + shape.out_item) + selection


def _core(shape: Shape) -> int:
    """The stacked factors, their QR (copy, Q and workspace), the core, and the pair."""
    k = shape.total_rank
    stacked = (shape.m + shape.n) * k * shape.item
    side = min(k, shape.m) * min(k, shape.n) * 8 * 4
    return 3 * stacked + side + _pair(shape)


def _streamed(rule: RuleSpec, shape: Shape) -> int:
    """All A's in the compute dtype, and the buffers of a tile in the making."""
    factors = shape.total_rank * shape.n * shape.item
    selection = 2 * HISTOGRAM_BYTES if rule.sparsity == "largest" else 0
    return factors + (rule.tile_buffers + 4) * tile_bytes(shape) + selection


def _dense(shape: Shape) -> int:
    """The merged matrix in float64, LAPACK's copy and its thin factors."""
    small = min(shape.m, shape.n)
    return (shape.m * shape.n * 3 + small * (shape.m + shape.n)) * 8 + _pair(shape)


def _krylov(shape: Shape, columns: int) -> int:
    """Basis, its images under M and MᵀM, and the QR of the former."""
    basis = (2 * shape.n + 3 * shape.m) * columns * shape.item
    return basis + columns * columns * 8 * 4 + _pair(shape)


def _pair(shape: Shape) -> int:
    """A and B: before balancing, after it, cast, and as the certificate sees them."""
    return (shape.m + shape.n) * shape.rank * (3 * shape.item + shape.out_item + 8)


def largest_resident(tiles: int, room: int, one: int) -> int:
    """Return how many of `tiles` tiles of `one` bytes fit into `room` bytes."""
    return max(0, min(tiles, room // one))


def arithmetic(route: Route, rule: RuleSpec, shape: Shape, block: int, passes: int) -> int:
    """Return the floating-point operations of a task, about."""
    m, n, k = shape.m, shape.n, shape.total_rank
    if route == "concatenate":
        return k * (m + n)
    if route == "fold":
        return (rule.operations + 2) * k * (m + n)
    if route == "core":
        return 4 * (m + n) * k * k + 20 * min(k, m, n) ** 3
    values = m * n * (2 * k + rule.operations * len(shape.ranks))
    selection = 2 * m * n * (2 * k + 4 * len(shape.ranks)) if rule.sparsity == "largest" else 0
    if route == "dense":
        return values + selection + 10 * m * n * min(m, n)
    return values * rule.sweeps + selection + passes * 4 * m * n * block
