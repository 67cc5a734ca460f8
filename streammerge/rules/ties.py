"""TIES (arXiv 2306.01708): trim, elect a sign, mean of those that agree."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from streammerge.rules.combine import disjoint_mean, elect
from streammerge.rules.tile import Tile


def ties(tile: Tile) -> torch.Tensor:
    """Return the disjoint mean of the int(density·numel) largest of each x_i."""

    def trimmed() -> Iterator[torch.Tensor]:
        return (tile.largest(i, x) for i, x in enumerate(tile.tensors()))

    return disjoint_mean(trimmed, tile.weights, elect(trimmed, tile.majority_sign))
