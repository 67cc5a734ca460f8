"""Matrices that a rule makes from the deltas, tile by tile: dense and krylov."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing, nullcontext

import torch

from streammerge.kernels.krylov import block_krylov
from streammerge.kernels.matrices import TiledMatrix, dense
from streammerge.kernels.tiles import HeldTiles, MergedTiles, Operands
from streammerge.lowrank import Truncation
from streammerge.output.scratch import ScratchFile
from streammerge.spaces.delta import delta_sample, delta_tile
from streammerge.tiling import factor_rows, row_tiles, sample_size
from streammerge.worker.encode import bytes_of
from streammerge.worker.work import Work

Spans = Sequence[tuple[int, int]]


def merge_deltas(work: Work) -> Truncation:
    """Return the triples of a matrix that a rule makes, tile by tile, from the deltas."""
    job, task, sources = work.job, work.task, work.sources
    rows = row_tiles(task.m, task.n)
    deltas = _Deltas(work, rows)
    operands = Operands(
        spans=[(start * task.n, stop * task.n) for start, stop in rows],
        fill=deltas.fill,
        sample=deltas.sample,
        width=task.n,
        new_buffer=sources.a[0].new_buffer,
        keys=sources.keys(job, task.target, "delta"),
        weights=sources.weights,
    )
    merged = MergedTiles(operands, job.options, stacked=task.stacked, each=work.each)
    if task.route == "dense":
        matrix = sources.a[0].new_empty((task.m, task.n))
        return dense(matrix, merged, rows, task.rank, work.each)
    start = work.gaussian("krylov", task.block)
    with closing(SpilledTiles(work)) if task.spilled else nullcontext() as store:
        held = HeldTiles(merged, task.resident, store, task.spilled)
        tiled = TiledMatrix(
            held, rows, lambda: operands.new_buffer(operands.largest_tile), work.each
        )
        return block_krylov(tiled, task.rank, start, task.passes, work.each)


class _Deltas:
    """Tiles and samples of the sources' deltas; the factors of some sources are held."""

    def __init__(self, work: Work, rows: Spans) -> None:
        self._job = work.job
        self._sources = work.sources
        self._rows = rows
        self._n = work.task.n
        a, b = work.sources.a, work.sources.b
        held = work.each(lambda i: (a[i].whole(), b[i].whole()), range(work.task.factors))
        self._held = list(held)

    def fill(self, i: int, t: int, buffer: torch.Tensor) -> torch.Tensor:
        """Put tile t of delta i into a buffer and return it, flat."""
        self._job.check()
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
        self._file.write(bytes_of(tile), self._offset(t))

    def get(self, t: int, out: torch.Tensor) -> torch.Tensor:
        """Read tile `t` as it was stored into the head of a flat buffer and return it."""
        start, stop = self._rows[t]
        tile = out[: (stop - start) * self._n]
        if tile.device.type == "cpu":
            self._file.read(bytes_of(tile), self._offset(t))
            return tile
        stored = torch.empty(tile.shape, dtype=tile.dtype)
        self._file.read(bytes_of(stored), self._offset(t))
        return tile.copy_(stored)

    def close(self) -> None:
        """Free the disk."""
        self._file.close()

    def _offset(self, t: int) -> int:
        return self._rows[t][0] * self._n * self._item
