"""The routes by which a target is merged, each from readers of factors to writers of regions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from streammerge.kernels.each import Pool
from streammerge.kernels.tiles import MergedTiles, Operands
from streammerge.spaces.factor import factor_weights
from streammerge.tiling import factor_rows, flat_tiles, sample_step
from streammerge.worker.deltas import merge_deltas
from streammerge.worker.encode import bytes_of, cast_tile, write
from streammerge.worker.factors import FactorReader
from streammerge.worker.pair import write_pair
from streammerge.worker.receipt import Certificate
from streammerge.worker.sums import merge_core, merge_gram, merge_sum
from streammerge.worker.work import Work

Spans = Sequence[tuple[int, int]]
Fill = Callable[[int, int, torch.Tensor], torch.Tensor]

TRUNCATING = {
    "core": merge_core,
    "gram": merge_gram,
    "sum": merge_sum,
    "dense": merge_deltas,
    "krylov": merge_deltas,
}


def merge_target(work: Work) -> Certificate | None:
    """Merge one target by its planned route and write its pair.

    Returns:
        How good the pair is, where something was truncated.
    """
    route = work.task.route
    if route in TRUNCATING:
        return write_pair(work, TRUNCATING[route](work))
    {"concatenate": _concatenate, "fold": _fold}[route](work)
    return None


def _concatenate(work: Work) -> None:
    """Write A = vstack(q_i·A_i) and B = hstack(B_i), a tile at a time."""
    for reader, q in zip(work.sources.a, work.stack_weights, strict=True):
        for start, stop in flat_tiles(reader.factor.elements):
            write(work.job, work.a, reader.elements(start, stop).mul_(q))
    readers = work.sources.b
    total_rank = sum(reader.matrix_shape[1] for reader in readers)
    for start, stop in factor_rows(work.task.m, total_rank):
        write(work.job, work.b, torch.cat([reader.rows(start, stop) for reader in readers], 1))


def _fold(work: Work) -> None:
    """Write the rule's answer on all A's, then on all B's, a tile at a time."""
    job, sources = work.job, work.sources
    weights = factor_weights(sources.weights, sources.scalings)
    sides = (("A", sources.a, work.a), ("B", sources.b, work.b))
    for (side, readers, writer), side_weights in zip(sides, weights, strict=True):
        spans = flat_tiles(readers[0].factor.elements)
        operands = Operands(
            spans=spans,
            fill=_factor_tiles(readers, spans),
            sample=_factor_samples(readers),
            width=readers[0].matrix_shape[1],
            new_buffer=readers[0].new_buffer,
            keys=sources.keys(job, work.task.target, side),
            weights=side_weights,
        )
        merged = MergedTiles(operands, job.options, stacked=work.task.stacked, each=work.each)
        for tile in work.each(_cast_tiles(work, merged, operands, writer.name), range(len(spans))):
            writer.append(bytes_of(tile))


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
