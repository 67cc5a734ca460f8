"""The truncated SVD of a product of factors from their Gram matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch.nn.functional import pad

from streammerge.kernels.each import Each
from streammerge.lowrank import NOISE, Truncation, tall_product
from streammerge.tiling import gram_blocks, gram_rows


def truncate_by_grams(b: torch.Tensor, a: torch.Tensor, rank: int, each: Each) -> Truncation:
    """Return the leading `rank` triples of B·A without forming it, nor an orthogonal basis.

    With BᵀB = L·Lᵀ and LᵀAAᵀL = Y·Σ²·Yᵀ: V = Aᵀ·L·Y/Σ and U = B·AAᵀ·L·Y/Σ². All of it in float64:
    a Gram matrix squares the condition, which is more than float32 factors can make of it.

    Args:
        b: m × k, float32.
        a: k × n, float32.
        rank: of the result; zero triples fill it up where B·A has a smaller one.
        each: goes over the blocks.
    """
    gram_b, gram_a = (gram(factor, each) for factor in (b, a.mT))
    # A column of B times d and its row of A over d are the same product: both are brought to one
    # length, lest a pair that is short in one factor drowns in the rounding of another's.
    turn_b, turn_a = _balance(gram_b.diagonal(), gram_a.diagonal())
    gram_b *= torch.outer(turn_b, turn_b)
    gram_a *= torch.outer(turn_a, turn_a)
    triangle = _triangle(gram_b)
    squares, y = torch.linalg.eigh(triangle.mT @ gram_a @ triangle)
    squares, y = squares.flip(0), y.flip(1)
    scale = float(gram_b.trace()) * float(gram_a.trace())
    if not math.isfinite(scale + float(squares.sum())):
        raise FloatingPointError("a merged matrix overflows: its norm is not finite")
    # Below this an eigenvalue is rounding.
    squares[squares <= len(squares) * torch.finfo(squares.dtype).eps * scale] = 0.0
    energy = float(squares.sum())
    if energy <= (NOISE * torch.finfo(b.dtype).eps) ** 2 * scale:
        # What is left of terms that cancel is rounding, and no part of it is better than another.
        squares, energy = torch.zeros_like(squares), 0.0
    kept = min(rank, int(torch.count_nonzero(squares)))
    s = squares[:kept].sqrt()
    inner = triangle @ y[:, :kept]
    u = multiply(b, turn_b[:, None] * (gram_a @ inner) / squares[:kept], each)
    v = multiply(a.mT, turn_a[:, None] * inner / s, each)
    return Truncation(
        u=pad(u, (0, rank - kept)),
        s=pad(s, (0, rank - kept)),
        v=pad(v, (0, rank - kept)),
        energy=energy,
        lost=float(squares[kept:].sum()),
    )


def _balance(b: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what B's columns and A's rows, of these squared lengths, are multiplied by.

    The products of the two are 1, or 0 where one of the lengths is.
    """
    there = (b > 0) & (a > 0)
    ratio = torch.where(there, a, 1.0).sqrt() / torch.where(there, b, 1.0).sqrt()
    turn = ratio.sqrt()
    return torch.where(there, turn, 0.0), torch.where(there, 1 / turn, 0.0)


def gram(x: torch.Tensor, each: Each) -> torch.Tensor:
    """Return xᵀ·x of an l × k matrix, in float64, block by block of one half of it."""

    def parts(columns: slice) -> Iterator[torch.Tensor]:
        for start, stop in gram_rows(len(x)):
            yield x[start:stop, columns].double()

    return gram_of_parts(parts, x.new_empty(x.shape[1], x.shape[1], dtype=torch.float64), each)


def gram_of_parts(
    parts: Callable[[slice], Iterator[torch.Tensor]], result: torch.Tensor, each: Each
) -> torch.Tensor:
    """Write xᵀ·x of a matrix that is given in ranges of rows, in float64, and return it.

    Args:
        parts: yields these ranges of some columns of x, one after another.
        result: k × k.
        each: goes over the blocks.
    """
    blocks = gram_blocks(len(result))
    pairs = [(i, j) for i in range(len(blocks)) for j in range(i, len(blocks))]

    def product(pair: tuple[int, int]) -> torch.Tensor:
        left, right = (slice(*blocks[index]) for index in pair)
        total = result.new_zeros(left.stop - left.start, right.stop - right.start)
        if left == right:
            for wide in parts(left):
                total.addmm_(wide.mT, wide)
            return total
        for wide, other in zip(parts(left), parts(right), strict=True):
            total.addmm_(wide.mT, other)
        return total

    for (i, j), part in zip(pairs, each(product, pairs), strict=True):
        result[slice(*blocks[i]), slice(*blocks[j])] = part
        result[slice(*blocks[j]), slice(*blocks[i])] = part.mT
    return result


def multiply(x: torch.Tensor, weights: torch.Tensor, each: Each) -> torch.Tensor:
    """Return x·weights, taken in float64, in x's dtype."""
    result = x.new_empty(len(x), weights.shape[1])

    def rows(span: tuple[int, int]) -> None:
        result[slice(*span)] = tall_product(x[slice(*span)].double(), weights)

    for _ in each(rows, gram_rows(len(x))):
        pass
    return result


def _triangle(matrix: torch.Tensor) -> torch.Tensor:
    """Return L with L·Lᵀ = matrix, which is positive semidefinite; L is lower triangular.

    Where it is singular a multiple of the identity, of the size of its rounding, is added.
    (Fukaya et al. 2020, arXiv 1809.11085.)
    """
    shift = 0.0
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    while True:
        triangle: torch.Tensor
        triangle, failed = torch.linalg.cholesky_ex(matrix + shift * identity)
        if not int(failed):
            return triangle
        shift = max(10 * shift, torch.finfo(matrix.dtype).eps * float(matrix.trace()))
        if not math.isfinite(shift):
            raise FloatingPointError("a merged matrix overflows: its norm is not finite")
        if shift == 0.0:
            return torch.zeros_like(matrix)
