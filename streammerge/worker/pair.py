"""The pair of a truncated matrix: written, and judged as it was written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from streammerge.errors import ClampError
from streammerge.lowrank import (
    Truncation,
    balanced_pair,
    clamped_pair,
    cut,
    residual_excess,
    rounding_energy,
    smallest_rank,
)
from streammerge.tiling import factor_rows
from streammerge.worker.encode import write
from streammerge.worker.receipt import Certificate
from streammerge.worker.work import Work, Writers


def write_pair(work: Work, triples: Truncation, writers: Writers) -> Certificate:
    """Write B and A, rows by rows, and judge them as written."""
    reached = True
    if work.job.policy is not None:
        rank, reached = smallest_rank(triples, work.job.policy.lost_share)
        triples = cut(triples, rank)
        item = work.job.output_dtype.itemsize
        writers.a.shorten(rank * work.task.n * item)
        writers.b.shorten(rank * work.task.m * item)
    clamp = work.job.plan.recipe["clamp"]
    if clamp is None:
        b, a_turned = balanced_pair(triples)
        rounding = _write_factors(work, b, a_turned, writers)
    else:
        best_b, best_a = balanced_pair(replace(triples, u=triples.u.clone(), v=triples.v.clone()))
        b, a_turned, limit = clamped_pair(triples, float(clamp))
        if limit < 0:
            raise ClampError(target=work.task.target, quantile=float(clamp), limit=limit)
        _write_factors(work, b, a_turned, writers)
        rounding = rounding_energy([(best_b, b)], [(best_a, a_turned)])
    return replace(_certify(triples, rounding), reached=reached)


def _write_factors(work: Work, b: torch.Tensor, a_turned: torch.Tensor, writers: Writers) -> float:
    """Write B (m × R) and A, given as Aᵀ (n × R); return the energy that the dtype rounds off."""
    rank = b.shape[1]
    for start, stop in factor_rows(len(b), rank):
        write(work.job, writers.b, b[start:stop])
    # A is written by rows, R × n, so it is turned first; B's rows lie as they are written.
    a = a_turned.mT.contiguous()
    for start, stop in factor_rows(rank, a.shape[1]):
        write(work.job, writers.a, a[start:stop])
    if work.job.output_dtype == work.job.dtype:
        return 0.0
    rows = [_rounded(x, work.job.output_dtype) for x in (b, a_turned)]
    return rounding_energy(*rows)


def _rounded(x: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield ranges of rows, as they are and as they are written."""
    for start, stop in factor_rows(*x.shape):
        yield x[start:stop], x[start:stop].to(dtype)


def _certify(triples: Truncation, rounding: float) -> Certificate:
    if not math.isfinite(triples.energy + rounding):
        raise FloatingPointError("the energy of a merged matrix overflows")
    if triples.energy == 0.0:
        return Certificate(
            1.0,
            0.0,
            0.0,
            converged=True,
            passes=triples.passes,
            rank=len(triples.s),
            directions=triples.directions,
            gap=triples.gap,
        )
    lost = triples.lost + rounding
    return Certificate(
        kept_energy=max(0.0, 1.0 - lost / triples.energy),
        relative_error=(lost / triples.energy) ** 0.5,
        excess=residual_excess(triples.missed + rounding, lost),
        converged=triples.converged,
        passes=triples.passes,
        rank=len(triples.s),
        directions=triples.directions,
        gap=triples.gap,
    )
