"""Singular values and vectors of a product of factors, in float64, without the product.

B = Q_B·R_B and Aᵀ = Q_A·R_A give B·A the singular values of the small core R_B·R_Aᵀ (Golub and
Van Loan, Matrix Computations, 5.4).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from streammerge.lowrank import tall_product
from streammerge.rules.spectrum import count_nonzero


@dataclass(frozen=True)
class Triples:
    """B·A = U·diag(s)·Vᵀ, without the triples that count as zero."""

    u: torch.Tensor
    """m × k, orthonormal columns."""
    s: torch.Tensor
    """k, descending."""
    v: torch.Tensor
    """n × k, orthonormal columns."""


def triples(b: torch.Tensor, a: torch.Tensor) -> Triples:
    """Return the singular triples of B·A.

    Args:
        b: m × r, float64.
        a: r × n, float64.
    """
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.mT)
    u, s, vt = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    kept = count_nonzero(s)
    return Triples(tall_product(q_b, u[:, :kept]), s[:kept], tall_product(q_a, vt[:kept].mT))


def triangle(blocks: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return R of the QR of a tall matrix that comes in blocks of rows; at most r × r.

    Args:
        blocks: float64, all of one width r; only one is held at a time.
    """
    result: torch.Tensor | None = None
    for block in blocks:
        stacked = block if result is None else torch.cat([result, block])
        result = torch.linalg.qr(stacked, mode="r").R
    assert result is not None, "a factor has rows"
    return result


def effective_rank(s: torch.Tensor) -> float:
    """Return exp of the entropy of the shares p = σ²/Σσ²; 0 where all are zero.

    Roy and Vetterli (The effective rank, EUSIPCO 2007) take the shares of σ; of σ², which are the
    shares of ‖Δ‖²_F, it says over how many directions the energy is spread.
    """
    energy = s.square()
    total = float(energy.sum())
    if not total:
        return 0.0
    return math.exp(float(torch.special.entr(energy / total).sum()))


def stable_rank(s: torch.Tensor) -> float:
    """Return ‖Δ‖²_F/‖Δ‖²_2 (Rudelson and Vershynin, J. ACM 54, 2007); 0 where all are zero."""
    energy = s.square()
    largest = float(energy.max())
    return float(energy.sum()) / largest if largest else 0.0
