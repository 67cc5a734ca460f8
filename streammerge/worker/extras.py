"""Tensors that are not LoRA factors: copied, averaged, or summed up, a tile at a time.

They are never brought to a device: each is read once, and little is done with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import xxhash

from streammerge.adapter import DTYPE_BITS, Extra, Factor
from streammerge.errors import NonFiniteError, UnlikeExtrasError
from streammerge.output.writer import RegionWriter
from streammerge.plans import Region, Task
from streammerge.readers.windows import Bytes
from streammerge.tiling import flat_tiles, longest
from streammerge.worker.encode import bytes_of, cast_to
from streammerge.worker.factors import STORED, FactorReader, view
from streammerge.worker.job import Job
from streammerge.worker.receipt import Receipt

Tile = Callable[[int, int], torch.Tensor]
"""From a first element and the one behind the last to the values of these."""

_CPU = torch.device("cpu")


def write_extra(job: Job, task: Task) -> Receipt:
    """Write the tensor of a task and return its receipt.

    Raises:
        NonFiniteError: a source holds NaN or infinity.
        UnlikeExtrasError: sources that have to be the same are not.
        MergeFailedError: another subclass of it says what failed.
    """
    columns, rows = job.plan.sources, range(task.first, task.last)
    positions = [int(columns.adapter[i]) for i in rows]
    scalings = [float(columns.scaling[i]) for i in rows]
    extras = [
        job.adapters[p].extra(int(columns.row[i])) for p, i in zip(positions, rows, strict=True)
    ]
    with torch.inference_mode(), job.writer(task.regions[0]) as writer:
        if task.route == "copy":
            checksums = _copy(job, extras, writer)
        else:
            weights = job.plan.sources.weight[task.first : task.last].tolist()
            readers = [_reader(job, extra) for extra in extras]
            products = [w * s for w, s in zip(weights, scalings, strict=True)]
            size = longest(flat_tiles(task.regions[0].elements))
            if task.route == "mean":
                tile = _mean(readers, products, size)
            else:
                tile = _sum(readers, products, size, job.dtype)
            _write(job, task.regions[0], tile, writer)
            checksums = [reader.checksum() for reader in readers]
        # Before anything is said of what was made of them.
        job.files.check({extra.file.path: extra.file for extra in extras}.values())
    inputs = (
        xxhash.xxh3_128_hexdigest(f"{task.target} {s!r} {checksum}".encode())
        for s, checksum in zip(scalings, checksums, strict=True)
    )
    return Receipt(task.target, (writer.checksum,), tuple(inputs), None, _CPU.type, 0.0)


def _reader(job: Job, extra: Extra) -> FactorReader:
    factor = Factor(extra.file, extra.key, extra.offset, extra.dtype, extra.shape)
    return FactorReader(job.window, factor, job.dtype, _CPU, None)


def _write(job: Job, region: Region, tile: Tile, writer: RegionWriter) -> None:
    for start, stop in _tiles(region.elements):
        # Of no source, nothing is read that would end with the run.
        job.check()
        values = cast_to(STORED[region.dtype], region.name, tile(start, stop))
        writer.append(bytes_of(values))


def _mean(readers: Sequence[FactorReader], weights: Sequence[float], size: int) -> Tile:
    """Return the weighted mean: the first source's values, and how far the others lie from them.

    So of equal values it is that value, to the bit. A tile holds until the next one.
    """
    whole = math.fsum(weights)
    # Made once: what comes and goes splinters the heap.
    values, changes, incoming = (readers[0].new_buffer(size) for _ in range(3))

    def tile(start: int, stop: int) -> torch.Tensor:
        first = readers[0].elements(start, stop, out=values)
        moved = changes[: stop - start].zero_()
        for reader, weight in zip(readers[1:], weights[1:], strict=True):
            other = reader.elements(start, stop, out=incoming)
            moved.add_(other.sub_(first), alpha=weight / whole)
        return first.add_(moved)

    return tile


def _sum(
    readers: Sequence[FactorReader], factors: Sequence[float], size: int, dtype: torch.dtype
) -> Tile:
    """Return the weighted sum; of nothing it is zeros. A tile holds until the next one."""
    sums, incoming = (torch.empty(size, dtype=dtype) for _ in range(2))

    def tile(start: int, stop: int) -> torch.Tensor:
        total = sums[: stop - start].zero_()
        for reader, factor in zip(readers, factors, strict=True):
            total.add_(reader.elements(start, stop, out=incoming), alpha=factor)
        return total

    return tile


def _copy(job: Job, extras: Sequence[Extra], writer: RegionWriter) -> list[str]:
    """Write the first source's bytes; return every source's checksum.

    Raises:
        UnlikeExtrasError: another source has other bytes.
    """
    checksums: list[str] = []
    for place, extra in enumerate(extras):
        digest = xxhash.xxh3_128()
        item = max(8, DTYPE_BITS[extra.dtype]) // 8
        for start, stop in _tiles(extra.nbytes // item):
            window = job.window(extra.file, extra.offset + start * item, (stop - start) * item)
            digest.update(window.data)
            if place == 0:
                _check_finite(extra, window)
                writer.append(window.data)
        checksums.append(digest.hexdigest())
        if checksums[-1] != checksums[0]:
            raise UnlikeExtrasError(
                tensor=extra.key, paths=(extras[0].file.path, extra.file.path), dtype=extra.dtype
            )
    return checksums


def _check_finite(extra: Extra, window: Bytes) -> None:
    """Refuse what no trained tensor holds; whole numbers and the like are taken as they are."""
    if extra.dtype not in STORED:
        return
    stored = view(window, STORED[extra.dtype])
    # A sum is finite only if all its terms are; it may overflow without them, hence the look.
    if not math.isfinite(float(stored.sum())):
        wrong = stored[~torch.isfinite(stored)]
        if len(wrong):
            raise NonFiniteError(path=extra.file.path, tensor=extra.key, value=float(wrong[0]))


def _tiles(elements: int) -> Sequence[tuple[int, int]]:
    """Return the ranges of a tensor's tiles; of an empty one there are none."""
    return flat_tiles(elements) if elements else ()
