"""Inner products of deltas from their factors: never an m × n matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from streammerge.kernels.each import Each
from streammerge.tiling import gram_blocks, gram_rows

Stacks = tuple[torch.Tensor, torch.Tensor]
"""B's side by side, m × k, and A's one below the other, k × n."""


def inner_products(
    groups: Sequence[range],
    stacks: Callable[[range], Stacks],
    ranks: Sequence[int],
    each: Each,
) -> torch.Tensor:
    """Return ⟨B_i·A_i, B_j·A_j⟩ of all pairs of N products, N × N, in float64.

    tr((B_i·A_i)ᵀ·B_j·A_j) is the sum over all elements of (B_iᵀ·B_j)∘(A_i·A_jᵀ).

    Args:
        groups: sources that are stacked together; each pair of groups meets once.
        stacks: returns a group's factors.
        ranks: of the sources.
        each: goes over blocks.
    """
    count = len(ranks)
    result = torch.zeros(count, count, dtype=torch.float64)
    for number, group in enumerate(groups):
        mine = stacks(group)
        own = [ranks[i] for i in group]
        for other in groups[number:]:
            others = [ranks[i] for i in other]
            theirs = mine if other is group else stacks(other)
            sums = _block_sums(mine, theirs, (own, others), each)
            # Not to be held while the next ones are made.
            del theirs
            result[group.start : group.stop, other.start : other.stop] = sums
            result[other.start : other.stop, group.start : group.stop] = sums.mT
        del mine
    return result


def cross(x: torch.Tensor, y: torch.Tensor, each: Each) -> torch.Tensor:
    """Return xᵀ·y of an l × k and an l × p matrix, in float64, block by block."""
    result = x.new_empty(x.shape[1], y.shape[1], dtype=torch.float64)
    pairs = [
        (slice(*left), slice(*right))
        for left in gram_blocks(x.shape[1])
        for right in gram_blocks(y.shape[1])
    ]

    def product(pair: tuple[slice, slice]) -> None:
        left, right = pair
        total = result[left, right].zero_()
        for start, stop in gram_rows(len(x)):
            total.addmm_(x[start:stop, left].double().mT, y[start:stop, right].double())

    for _ in each(product, pairs):
        pass
    return result


def _block_sums(
    left: Stacks, right: Stacks, ranks: tuple[Sequence[int], Sequence[int]], each: Each
) -> torch.Tensor:
    """Return the inner products of two groups, from the sums of blocks of (BᵀB')∘(AA'ᵀ)."""
    met = cross(left[0], right[0], each).mul_(cross(left[1].mT, right[1].mT, each))
    rows, columns = map(list, ranks)
    by_row = torch.stack([part.sum(0) for part in torch.split(met, rows)])
    sums = [part.sum(1) for part in torch.split(by_row, columns, dim=1)]
    return torch.stack(sums, dim=1).cpu()
