"""Exact space: a weighted sum of deltas is the product of the factors side by side."""

from __future__ import annotations

from collections.abc import Sequence


def stack_weights(weights: Sequence[float], scalings: Sequence[float]) -> list[float]:
    """Return what each A is multiplied by before they are stacked: q = weight·scaling.

    A = vstack(q_i·A_i), B = hstack(B_i), so that B·A = Σ w_i·Δ_i exactly (PEFT's `cat`).
    """
    return [weight * scaling for weight, scaling in zip(weights, scalings, strict=True)]
