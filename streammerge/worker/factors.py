"""Input factors: stored bytes in, checked tensors of the compute dtype out."""

from __future__ import annotations

import ctypes
import itertools
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from streammerge.adapter import TORCH_NAMES, Factor, TensorFile
from streammerge.budget import CPU
from streammerge.draw import stream_key
from streammerge.errors import NonFiniteError
from streammerge.hub import Span
from streammerge.plans import Task
from streammerge.readers.windows import Bytes, Window, held, read_span
from streammerge.tiling import TILE_ELEMENTS, flat_tiles
from streammerge.worker.job import Job
from streammerge.worker.transfer import Transfer

LINALG_ERROR: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
"""What LAPACK's refusals are raised as."""

STORED: dict[str, torch.dtype] = {
    stored: getattr(torch, name) for stored, name in TORCH_NAMES.items()
}
"""The dtypes of numbers that are computed with, as safetensors and as torch spells them."""


PIECE_ELEMENTS = 4096
"""To read a piece of a file on its own takes about as long as to read so many more elements."""


class FactorReader:
    """One factor of one adapter: elements in the compute dtype, checked, hashed on the way."""

    def __init__(
        self,
        window: Window,
        factor: Factor,
        dtype: torch.dtype,
        device: torch.device,
        transfer: Transfer | None,
        *,
        hashed: bool = True,
    ) -> None:
        """Make it.

        Args:
            window: reads stored bytes.
            factor: where it lies.
            dtype: of the elements.
            device: where they are wanted.
            transfer: the way there, where that is not the process's own memory.
            hashed: whether a checksum of all of it will be asked for.
        """
        self.factor = factor
        self._hashing = hashed
        self._window = window
        self._dtype = dtype
        self._device = device
        self._transfer = transfer
        self._unchecked: torch.Tensor | None = None
        self._stored = STORED[factor.dtype]
        self._hash = xxhash.xxh3_128()
        self._hashed = 0
        self._lock = threading.Lock()

    def elements(self, start: int, stop: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return elements start … stop - 1, row by row, as a flat tensor that may be written to.

        Args:
            start: first element.
            stop: one behind the last.
            out: a flat buffer that they are put into, when given.

        Raises:
            NonFiniteError: one of them is NaN or infinite; on a device `check` says so.
        """
        values = self.new_empty((stop - start,)) if out is None else out[: stop - start]
        if self.factor.turned:
            return self._turned(start, values)
        stored = self._stored_at(start, stop)
        if self._transfer is not None:
            values.copy_(self._transfer.send(stored))
            self._look_later(values)
            return values
        values.copy_(stored)
        # A sum is finite only if all its terms are; it may overflow without them, hence the look.
        if not math.isfinite(float(values.sum())):
            self._refuse_non_finite(values, stored)
        return values

    def _turned(self, start: int, values: torch.Tensor) -> torch.Tensor:
        """Fill `values` with elements from `start` on of a factor that is stored transposed.

        Whole rows are picked at once, and parts of rows where the elements begin and end in one.
        """
        width, stop = self.matrix_shape[1], start + len(values)
        begins, ends = -(-start // width) * width, stop // width * width
        cuts = [start, min(begins, stop), max(begins, ends), stop]
        for low, high in itertools.pairwise(cuts):
            if low < high:
                row, column = divmod(low, width)
                rows = max(1, (high - low) // width)
                place = values[low - start : high - start].view(rows, -1)
                self._pick(row, column, place)
        if self._transfer is not None:
            self._look_later(values)
        elif not math.isfinite(float(values.sum())) and not bool(torch.isfinite(values).all()):
            self._find_non_finite()
        return values

    def _pick(self, row: int, column: int, place: torch.Tensor) -> None:
        """Fill a matrix with the elements from a row and a column on of what is stored turned.

        A stored line holds what is a column here. Of long lines only the wanted piece is read;
        short ones are read several together, as many as make a tile.
        """
        length, (rows, columns) = self.matrix_shape[0], place.shape
        if length > PIECE_ELEMENTS + rows:
            for i in range(columns):
                first = (column + i) * length + row
                self._put(place[:, i], view(self._read(first, first + rows), self._stored))
            return
        lines = max(1, TILE_ELEMENTS // length)
        for i in range(0, columns, lines):
            count = min(lines, columns - i)
            stored = self._stored_at((column + i) * length, (column + i + count) * length)
            picked = stored.view(count, length)[:, row : row + rows].t()
            self._put(place[:, i : i + count], picked)

    def _put(self, place: torch.Tensor, stored: torch.Tensor) -> None:
        if self._transfer is None:
            place.copy_(stored)
        else:
            sent = self._transfer.send(stored.contiguous().view(-1))
            place.copy_(sent.view(stored.shape))

    def _look_later(self, values: torch.Tensor) -> None:
        """Keep the sum of what is on a device: to look at it would wait; see `check`."""
        total = values.sum()
        self._unchecked = total if self._unchecked is None else self._unchecked.add_(total)

    def check(self) -> None:
        """Check what was brought to a device and not looked at on its way.

        Raises:
            NonFiniteError: an element is NaN or infinite.
        """
        total, self._unchecked = self._unchecked, None
        if total is not None and not math.isfinite(float(total)):
            self._find_non_finite()

    def _find_non_finite(self) -> None:
        """Refuse the first element, as they are stored, that the dtype cannot hold."""
        for span in flat_tiles(self.factor.elements):
            stored = self._stored_at(*span)
            self._refuse_non_finite(stored.to(self._dtype), stored)

    def strided(self, step: int) -> torch.Tensor:
        """Return every step-th element of each of its tiles as they are stored, unchecked."""
        # Copied, for the next window may take the place of this one.
        parts = [
            self._stored_at(*span)[::step].to(self._dtype, copy=True)
            for span in flat_tiles(self.factor.elements)
        ]
        return torch.cat(parts).to(self._device)

    def rows(self, start: int, stop: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return rows start … stop - 1 as a matrix; what follows the first dimension is one."""
        width = self.matrix_shape[1]
        return self.elements(start * width, stop * width, out).view(stop - start, width)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns of the factor as a matrix."""
        rows = self.factor.shape[0]
        return rows, self.factor.elements // rows

    def new_empty(self, shape: Sequence[int]) -> torch.Tensor:
        """Return an uninitialised tensor of the dtype and on the device that are read to."""
        return torch.empty(tuple(shape), dtype=self._dtype, device=self._device)

    def new_buffer(self, elements: int) -> torch.Tensor:
        """Return an uninitialised flat tensor of this kind."""
        return self.new_empty((elements,))

    def whole(self) -> torch.Tensor:
        """Return all of it as a matrix."""
        return self.rows(0, self.factor.shape[0])

    def checksum(self) -> str:
        """xxh3-128 of the stored bytes."""
        self._hash_until(self.factor.elements)
        return self._hash.hexdigest()

    def _stored_at(self, start: int, stop: int) -> torch.Tensor:
        """Return elements start … stop - 1 as they are stored, read-only; hash what is new.

        Factors are mostly read from their start to their end. Where several threads share one, or
        tiles are asked for in another order, what was passed over is read for the hash alone.
        """
        if not self._hashing or self._hashed >= stop:
            return view(self._read(start, stop), self._stored)
        with self._lock:
            self._hash_until(start)
            window = self._read(start, stop)
            self._hash.update(window[(self._hashed - start) * self._stored.itemsize :].data)
            self._hashed = max(self._hashed, stop)
        return view(window, self._stored)

    def _hash_until(self, end: int) -> None:
        while self._hashed < end:
            stop = min(end, self._hashed + TILE_ELEMENTS)
            self._hash.update(self._read(self._hashed, stop).data)
            self._hashed = stop

    def _read(self, start: int, stop: int) -> Bytes:
        size = self._stored.itemsize
        offset = self.factor.offset + start * size
        return self._window(self.factor.file, offset, (stop - start) * size)

    def _refuse_non_finite(self, values: torch.Tensor, stored: torch.Tensor) -> None:
        places = (~torch.isfinite(values)).nonzero().view(-1)
        if len(places):
            value = float(stored[places[:1].cpu()])
            raise NonFiniteError(path=self.factor.file.path, tensor=self.factor.key, value=value)


def view(window: npt.NDArray[np.uint8], dtype: torch.dtype) -> torch.Tensor:
    """Return stored bytes as a tensor without a copy; it must not be written to.

    The one door for read-only maps: torch warns of any buffer that is not writable, and has no
    read-only tensors. The array stays alive with the tensor, being an attribute of its buffer.
    """
    if window.ctypes.data % dtype.itemsize:
        # Early safetensors files do not align their data.
        window = window.copy()
    buffer: Any = (ctypes.c_char * window.nbytes).from_address(window.ctypes.data)
    buffer.keeps_alive = window
    return torch.frombuffer(buffer, dtype=dtype)


class TargetSources:
    """The factors that take part in one target, in the adapters' order."""

    def __init__(
        self,
        job: Job,
        task: Task,
        device: torch.device,
        window: Window,
        *,
        hashed: bool = True,
    ) -> None:
        columns = job.plan.sources
        rows = range(task.first, task.last)
        self.positions = [int(columns.adapter[i]) for i in rows]
        self.weights = columns.weight[task.first : task.last].tolist()
        self.densities = columns.density[task.first : task.last].tolist()
        self.scalings = [float(columns.scaling[i]) for i in rows]
        transfer = Transfer(device) if device.type != CPU else None
        self.a, self.b = (
            [
                FactorReader(
                    window,
                    job.adapters[p].factor(int(columns.row[i]), side),
                    job.dtype,
                    device,
                    transfer,
                    hashed=hashed,
                )
                for p, i in zip(self.positions, rows, strict=True)
            ]
            for side in "AB"
        )

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def files(self) -> list[TensorFile]:
        """The files that they lie in."""
        files = (reader.factor.file for reader in (*self.a, *self.b))
        return list({file.path: file for file in files}.values())

    @contextmanager
    def checked(self) -> Iterator[None]:
        """Check, at the end, what was brought to a device and not looked at on its way.

        Raises:
            NonFiniteError: an element is NaN or infinite, and so is what else went wrong.
        """
        try:
            yield
        except (FloatingPointError, LINALG_ERROR):
            self._check()
            raise
        self._check()

    def _check(self) -> None:
        for reader in (*self.a, *self.b):
            reader.check()

    def keys(self, job: Job, target: str, tensor: str) -> list[int]:
        """Return each source's key of random bits for a tensor of the target."""
        seed = int(job.plan.recipe["seed"])
        return [stream_key(seed, position, target, tensor) for position in self.positions]

    def checksums(self, target: str) -> tuple[str, ...]:
        """Return a checksum of each source's target, scaling, A and B."""
        return tuple(
            source_checksum(target, s, a, b)
            for s, a, b in zip(self.scalings, self.a, self.b, strict=True)
        )


def source_checksum(target: str, scaling: float, a: FactorReader, b: FactorReader) -> str:
    """Return one checksum of a source's target, scaling, A and B."""
    text = f"{target} {scaling!r} {a.checksum()} {b.checksum()}"
    return xxhash.xxh3_128_hexdigest(text.encode())


def held_window(job: Job, task: Task) -> Window:
    """Return what reads a task's sources out of memory, into which all of them are read now, once.

    Raises:
        TaskStoppedError: the run is over.
        MergeFailedError: a subclass of it says what cannot be read.
    """
    columns, spans, blocks = job.plan.sources, [], []
    for i in range(task.first, task.last):
        adapter = job.adapters[int(columns.adapter[i])]
        for side in "AB":
            job.check()
            factor = adapter.factor(int(columns.row[i]), side)
            nbytes = factor.elements * STORED[factor.dtype].itemsize
            spans.append(Span(factor.file, factor.offset, nbytes))
            blocks.append(read_span(job.files, spans[-1]))
    job.files.check({span.file.path: span.file for span in spans}.values())
    return held(spans, blocks, job.window)


def task_window(job: Job, task: Task) -> Window:
    """Return what reads a task's sources; those on the Hub are fetched, once, and held by it.

    Factors that lie side by side in a file come in one request.

    Raises:
        TaskStoppedError: the run is over.
        MergeFailedError: a subclass of it says what cannot be had.
    """
    columns, pieces = job.plan.sources, set()
    for i in range(task.first, task.last):
        adapter = job.adapters[int(columns.adapter[i])]
        if adapter.files[0].etag is None:
            continue
        for side in "AB":
            factor = adapter.factor(int(columns.row[i]), side)
            nbytes = factor.elements * STORED[factor.dtype].itemsize
            pieces.add((factor.file, factor.offset, factor.offset + nbytes))
    if not pieces:
        return job.window
    spans: list[Span] = []
    for file, start, stop in sorted(pieces, key=lambda piece: (piece[0].path, *piece[1:])):
        last = spans[-1] if spans else None
        if last is not None and last.file == file and start <= last.offset + last.nbytes:
            end = max(stop, last.offset + last.nbytes)
            spans[-1] = Span(file, last.offset, end - last.offset)
        else:
            spans.append(Span(file, start, stop - start))
    return held(spans, job.fetch(spans), job.window)
