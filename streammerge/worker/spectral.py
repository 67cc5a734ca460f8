"""Spectral rules: a merge from the singular triples of the deltas, never from a delta."""

from __future__ import annotations

import torch

from streammerge.kernels.each import Here
from streammerge.kernels.grams import truncate_by_grams
from streammerge.kernels.krylov import block_krylov
from streammerge.kernels.matrices import FactorSum
from streammerge.kernels.polar import polar
from streammerge.kernels.spectra import Triples, triples
from streammerge.lowrank import Truncation, truncate_product
from streammerge.planner.routes import PROBES
from streammerge.rules import SPECTRAL, Spectrum
from streammerge.rules.spectrum import NULL
from streammerge.worker.sums import stack
from streammerge.worker.work import Work


def merge_spectral(work: Work) -> Truncation:
    """Return the triples of what a spectral rule makes of the target's deltas."""
    everyone = range(len(work.sources))

    def truncate(count: int) -> Truncation:
        return _product(work, stack(work, everyone, "B"), stack(work, everyone, "A"), count)

    spectrum: Spectrum[Truncation] = Spectrum(
        count=len(everyone),
        rank=work.task.rank,
        parameters=work.job.plan.parameters,
        truncate=truncate,
        stacked=lambda most, less: _stacked(work, most, less),
        polar=lambda x: polar(x, work.each),
        product=lambda b, a: _product(work, b, a, work.task.rank),
        whole=lambda u, s, v: _whole(work, u, s, v),
    )
    found: Truncation = SPECTRAL[work.job.plan.rule](spectrum)
    return found


def _product(work: Work, b: torch.Tensor, a: torch.Tensor, rank: int) -> Truncation:
    """Return the leading triples of B·A, as those of a weighted sum are found."""
    if work.task.passes and b.shape[1] > work.task.block:
        start, probes = work.gaussian("krylov", work.task.block), work.gaussian("probes", PROBES)
        held = FactorSum(Here([lambda: (b, a)], 1, work.each), probes)
        found = block_krylov(held, rank, start, work.task.passes, work.each)
    elif b.dtype == torch.float32 and b.shape[1] <= min(work.task.m, work.task.n):
        found = truncate_by_grams(b, a, rank, work.each)
    else:
        found = truncate_product(b, a, rank)
    return found


def _stacked(
    work: Work, most: int | None, less: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return U, s and V of the sources' deltas side by side, each times its weight.

    Args:
        work: the target.
        most: how many triples of each; all whose value is not zero when None.
        less: orthonormal columns, m × c, what lies in which is taken out of each delta first.
    """
    task, sources = work.task, work.sources
    ranks = [reader.matrix_shape[0] for reader in sources.a]
    room = sum(min(rank, task.m, task.n, most or rank) for rank in ranks)
    new = sources.a[0].new_empty
    u, s, v = new((task.m, room)), new((room,)), new((task.n, room))
    filled = 0
    for place in range(len(ranks)):
        found = _triples(work, place, less)
        count = min(most or len(found.s), len(found.s))
        for whole, part in ((u, found.u), (s, found.s), (v, found.v)):
            whole[..., filled : filled + count] = part[..., :count]
        filled += count
    del found
    work.end_phase()
    return u[:, :filled], s[:filled], v[:, :filled]


def _triples(work: Work, place: int, less: torch.Tensor | None) -> Triples:
    """Return the triples of w·Δ of a source, less what lies in some columns."""
    b = work.sources.b[place].whole().double().mul_(work.stack_weights[place])
    a = work.sources.a[place].whole().double()
    found = triples(b, a)
    if less is None or not len(found.s):
        return found
    largest, columns = found.s[0], less.double()
    # Twice, for one pass leaves a part of the size of rounding times what was taken out.
    for _ in range(2):
        b.addmm_(columns, columns.mT @ b, alpha=-1)
    rest = triples(b, a)
    # Where nothing is left but rounding it has no directions.
    there = int(torch.count_nonzero(rest.s > NULL * largest))
    return Triples(rest.u[:, :there], rest.s[:there], rest.v[:, :there])


def _whole(work: Work, u: torch.Tensor, s: torch.Tensor, v: torch.Tensor) -> Truncation:
    """Return triples of which nothing is lost, filled up with zeros to the task's rank."""
    missing = (0, work.task.rank - len(s))
    pad = torch.nn.functional.pad
    values = pad(s.double(), missing)
    return Truncation(
        u=pad(u, missing),
        s=values,
        v=pad(v, missing),
        energy=float(values.square().sum()),
        lost=0.0,
    )
