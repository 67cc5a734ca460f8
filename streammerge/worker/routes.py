"""The routes by which a target is merged, each from readers of factors to writers of regions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import cache

import torch

from streammerge.draw import stream_key
from streammerge.errors import ClampError, OutputOverflowError
from streammerge.kernels.each import Each, Pool
from streammerge.kernels.grams import truncate_by_grams
from streammerge.kernels.krylov import block_krylov
from streammerge.kernels.matrices import FactorSum, Stacks, TiledMatrix, dense
from streammerge.kernels.tiles import HeldTiles, MergedTiles, Operands
from streammerge.lowrank import (
    Truncation,
    balanced_pair,
    clamped_pair,
    residual_excess,
    rounding_energy,
    truncate_product,
)
from streammerge.output.scratch import ScratchFile
from streammerge.output.writer import RegionWriter
from streammerge.planner.memory import PROBES
from streammerge.plans import Task, coprime_step, factor_groups, factor_rows, flat_tiles, row_tiles
from streammerge.select import sample_size
from streammerge.spaces.delta import delta_sample, delta_tile
from streammerge.spaces.exact import stack_weights
from streammerge.spaces.factor import factor_weights
from streammerge.worker.factors import FactorReader, TargetSources
from streammerge.worker.job import Job
from streammerge.worker.receipt import Certificate

Spans = Sequence[tuple[int, int]]
Fill = Callable[[int, int, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Work:
    """One target on its way through a route."""

    job: Job
    task: Task
    sources: TargetSources
    device: torch.device
    a: RegionWriter
    b: RegionWriter
    each: Each
    """Goes over parts of the target, several at once where the task has the cores."""

    @property
    def stack_weights(self) -> list[float]:
        """Each source's q = weight·scaling."""
        return stack_weights(self.sources.weights, self.sources.scalings)


def merge_target(work: Work) -> Certificate | None:
    """Merge one target by its planned route and write its pair.

    Returns:
        How good the pair is, where something was truncated.
    """
    route = work.task.route
    if route == "concatenate":
        _concatenate(work)
        return None
    if route == "fold":
        _fold(work)
        return None
    triples = {"core": _core, "gram": _gram, "sum": _sum}.get(route, _stream)(work)
    return _write_pair(work, triples)


def _concatenate(work: Work) -> None:
    """Write A = vstack(q_i·A_i) and B = hstack(B_i), a tile at a time."""
    for reader, q in zip(work.sources.a, work.stack_weights, strict=True):
        for start, stop in flat_tiles(reader.factor.elements):
            _write(work.job, work.a, reader.elements(start, stop).mul_(q))
    readers = work.sources.b
    total_rank = sum(reader.matrix_shape[1] for reader in readers)
    for start, stop in factor_rows(work.task.m, total_rank):
        _write(work.job, work.b, torch.cat([reader.rows(start, stop) for reader in readers], 1))


def _fold(work: Work) -> None:
    """Write the rule's answer on all A's, then on all B's, a tile at a time."""
    job, sources = work.job, work.sources
    weights = factor_weights(sources.weights, sources.scalings)
    sides = (("A", sources.a, work.a), ("B", sources.b, work.b))
    for (side, readers, writer), side_weights in zip(sides, weights, strict=True):
        spans = flat_tiles(readers[0].factor.elements)
        if len(spans) > 1:
            _hash(readers)  # tiles are read in any order
        operands = Operands(
            spans=spans,
            fill=_factor_tiles(readers, spans),
            sample=_factor_samples(readers),
            width=readers[0].matrix_shape[1],
            new_buffer=_new_buffer(readers[0]),
            keys=sources.keys(job, work.task.target, side),
            weights=side_weights,
        )
        merged = MergedTiles(operands, job.options, stacked=work.task.stacked, each=work.each)
        for tile in work.each(_cast_tiles(job, merged, operands, writer), range(len(spans))):
            writer.append(_bytes_of(tile))


def _cast_tiles(
    job: Job, merged: MergedTiles, operands: Operands, writer: RegionWriter
) -> Callable[[int], torch.Tensor]:
    """Return the function from a tile's number to the tile as it is written."""
    buffers = Pool(lambda: operands.new_buffer(operands.largest_tile))

    def tile(t: int) -> torch.Tensor:
        with buffers.lend() as buffer:
            cast = _cast(job, writer, merged(t, buffer))
            # A copy, where the dtype is the same: the buffer is lent to the next tile.
            return cast.clone() if cast.data_ptr() == buffer.data_ptr() else cast

    return tile


def _factor_tiles(readers: Sequence[FactorReader], spans: Spans) -> Fill:
    return lambda i, t, buffer: readers[i].elements(*spans[t], out=buffer)


def _factor_samples(readers: Sequence[FactorReader]) -> Callable[[int], torch.Tensor]:
    """Return the function that returns every so many-th element of factor i."""

    def sample(i: int) -> torch.Tensor:
        factor, width = readers[i].factor, readers[i].matrix_shape[1]
        step = factor.elements // sample_size(factor.elements)
        return readers[i].strided(coprime_step(step, width))

    return sample


def _hash(readers: Sequence[FactorReader]) -> None:
    for reader in readers:
        reader.hash_all()


def _new_buffer(reader: FactorReader) -> Callable[[int], torch.Tensor]:
    return lambda elements: reader.new_empty((elements,))


def _core(work: Work) -> Truncation:
    """Return the triples of Σ w_i·Δ_i from the stacked factors, by QR, without forming it."""
    return truncate_product(*_stacks(work), work.task.rank)


def _gram(work: Work) -> Truncation:
    """Return the triples of Σ w_i·Δ_i from the stacked factors' Gram matrices."""
    return truncate_by_grams(*_stacks(work), work.task.rank, work.each)


def _stacks(work: Work) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all scaled B's side by side (m × k) and the A's one below the other (k × n)."""
    everyone = range(len(work.sources))
    b, a = work.each(lambda side: _stack(work, everyone, side), "BA")
    return b, a


def _stack(work: Work, chosen: range, side: str) -> torch.Tensor:
    """Return the chosen sources' A's one below the other, or their B's, scaled, side by side."""
    readers, along = (work.sources.a, 0) if side == "A" else (work.sources.b, 1)
    readers = readers[chosen.start : chosen.stop]
    size = list(readers[0].matrix_shape)
    lengths = [reader.matrix_shape[along] for reader in readers]
    size[along] = sum(lengths)
    stack = readers[0].new_empty(size)
    for i, part in zip(chosen, torch.split(stack, lengths, dim=along), strict=True):
        factor = readers[i - chosen.start].whole()
        part.copy_(factor.mul_(work.stack_weights[i]) if side == "B" else factor)
    return stack


def _sum(work: Work) -> Truncation:
    """Return the triples of Σ w_i·Δ_i by going over the factors, a group of adapters at a time."""
    task = work.task
    ranks = [reader.matrix_shape[0] for reader in work.sources.a]
    groups = [_group(work, group) for group in factor_groups(ranks, task.m + task.n)]
    start, probes = _gaussian(work, "krylov", task.block), _gaussian(work, "probes", PROBES)
    total = FactorSum(groups, probes, work.each)
    return block_krylov(total, task.rank, start, task.passes, work.each)


def _group(work: Work, group: range) -> Stacks:
    """Return what returns the stacks of a group, which are held if there is room."""

    def stacks() -> tuple[torch.Tensor, torch.Tensor]:
        return _stack(work, group, "B"), _stack(work, group, "A")

    return cache(stacks) if group.stop <= work.task.factors else stacks


def _stream(work: Work) -> Truncation:
    """Return the triples of a matrix that a rule makes, tile by tile, from the deltas."""
    job, task, sources = work.job, work.task, work.sources
    rows = row_tiles(task.m, task.n)
    deltas = _Deltas(work, rows)
    operands = Operands(
        spans=[(start * task.n, stop * task.n) for start, stop in rows],
        fill=deltas.fill,
        sample=deltas.sample,
        width=task.n,
        new_buffer=_new_buffer(sources.a[0]),
        keys=sources.keys(job, task.target, "delta"),
        weights=sources.weights,
    )
    merged = MergedTiles(operands, job.options, stacked=task.stacked, each=work.each)
    if task.route == "dense":
        matrix = sources.a[0].new_empty((task.m, task.n))
        return dense(matrix, merged, rows, task.rank, work.each)
    start = _gaussian(work, "krylov", task.block)
    with closing(SpilledTiles(work)) if task.spilled else nullcontext() as store:
        held = HeldTiles(merged, task.resident, store, task.spilled)
        tiled = TiledMatrix(
            held, rows, lambda: operands.new_buffer(operands.largest_tile), work.each
        )
        return block_krylov(tiled, task.rank, start, task.passes, work.each)


class _Deltas:
    """Tiles and samples of the sources' deltas; the factors of some sources are held."""

    def __init__(self, work: Work, rows: Spans) -> None:
        self._sources = work.sources
        self._rows = rows
        self._n = work.task.n
        a, b = work.sources.a, work.sources.b
        held = work.each(lambda i: (a[i].whole(), b[i].whole()), range(work.task.factors))
        self._held = list(held)
        # Tiles are made in any order, and by several threads.
        _hash(a[work.task.factors :])
        _hash(b[work.task.factors :])

    def fill(self, i: int, t: int, buffer: torch.Tensor) -> torch.Tensor:
        """Put tile t of delta i into a buffer and return it, flat."""
        start, stop = self._rows[t]
        b = self._b_rows(i, start, stop)
        out = buffer[: (stop - start) * self._n]
        shaped = out.view(stop - start, self._n)
        delta_tile(b, self._a(i), self._sources.scalings[i], out=shaped)
        return out

    def sample(self, i: int) -> torch.Tensor:
        """Return elements of delta i, spread over all rows and columns."""
        a, (m, rank) = self._a(i), self._sources.b[i].matrix_shape
        tiles = factor_rows(m, rank)
        count = sample_size(m * self._n) // len(tiles)
        scaling = self._sources.scalings[i]
        return torch.cat(
            [delta_sample(self._b_rows(i, *rows), a, scaling, count) for rows in tiles]
        )

    def _a(self, i: int) -> torch.Tensor:
        return self._held[i][0] if i < len(self._held) else self._sources.a[i].whole()

    def _b_rows(self, i: int, start: int, stop: int) -> torch.Tensor:
        if i < len(self._held):
            return self._held[i][1][start:stop]
        return self._sources.b[i].rows(start, stop)


class SpilledTiles:
    """Tiles of a merged matrix on scratch disk."""

    def __init__(self, work: Work) -> None:
        scratch = work.job.plan.scratch
        assert scratch is not None, "tiles are only spilled where there is a scratch"
        self._file = ScratchFile(scratch)
        self._rows = row_tiles(work.task.m, work.task.n)
        self._n = work.task.n
        self._item = work.job.dtype.itemsize

    def put(self, t: int, tile: torch.Tensor) -> None:
        """Store tile `t`, flat."""
        self._file.write(_bytes_of(tile), self._offset(t))

    def get(self, t: int, out: torch.Tensor) -> torch.Tensor:
        """Read tile `t` as it was stored into the head of a flat buffer and return it."""
        start, stop = self._rows[t]
        tile = out[: (stop - start) * self._n]
        if tile.device.type == "cpu":
            self._file.read(_bytes_of(tile), self._offset(t))
            return tile
        stored = torch.empty(tile.shape, dtype=tile.dtype)
        self._file.read(_bytes_of(stored), self._offset(t))
        return tile.copy_(stored)

    def close(self) -> None:
        """Free the disk."""
        self._file.close()

    def _offset(self, t: int) -> int:
        return self._rows[t][0] * self._n * self._item


def _gaussian(work: Work, purpose: str, columns: int) -> torch.Tensor:
    """Return an n × columns Gaussian matrix, drawn on the CPU so that all devices have the same."""
    job, task = work.job, work.task
    seed = stream_key(int(job.plan.recipe["seed"]), 0, task.target, purpose)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(task.n, columns, generator=generator, dtype=job.dtype).to(work.device)


def _write_pair(work: Work, triples: Truncation) -> Certificate:
    """Write B and A, rows by rows, and judge them as written."""
    clamp = work.job.plan.recipe["clamp"]
    if clamp is None:
        b, a_turned = balanced_pair(triples)
        rounding = _write_factors(work, b, a_turned)
    else:
        best_b, best_a = balanced_pair(replace(triples, u=triples.u.clone(), v=triples.v.clone()))
        b, a_turned, limit = clamped_pair(triples, float(clamp))
        if limit < 0:
            raise ClampError(target=work.task.target, quantile=float(clamp), limit=limit)
        _write_factors(work, b, a_turned)
        rounding = rounding_energy([(best_b, b)], [(best_a, a_turned)])
    return _certify(triples, rounding)


def _write_factors(work: Work, b: torch.Tensor, a_turned: torch.Tensor) -> float:
    """Write B (m × R) and A, given as Aᵀ (n × R); return the energy that the dtype rounds off."""
    rank = b.shape[1]
    for start, stop in factor_rows(len(b), rank):
        _write(work.job, work.b, b[start:stop])
    # A is written by rows, R × n, so it is turned first; B's rows lie as they are written.
    a = a_turned.mT.contiguous()
    for start, stop in factor_rows(rank, a.shape[1]):
        _write(work.job, work.a, a[start:stop])
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
        return Certificate(1.0, 0.0, 0.0, converged=True, passes=triples.passes)
    lost = triples.lost + rounding
    return Certificate(
        kept_energy=max(0.0, 1.0 - lost / triples.energy),
        relative_error=(lost / triples.energy) ** 0.5,
        excess=residual_excess(triples.missed + rounding, lost),
        converged=triples.converged,
        passes=triples.passes,
    )


def _write(job: Job, writer: RegionWriter, values: torch.Tensor) -> None:
    """Cast values to the output's dtype and append them to a region."""
    writer.append(_bytes_of(_cast(job, writer, values)))


def _cast(job: Job, writer: RegionWriter, values: torch.Tensor) -> torch.Tensor:
    """Return values in the output's dtype.

    Raises:
        OutputOverflowError: one of them does not fit.
        FloatingPointError: one of them was not finite before.
    """
    cast = values.to(job.output_dtype).contiguous()
    # A sum is finite only if all its terms are; it may overflow without them, hence the look.
    if not math.isfinite(float(cast.sum())):
        wrong = values[~torch.isfinite(cast)]
        if len(wrong) and not torch.isfinite(wrong).all():
            raise FloatingPointError("a merged value overflows on the way")
        if len(wrong):
            raise OutputOverflowError(
                tensor=writer.name, value=float(wrong.abs().max()), dtype=job.plan.dtype
            )
    return cast


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor, of its copy where it lies on a device."""
    return memoryview(tensor.cpu().view(torch.uint8).numpy().data).cast("B")
