"""Matrices that a rule makes, tile by tile, from the deltas or from coordinates of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import Protocol

import torch

from streammerge.allocator import ALIGNED_BYTES
from streammerge.kernels.held import HeldTiles
from streammerge.kernels.krylov import block_krylov
from streammerge.kernels.matrices import RowTiles, TiledMatrix, dense
from streammerge.kernels.selection import Selection
from streammerge.kernels.thresholds import Cut, Stream
from streammerge.kernels.tiles import MergedTiles, Operands
from streammerge.lowrank import Truncation
from streammerge.output.scratch import ScratchFile
from streammerge.spaces.delta import delta_sample, delta_tile
from streammerge.tiling import factor_rows, row_tiles, sample_size
from streammerge.worker.encode import bytes_of
from streammerge.worker.work import Work

Spans = Sequence[tuple[int, int]]


def merge_deltas(work: Work) -> Truncation:
    """Return the triples of a matrix that a rule makes, tile by tile, from the deltas."""
    with closing(MergedTensors(work, Deltas(work))) as merged:
        return merge_tensors(work, merged, work.task.passes)


def merge_tensors(work: Work, merged: MergedTensors, passes: int) -> Truncation:
    """Return the triples of a matrix that a rule makes, tile by tile.

    Args:
        work: the target.
        merged: the matrix.
        passes: of an iteration; 0 to form it as a whole.
    """
    count, task = len(merged.rows), work.task
    merged.tiles.find_thresholds(
        lambda i: work.over(("stream", i), lambda: merged.stream(i), count)
    )
    merged.tiles.find_selection(
        work.over(("variation",), merged.tiles.variation, count),
        work.over(("tiles",), lambda: merged.tiles, count),
    )
    height, width = merged.shape
    if not passes:
        matrix = work.sources.a[0].new_empty((height, width))
        return dense(matrix, merged.tiles, merged.rows, task.rank, work.each)
    found = merged.tiles.thresholds, merged.tiles.selection
    tiled = TiledMatrix(work.over(("matrix", *found), lambda: merged.matrix(*found), count), height)
    start = work.gaussian("krylov", task.block, width)
    return block_krylov(tiled, task.rank, start, passes, work.each)


class Tensors(Protocol):
    """What a rule sees: one matrix for each source, in the same tiles of rows."""

    name: str
    """By which random bits are drawn."""
    rows: Spans
    """Each tile's range of rows."""
    width: int
    """Columns."""

    def fill(self, i: int, t: int, buffer: torch.Tensor) -> torch.Tensor:
        """Put tile t of matrix i into a buffer and return it, flat."""

    def sample(self, i: int) -> torch.Tensor:
        """Return elements of matrix i, spread over all of it."""


class MergedTensors:
    """What a rule makes of its matrices, in tiles; as much of it is held as the task says."""

    def __init__(self, work: Work, tensors: Tensors) -> None:
        self.rows = tensors.rows
        """Each tile's range of rows."""
        width, sources = tensors.width, work.sources
        self.shape = (self.rows[-1][1], width)
        """Of the merged matrix."""
        self._work = work
        self._operands = Operands(
            spans=[(start * width, stop * width) for start, stop in self.rows],
            fill=tensors.fill,
            sample=tensors.sample,
            width=width,
            new_buffer=sources.a[0].new_buffer,
            keys=sources.keys(work.job, work.task.target, tensors.name),
            weights=work.weights,
            densities=sources.densities,
            quotas=work.quotas(0),
        )
        self.tiles = MergedTiles(self._operands, work.options, stacked=work.task.stacked)
        self._open = ExitStack()
        self._held: HeldTiles | None = None

    def stream(self, i: int) -> Stream:
        """Return matrix i, for the search of its threshold."""
        return self.tiles.stream(i)

    def matrix(self, thresholds: tuple[Cut, ...], selection: Selection | None) -> RowTiles:
        """Return the merged matrix, of matrices cut there; it holds tiles from now on."""
        if self._held is None:
            task = self._work.task
            self.tiles.thresholds, self.tiles.selection = thresholds, selection
            store = (
                self._open.enter_context(closing(SpilledTiles(self._work)))
                if task.spilled
                else None
            )
            self._held = HeldTiles(self.tiles, task.resident, store, task.spilled)
        size = self._operands.largest_tile
        return RowTiles(self._held, self.rows, lambda: self._operands.new_buffer(size))

    def close(self) -> None:
        """Free the disk."""
        self._open.close()


class Deltas:
    """Tiles and samples of the sources' deltas; the factors of some sources are held."""

    name = "delta"

    def __init__(self, work: Work) -> None:
        self.rows: Spans = row_tiles(work.task.m, work.task.n)
        """Each tile's range of rows."""
        self.width = work.task.n
        """Columns."""
        self._job = work.job
        self._sources = work.sources
        a, b = work.sources.a, work.sources.b
        held = work.each(lambda i: (a[i].whole(), b[i].whole()), range(work.task.factors))
        self._held = list(held)

    def fill(self, i: int, t: int, buffer: torch.Tensor) -> torch.Tensor:
        """Put tile t of delta i into a buffer and return it, flat."""
        self._job.check()
        start, stop = self.rows[t]
        b = self._b_rows(i, start, stop)
        out = buffer[: (stop - start) * self.width]
        shaped = out.view(stop - start, self.width)
        delta_tile(b, self._a(i), self._sources.scalings[i], out=shaped)
        return out

    def sample(self, i: int) -> torch.Tensor:
        """Return elements of delta i, spread over all of it."""
        a, m = self._a(i), self.rows[-1][1]
        # The same places of all deltas, whatever their ranks.
        tiles = factor_rows(m, max(b.matrix_shape[1] for b in self._sources.b))
        count = sample_size(m * self.width) // len(tiles)
        scaling = self._sources.scalings[i]
        return torch.cat(
            [delta_sample(self._b_rows(i, *rows), a, scaling, count) for rows in tiles]
        )

    def _a(self, i: int) -> torch.Tensor:
        return self._held[i][0] if i < len(self._held) else self._sources.a[i].whole()

    def _b_rows(self, i: int, start: int, stop: int) -> torch.Tensor:
        if i < len(self._held):
            rows = self._held[i][1][start:stop]
            # Aligned as what is read: else a product of one column may be rounded otherwise.
            return rows.clone() if rows.data_ptr() % ALIGNED_BYTES else rows
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
