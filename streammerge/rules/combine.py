"""How N tensors of a tile become one; shared by the rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

Tensors = Callable[[], Iterator[torch.Tensor]]


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
    for x in tensors():
        vote = x.sign() if majority_sign == "frequency" else x
        if score is None:
            score = torch.zeros_like(x)
        score.add_(vote)
    assert score is not None, "a target has at least one source"
    return torch.where(score >= 0, 1.0, -1.0).to(score.dtype)


def disjoint_mean(
    tensors: Tensors, weights: Sequence[float], elected: torch.Tensor
) -> torch.Tensor:
    """Return Σ w_i·x_i over those whose sign was elected, divided by how many they are.

    An exact zero has no sign: it neither counts nor contributes. (PEFT's `disjoint_merge`.)
    """
    total = torch.zeros_like(elected)
    count = torch.zeros_like(elected)
    for x, weight in zip(tensors(), weights, strict=True):
        agrees = x.sign() == elected
        count.add_(agrees)
        total.add_(torch.where(agrees, x, 0.0), alpha=weight)
    return total.div_(count.clamp_(min=1.0))
