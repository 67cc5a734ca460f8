"""MagPrune's random trimming (DELLA, arXiv 2406.11617), then the weighted sum."""

from __future__ import annotations

import torch

from streammerge.rules.combine import weighted_sum
from streammerge.rules.tile import Tile


def della_linear(tile: Tile) -> torch.Tensor:
    """Return Σ w_i·x_i over random elements of each x_i, each over its own probability."""
    return weighted_sum(tile.ranked, tile)
