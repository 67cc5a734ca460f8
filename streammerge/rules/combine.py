"""How N tensors of a tile become one; shared by the rules.

All of it is done in the tile's own buffers, for a fresh one costs as much as two operations on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from streammerge.rules.tile import Tensors, Tile


def weighted_sum(tensors: Tensors, tile: Tile) -> torch.Tensor:
    """Return Σ w_i·x_i, added up in order."""
    total = tile.out.zero_()
    for x, weight in zip(tensors(), tile.weights, strict=True):
        total.add_(x, alpha=weight)
    return total


def elect(tensors: Tensors, tile: Tile) -> torch.Tensor:
    """Return +1 or -1 for every element: the sign of Σ x ("total") or Σ sgn(x) ("frequency").

    Weights have no vote, and zero elects +. (TIES, arXiv 2306.01708; PEFT's
    `calculate_majority_sign_mask`.)

    Returns:
        The tile's first spare buffer; the second has been used.
    """
    score = tile.spare(0).zero_()
    for x in tensors():
        if tile.majority_sign == "frequency":
            score.add_(torch.sign(x, out=tile.spare(1)))
        else:
            score.add_(x)
    # A sum that starts at +0 is never -0, so its sign bit is set only below zero.
    return torch.copysign(torch.ones((), dtype=score.dtype, device=score.device), score, out=score)


def disjoint_mean(
    tensors: Tensors, elected: torch.Tensor, tile: Tile, counts: Sequence[float] | None = None
) -> torch.Tensor:
    """Return Σ w_i·c_i·x_i over those whose sign was elected, divided by Σ c_i over the same.

    An exact zero has no sign: it neither counts nor contributes. (PEFT's `disjoint_merge`.)

    Args:
        tensors: the x_i.
        elected: +1 or -1, in the tile's first spare buffer.
        tile: what else there is; the second and third spare buffer are used.
        counts: the c_i, how much each tensor counts; 1 each when None.
    """
    counts = counts or [1.0] * len(tile.weights)
    total, part, count = tile.out.zero_(), tile.spare(1), tile.spare(2).zero_()
    for x, weight, counted in zip(tensors(), tile.weights, counts, strict=True):
        # x·e is |x| where the signs agree and negative where not; signs cost no rounding.
        torch.mul(x, elected, out=part).clamp_(min=0.0)
        total.add_(part, alpha=weight * counted)
        count.add_(part.sign_(), alpha=counted)
    # Where none agrees the sum is zero, and stays so.
    return total.mul_(elected).div_(count.clamp_(min=torch.finfo(count.dtype).tiny))
