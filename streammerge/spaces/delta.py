"""Delta space: the rule sees the deltas ΔW = (B·A)·s themselves, a tile of rows at a time."""

from __future__ import annotations

import torch


def delta_tile(
    b_rows: torch.Tensor, a: torch.Tensor, scaling: float, *, out: torch.Tensor
) -> torch.Tensor:
    """Write (b_rows·A)·scaling into `out`, in that order, and return it.

    Args:
        b_rows: h × r, the tile's rows of B, contiguous.
        a: r × n, contiguous.
        scaling: the adapter's alpha/r.
        out: h × n.
    """
    torch.mm(b_rows, a, out=out)
    return out.mul_(scaling)
