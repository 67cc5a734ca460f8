"""What a task costs in time: arithmetic, and the rates at which things are told apart."""

from __future__ import annotations

from functools import lru_cache

from streammerge.catalog import RuleSpec
from streammerge.planner.memory import tile_bytes
from streammerge.planner.routes import COORDINATES, Course, Shape, seen_shape

GEMM_RATE = 3e10
"""Floating-point operations a second of a matrix product on one core."""

ELEMENT_RATE = 5e8
"""Element-wise operations a second on one core, on tiles that stay in its cache."""

SCRATCH_RATE = 5e8
"""Bytes a second of a scratch disk."""


@lru_cache(maxsize=1024)
def arithmetic(course: Course, rule: RuleSpec, shape: Shape) -> int:
    """Return the floating-point operations of a task, about."""
    if course.route in COORDINATES.values():
        return _bases(course, shape) + _formed(course, rule, seen_shape(course.route, shape))
    if rule.kind == "coefficient":
        return _inner(shape) + _direct(course, rule, shape)
    return _direct(course, rule, shape)


def _inner(shape: Shape) -> int:
    """Return what the inner products of all sources take."""
    return (shape.m + shape.n) * shape.total_rank**2


def _direct(course: Course, rule: RuleSpec, shape: Shape) -> int:
    m, n, k, sources = shape.m, shape.n, shape.total_rank, len(shape.ranks)
    from_factors = {
        "concatenate": k * (m + n),
        "fold": (rule.operations + 2) * k * (m + n),
        "core": 4 * (m + n) * k * k + 20 * min(k, shape.small) ** 3,
        "gram": 2 * (m + n) * k * k + 20 * k**3,
        "sum": course.passes * 4 * k * (m + n) * course.block,
        "spectral": 4 * (m + n) * k * k + 40 * min(k, shape.small) ** 3,
        "copy": m * n,
        "mean": 3 * m * n * sources,
        "bias": 2 * m * n * sources,
    }
    if course.route in from_factors:
        return from_factors[course.route]
    return _formed(course, rule, shape)


COUNTED = 40
"""Operations that counting an element's digit is worth: a scatter, 4 ns."""


@lru_cache(maxsize=1024)
def counting(course: Course, rule: RuleSpec, shape: Shape) -> tuple[int, int]:
    """Return the operations of a pass that counts all elements of a target, about: those of its
    bases, which every group of adapters takes, and those of its elements."""
    if course.route == "fold":
        return 0, rule.cuts * COUNTED * shape.total_rank * (shape.m + shape.n)
    seen = seen_shape(course.route, shape)
    in_bases = course.route in COORDINATES.values()
    made = 2 * seen.m * seen.n * seen.total_rank
    counted = rule.cuts * COUNTED * seen.m * seen.n * len(seen.ranks)
    return _bases(course, shape) if in_bases else 0, made + counted


def _formed(course: Course, rule: RuleSpec, shape: Shape) -> int:
    """Return what a matrix takes that is made tile by tile: finding thresholds, making it once, and
    its truncated SVD."""
    m, n, k, sources = shape.m, shape.n, shape.total_rank, len(shape.ranks)
    made = m * n * (2 * k * rule.sweeps + rule.operations * sources)
    selection = rule.cuts * 2 * m * n * (2 * k + 4 * sources)
    selection += rule.joint_passes * m * n * (4 * k + 10 * sources)
    if not course.passes:
        return made + selection + 4 * m * n * shape.small + 20 * shape.small**3
    return made + selection + course.passes * 4 * m * n * course.block


def _bases(course: Course, shape: Shape) -> int:
    """Return what bases take, the coordinates of factors in them, and bringing a pair back."""
    k = shape.total_rank
    if course.route == "shared_bases":
        return (shape.m + shape.n) * k * (k + 4 * shape.rank) + 20 * k**3 + 200 * k * k * shape.rank
    sides = (shape.m,) if course.route == "left_basis" else (shape.m, shape.n)
    orders = [min(side, k) for side in sides]
    return sum(
        side * k * (2 * order + order) + 2 * side * order * (k + shape.rank) + 20 * order**3
        for side, order in zip(sides, orders, strict=True)
    )


def prefers_scratch(rule: RuleSpec, shape: Shape) -> bool:
    """Return whether a merged tile is read from scratch sooner than it is made again."""
    elements = tile_bytes(shape) / shape.item
    remade = elements * 2 * shape.total_rank * rule.sweeps / GEMM_RATE
    remade += elements * rule.operations * len(shape.ranks) / ELEMENT_RATE
    return remade > tile_bytes(shape) / SCRATCH_RATE
