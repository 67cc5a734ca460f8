"""Small dense linear algebra around a truncated SVD: exact cores, balanced pairs, certificates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

ENERGY_TOLERANCE = 1e-4
"""A residual norm this much above the best possible one, relatively, is good enough."""

ZERO_TOLERANCE = 1e-5
"""A residual of this share of the merged matrix is rounding, and good enough whatever its parts."""

GAP = 1.1
"""From this ratio of σ_R to σ_{R+1} on the best approximation is unique enough to be aimed at."""

PAIR_TOLERANCE = 3e-5
"""With such a gap: error of the truncated matrix itself, relatively, that is good enough."""


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
    missed: float = 0.0
    """Estimate of the energy that the best triples of this number would keep beyond these."""
    passes: int = 0
    """Times that the iteration went over M; 0 for a direct decomposition."""
    converged: bool = True

    @property
    def lost(self) -> float:
        """‖M - U·S·Vᵀ‖²_F."""
        return max(0.0, self.energy - float(self.s.square().sum()))

    @property
    def excess(self) -> float:
        """How far the residual's norm is above the best possible one, relatively; an estimate."""
        return residual_excess(self.missed, self.lost)


def residual_excess(missed: float, lost: float) -> float:
    """Return 1 - √(1 - missed/lost): the residual's norm against the best possible one."""
    if lost <= 0.0:
        return 0.0
    return 1.0 - math.sqrt(max(0.0, 1.0 - missed / lost))


def truncate_product(b: torch.Tensor, a: torch.Tensor, rank: int) -> Truncation:
    """Return the leading `rank` triples of B·A without forming it.

    Thin QR of B and of Aᵀ, and the SVD of the small core R_B·R_Aᵀ between them, in float64: exact
    to rounding, the best approximation of its rank.

    Args:
        b: m × k.
        a: k × n.
        rank: of the result; zero triples fill it up where B·A has a smaller one.
    """
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.mT)
    left, s, right = torch.linalg.svd(r_b.double() @ r_a.double().mT, full_matrices=False)
    energy = float(s.square().sum())
    kept = min(rank, len(s))
    u = q_b @ left[:, :kept].to(b.dtype)
    v = q_a @ right[:kept].mT.to(a.dtype)
    return Truncation(_widen(u, rank), _lengthen(s[:kept], rank), _widen(v, rank), energy)


def truncate_matrix(matrix: torch.Tensor, rank: int) -> Truncation:
    """Return the leading `rank` triples of a matrix with one small side.

    A QR brings it down to the small side; the SVD of what is left is done in float64.
    """
    if matrix.shape[0] < matrix.shape[1]:
        turned = truncate_matrix(matrix.mT, rank)
        return Truncation(turned.v, turned.s, turned.u, turned.energy)
    q, r = torch.linalg.qr(matrix)
    left, s, right = torch.linalg.svd(r.double(), full_matrices=False)
    u = q @ left[:, :rank].to(q.dtype)
    v = right[:rank].mT.to(q.dtype)
    return Truncation(u, s[:rank], v, float(s.square().sum()))


def balanced_pair(triples: Truncation) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B = U·√S (m × R) and A = √S·Vᵀ (R × n): both of one magnitude.

    PEFT's U·S and Vᵀ put most of B among float16's subnormals.
    """
    root = triples.s.sqrt().to(triples.u.dtype)
    return (triples.u * root).contiguous(), (triples.v * root).mT.contiguous()


def clamped_pair(triples: Truncation, quantile: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return B = U·S and A = Vᵀ with all entries clamped to ±limit, and the limit.

    The limit is the quantile of the signed entries of both (PEFT's `svd_clamp`), by linear
    interpolation, and on any size: torch.quantile stops at 2^24 elements.
    """
    b = triples.u * triples.s.to(triples.u.dtype)
    a = triples.v.mT
    entries = torch.cat([b.flatten(), a.flatten()])
    place = quantile * (len(entries) - 1)
    below, above = (
        float(entries.kthvalue(k + 1).values) for k in (math.floor(place), math.ceil(place))
    )
    limit = below + (above - below) * (place - math.floor(place))
    if limit < 0:
        return b, a.contiguous(), limit
    return b.clamp(-limit, limit), a.clamp(-limit, limit).contiguous(), limit


def rounding_energy(
    b: torch.Tensor, a: torch.Tensor, b_written: torch.Tensor, a_written: torch.Tensor
) -> float:
    """Return ‖B'·A' - B·A‖²_F for a pair as computed and as written, from R × R Gram matrices.

    The truncation's residual is orthogonal to it in all but second order, so that the two energies
    add up to that of the written pair.
    """
    left, right = torch.cat([b_written, -b], dim=1), torch.cat([a_written, a], dim=0)
    gram_b = left.double().mT @ left.double()
    gram_a = right.double() @ right.double().mT
    return max(0.0, float((gram_b * gram_a).sum()))


def _widen(x: torch.Tensor, columns: int) -> torch.Tensor:
    missing = columns - x.shape[1]
    return torch.nn.functional.pad(x, (0, missing)) if missing else x


def _lengthen(x: torch.Tensor, length: int) -> torch.Tensor:
    missing = length - len(x)
    return torch.nn.functional.pad(x, (0, missing)) if missing else x
