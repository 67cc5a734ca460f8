"""DARE (arXiv 2311.03099): drop at random and rescale, then the weighted sum."""

from __future__ import annotations

import torch

from streammerge.rules.combine import weighted_sum
from streammerge.rules.tile import Tile


def dare_linear(tile: Tile) -> torch.Tensor:
    """Return Σ w_i·x_i/density over random elements of each x_i."""
    return weighted_sum(tile.random, tile)
