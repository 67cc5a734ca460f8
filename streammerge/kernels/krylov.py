"""The truncated SVD of a merged matrix by block Krylov iteration, with its certificate."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from streammerge.kernels.each import Each
from streammerge.lowrank import (
    ENERGY_TOLERANCE,
    GAP,
    PAIR_TOLERANCE,
    ZERO_TOLERANCE,
    Truncation,
    residual_excess,
    thin_qr,
)
from streammerge.planner.routes import MIN_PASSES


class Matrix(Protocol):
    """A merged matrix M, m × n, as something to multiply with."""

    def images(self, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return M·block and Mᵀ·M·block for an n × b block."""

    def outside(self, space: KrylovSpace) -> float:
        """Return the energy of M that a space does not hold: ‖M - M·V·Vᵀ‖²_F."""

    def distance(self, triples: Truncation) -> float:
        """Return ‖M - U·S·Vᵀ‖²_F without cancellation."""


CANCELLATION = 1e-5
"""A residual energy below this share of ‖M‖² is not trusted as a difference of two float32 sums:
one more pass takes it directly."""


def block_krylov(
    matrix: Matrix, rank: int, start: torch.Tensor, passes: int, each: Each
) -> Truncation:
    """Return the leading `rank` triples of M by block Krylov iteration on MᵀM.

    Each pass takes W = M·V_j and Z = Mᵀ·W. W extends a basis U with M·V = U·T, whose SVD gives
    the singular values (Rayleigh-Ritz); what Z adds to the basis V is the next block V_{j+1}·C,
    and C gives the residuals without another pass. (Golub and Kahan 1965, by blocks, fully
    reorthogonalised; Musco and Musco 2015, arXiv 1504.05477; Tropp and Webber 2023, arXiv
    2306.12418.)

    Args:
        matrix: M.
        rank: triples wanted.
        start: n × block, the Gaussian start.
        passes: blocks at most; later ones are skipped once the certificate holds.
        each: goes over the two bases.

    Raises:
        FloatingPointError: M is not finite.
    """
    space = KrylovSpace(right=Basis([thin_qr(start)[0]]), left=Basis([]))
    for done in range(1, passes + 1):
        coupling = space.grow(matrix, each)
        if done < min(MIN_PASSES, passes):
            continue
        result = _ritz(space, coupling, rank, matrix.outside(space))
        if result.converged:
            break
    if result.lost <= CANCELLATION * result.energy:
        result = replace(result, lost=matrix.distance(result))
    return result


@dataclass
class Basis:
    """Orthonormal columns, in blocks."""

    blocks: list[torch.Tensor]

    def extend(self, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add what `block` has outside the basis, as a new block; `block` is used up.

        Returns:
            The coefficients C and R with block = basis·C + new·R, in float64.
        """
        width = block.shape[1]
        inside = block.new_zeros(len(self.blocks) * width, width, dtype=torch.float64)
        # Twice, for one pass leaves a part of the size of rounding times what was taken out.
        for _ in range(2):
            inside += self._take_out(block)
        outside, triangle = thin_qr(block)
        # Where M's rank is used up the block is rounding, and the QR has made it large: what the
        # basis holds of it is taken out again. These directions carry no weight (R is tiny).
        self._take_out(outside)
        self.blocks.append(thin_qr(outside)[0])
        return inside, self.blocks[-1].mT.double() @ outside.double() @ triangle.double()

    def _take_out(self, block: torch.Tensor) -> torch.Tensor:
        """Subtract from `block`, in place, its part inside the basis; return the coefficients."""
        taken = []
        for known in self.blocks:
            part = known.mT @ block
            block.addmm_(known, part, alpha=-1)
            taken.append(part.double())
        return torch.cat(taken) if taken else block.new_zeros(0, block.shape[1]).double()

    def combine(self, weights: torch.Tensor) -> torch.Tensor:
        """Return basis·weights; weights may have fewer rows than the basis has columns."""
        width = self.blocks[0].shape[1]
        total = self.blocks[0].new_zeros(self.blocks[0].shape[0], weights.shape[1])
        for block, part in zip(self.blocks, torch.split(weights, width), strict=False):
            total.addmm_(block, part.to(block.dtype))
        return total


class KrylovSpace:
    """A Krylov space: bases V and U, and the triangle T with M·V = U·T (float64).

    V is one block ahead: the newest has no image yet.
    """

    def __init__(self, right: Basis, left: Basis) -> None:
        self.right = right
        self.left = left
        self.triangle = right.blocks[0].new_empty(0, 0, dtype=torch.float64)

    @property
    def explored(self) -> list[torch.Tensor]:
        """The blocks of V that have an image."""
        return self.right.blocks[: len(self.left.blocks)]

    def grow(self, matrix: Matrix, each: Each) -> torch.Tensor:
        """Take one more pass; return how V's new block C continues it, Mᵀ·M·V_j = V·… + C·this."""
        images = zip((self.left, self.right), matrix.images(self.right.blocks[-1]), strict=True)
        (inside, diagonal), (_, coupling) = each(lambda pair: pair[0].extend(pair[1]), images)
        below = inside.new_zeros(diagonal.shape[0], self.triangle.shape[1])
        above = torch.cat([self.triangle, inside], dim=1)
        self.triangle = torch.cat([above, torch.cat([below, diagonal], dim=1)])
        return coupling


def _ritz(space: KrylovSpace, coupling: torch.Tensor, rank: int, outside: float) -> Truncation:
    """Return the best triples in the space, with their certificate.

    With T = P·Σ·Cᵀ the Ritz pairs of MᵀM are (σ², V·c), and their residuals lie in the newest
    block: MᵀM·V·c - σ²·V·c = V_{j+1}·coupling·(last block of c).
    """
    p, s, c = torch.linalg.svd(space.triangle)
    norms = (coupling @ c[:rank, -coupling.shape[1] :].mT).square().sum(0)
    theta = s.square()
    energy, lost = outside + float(theta.sum()), outside + float(theta[rank:].sum())
    missed, pair_error = estimate_errors(theta, norms)
    return Truncation(
        u=space.left.combine(p[:, :rank]),
        s=s[:rank],
        v=space.right.combine(c[:rank].mT),
        energy=energy,
        lost=lost,
        missed=missed,
        passes=len(space.left.blocks),
        converged=lost <= ZERO_TOLERANCE**2 * energy
        or is_converged(theta, rank, lost, missed, pair_error),
    )


def estimate_errors(theta: torch.Tensor, norms: torch.Tensor) -> tuple[float, float]:
    """Estimate what a set of Ritz pairs misses.

    Args:
        theta: squared Ritz values, falling, more than there are pairs.
        norms: ‖MᵀM·v_i - θ_i·v_i‖² of the pairs.

    Returns:
        The energy that the best triples would keep beyond these, Σ‖r_i‖²/(θ_i - θ_{R+1}); and the
        norm of the truncated matrix's error, √(Σ 2·θ_i·‖r_i‖²/(θ_i - θ_{R+1})²).
    """
    rank = len(norms)
    kept = theta[:rank]
    following = theta[rank] if len(theta) > rank else theta.new_zeros(())
    gaps = (kept - following).clamp_min(torch.finfo(theta.dtype).tiny)
    counted = norms > 0
    missed = (norms[counted] / gaps[counted]).sum()
    pair = (2 * kept[counted] * norms[counted] / gaps[counted].square()).sum()
    return float(missed), math.sqrt(float(pair))


def is_converged(
    theta: torch.Tensor, rank: int, lost: float, missed: float, pair_error: float
) -> bool:
    """Return whether the certificate holds.

    The residual's norm must be within 1e-4 of the best possible. Where σ_R stands clear of
    σ_{R+1} the best approximation is unique, and the pair itself is brought close to it.
    Args:
        theta: squared Ritz values, falling.
        rank: how many are kept.
        lost: energy of the residual.
        missed: as `estimate_errors` gives it.
        pair_error: as `estimate_errors` gives it.
    """
    if residual_excess(missed, lost) > ENERGY_TOLERANCE:
        return False
    following = float(theta[rank]) if len(theta) > rank else 0.0
    clear = float(theta[rank - 1]) >= GAP**2 * following
    return not clear or pair_error <= PAIR_TOLERANCE * math.sqrt(float(theta[:rank].sum()))
