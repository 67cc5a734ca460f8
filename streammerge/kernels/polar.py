"""The orthonormal columns that are nearest to those of a matrix."""

from __future__ import annotations

import math

import torch

from streammerge.kernels.each import Each
from streammerge.kernels.grams import gram
from streammerge.rules.spectrum import NULL
from streammerge.tiling import gram_rows


def polar(x: torch.Tensor, each: Each) -> torch.Tensor:
    """Return P·Qᵀ for x = P·S·Qᵀ, without the triples whose value is rounding.

    The solution of the orthogonal Procrustes problem (Schönemann 1966), from the smaller of the
    two Gram matrices in float64: x·(xᵀ·x)^(-1/2), or (x·xᵀ)^(-1/2)·x.

    Args:
        x: l × k; it is overwritten, and what is returned lies in its place.
        each: goes over blocks.

    Raises:
        FloatingPointError: it is not finite.
    """
    rows, columns = x.shape
    if not columns:
        return x
    if columns > rows:
        return polar(x.mT, each).mT
    squares = gram(x, each)
    if not math.isfinite(float(squares.trace())):
        raise FloatingPointError("factors overflow: their norm is not finite")
    values, vectors = torch.linalg.eigh(squares)
    del squares
    roots = values.clamp_min_(0.0).sqrt_()
    kept = vectors[:, roots > NULL * roots[-1]]
    inverse = (kept / roots[roots > NULL * roots[-1]]) @ kept.mT
    del vectors, kept

    def turn(span: tuple[int, int]) -> None:
        part = x[slice(*span)]
        part.copy_(part.double() @ inverse)

    for _ in each(turn, gram_rows(rows)):
        pass
    return x
