"""The routes by which a target is merged, each from readers of factors to writers of regions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from streammerge.kernels.each import Each, Here, Over, Pool
from streammerge.kernels.tiles import MergedTiles, Operands
from streammerge.registry import RULES
from streammerge.spaces.factor import factor_weights
from streammerge.tiling import factor_rows, flat_tiles, fold_tiles, longest, sample_step
from streammerge.worker.coefficients import with_coefficients
from streammerge.worker.coordinates import (
    merge_in_both_bases,
    merge_in_left_basis,
    merge_in_shared_bases,
)
from streammerge.worker.deltas import merge_deltas
from streammerge.worker.encode import bytes_of, cast_tile, write
from streammerge.worker.factors import FactorReader
from streammerge.worker.pair import write_pair
from streammerge.worker.receipt import Certificate
from streammerge.worker.spectral import merge_spectral
from streammerge.worker.sums import merge_core, merge_gram, merge_sum
from streammerge.worker.work import Work, Writers

Spans = Sequence[tuple[int, int]]
Fill = Callable[[int, int, torch.Tensor], torch.Tensor]

TRUNCATING = {
    "core": merge_core,
    "gram": merge_gram,
    "sum": merge_sum,
    "dense": merge_deltas,
    "krylov": merge_deltas,
    "left_basis": merge_in_left_basis,
    "both_bases": merge_in_both_bases,
    "shared_bases": merge_in_shared_bases,
    "spectral": merge_spectral,
}


def merge_target(work: Work, writers: Writers) -> tuple[Certificate | None, float]:
    """Merge one target by its planned route and write its pair.

    Returns:
        How good the pair is, where something was truncated; and how far the last step went of an
        iteration for bases or coefficients that has used up its steps, 0 where there was none.
    """
    route = work.task.route
    if RULES[work.job.plan.rule].kind == "coefficient":
        work = with_coefficients(work)
    if route in TRUNCATING:
        triples = TRUNCATING[route](work)
        unsettled = max(work.unsettled, triples.unsettled)
        return write_pair(work, triples, writers), unsettled
    {"concatenate": _concatenate, "fold": _fold}[route](work, writers)
    return None, work.unsettled


def _concatenate(work: Work, writers: Writers) -> None:
    """Write A = vstack(q_i·A_i) and B = hstack(B_i), a tile or a few at a time."""
    for reader, q in zip(work.sources.a, work.stack_weights, strict=True):
        for start, stop in flat_tiles(reader.factor.elements):
            write(work.job, writers.a, reader.elements(start, stop).mul_(q))
    readers = work.sources.b
    ranks = [reader.matrix_shape[1] for reader in readers]
    blocks = _joined(factor_rows(work.task.m, sum(ranks)), max(1, work.task.resident))
    height = longest(blocks)
    # Cast before they are joined, for the fewer bytes are in hand, and always in the same memory.
    joined = torch.empty(height * sum(ranks), dtype=work.job.output_dtype, device=work.device)
    buffer = readers[0].new_buffer(height * max(ranks))
    for start, stop in blocks:
        block = joined[: (stop - start) * sum(ranks)].view(stop - start, -1)
        for reader, place in zip(readers, torch.split(block, ranks, dim=1), strict=True):
            rows = reader.rows(start, stop, out=buffer)
            place.copy_(cast_tile(work.job, writers.b.name, rows))
        writers.b.append(bytes_of(block))


def _joined(ranges: Spans, count: int) -> list[tuple[int, int]]:
    """Return the ranges with `count` at a time made one."""
    firsts = range(0, len(ranges), count)
    return [(ranges[i][0], ranges[min(i + count, len(ranges)) - 1][1]) for i in firsts]


def _fold(work: Work, writers: Writers) -> None:
    """Write the rule's answer on all A's, then on all B's, a tile at a time."""
    job, sources = work.job, work.sources
    weights = factor_weights(sources.weights, sources.scalings)
    whole_rows = RULES[job.options.rule].whole_rows
    sides = (("A", sources.a, writers.a), ("B", sources.b, writers.b))
    for number, ((side, readers, writer), side_weights) in enumerate(
        zip(sides, weights, strict=True)
    ):
        spans = fold_tiles(*readers[0].matrix_shape, whole_rows=whole_rows)
        operands = Operands(
            spans=spans,
            fill=_factor_tiles(readers, spans),
            sample=_factor_samples(readers),
            width=readers[0].matrix_shape[1],
            new_buffer=readers[0].new_buffer,
            keys=sources.keys(job, work.task.target, side),
            weights=side_weights,
            densities=sources.densities,
            quotas=work.quotas(number),
        )
        merged = MergedTiles(operands, job.options, stacked=work.task.stacked)
        merged.find_thresholds(_streams(merged, len(spans), work.each))
        variation = Here(merged.variation(), len(spans), work.each)
        merged.find_selection(variation, Here(merged, len(spans), work.each))
        for tile in work.each(_cast_tiles(work, merged, operands, writer.name), range(len(spans))):
            writer.append(bytes_of(tile))


def _streams(merged: MergedTiles, count: int, each: Each) -> Callable[[int], Over]:
    """Return what returns the panels of the stream of tensor i."""
    return lambda i: Here(merged.stream(i), count, each)


def _cast_tiles(
    work: Work, merged: MergedTiles, operands: Operands, name: str
) -> Callable[[int], torch.Tensor]:
    """Return the function from a tile's number to the tile as it is written."""
    buffers = Pool(lambda: operands.new_buffer(operands.largest_tile))

    def tile(t: int) -> torch.Tensor:
        with buffers.lend() as buffer:
            cast = cast_tile(work.job, name, merged(t, buffer))
            # A copy, where the dtype is the same: the buffer is lent to the next tile.
            return cast.clone() if cast.data_ptr() == buffer.data_ptr() else cast

    return tile


def _factor_tiles(readers: Sequence[FactorReader], spans: Spans) -> Fill:
    return lambda i, t, buffer: readers[i].elements(*spans[t], out=buffer)


def _factor_samples(readers: Sequence[FactorReader]) -> Callable[[int], torch.Tensor]:
    """Return the function that returns every so many-th element of factor i."""

    def sample(i: int) -> torch.Tensor:
        reader = readers[i]
        return reader.strided(sample_step(reader.factor.elements, reader.matrix_shape[1]))

    return sample
