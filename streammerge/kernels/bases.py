"""Orthonormal bases of what many factors span: left singular vectors of matrices side by side.

A basis has one sign and one order, whatever LAPACK or device it comes from: singular values fall,
and the first of a vector's largest entries is positive. Where two of the values are as good as
equal the vectors between them are anybody's; how near they come is told with the basis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from streammerge.kernels.each import Each
from streammerge.kernels.grams import gram, gram_of_parts, multiply
from streammerge.lowrank import tall_product, thin_qr
from streammerge.planner.memory import SIGNED
from streammerge.spaces.bases import ROUNDING
from streammerge.tiling import GRAM_ROWS

ALIKE = 1e-4
"""Entries this near to the largest, relatively, count as equal to it: a sign that hangs on the
rounding of two of them would be no sign."""


@dataclass(frozen=True)
class Basis:
    """Left singular vectors, without those of the value zero."""

    vectors: torch.Tensor
    """s × k, orthonormal columns."""
    gap: float
    """The smallest distance between a singular value and the next one, over the larger of the two;
    1 where there is none to compare."""
    unsettled: float = 0.0
    """How far the last step went of an iteration that has used up its steps, as an angle; 0 where
    it has settled, or nothing is iterated."""


@dataclass(frozen=True)
class Reduced:
    """A basis U and the X's that it was found from, without the columns Q that they share.

    U = Q·turn and X_t = Q·R_t, so that Uᵀ·X_t = turnᵀ·R_t; where nothing is shared turn is U.
    """

    turn: torch.Tensor
    """Orthonormal columns, k of them."""
    factors: torch.Tensor
    """The R's side by side."""
    widths: Sequence[int]
    """Of each."""

    def project(
        self, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], each: Each
    ) -> list[torch.Tensor]:
        """Return function(R_t, turn) of each, k × its width: of neighbours together, for products
        of few columns take longer.

        Args:
            function: goes column by column.
            each: goes over those that are taken together.
        """
        groups = _groups(self.widths)
        counts = [sum(self.widths[t] for t in group) for group in groups]

        def parts(place: int) -> list[torch.Tensor]:
            found = function(torch.split(self.factors, counts, dim=1)[place], self.turn)
            widths = [self.widths[t] for t in groups[place]]
            return [part.contiguous() for part in torch.split(found, widths, dim=1)]

        return [part for found in each(parts, range(len(groups))) for part in found]


Roots = Sequence[torch.Tensor]


def left_basis(
    stack: torch.Tensor, widths: Sequence[int], roots: Roots | None, each: Each
) -> tuple[Basis, Reduced]:
    """Return a basis of [X_1·L_1 … X_N·L_N]: of X itself where there are no L's.

    In float32 from the smaller of the two Gram matrices, in float64, which squares the condition
    and so has the precision of float32 and more; in float64 by QR and the SVD of the triangle.

    Args:
        stack: X = [X_1 … X_N], s × k.
        widths: columns of the X's.
        roots: the L's, square, float64.
        each: goes over blocks.

    Raises:
        FloatingPointError: what they span is not finite.
    """
    make = _by_grams if stack.dtype == torch.float32 else _by_qr
    found = make(stack, widths, roots, each)
    signs = signs_of(found.vectors)
    found.vectors.mul_(signs)
    if found.turn is not found.vectors:
        found.turn.mul_(signs)
    reduced = Reduced(found.turn, found.factors, widths)
    return Basis(found.vectors, smallest_gap(found.values)), reduced


@dataclass(frozen=True)
class _Found:
    """Singular vectors, U, and values; and what `Reduced` is made of."""

    vectors: torch.Tensor
    values: torch.Tensor
    turn: torch.Tensor
    factors: torch.Tensor


def _by_grams(
    stack: torch.Tensor, widths: Sequence[int], roots: Roots | None, each: Each
) -> _Found:
    side, columns = stack.shape
    if columns > side:
        y, values = _eigen(_row_gram(stack, widths, roots, each))
        vectors = y.to(stack.dtype)
        return _Found(vectors, values, vectors, stack)
    squares = gram(stack, each)
    for part, other in zip(_parts(squares, widths, roots), roots or (), strict=True):
        part.copy_(other.mT @ part)
    for part, other in zip(_parts(squares.mT, widths, roots), roots or (), strict=True):
        part.copy_(other.mT @ part)
    y, values = _eigen(squares)
    del squares
    y /= values
    for part, other in zip(_parts(y, widths, roots), roots or (), strict=True):
        part.copy_(other @ part)
    vectors = multiply(stack, y, each)
    return _Found(vectors, values, vectors, stack)


def _parts(
    matrix: torch.Tensor, widths: Sequence[int], roots: Roots | None
) -> Sequence[torch.Tensor]:
    """Return the rows of each source, where there is anything to multiply them with."""
    return torch.split(matrix, list(widths)) if roots else ()


def _row_gram(
    stack: torch.Tensor, widths: Sequence[int], roots: Roots | None, each: Each
) -> torch.Tensor:
    """Return Σ (X_t·L_t)·(X_t·L_t)ᵀ, s × s, in float64."""
    if roots is None:
        return gram(stack.mT, each)
    groups = _groups(widths)

    def parts(rows: slice) -> Iterator[torch.Tensor]:
        blocks = torch.split(stack[rows], list(widths), dim=1)
        for group in groups:
            turned = [roots[t].mT @ blocks[t].mT.double() for t in group]
            yield torch.cat(turned)

    side = len(stack)
    return gram_of_parts(parts, stack.new_empty(side, side, dtype=torch.float64), each)


def _groups(widths: Sequence[int]) -> list[range]:
    """Return neighbouring sources that are taken together: GRAM_ROWS columns, or one source."""
    groups: list[range] = []
    filled = GRAM_ROWS
    for source, width in enumerate(widths):
        if filled + width > GRAM_ROWS:
            groups.append(range(source, source))
            filled = 0
        groups[-1] = range(groups[-1].start, source + 1)
        filled += width
    return groups


def _eigen(squares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return eigenvectors of a Gram matrix and the roots of their values, falling; none of zero."""
    if not math.isfinite(float(squares.trace())):
        raise FloatingPointError("factors overflow: their norm is not finite")
    found, y = torch.linalg.eigh(squares)
    values = found.flip(0).clamp_min_(0.0).sqrt_()
    kept = _count(values, torch.float32)
    return y[:, len(y) - kept :].flip(1), values[:kept]


def _by_qr(stack: torch.Tensor, widths: Sequence[int], roots: Roots | None, each: Each) -> _Found:
    del each
    wide = stack.shape[1] > len(stack)
    q, factors = (None, stack) if wide else thin_qr(stack)
    rooted = factors
    if roots:
        parts = torch.split(factors, list(widths), dim=1)
        rooted = torch.cat([part @ root for part, root in zip(parts, roots, strict=True)], dim=1)
    if wide:
        # X·L = Rᵀ·Qᵀ, and Q is not wanted.
        rooted = torch.linalg.qr(rooted.mT, mode="r").R.mT
    left, values, _ = torch.linalg.svd(rooted)
    if not math.isfinite(float(values.sum())):
        raise FloatingPointError("factors overflow: their norm is not finite")
    kept = _count(values, stack.dtype)
    turn = left[:, :kept]
    vectors = turn if q is None else tall_product(q, turn)
    return _Found(vectors, values[:kept], turn, factors)


def _count(values: torch.Tensor, dtype: torch.dtype) -> int:
    """Return how many of falling singular values are not rounding."""
    largest = float(values[0])
    return int(torch.count_nonzero(values > ROUNDING[dtype] * largest))


def signs_of(vectors: torch.Tensor) -> torch.Tensor:
    """Return what makes the first of the largest entries of each column positive: +1 or -1."""
    # Made before the large blocks: between them small ones would keep the heap from being reused.
    signs = vectors.new_empty(vectors.shape[1])
    count = max(1, SIGNED // len(vectors))
    for part, block in zip(*(torch.split(x, count, dim=-1) for x in (signs, vectors)), strict=True):
        sizes = block.abs()
        first = (sizes >= (1 - ALIKE) * sizes.amax(0)).to(torch.int8).argmax(0)
        torch.sign(block.gather(0, first[None])[0], out=part)
    return signs


def smallest_gap(values: torch.Tensor) -> float:
    """Return the smallest distance of falling values to the next, over the larger; 1 of one."""
    if len(values) < 2:
        return 1.0
    return float(((values[:-1] - values[1:]) / values[:-1]).min())


def square_root(factor: torch.Tensor, scaling: float, each: Each) -> torch.Tensor:
    """Return L, r × r, with L·Lᵀ = scaling²·A·Aᵀ, in float64.

    B·L has the left singular vectors and the singular values of B·A·scaling.

    Args:
        factor: A, r × n.
        scaling: the adapter's.
        each: goes over blocks.
    """
    rank = len(factor)
    if factor.dtype == torch.float64:
        triangle = torch.linalg.qr(factor.mT, mode="r").R
        return pad(triangle.mT, (0, rank - len(triangle))) * scaling
    squares = gram(factor.mT, each)
    if not math.isfinite(float(squares.trace())):
        raise FloatingPointError("factors overflow: their norm is not finite")
    vectors: torch.Tensor
    values, vectors = torch.linalg.eigh(squares)
    vectors *= values.clamp_min_(0.0).sqrt_() * scaling
    return vectors
