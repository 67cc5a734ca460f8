"""By which route a target is merged. Shape, rule and space alone decide, for routes round apart."""

from __future__ import annotations

from dataclasses import dataclass, replace

from streammerge.catalog import RuleSpec, SpaceSpec
from streammerge.plans import Route

OVERSAMPLING = 8
"""Columns of a Krylov block beyond the rank: the more, the fewer passes."""

KRYLOV_PASSES = 14
"""Passes planned at most; flat spectra take 3 to 12, others 3 or 4."""

KRYLOV_ELEMENTS = 3 * 2**23
"""The bases are planned with at most so many elements, as long as that leaves MIN_PASSES."""

KRYLOV_COLUMNS = 1024
"""And with at most so many columns: the SVD of the triangle is done in float64."""

MIN_PASSES = 3
"""Fewer blocks give no certificate worth its name: the residuals need a space to show in."""

DOUBLE = 8
"""Bytes of a float64."""

DENSE_SIDE = 256
"""A merged matrix with a side up to this is decomposed as a whole."""

STACK_ELEMENTS = 2**25
"""Factors with more elements than this are not stacked, but iterated on."""

GRAM_SECONDS = 3e-11
"""Of a multiplication and addition in a Gram matrix, half of which is computed, in float64."""

EIGEN_SECONDS = 3e-10
"""Of a k × k eigenvalue problem, divided by k³."""

SUM_SECONDS = 3.5e-11
"""Of a multiplication and addition in an iteration on factors, with reading them again."""

SUM_PASSES = 10
"""Passes that an iteration on factors takes, about."""

COORDINATES: dict[str, Route] = {
    "core": "both_bases",
    "knots": "left_basis",
    "ctm": "shared_bases",
}
"""Spaces in which a rule sees coordinates in bases of all adapters' factors, and their routes."""

PROBES = 8
"""Gaussian vectors that ride along when factors are iterated on; they estimate what is missed."""


@dataclass(frozen=True)
class Shape:
    """What decides the route of a target, its cost and its memory."""

    m: int
    n: int
    rank: int
    """Of the output."""
    ranks: tuple[int, ...]
    """Of the sources."""
    source_bytes: int
    """Of all source factors, as stored."""
    stored_item: int
    """Bytes of a number in the widest source."""
    item: int
    """Bytes of a number in the compute dtype."""
    out_item: int
    """Bytes of a number in the output."""
    fetched: int = 0
    """Bytes of its sources that are fetched from the Hub and held while the task runs."""
    kept: int = 0
    """Bytes that are held beside the task: 0 but where methods are compared."""
    turned: bool = False
    """Whether a source's factors are stored transposed."""

    @property
    def total_rank(self) -> int:
        """Rows of all A's together."""
        return sum(self.ranks)

    @property
    def small(self) -> int:
        """The shorter side."""
        return min(self.m, self.n)


@dataclass(frozen=True)
class Course:
    """A route and its iteration."""

    route: Route
    block: int = 0
    """Columns of a Krylov block; 0 on direct routes."""
    passes: int = 0
    """Krylov passes planned."""


def choose_course(rule: RuleSpec, space: SpaceSpec, shape: Shape) -> Course:
    """Return how a target is merged.

    A weighted sum goes through the stacked factors while that costs the least: by their Gram
    matrices, which square the condition and so need twice the precision of what they are made of,
    or by QR. With more adapters than that it is iterated on group by group, or, with a short side,
    formed. It is the same in coordinates as of the deltas themselves, for the bases hold all of
    them. What other rules make is formed tile by tile, and iterated on.
    """
    if space.name == "exact":
        return Course("concatenate")
    if space.name == "factor":
        return Course("fold")
    summed = rule.name == "linear" or rule.kind == "coefficient"
    if space.name in COORDINATES and not (summed and space.spans):
        return _in_bases(COORDINATES[space.name], shape)
    if rule.kind == "spectral":
        # What it takes the triples of is made of as many columns as a weighted sum.
        course = _of_deltas(shape, linear=True)
        iterated = course.route == "sum"
        return Course("spectral", *((course.block, course.passes) if iterated else ()))
    return _of_deltas(shape, linear=summed)


def _in_bases(route: Route, shape: Shape) -> Course:
    block, seen = shape.rank + OVERSAMPLING, seen_shape(route, shape)
    passes = _passes(seen, block) if seen.small > whole_side(shape.rank) else 0
    return Course(route, block, passes)


def _of_deltas(shape: Shape, *, linear: bool) -> Course:
    block = shape.rank + OVERSAMPLING
    iterated = Course("krylov", block, _passes(shape, block))
    if linear and shape.total_rank * (shape.m + shape.n) <= STACK_ELEMENTS:
        if shape.item == DOUBLE:
            if shape.total_rank <= max(SUM_PASSES * block, shape.small // 8):
                return Course("core")
        elif gram_seconds(shape) <= sum_seconds(shape, block):
            return Course("gram")
    if shape.small <= whole_side(shape.rank):
        return Course("dense")
    return Course("sum", iterated.block, iterated.passes) if linear else iterated


def seen_shape(route: Route, shape: Shape) -> Shape:
    """Return the shape of what the rule sees: of the target, or of its coordinates.

    There are as many coordinates as the bases have directions; at most that many.
    """
    if route not in COORDINATES.values():
        return shape
    if route == "shared_bases":
        return replace(shape, m=shape.rank, n=shape.rank)
    height = min(shape.m, shape.total_rank)
    width = min(shape.n, shape.total_rank) if route == "both_bases" else shape.n
    return replace(shape, m=height, n=width)


def whole_side(rank: int) -> int:
    """Return up to which side a merged matrix is decomposed as a whole."""
    return max(DENSE_SIDE, 4 * (rank + OVERSAMPLING))


def gram_seconds(shape: Shape) -> float:
    """Return what the route over Gram matrices takes, about."""
    k = shape.total_rank
    return GRAM_SECONDS * (shape.m + shape.n) * k * k + EIGEN_SECONDS * k**3


def sum_seconds(shape: Shape, block: int) -> float:
    """Return what an iteration on factors takes, about."""
    return SUM_SECONDS * SUM_PASSES * 2 * shape.total_rank * (shape.m + shape.n) * block


def _passes(shape: Shape, block: int) -> int:
    affordable = min(KRYLOV_ELEMENTS // (block * (shape.m + shape.n)) - 1, KRYLOV_COLUMNS // block)
    return min(KRYLOV_PASSES, shape.small // block, max(MIN_PASSES, affordable))
