"""TIES (arXiv 2306.01708): trim, elect a sign, mean of those that agree."""

from __future__ import annotations

import torch

from streammerge.rules.combine import disjoint_mean, elect
from streammerge.rules.tile import Tile


def ties(tile: Tile) -> torch.Tensor:
    """Return the disjoint mean of the int(density·numel) largest of each x_i."""
    return disjoint_mean(tile.largest, elect(tile.largest, tile), tile)
