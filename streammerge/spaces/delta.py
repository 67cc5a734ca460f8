"""Delta space: the rule sees the deltas ΔW = (B·A)·s themselves, a tile of rows at a time."""

from __future__ import annotations

import torch

from streammerge.tiling import coprime_step


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


def delta_sample(b_rows: torch.Tensor, a: torch.Tensor, scaling: float, count: int) -> torch.Tensor:
    """Return some elements of (b_rows·A)·scaling, flat: all rows and columns in turn.

    Args:
        b_rows: h × r.
        a: r × n.
        scaling: the adapter's alpha/r.
        count: elements wanted; all of them are returned where they are no more.
    """
    rows, columns = len(b_rows), a.shape[1]
    if rows * columns <= count:
        return delta_tile(b_rows, a, scaling, out=b_rows.new_empty(rows, columns)).view(-1)
    # Each row meets another column every time it comes round.
    step, shift = (coprime_step(round(columns * share), columns) for share in (0.618, 0.755))
    parts = []
    for places in torch.split(torch.arange(count, device=a.device), SAMPLE_PART):
        column = (places * step + places // rows * shift) % columns
        products = b_rows[places % rows].mT.mul_(a[:, column])
        parts.append(products.sum(0).mul_(scaling))
    return torch.cat(parts)


SAMPLE_PART = 1 << 13
"""Elements of a sample that are taken at once."""
