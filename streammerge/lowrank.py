"""Small dense linear algebra around a truncated SVD: exact cores, balanced pairs, certificates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad

from streammerge.planner.memory import QR_ROWS

ENERGY_TOLERANCE = 1e-4
"""A residual norm this much above the best possible one, relatively, is good enough."""

ZERO_TOLERANCE = 1e-5
"""A residual of this share of the merged matrix is rounding, and good enough whatever its parts."""

ZERO_TOLERANCE_DOUBLE = 1e-12
"""The same in float64."""

NOISE = 8
"""A product below so many roundings of its factors' norms is zero."""

GAP = 1.1
"""From this ratio of σ_R to σ_{R+1} on the best approximation is unique enough to be aimed at."""

PAIR_TOLERANCE = 3e-5
"""With such a gap: error of the truncated matrix itself, relatively, that is good enough."""


SQUARED = 1e-200, 1e200
"""Between these lies ‖M‖² of a float64 matrix whose squares neither overflow nor vanish."""

LEAST_GAP = 1e-4
"""From this share of the largest on the distance of two squared singular values is large enough in
float64 for vectors on both sides of it."""

LEAST_LOST = 1e-6
"""From this share of ‖M‖² on the sum of squares that are lost is exact enough in float64."""


@dataclass(frozen=True)
class Truncation:
    """The leading singular triples of a merged matrix M, and what is known about the rest."""

    u: torch.Tensor
    """m × R, orthonormal columns."""
    s: torch.Tensor
    """R singular values, falling, float64."""
    v: torch.Tensor
    """n × R, orthonormal columns."""
    energy: float
    """‖M‖²_F."""
    lost: float
    """‖M - U·S·Vᵀ‖²_F."""
    missed: float = 0.0
    """Estimate of the energy that the best triples of this number would keep beyond these."""
    passes: int = 0
    """Times that the iteration went over M; 0 for a direct decomposition."""
    converged: bool = True
    directions: tuple[int, ...] = ()
    """Of the bases in which a rule saw coordinates, of columns and perhaps of rows."""
    gap: float | None = None
    """The smallest relative distance of neighbouring singular values of these bases."""
    unsettled: float = 0.0
    """How far the last step went of an iteration for these bases that has used up its steps, as an
    angle; 0 where it has settled, or they are not iterated."""


def residual_excess(missed: float, lost: float) -> float:
    """Return 1 - √(1 - missed/lost): the residual's norm against the best possible one."""
    if lost <= 0.0:
        return 0.0
    return 1.0 - math.sqrt(max(0.0, 1.0 - missed / lost))


def tall_product(tall: torch.Tensor, small: torch.Tensor) -> torch.Tensor:
    """Return tall·small, taken the other way round and turned back: columns lie side by side.

    In float64 MKL takes two to ten times as long for a tall matrix on the left as for a wide one
    on the right; in float32 it is the same.

    Args:
        tall: m × k.
        small: k × r.
    """
    return (small.mT @ tall.mT).mT


def thin_qr(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Q and R of a matrix; a tall one by blocks of rows, whose R's are decomposed again.

    Householder's rounding grows with the length of the columns: 120,000 rows in float32 lose four
    digits. (Tall-skinny QR: Demmel, Grigori, Hoemmen and Langou 2012.)
    """
    blocks = _row_blocks(matrix)
    if len(blocks) == 1:
        q, r = torch.linalg.qr(matrix)
        return q, r
    q = torch.empty_like(matrix, memory_format=torch.contiguous_format)
    parts = torch.split(q, blocks[0].shape[0])
    triangles = []
    for block, part in zip(blocks, parts, strict=True):
        q_block, r_block = torch.linalg.qr(block)
        part[:, : q_block.shape[1]] = q_block
        triangles.append(r_block)
    q_above, r = torch.linalg.qr(torch.cat(triangles).double())
    above = torch.split(q_above.to(matrix.dtype), [len(triangle) for triangle in triangles])
    for part, turn in zip(parts, above, strict=True):
        part.copy_(tall_product(part[:, : len(turn)], turn))
    return q, r.to(matrix.dtype)


def qr_triangle(matrix: torch.Tensor) -> torch.Tensor:
    """Return R, n × n, of an m × n matrix, as `thin_qr` finds it, without Q: half of the work.

    It is found in the matrix's dtype, but for what blocks of rows are put together in, and returned
    in float64.
    """
    blocks = _row_blocks(matrix)
    if len(blocks) > 1:
        matrix = torch.cat([torch.linalg.qr(block, mode="r").R for block in blocks]).double()
    r: torch.Tensor = torch.linalg.qr(matrix, mode="r").R
    return r.double()


def _row_blocks(matrix: torch.Tensor) -> Sequence[torch.Tensor]:
    return torch.split(matrix, max(QR_ROWS, 2 * matrix.shape[1]))


def truncate_product(b: torch.Tensor, a: torch.Tensor, rank: int) -> Truncation:
    """Return the leading `rank` triples of B·A without forming it.

    Thin QR of B and of Aᵀ, and the SVD of the small core R_B·R_Aᵀ between them, in float64: exact
    to rounding, the best approximation of its rank.

    Args:
        b: m × k.
        a: k × n.
        rank: of the result; zero triples fill it up where B·A has a smaller one.
    """
    q_b, r_b = thin_qr(b)
    q_a, r_a = thin_qr(a.mT)
    left, s, right = torch.linalg.svd(r_b.double() @ r_a.double().mT, full_matrices=False)
    kept = min(rank, len(s))
    sides = ((q_b, left), (q_a, right.mT))
    u, v = (tall_product(q, turn[:, :kept].to(q.dtype)) for q, turn in sides)
    triples = _padded(u, s, v, rank)
    lengths = torch.linalg.vector_norm(b, dim=0).double() * torch.linalg.vector_norm(a, dim=1)
    noise = NOISE * torch.finfo(b.dtype).eps * float(lengths.sum())
    if triples.energy <= noise**2 < math.inf:
        # What is left of terms that cancel is rounding, and no part of it is better than another.
        return replace(triples, s=torch.zeros_like(triples.s), energy=0.0, lost=0.0)
    return triples


def truncate_matrix(matrix: torch.Tensor, rank: int) -> Truncation:
    """Return the leading `rank` triples of a matrix with one small side.

    Singular values and right singular vectors V come from MᵀM, or from the triangle of M's QR where
    that is more exact, and M·V is U·S. M·V has rounding of the size of the largest value, which
    would spoil the vectors of small ones: its QR, whose signs are turned to those of M·V, removes
    their part along the earlier ones. (With as many triples as there are values this takes longer
    than Q of the matrix itself would.)

    Args:
        matrix: m × n.
        rank: of the result; zero triples fill it up where the matrix has fewer singular values.

    Raises:
        FloatingPointError: its norm is not finite.
    """
    if matrix.shape[0] < matrix.shape[1]:
        turned = truncate_matrix(matrix.mT, rank)
        return replace(turned, u=turned.v, v=turned.u)
    kept = min(rank, matrix.shape[1])
    s, right = _from_squares(matrix, kept) or _from_triangle(matrix)
    v = right[:, :kept].to(matrix.dtype)
    q, turn = thin_qr(tall_product(matrix, v))
    u = (q * torch.where(turn.diagonal() < 0, -1, 1)).contiguous()
    return _padded(u, s, v, rank)


def _from_triangle(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return singular values and right singular vectors from the triangle of the QR."""
    _, s, right = torch.linalg.svd(qr_triangle(matrix), full_matrices=False)
    return s, right.mT


def _from_squares(matrix: torch.Tensor, kept: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return singular values and right singular vectors from MᵀM, in half of the time.

    MᵀM has the squares of the values, and is exact to float64's rounding of the largest: better
    than a float32 matrix itself. One of float64 would lose digits of what is small, or near to each
    other: there it takes a gap behind the values that are kept, and something that is lost; None
    otherwise.
    """
    squares = _gram(torch.split(matrix, QR_ROWS))
    energy = float(squares.trace())
    if matrix.dtype == torch.float64 and not SQUARED[0] < energy < SQUARED[1]:
        return None
    if not math.isfinite(energy):
        raise FloatingPointError("a merged matrix overflows: its norm is not finite")
    values, vectors = torch.linalg.eigh(squares)
    values = values.flip(0).clamp_min_(0.0)
    if matrix.dtype == torch.float64:
        if float(values[kept:].sum()) < LEAST_LOST * energy:
            return None
        if float(values[kept - 1] - values[kept]) < LEAST_GAP * float(values[0]):
            return None
    return values.sqrt_(), vectors.flip(1)


def _padded(u: torch.Tensor, s: torch.Tensor, v: torch.Tensor, rank: int) -> Truncation:
    """Return `rank` triples: those of u and v, and zero ones; s holds all singular values."""
    kept, squares = u.shape[1], s.square()
    return Truncation(
        u=pad(u, (0, rank - kept)),
        s=pad(s[:kept], (0, rank - kept)),
        v=pad(v, (0, rank - kept)),
        energy=float(squares.sum()),
        lost=float(squares[kept:].sum()),
    )


def smallest_rank(triples: Truncation, lost_share: float) -> tuple[int, bool]:
    """Return the smallest rank, 1 at least, that loses so little, and whether there is one.

    What a rank of k loses is what the triples lose and the squares of their singular values from
    the k+1st on: the numbers that its certificate is made of.

    Args:
        triples: of the largest rank that comes into question; this is returned if none will do.
        lost_share: of ‖M‖²_F, that may be lost. What is lost below `rounding_share` is nothing.
    """
    if triples.energy == 0.0:
        return 1, True
    allowed = max(lost_share, rounding_share(triples.u.dtype) ** 2) * triples.energy
    rank, lost = len(triples.s), triples.lost
    reached = lost <= allowed
    squares = triples.s.square().tolist()
    while rank > 1 and lost + squares[rank - 1] <= allowed:
        lost += squares[rank - 1]
        rank -= 1
    return rank, reached


def rounding_share(dtype: torch.dtype) -> float:
    """Return below which share of ‖M‖_F a residual is the rounding of arithmetic in a dtype."""
    return ZERO_TOLERANCE if dtype == torch.float32 else ZERO_TOLERANCE_DOUBLE


def cut(triples: Truncation, rank: int) -> Truncation:
    """Return the first triples, as views.

    What better ones of this number would keep beyond them is no more than with all of them, so
    that stays as an estimate.
    """
    beyond = float(triples.s[rank:].square().sum())
    return replace(
        triples,
        u=triples.u[:, :rank],
        s=triples.s[:rank],
        v=triples.v[:, :rank],
        lost=triples.lost + beyond,
    )


def balanced_pair(triples: Truncation) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B = U·√S (m × R) and Aᵀ = V·√S (n × R), both of one magnitude; U and V are used up.

    PEFT's U·S and Vᵀ put most of B among float16's subnormals.
    """
    root = triples.s.sqrt().to(triples.u.dtype)
    return triples.u.mul_(root), triples.v.mul_(root)


def clamped_pair(triples: Truncation, quantile: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return B = U·S and Aᵀ = V with all entries clamped to ±limit, and the limit.

    The limit is the quantile of the signed entries of both (PEFT's `svd_clamp`), by linear
    interpolation, and on any size: torch.quantile stops at 2^24 elements. Where it is negative
    nothing is clamped. U and V are used up.
    """
    b, a = triples.u.mul_(triples.s.to(triples.u.dtype)), triples.v
    entries = torch.cat([b.flatten(), a.flatten()])
    place = quantile * (len(entries) - 1)
    below, above = (
        float(entries.kthvalue(k + 1).values) for k in (math.floor(place), math.ceil(place))
    )
    limit = below + (above - below) * (place - math.floor(place))
    if limit < 0:
        return b, a, limit
    return b.clamp_(-limit, limit), a.clamp_(-limit, limit), limit


def rounding_energy(
    pairs: Iterable[tuple[torch.Tensor, torch.Tensor]],
    others: Iterable[tuple[torch.Tensor, torch.Tensor]],
) -> float:
    """Return ‖B'·A' - B·A‖²_F for a product as computed and as written, from small Gram matrices.

    The truncation's residual is orthogonal to it in all but second order, so that the two energies
    add up to that of the written pair.

    Args:
        pairs: rows of B with the same rows of B', range by range.
        others: rows of Aᵀ with the same rows of A'ᵀ, range by range.
    """
    # B'·A' - B·A = (B' - B)·A' + B·(A' - A): factors [B' - B, B] and [A'; A' - A], whose small
    # differences are not lost in the Gram matrices as those of B' and B would be.
    left = _gram((torch.cat([w.to(x.dtype) - x, x], dim=1) for x, w in pairs))
    right = _gram((torch.cat([w.to(x.dtype), w.to(x.dtype) - x], dim=1) for x, w in others))
    return max(0.0, float((left * right).sum()))


def _gram(blocks: Iterable[torch.Tensor]) -> torch.Tensor:
    total: torch.Tensor | None = None
    for block in blocks:
        wide = block.double()
        gram = wide.mT @ wide
        total = gram if total is None else total.add_(gram)
    assert total is not None, "a factor has at least one row"
    return total
