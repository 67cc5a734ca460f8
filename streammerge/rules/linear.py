"""Weighted sum (task arithmetic, arXiv 2212.04089)."""

from __future__ import annotations

import torch

from streammerge.rules.combine import weighted_sum
from streammerge.rules.tile import Tile


def linear(tile: Tile) -> torch.Tensor:
    """Return Σ w_i·x_i."""
    return weighted_sum(tile.tensors, tile)
