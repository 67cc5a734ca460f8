"""Keep the largest, then the weighted sum (PEFT)."""

from __future__ import annotations

import torch

from streammerge.rules.combine import weighted_sum
from streammerge.rules.tile import Tile


def magnitude_prune(tile: Tile) -> torch.Tensor:
    """Return Σ w_i·x_i over the int(density·numel) largest of each x_i, not rescaled."""
    return weighted_sum(tile.largest, tile)
