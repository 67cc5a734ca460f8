"""The truncated SVD of a merged matrix that exists only as tiles of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from streammerge.lowrank import (
    ENERGY_TOLERANCE,
    GAP,
    PAIR_TOLERANCE,
    ZERO_TOLERANCE,
    Truncation,
    residual_excess,
    truncate_matrix,
)

TileAt = Callable[[int], torch.Tensor]
Spans = Sequence[tuple[int, int]]

MIN_PASSES = 3
"""Fewer blocks give no certificate worth its name: the residuals need a space to show in."""


def dense(tile_at: TileAt, rows: Spans, rank: int) -> Truncation:
    """Return the leading `rank` triples from the matrix as a whole; for one small side."""
    return truncate_matrix(torch.cat([tile_at(t) for t in range(len(rows))]), rank)


def block_krylov(
    tile_at: TileAt, rows: Spans, rank: int, start: torch.Tensor, passes: int
) -> Truncation:
    """Return the leading `rank` triples of M by block Krylov iteration on MᵀM.

    Each pass goes once over the tiles: W_j = M·V_j and Z_j = Mᵀ·W_j, and V_{j+1} is Z_j with all
    earlier blocks taken out. On the basis so far W gives the singular values (Rayleigh-Ritz),
    and Z the residuals of the Ritz pairs without another pass. (Musco and Musco 2015,
    arXiv 1504.05477; Tropp and Webber 2023, arXiv 2306.12418.)

    Args:
        tile_at: M's tiles of rows, h × n.
        rows: each tile's range of rows, in order.
        rank: triples wanted.
        start: n × block, the Gaussian start.
        passes: blocks at most; later ones are skipped once the certificate holds.
    """
    space = _Space.empty(rows[-1][1], start, passes)
    block = torch.linalg.qr(start).Q
    result = None
    for done in range(1, passes + 1):
        energy = space.go_over(tile_at, rows, block, first=done == 1)
        if done >= min(MIN_PASSES, passes):
            result = space.ritz(rank, energy, done)
            if result.converged or done == passes:
                break
        block = space.next_block()
    assert result is not None, "at least one pass is planned"
    return result


@dataclass
class _Space:
    """The Krylov basis V, its image W = M·V, and Z = Mᵀ·W, in the columns used so far."""

    v: torch.Tensor
    w: torch.Tensor
    z: torch.Tensor
    used: int = 0
    block: int = 0
    energy: float = 0.0

    @classmethod
    def empty(cls, m: int, start: torch.Tensor, passes: int) -> _Space:
        n, block = start.shape
        v, z = (start.new_empty(n, block * passes) for _ in range(2))
        return cls(v=v, w=start.new_empty(m, block * passes), z=z, block=block)

    def go_over(self, tile_at: TileAt, rows: Spans, block: torch.Tensor, *, first: bool) -> float:
        """Add a block to the basis, with its images, in one pass; return ‖M‖²."""
        columns = slice(self.used, self.used + self.block)
        image = torch.zeros_like(block)
        for t, (top, bottom) in enumerate(rows):
            tile = tile_at(t)
            part = tile @ block
            image.addmm_(tile.mT, part)
            self.w[top:bottom, columns] = part
            if first:
                self.energy += squared_norm(tile)
        self.v[:, columns], self.z[:, columns] = block, image
        self.used += self.block
        return self.energy

    def next_block(self) -> torch.Tensor:
        """Return the newest image with the basis taken out, orthonormal."""
        basis = self.v[:, : self.used]
        block = self.z[:, self.used - self.block : self.used].clone()
        # Twice before and once after the QR: where M's rank is used up, what is left is rounding,
        # and its directions have to be orthogonal all the same.
        for _ in range(2):
            block -= basis @ (basis.mT @ block)
        block = torch.linalg.qr(block).Q
        block -= basis @ (basis.mT @ block)
        orthonormal: torch.Tensor = torch.linalg.qr(block).Q
        return orthonormal

    def ritz(self, rank: int, energy: float, passes: int) -> Truncation:
        """Return the best triples in the basis, with their certificate."""
        v, w, z = (x[:, : self.used] for x in (self.v, self.w, self.z))
        q, r = torch.linalg.qr(w)
        left, s, right = torch.linalg.svd(r.double(), full_matrices=False)
        theta, weights = s.square(), right[:rank].mT.to(v.dtype)
        vectors = v @ weights
        residual = z @ weights - vectors * theta[:rank].to(v.dtype)
        found = Truncation(
            u=q @ left[:, :rank].to(q.dtype), s=s[:rank], v=vectors, energy=energy, passes=passes
        )
        norms = residual.double().square().sum(0)
        missed, pair_error = estimate_errors(theta, norms)
        return Truncation(
            u=found.u,
            s=found.s,
            v=found.v,
            energy=energy,
            missed=missed,
            passes=passes,
            converged=is_converged(found, missed, pair_error, theta),
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


def is_converged(found: Truncation, missed: float, pair_error: float, theta: torch.Tensor) -> bool:
    """Return whether the certificate holds.

    The residual's norm must be within 1e-4 of the best possible, or be rounding. Where σ_R stands
    clear of σ_{R+1} the best approximation is unique, and the pair itself is brought close to it.
    """
    rank = len(found.s)
    if found.lost <= ZERO_TOLERANCE**2 * found.energy:
        return True
    if residual_excess(missed, found.lost) > ENERGY_TOLERANCE:
        return False
    following = float(theta[rank]) if len(theta) > rank else 0.0
    clear = float(theta[rank - 1]) >= GAP**2 * following
    return not clear or pair_error <= PAIR_TOLERANCE * math.sqrt(float(theta[:rank].sum()))


def squared_norm(tile: torch.Tensor) -> float:
    """Return ‖tile‖²_F, added up in float64."""
    return float(tile.double().square().sum())
