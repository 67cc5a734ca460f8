"""DELLA (arXiv 2406.11617): MagPrune's random trimming, then the election and mean of TIES."""

from __future__ import annotations

import torch

from streammerge.rules.combine import disjoint_mean, elect
from streammerge.rules.tile import Tile


def della(tile: Tile) -> torch.Tensor:
    """Return the disjoint mean of random elements of each x_i, each over its own probability."""
    return disjoint_mean(tile.ranked, elect(tile.ranked, tile), tile)
