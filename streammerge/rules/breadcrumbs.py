"""Model Breadcrumbs (arXiv 2312.06795): drop outliers and small elements, then the sum."""

from __future__ import annotations

import torch

from streammerge.rules.combine import weighted_sum
from streammerge.rules.tile import Tile


def breadcrumbs(tile: Tile) -> torch.Tensor:
    """Return Σ w_i·x_i over the int(density·numel) largest of each x_i but for the outliers.

    These are the int(gamma·numel) largest of all.
    """
    return weighted_sum(tile.middle, tile)
