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
    """Return some elements of (b_rows·A)·scaling, flat, from rows and columns all over it.

    A few rows, far from each other, meet the same columns, the next few others: so there are
    products of small matrices to take, and hardly any two elements that go up and down together.

    Args:
        b_rows: h × r.
        a: r × n.
        scaling: the adapter's alpha/r.
        count: elements wanted, about; all of them are returned where they are no more.
    """
    rows, columns = len(b_rows), a.shape[1]
    if rows * columns <= count:
        return delta_tile(b_rows, a, scaling, out=b_rows.new_empty(rows, columns)).view(-1)
    least = min(columns, SAMPLED_COLUMNS)
    used = min(rows, max(1, count // least))
    height = min(SAMPLED_ROWS, max(1, used // 16))
    groups = -(-used // height)
    width = min(columns, max(least, count // (height * groups)))
    # Steps without a common divisor come by every row and column, whatever period these have.
    down = coprime_step(round(rows * 0.618), rows)
    step, shift = (coprime_step(round(columns * part), columns) for part in (1 / width, 0.618))
    chosen = torch.arange(height * groups, device=a.device) % used * down % rows
    first, further = (torch.arange(number, device=a.device) for number in (groups, width))
    places = (first[:, None] * shift + further * step) % columns
    left = b_rows[chosen].view(height, groups, -1).transpose(0, 1)
    right = a[:, places.view(-1)].view(-1, groups, width).transpose(0, 1)
    return torch.bmm(left, right).view(-1).mul_(scaling)


SAMPLED_COLUMNS = 8
"""Columns that a row of a sample meets, at least."""

SAMPLED_ROWS = 4
"""Rows that meet the same columns, at most."""
