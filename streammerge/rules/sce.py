"""SCE (arXiv 2408.07990): select what varies, calculate how much each counts, erase minorities."""

from __future__ import annotations

import torch

from streammerge.rules.combine import disjoint_mean, elect
from streammerge.rules.tile import Tile


def sce(tile: Tile) -> torch.Tensor:
    """Return Σ w_i·c_i·x_i / Σ c_i over those that agree, of the elements that vary most.

    c_i is tensor i's share of the sum of the squares of these elements, over whole tensors.
    """
    return disjoint_mean(tile.varied, elect(tile.varied, tile), tile, tile.shares)
