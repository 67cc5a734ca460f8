"""MagPrune: elements are kept at random, the likelier the larger they are in their row.

Deep et al. 2024, arXiv 2406.11617. Of a row of n elements the one with the j-th smallest magnitude
is kept with the probability p - ε/2 + ε·j/(n - 1), j from 0 to n - 1, and divided by it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from streammerge.draw import Drawer, signed_limit
from streammerge.tiling import ranked_rows

COLUMN_BITS = 32


@dataclass(frozen=True)
class RankOdds:
    """How likely the elements of a row are kept, from the smallest to the largest."""

    probability: torch.Tensor
    limit: torch.Tensor
    """The last of the drawn bits that keep an element."""


def rank_odds(width: int, density: float, epsilon: float, like: torch.Tensor) -> RankOdds:
    """Return the odds of a row.

    Args:
        width: elements of it.
        density: their mean; a row of one element has it.
        epsilon: the largest less the smallest.
        like: of the dtype and on the device of the probabilities.
    """
    steps = np.arange(width) / (width - 1) if width > 1 else np.full(1, 0.5)
    probability = density + epsilon * (steps - 0.5)
    limit = torch.from_numpy(signed_limit(probability)).to(like.device)
    return RankOdds(torch.from_numpy(probability).to(like), limit)


def drop_ranked_(
    x: torch.Tensor, odds: RankOdds, drawer: Drawer, key: int, start: int, *, mask: torch.Tensor
) -> torch.Tensor:
    """Keep random elements of whole rows, divided by their probability; set the others to zero.

    Of equal magnitudes in a row the one further left counts as the smaller.

    Args:
        x: rows, one behind the other, flat; written to.
        odds: of a row.
        drawer: draws the bits.
        key: of the tensor's stream of bits.
        start: flat index of the first element.
        mask: a buffer of the same size.

    Returns:
        `x`.
    """
    width = len(odds.limit)
    rows, masks = x.view(-1, width), mask.view(-1, width)
    for first, last in ranked_rows(len(rows), width):
        part = rows[first:last]
        order = rising(part)
        limits = torch.empty_like(part, dtype=torch.int32)
        limits.scatter_(1, order, odds.limit.expand_as(order))
        drawer.mask_each(key, start + first * width, limits, out=masks[first:last])
        del limits
        probability = torch.empty_like(part)
        probability.scatter_(1, order, odds.probability.expand_as(order))
        part.mul_(masks[first:last]).div_(probability)
    return x


def rising(rows: torch.Tensor) -> torch.Tensor:
    """Return the columns of each row by rising magnitude, those of equals by their place; int64."""
    magnitudes = rows.abs()
    if rows.device.type != "cpu" or rows.dtype != torch.float32:
        return torch.argsort(magnitudes, dim=1, stable=True)
    # The bits of a float that is not negative are ordered as it is; with the column below them
    # they make numbers that all differ, which numpy sorts ten times as fast as torch does floats.
    keys = magnitudes.view(torch.int32).long().bitwise_left_shift_(COLUMN_BITS)
    keys.bitwise_or_(torch.arange(rows.shape[1]))
    keys.numpy().sort(axis=1)
    return keys.bitwise_and_((1 << COLUMN_BITS) - 1)
