"""How close a pair is to an adapter's delta, from small Gram matrices: never an m × n matrix.

With M = B·A the pair and Δ = s·B_i·A_i the delta, ⟨M, Δ⟩ = s·⟨BᵀB_i, A·A_iᵀ⟩ and ‖M‖², ‖Δ‖²
likewise. P, the projector onto the row space of A_i, is A_iᵀ·(A_i·A_iᵀ)⁺·A_i, so that with
C = A·A_iᵀ and G = BᵀB, ‖M·P‖² = tr(G·C·(A_i·A_iᵀ)⁺·Cᵀ); and Δ·P = Δ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from streammerge.rules.spectrum import NULL

Spans = Sequence[tuple[int, int]]
Rows = Callable[[int, int], torch.Tensor]
"""From a range of rows to these rows, in float64."""


@dataclass(frozen=True)
class Closeness:
    """What a pair is to one delta; all squared Frobenius norms."""

    delta: float
    """‖Δ‖²."""
    distance: float
    """‖M - Δ‖²."""
    on_inputs: float
    """‖(M - Δ)·P‖²: of that, what acts on the directions in which the adapter reads its input."""


@dataclass(frozen=True)
class Grams:
    """Inner products of a pair with one delta's factors, float64."""

    b: torch.Tensor
    """BᵀB, R × R."""
    a: torch.Tensor
    """A·Aᵀ, R × R."""
    cross_b: torch.Tensor
    """BᵀB_i, R × r."""
    cross_a: torch.Tensor
    """A·A_iᵀ, R × r."""
    own_b: torch.Tensor
    """B_iᵀB_i, r × r."""
    own_a: torch.Tensor
    """A_i·A_iᵀ, r × r."""


def energy(b: torch.Tensor, a: torch.Tensor) -> float:
    """Return ‖B·A‖² from BᵀB and A·Aᵀ."""
    return max(0.0, float((b * a).sum()))


def closeness(grams: Grams, scaling: float) -> Closeness:
    """Return what a pair is to a delta whose scaling is that.

    Directions of A_i below 1e-6 of its largest singular value count as none. Raises
    FloatingPointError where a norm is not finite.
    """
    inner = scaling * float((grams.cross_b * grams.cross_a).sum())
    delta = scaling**2 * energy(grams.own_b, grams.own_a)
    values, vectors = torch.linalg.eigh(grams.own_a)
    kept = values > NULL**2 * values[-1:]
    reached = grams.cross_a @ vectors[:, kept] / values[kept].sqrt()
    seen = float((reached * (grams.b @ reached)).sum())
    whole = energy(grams.b, grams.a)
    if not math.isfinite(whole + delta + inner + seen):
        raise FloatingPointError("the norm of a pair is not finite")
    return Closeness(
        delta=delta,
        distance=max(0.0, whole - 2 * inner + delta),
        on_inputs=max(0.0, seen - 2 * inner + delta),
    )


def tall_products(left: Rows, right: Rows, spans: Spans) -> torch.Tensor:
    """Return LᵀR of two matrices of equal height, which come in ranges of rows."""
    total: torch.Tensor | None = None
    for start, stop in spans:
        product = left(start, stop).mT @ right(start, stop)
        total = product if total is None else total.add_(product)
    assert total is not None, "a factor has rows"
    return total


def wide_products(left: Rows, left_spans: Spans, right: Rows, right_spans: Spans) -> torch.Tensor:
    """Return L·Rᵀ of two matrices of equal width, which come in ranges of rows."""
    found = [
        torch.cat([left(*span) @ rows.mT for span in left_spans])
        for rows in (right(*span) for span in right_spans)
    ]
    return torch.cat(found, 1)
