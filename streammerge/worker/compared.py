"""One target merged by one method, its pair kept in memory and measured instead of written."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from streammerge.kernels.closeness import (
    Grams,
    Rows,
    closeness,
    energy,
    tall_products,
    wide_products,
)
from streammerge.plans import Region, Task
from streammerge.readers.windows import Window
from streammerge.tiling import factor_rows
from streammerge.worker.factors import FactorReader, TargetSources
from streammerge.worker.job import Job
from streammerge.worker.receipt import Certificate
from streammerge.worker.routes import merge_target
from streammerge.worker.run import told, watched
from streammerge.worker.work import Work, Writers

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class MeasuredPair:
    """What a method makes of one target, against the adapters' own deltas; squared norms."""

    rank: int
    """Of the pair."""
    positions: tuple[int, ...]
    """Of the adapters that have the target."""
    deltas: tuple[float, ...]
    """‖Δ_i‖² of each of them."""
    distances: tuple[float, ...]
    """‖M - Δ_i‖² of each of them, M the pair as it would be written."""
    on_inputs: tuple[float, ...]
    """‖(M - Δ_i)·P_i‖², P_i the projector onto the row space of A_i."""
    energy: float
    """‖M‖²."""
    relative_error: float | None
    """What the cut to the rank loses of what the rule makes; None where nothing is cut."""
    last_step: float | None
    """How far the last step went of an iteration that has used up its steps; None where it came to
    rest, or nothing is iterated."""
    seconds: float
    """That the merge of the target took, without measuring it."""


class _Kept:
    """Takes a tensor's bytes into memory."""

    def __init__(self, region: Region) -> None:
        self.name = region.name
        self._data = np.empty(region.nbytes, np.uint8)
        self._filled = 0

    def shorten(self, nbytes: int) -> None:
        """End after so many bytes."""
        self._data = self._data[:nbytes]

    def append(self, data: memoryview) -> None:
        """Take the next bytes."""
        data = data.cast("B")
        end = self._filled + len(data)
        self._data[self._filled : end] = data
        self._filled = end

    def matrix(self, dtype: torch.dtype, rows: int) -> torch.Tensor:
        """Return what was taken, as a matrix."""
        if self._filled != len(self._data):
            raise AssertionError(f"{self.name}: {len(self._data) - self._filled} bytes are missing")
        return torch.from_numpy(self._data).view(dtype).view(rows, -1)


def measure_pair(job: Job, task: Task, window: Window) -> MeasuredPair:
    """Merge a target as `run_task` does, with the same bits, and measure its pair.

    Args:
        job: of the method.
        task: the target.
        window: reads the sources.

    Raises:
        MergeFailedError: a subclass of it says what failed.
    """
    with told(job, task), torch.inference_mode():
        began = time.perf_counter()
        a, b = map(_Kept, task.regions)
        sources = TargetSources(job, task, _CPU, window, hashed=False)
        with sources.checked():
            work = Work(job, task, sources, _CPU, watched(job, map))
            certificate, unsettled = merge_target(work, Writers(a, b))
        seconds = time.perf_counter() - began
        dtype = job.output_dtype
        rank = task.rank if certificate is None else certificate.rank
        pair = (b.matrix(dtype, task.m), a.matrix(dtype, rank))
        return _measured(
            job,
            task,
            window,
            pair,
            certificate=certificate,
            last_step=unsettled or None,
            seconds=seconds,
        )


def _measured(
    job: Job,
    task: Task,
    window: Window,
    pair: tuple[torch.Tensor, torch.Tensor],
    *,
    certificate: Certificate | None,
    last_step: float | None,
    seconds: float,
) -> MeasuredPair:
    rank = len(pair[1])
    b, a = map(_rows_of, pair)
    a_spans = factor_rows(rank, task.n)
    gram_b = tall_products(b, b, factor_rows(task.m, rank))
    gram_a = wide_products(a, a_spans, a, a_spans)
    columns = job.plan.sources
    found, positions = [], []
    for i in range(task.first, task.last):
        job.check()
        position = int(columns.adapter[i])
        adapter, row = job.adapters[position], int(columns.row[i])
        own_a, own_b = (
            FactorReader(window, adapter.factor(row, side), torch.float64, _CPU, None, hashed=False)
            for side in "AB"
        )
        width = own_b.matrix_shape[1]
        tall = factor_rows(task.m, max(rank, width))
        own_spans = factor_rows(*own_a.matrix_shape)
        grams = Grams(
            b=gram_b,
            a=gram_a,
            cross_b=tall_products(b, own_b.rows, tall),
            cross_a=wide_products(a, a_spans, own_a.rows, own_spans),
            own_b=tall_products(own_b.rows, own_b.rows, tall),
            own_a=wide_products(own_a.rows, own_spans, own_a.rows, own_spans),
        )
        found.append(closeness(grams, float(columns.scaling[i])))
        positions.append(position)
    return MeasuredPair(
        rank=rank,
        positions=tuple(positions),
        deltas=tuple(one.delta for one in found),
        distances=tuple(one.distance for one in found),
        on_inputs=tuple(one.on_inputs for one in found),
        energy=energy(gram_b, gram_a),
        relative_error=certificate.relative_error if certificate else None,
        last_step=last_step,
        seconds=seconds,
    )


def _rows_of(matrix: torch.Tensor) -> Rows:
    return lambda start, stop: matrix[start:stop].double()
