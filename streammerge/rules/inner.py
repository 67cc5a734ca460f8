"""What a coefficient rule sees: how N deltas of a target lie to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

BLUR = 1e-6
"""Lengths and sines below this share are rounding: roots of what inner products in float64 are off,
which is more than 1e-16 where factors nearly cancel in a delta."""


@dataclass(frozen=True)
class Inner:
    """Inner products of N deltas, and their weights.

    A coefficient rule finds numbers c, and Σ c_i·Δ_i is the merge. All that it says of the deltas
    it says by their inner products, so that it never needs a delta.
    """

    products: torch.Tensor
    """⟨Δ_i, Δ_j⟩ = Σ over all elements of Δ_i·Δ_j; N × N, float64."""
    weights: Sequence[float]

    @cached_property
    def norms(self) -> torch.Tensor:
        """‖Δ_i‖_F."""
        return self.products.diagonal().clamp_min(0.0).sqrt()

    @cached_property
    def shares(self) -> torch.Tensor:
        """The weights divided by their sum, which is not zero."""
        weights = torch.tensor(list(self.weights), dtype=torch.float64)
        return weights / weights.sum()

    @cached_property
    def cosines(self) -> torch.Tensor:
        """⟨Δ_i, Δ_j⟩ of the deltas at length 1; one that is zero stays zero."""
        return (self.products * torch.outer(self.inverse_norms, self.inverse_norms)).clamp(-1, 1)

    @cached_property
    def inverse_norms(self) -> torch.Tensor:
        """1/‖Δ_i‖_F; 0 where that is zero."""
        return torch.where(self.norms > 0, 1 / self.norms, 0.0)

    def length(self, coefficients: torch.Tensor) -> float:
        """Return ‖Σ c_i·Δ_i‖_F."""
        return float((coefficients @ self.products @ coefficients).clamp_min(0.0).sqrt())


@dataclass(frozen=True)
class Combination:
    """The weighted sum Σ c_i·Δ_i that a coefficient rule has chosen."""

    coefficients: torch.Tensor
    """What each delta is multiplied by; N, float64."""
    unsettled: float = 0.0
    """How far the last step went of an iteration that has used up its steps, as an angle; 0 where
    it has settled, or nothing is iterated."""
