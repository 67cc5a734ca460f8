"""Consensus merging by TALL masks (arXiv 2405.07813): what enough of them find important stays."""

from __future__ import annotations

import torch

from streammerge.rules.tile import Tile


def consensus(tile: Tile) -> torch.Tensor:
    """Return Σ w_i·x_i, without the elements that matter to fewer than `agree` tensors.

    An element of Σ matters to tensor i where |w_i·x_i| is at least `tall_lambda` times what the
    others add to it, |Σ - w_i·x_i|. Of fewer tensors than `agree` all have to agree.
    """
    weights, total = tile.weights, tile.out.zero_()
    part, others, votes = (tile.spare(k) for k in range(3))
    for x, weight in zip(tile.tensors(), weights, strict=True):
        total.add_(torch.mul(x, weight, out=part))
    votes.zero_()
    for x, weight in zip(tile.tensors(), weights, strict=True):
        torch.mul(x, weight, out=part)
        torch.sub(total, part, out=others).abs_().mul_(tile.parameters["tall_lambda"])
        votes.add_(part.abs_().ge_(others))
    return total.mul_(votes.ge_(min(tile.parameters["agree"], len(weights))))
