"""How N tensors of a tile become one; shared by the rules."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from streammerge.rules.tile import Tensors


def weighted_sum(tensors: Tensors, weights: Sequence[float]) -> torch.Tensor:
    """Return Σ w_i·x_i, added up in order."""
    total: torch.Tensor | None = None
    for x, weight in zip(tensors(), weights, strict=True):
        if total is None:
            total = torch.zeros_like(x)
        total.add_(x, alpha=weight)
    assert total is not None, "a target has at least one source"
    return total


def elect(tensors: Tensors, majority_sign: str) -> torch.Tensor:
    """Return +1 or -1 for every element: the sign of Σ x ("total") or Σ sgn(x) ("frequency").

    Weights have no vote, and zero elects +. (TIES, arXiv 2306.01708; PEFT's
    `calculate_majority_sign_mask`.)
    """
    score: torch.Tensor | None = None
    vote: torch.Tensor | None = None
    for x in tensors():
        if score is None:
            score = torch.zeros_like(x)
        if majority_sign == "frequency":
            vote = torch.sign(x, out=vote)
        score.add_(x if vote is None else vote)
    assert score is not None, "a target has at least one source"
    # A sum that starts at +0 is never -0, so its sign bit is set only below zero.
    return torch.copysign(torch.ones((), dtype=score.dtype, device=score.device), score, out=score)


def disjoint_mean(
    tensors: Tensors, weights: Sequence[float], elected: torch.Tensor
) -> torch.Tensor:
    """Return Σ w_i·x_i over those whose sign was elected, divided by how many they are.

    An exact zero has no sign: it neither counts nor contributes. (PEFT's `disjoint_merge`.)
    """
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    part: torch.Tensor | None = None
    for x, weight in zip(tensors(), weights, strict=True):
        # x·e is |x| where the signs agree and negative where not; signs cost no rounding.
        part = torch.mul(x, elected, out=part).clamp_(min=0.0)
        total.add_(part, alpha=weight)
        count.add_(part.sign_())
    return total.mul_(elected).div_(count.clamp_(min=1.0))
