"""DARE's random trimming (arXiv 2311.03099), then the election and mean of TIES (2306.01708)."""

from __future__ import annotations

import torch

from streammerge.rules.combine import disjoint_mean, elect
from streammerge.rules.tile import Tile


def dare_ties(tile: Tile) -> torch.Tensor:
    """Return the disjoint mean of random elements of each x_i, rescaled by 1/density."""
    return disjoint_mean(tile.random, elect(tile.random, tile), tile)
