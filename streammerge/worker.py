"""Runs one task: reads its factors, merges them, writes its two regions, returns a receipt.

The one place that holds bytes and maths together. A task is idempotent and needs nothing from
other tasks, so an executor may run tasks anywhere, in any order, and again.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from streammerge.adapter import Adapter, Factor
from streammerge.draw import stream_key
from streammerge.errors import (
    ClampError,
    NonFiniteError,
    OutputOverflowError,
)
from streammerge.kernels.tiles import Operands, RuleOptions, keep_resident, merged_tiles
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
from streammerge.plans import Plan, Region, Task, flat_tiles, row_tiles, split, TILE_ELEMENTS
from streammerge.readers.mapped import MappedFiles
from streammerge.spaces.delta import delta_tile
from streammerge.spaces.exact import stack_weights
from streammerge.spaces.factor import factor_weights

_STORED = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class Certificate:
    """How good a truncated pair is, for the tensors as written. Estimates; see docs."""

    kept_energy: float
    """Share of the merged matrix's energy ‖M‖²_F that the pair keeps."""
    relative_error: float
    """‖M - B·A‖_F / ‖M‖_F."""
    excess: float
    """How far that is above the best possible of the rank, relatively."""
    converged: bool
    passes: int


@dataclass(frozen=True)
class Receipt:
    """What a finished task leaves behind."""

    target: str
    checksums: tuple[str, str]
    """xxh3-128 of A's and of B's region."""
    inputs: tuple[tuple[str, str], ...]
    """xxh3-128 of each source's A and B, as stored."""
    certificate: Certificate | None
    seconds: float


class Job:
    """Everything that a worker needs to run tasks of a plan."""

    def __init__(
        self, plan: Plan, adapters: Sequence[Adapter], directory: Path, starts: Sequence[int]
    ) -> None:
        self.plan = plan
        self.adapters = adapters
        self.directory = directory
        self.starts = starts
        """Where each output file's data begin."""
        self.files = MappedFiles()
        recipe = plan.recipe
        self.dtype: torch.dtype = getattr(torch, recipe["compute_dtype"])
        self.output_dtype: torch.dtype = getattr(torch, plan.dtype)
        density = recipe["density"]
        self.options = RuleOptions(
            plan.rule, 1.0 if density is None else float(density), recipe["majority_sign"]
        )

    def writer(self, region: Region) -> RegionWriter:
        """Return the writer of a region."""
        path = self.directory / self.plan.files[region.file].name
        return RegionWriter(path, self.starts[region.file], region)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Let torch use one thread for each operation, as long as the block lasts.

    Results must not depend on how many threads share an operation; cores are used by tasks.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
        if task.route == "concatenate":
            certificate = _concatenate(job, sources, a, b)
        elif task.route == "fold":
            certificate = _fold(job, task, sources, a, b)
        else:
            certificate = _truncate(job, task, sources, a, b)
    return Receipt(
        target=task.target,
        checksums=(a.checksum, b.checksum),
        inputs=sources.checksums(),
        certificate=certificate,
        seconds=time.perf_counter() - began,
    )


class FactorReader:
    """One factor of one adapter: elements in the compute dtype, checked, hashed on the way."""

    def __init__(self, files: MappedFiles, factor: Factor, dtype: torch.dtype) -> None:
        self.factor = factor
        self._files = files
        self._dtype = dtype
        self._stored = _STORED[factor.dtype]
        self._hash = xxhash.xxh3_128()
        self._hashed = 0

    def elements(self, start: int, stop: int) -> torch.Tensor:
        """Return elements start … stop - 1, in file order, as a tensor of their own.

        Raises:
            NonFiniteError: one of them is NaN or infinite.
        """
        size = self._stored.itemsize
        offset, nbytes = self.factor.offset + start * size, (stop - start) * size
        window = self._files.window(self.factor.file, offset, nbytes)
        if start == self._hashed:
            self._hash.update(window)
            self._hashed = stop
        values = _view(window, self._stored).to(self._dtype, copy=True)
        # A sum is finite only if all its terms are; it may overflow without them, hence the look.
        if not torch.isfinite(values.sum()):
            self._refuse_non_finite(values)
        return values

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return rows start … stop - 1 as a matrix; what follows the first dimension is one."""
        width = self.factor.elements // self.factor.shape[0]
        return self.elements(start * width, stop * width).view(stop - start, width)

    def whole(self) -> torch.Tensor:
        """Return all of it as a matrix."""
        return self.rows(0, self.factor.shape[0])

    def checksum(self) -> str:
        """xxh3-128 of the stored bytes, all of which have been read in order by now."""
        assert self._hashed == self.factor.elements, f"{self.factor.key}: not read in order"
        return self._hash.hexdigest()

    def _refuse_non_finite(self, values: torch.Tensor) -> None:
        wrong = values[~torch.isfinite(values)]
        if len(wrong):
            value = "NaN" if bool(wrong[0].isnan()) else "infinity"
            raise NonFiniteError(path=self.factor.file.path, tensor=self.factor.key, value=value)


def _view(window: npt.NDArray[np.uint8], dtype: torch.dtype) -> torch.Tensor:
    """Return stored bytes as a tensor without a copy; it must not be written to.

    The one door for read-only maps: torch warns of any buffer that is not writable, and has no
    read-only tensors. The array stays alive with the tensor, being an attribute of its buffer.
    """
    if window.nbytes == 0:
        return torch.empty(0, dtype=dtype)
    if window.ctypes.data % dtype.itemsize:
        # Early safetensors files do not align their data.
        window = window.copy()
    buffer: Any = (ctypes.c_char * window.nbytes).from_address(window.ctypes.data)
    buffer.keeps_alive = window
    return torch.frombuffer(buffer, dtype=dtype)


class Sources:
    """The factors that take part in one target, in the adapters' order."""

    def __init__(self, job: Job, task: Task) -> None:
        columns, weights = job.plan.sources, job.plan.recipe["weights"]
        rows = range(task.first, task.last)
        self.positions = [int(columns.adapter[i]) for i in rows]
        self.weights = [float(weights[p]) for p in self.positions]
        self.scalings = [float(columns.scaling[i]) for i in rows]
        self.a, self.b = (
            [
                FactorReader(
                    job.files, job.adapters[p].factor(int(columns.row[i]), side), job.dtype
                )
                for p, i in zip(self.positions, rows, strict=True)
            ]
            for side in "AB"
        )

    def __len__(self) -> int:
        return len(self.weights)

    def keys(self, job: Job, target: str, tensor: str) -> list[int]:
        """Return each source's key of random bits for a tensor of the target."""
        seed = int(job.plan.recipe["seed"])
        return [stream_key(seed, position, target, tensor) for position in self.positions]

    def checksums(self) -> tuple[tuple[str, str], ...]:
        """Return each source's checksums of A and B."""
        return tuple((a.checksum(), b.checksum()) for a, b in zip(self.a, self.b, strict=True))


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


def _factor_tile(readers: Sequence[FactorReader], spans: Sequence[tuple[int, int]]) -> Any:
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


def _delta_tiles(sources: Sources, rows: Sequence[tuple[int, int]], n: int) -> Any:
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
    writer.append(memoryview(cast.view(torch.uint8).numpy()))
    return cast


def fingerprint() -> dict[str, str]:
    """Return what decides the rounding of results on this machine."""
    build = torch.__config__.show()
    blas = next((line.strip(" -") for line in build.splitlines() if "Math Kernel" in line), "other")
    return {
        "torch": torch.__version__,
        "blas": blas,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": "cpu",
    }
