"""What the ways to the leading triples of a matrix take."""

from __future__ import annotations

from streammerge.planner.memory.buffers import pair_bytes
from streammerge.planner.routes import DOUBLE, PROBES, Course, Shape
from streammerge.tiling import gram_rows, longest


def core_bytes(shape: Shape) -> int:
    """The stacked factors and Q of the first QR, then those of the second; the triangles, and the
    core with its SVD, a copy of it, and LAPACK's room of four times its size; the pair."""
    k = shape.total_rank
    stack_b, stack_a = shape.m * k * shape.item, shape.n * k * shape.item
    largest = max(shape.ranks)
    reading = largest * max(shape.m, shape.n) * (shape.item + shape.stored_item)
    high, low = min(k, shape.m), min(k, shape.n)
    core = ((high + low) * k + 8 * high * low) * DOUBLE
    return stack_a + stack_b + 2 * max(stack_a, stack_b) + max(reading, core) + pair_bytes(shape)


def gram_bytes(shape: Shape, lanes: int) -> int:
    """The stacked factors, and what reading them leaves of the heap; their Gram matrices and what
    is made of them; rows in float64."""
    k = shape.total_rank
    stacks = (shape.m + shape.n) * k * shape.item
    reading = 2 * max(shape.ranks) * max(shape.m, shape.n) * (shape.item + shape.stored_item)
    rows = longest(gram_rows(max(shape.m, shape.n)))
    return stacks + reading + 9 * k * k * DOUBLE + lanes * 2 * rows * k * DOUBLE + pair_bytes(shape)


def dense_bytes(shape: Shape) -> int:
    """The merged matrix, what its QR is made in, and the SVD of the triangle, in float64."""
    small = shape.small
    return 3 * shape.m * shape.n * shape.item + 8 * small * small * 8 + pair_bytes(shape)


def krylov_bytes(shape: Shape, course: Course, lanes: int) -> int:
    """Both bases, the newest images as they are made and orthogonalised, each lane's share of
    them, and the triangle."""
    columns = course.block * course.passes
    bases = (shape.m * columns + shape.n * (columns + course.block)) * shape.item
    newest = 3 * (shape.m + shape.n) * course.block * shape.item
    shares = (lanes + 1) * max(shape.m, shape.n) * (course.block + PROBES) * shape.item
    return bases + newest + shares + 8 * columns * columns * DOUBLE + pair_bytes(shape)
