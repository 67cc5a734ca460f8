"""Which elements vary most over N tensors, and how much each tensor counts by them (SCE).

Wan et al. 2024, arXiv 2408.07990. Both are known only when all tiles of all tensors were seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from streammerge.kernels.each import Over, accumulate
from streammerge.kernels.thresholds import Stream, Threshold, find_cut

CHUNK = 1 << 15
"""Elements that are squared in float64 at once."""


@dataclass(frozen=True)
class Selection:
    """What is kept of all tensors alike, and how much each of them counts."""

    cut: Threshold
    """Of the variance over the tensors."""
    shares: tuple[float, ...]
    """Of each tensor the share of its squares in those of all, over what is kept; zeros where all
    that is kept is zero."""


class Selecting(Protocol):
    """Tensors of which only the elements that vary most are kept."""

    def squares(self, panel: range, cut: Threshold) -> torch.Tensor:
        """Return the sum of squares of each tensor's kept elements over the tiles of a panel."""


def find_selection(
    stream: Stream, density: float, count: int, variation: Over, tiles: Over
) -> Selection:
    """Find what is kept and how much each tensor counts.

    The int(density·numel) elements with the largest variance are kept, of equals those with the
    lowest flat index. One tensor alone, which varies from nothing, is kept whole.

    Args:
        stream: the variance.
        density: share of elements kept.
        count: of the tensors.
        variation: the stream's panels.
        tiles: the panels of the tensors, a `Selecting`.

    Raises:
        FloatingPointError: a variance, or a sum of squares, is not finite.
    """
    keep = stream.numel if count == 1 else int(density * stream.numel)
    cut = find_cut(stream, keep, variation, zeros=True)
    sums = accumulate(tiles(square_panel, cut)).tolist()
    total = math.fsum(sums)
    if not math.isfinite(total):
        raise FloatingPointError("tensors overflow: their squares are not finite")
    # Whatever the scale: only where all squares are zero no tensor counts.
    return Selection(cut, tuple(square / total if total else 0.0 for square in sums))


def square_panel(tensors: Selecting, panel: range, cut: Threshold) -> torch.Tensor:
    """Return the sum of squares of each tensor's kept elements over the tiles of a panel."""
    return tensors.squares(panel, cut)


def squared(x: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares of a flat tile, in float64."""
    return accumulate(part.double().square_().sum() for part in torch.split(x, CHUNK))


def variance(
    tensors: Callable[[], Iterator[torch.Tensor]],
    count: int,
    *,
    out: torch.Tensor,
    mean: torch.Tensor,
    part: torch.Tensor,
) -> torch.Tensor:
    """Write the population variance of each element over N tensors into `out`, and return it.

    Args:
        tensors: goes over them, each time it is called.
        count: N.
        out: of their size, as are the others.
        mean: a buffer.
        part: another.
    """
    mean.zero_()
    for x in tensors():
        mean.add_(x)
    mean.div_(count)
    out.zero_()
    for x in tensors():
        out.add_(torch.sub(x, mean, out=part).square_())
    return out.div_(count)
