"""Weighted sums of deltas from their factors, never formed: core, gram and sum."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from streammerge.kernels.grams import truncate_by_grams
from streammerge.kernels.krylov import block_krylov
from streammerge.kernels.matrices import FactorSum, Stacks
from streammerge.lowrank import Truncation, truncate_product
from streammerge.planner.routes import PROBES
from streammerge.tiling import factor_groups
from streammerge.worker.work import Work


def merge_core(work: Work) -> Truncation:
    """Return the triples of Σ w_i·Δ_i from the stacked factors, by QR, without forming it."""
    return truncate_product(*_stacks(work), work.task.rank)


def merge_gram(work: Work) -> Truncation:
    """Return the triples of Σ w_i·Δ_i from the stacked factors' Gram matrices."""
    return truncate_by_grams(*_stacks(work), work.task.rank, work.each)


def _stacks(work: Work) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all scaled B's side by side (m × k) and the A's one below the other (k × n)."""
    everyone = range(len(work.sources))
    b, a = work.each(lambda side: stack(work, everyone, side), "BA")
    return b, a


def stack(work: Work, chosen: range, side: str, *, scaled: bool = True) -> torch.Tensor:
    """Return the chosen sources' A's one below the other, or their B's side by side.

    Args:
        work: the target.
        chosen: sources.
        side: "A" or "B".
        scaled: whether each B is multiplied by its q = weight·scaling.
    """
    readers, along = (work.sources.a, 0) if side == "A" else (work.sources.b, 1)
    readers = readers[chosen.start : chosen.stop]
    size = list(readers[0].matrix_shape)
    lengths = [reader.matrix_shape[along] for reader in readers]
    size[along] = sum(lengths)
    stacked = readers[0].new_empty(size)
    weights = work.stack_weights[chosen.start : chosen.stop]
    for reader, weight, part in zip(
        readers, weights, torch.split(stacked, lengths, dim=along), strict=True
    ):
        part.copy_(reader.whole().mul_(weight) if side == "B" and scaled else reader.whole())
    return stacked


def merge_sum(work: Work) -> Truncation:
    """Return the triples of Σ w_i·Δ_i by going over the factors, a group of adapters at a time."""
    task = work.task
    start, probes = work.gaussian("krylov", task.block), work.gaussian("probes", PROBES)
    count = len(source_groups(work))
    part = ("groups", work.coefficients and tuple(work.coefficients))
    total = FactorSum(work.over(part, lambda: stacks_of(work), count), probes)
    return block_krylov(total, task.rank, start, task.passes, work.each)


def source_groups(work: Work) -> list[range]:
    """Return which sources are stacked together."""
    ranks = [reader.matrix_shape[0] for reader in work.sources.a]
    return factor_groups(ranks, work.task.m + work.task.n)


def stacks_of(work: Work) -> list[Stacks]:
    """Return what returns the stacks of each group; as many are held as the task says."""
    ranks = [reader.matrix_shape[0] for reader in work.sources.a]
    free, lock = sum(ranks[: work.task.factors]), threading.Lock()

    def held(rank: int) -> bool:
        nonlocal free
        with lock:
            fits = rank <= free
            free -= rank if fits else 0
        return fits

    return [_Group(work, group, held) for group in source_groups(work)]


class _Group:
    """The stacks of a group, which are held if there is room when they are first asked for."""

    def __init__(self, work: Work, group: range, held: Callable[[int], bool]) -> None:
        self._work = work
        self._group = group
        self._asked = False
        self._held = held
        self._stacks: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._stacks is not None:
            return self._stacks
        stacks = stack(self._work, self._group, "B"), stack(self._work, self._group, "A")
        if not self._asked and self._held(len(stacks[1])):
            self._stacks = stacks
        self._asked = True
        return stacks
