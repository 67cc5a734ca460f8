"""Runs one task: reads its factors, merges them, writes its two regions, returns a receipt.

A task is idempotent and needs nothing from other tasks, so an executor may run tasks anywhere, in
any order, and again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from streammerge.draw import stream_key
from streammerge.errors import ClampError, OutputOverflowError
from streammerge.kernels.tiles import Operands, keep_resident, merged_tiles
from streammerge.kernels.truncate import block_krylov, dense
from streammerge.lowrank import (
    Truncation,
    balanced_pair,
    clamped_pair,
    residual_excess,
    rounding_energy,
    truncate_product,
)
from streammerge.output.writer import RegionWriter
from streammerge.plans import TILE_ELEMENTS, Task, flat_tiles, row_tiles, split
from streammerge.spaces.delta import delta_tile
from streammerge.spaces.exact import stack_weights
from streammerge.spaces.factor import factor_weights
from streammerge.worker.factors import FactorReader, Sources
from streammerge.worker.job import Job
from streammerge.worker.receipt import Certificate, Receipt

Spans = Sequence[tuple[int, int]]


def run_task(job: Job, task: Task) -> Receipt:
    """Merge one target and write its regions.

    Raises:
        MergeFailedError: a subclass of it says what failed.
    """
    began = time.perf_counter()
    # The number of threads belongs to the calling thread; executors call from their own.
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)
    sources = Sources(job, task)
    with torch.inference_mode(), job.writer(task.a) as a, job.writer(task.b) as b:
        certificate = None
        if task.route == "concatenate":
            _concatenate(job, sources, a, b)
        elif task.route == "fold":
            _fold(job, task, sources, a, b)
        else:
            certificate = _truncate(job, task, sources, a, b)
    return Receipt(
        target=task.target,
        checksums=(a.checksum, b.checksum),
        inputs=sources.checksums(),
        certificate=certificate,
        seconds=time.perf_counter() - began,
    )


def _concatenate(job: Job, sources: Sources, a: RegionWriter, b: RegionWriter) -> None:
    """Write A = vstack(q_i·A_i) and B = hstack(B_i), a tile at a time."""
    for reader, q in zip(sources.a, stack_weights(sources.weights, sources.scalings), strict=True):
        for start, stop in flat_tiles(reader.factor.elements):
            _write(job, a, reader.elements(start, stop).mul_(q))
    total_rank = sum(reader.factor.shape[1] for reader in sources.b)
    m = sources.b[0].factor.shape[0]
    for start, stop in split(m, max(1, TILE_ELEMENTS // total_rank)):
        _write(job, b, torch.cat([reader.rows(start, stop) for reader in sources.b], dim=1))


def _fold(job: Job, task: Task, sources: Sources, a: RegionWriter, b: RegionWriter) -> None:
    """Write the rule's answer on all A's, then on all B's, a tile at a time."""
    weights = factor_weights(sources.weights, sources.scalings)
    sides = (("A", sources.a, a), ("B", sources.b, b))
    for (side, readers, writer), side_weights in zip(sides, weights, strict=True):
        spans = flat_tiles(readers[0].factor.elements)
        tile_at = merged_tiles(
            Operands(
                spans=spans,
                tile=_factor_tile(readers, spans),
                keys=sources.keys(job, task.target, side),
                weights=side_weights,
            ),
            job.options,
        )
        for t in range(len(spans)):
            _write(job, writer, tile_at(t))


def _factor_tile(
    readers: Sequence[FactorReader], spans: Spans
) -> Callable[[int, int], torch.Tensor]:
    return lambda i, t: readers[i].elements(*spans[t])


def _truncate(
    job: Job, task: Task, sources: Sources, a: RegionWriter, b: RegionWriter
) -> Certificate:
    """Write the best pair of the task's rank for the merged matrix, by the planned route."""
    if task.route == "core":
        triples = _truncate_sum(task, sources)
    else:
        triples = _truncate_merged(job, task, sources)
    clamp = job.plan.recipe["clamp"]
    if clamp is None:
        b_pair, a_pair = balanced_pair(triples)
    else:
        b_pair, a_pair, limit = clamped_pair(triples, float(clamp))
        if limit < 0:
            raise ClampError(target=task.target, quantile=float(clamp), limit=limit)
    b_written, a_written = _write(job, b, b_pair), _write(job, a, a_pair)
    best_b, best_a = balanced_pair(triples)
    rounding = rounding_energy(best_b, best_a, b_written.to(job.dtype), a_written.to(job.dtype))
    return _certify(triples, rounding)


def _truncate_sum(task: Task, sources: Sources) -> Truncation:
    """Return the triples of Σ w_i·Δ_i from the stacked factors, without forming it."""
    q = stack_weights(sources.weights, sources.scalings)
    a = torch.cat([reader.whole() for reader in sources.a])
    b = torch.cat(
        [reader.whole().mul_(value) for reader, value in zip(sources.b, q, strict=True)], dim=1
    )
    return truncate_product(b, a, task.rank)


def _truncate_merged(job: Job, task: Task, sources: Sources) -> Truncation:
    """Return the triples of a matrix that a rule makes, tile by tile, from the deltas."""
    rows = row_tiles(task.m, task.n)
    operands = Operands(
        spans=[(start * task.n, stop * task.n) for start, stop in rows],
        tile=_delta_tiles(sources, rows, task.n),
        keys=sources.keys(job, task.target, "delta"),
        weights=sources.weights,
    )
    tile_at = keep_resident(merged_tiles(operands, job.options), task.resident)
    if task.route == "dense":
        return dense(tile_at, rows, task.rank)
    seed = stream_key(int(job.plan.recipe["seed"]), 0, task.target, "krylov")
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(task.n, task.block, generator=generator, dtype=job.dtype)
    return block_krylov(tile_at, rows, task.rank, start, task.passes)


def _delta_tiles(sources: Sources, rows: Spans, n: int) -> Callable[[int, int], torch.Tensor]:
    """Return the function from (i, t) to tile t of delta i; all share one buffer."""
    a = [reader.whole() for reader in sources.a]
    buffer = a[0].new_empty(max(stop - start for start, stop in rows), n)

    def tile(i: int, t: int) -> torch.Tensor:
        start, stop = rows[t]
        out = buffer[: stop - start]
        return delta_tile(sources.b[i].rows(start, stop), a[i], sources.scalings[i], out=out)

    return tile


def _certify(triples: Truncation, rounding: float) -> Certificate:
    lost = triples.lost + rounding
    if triples.energy == 0.0:
        return Certificate(1.0, 0.0, 0.0, True, triples.passes)
    return Certificate(
        kept_energy=max(0.0, 1.0 - lost / triples.energy),
        relative_error=(lost / triples.energy) ** 0.5,
        excess=residual_excess(triples.missed + rounding, lost),
        converged=triples.converged,
        passes=triples.passes,
    )


def _write(job: Job, writer: RegionWriter, values: torch.Tensor) -> torch.Tensor:
    """Cast values to the output's dtype, append them to a region, and return them as written.

    Raises:
        OutputOverflowError: one of them does not fit.
    """
    cast = values.to(job.output_dtype).contiguous()
    if job.output_dtype != values.dtype and not torch.isfinite(cast.sum()):
        wrong = values[~torch.isfinite(cast)]
        if len(wrong):
            raise OutputOverflowError(
                tensor=writer.name, value=float(wrong.abs().max()), dtype=job.plan.dtype
            )
    writer.append(cast.view(torch.uint8).numpy().data)
    return cast
