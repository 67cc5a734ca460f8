"""Counting the magnitudes of a target's tensors, for thresholds over whole adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from streammerge.kernels.census import Question, Tally
from streammerge.kernels.each import Each, Here, Pool, accumulate
from streammerge.kernels.thresholds import Tiled, count_equals, count_panel
from streammerge.planner.routes import COORDINATES
from streammerge.plans import Task
from streammerge.select import digits, found_value
from streammerge.spaces.delta import delta_tile
from streammerge.tiling import flat_tiles, row_tiles
from streammerge.worker.coordinates import coordinates_of
from streammerge.worker.factors import FactorReader, TargetSources, task_window
from streammerge.worker.job import Job
from streammerge.worker.run import attempt, watched
from streammerge.worker.work import Work

Tensor = tuple[int, int, Tiled]
"""An adapter's position, the number of its tensor in the target (0 the only one, or A; 1 B), and
the tensor as the rule sees it."""

Spans = Sequence[tuple[int, int]]

IN_BASES = frozenset(COORDINATES.values())


def count_task(job: Job, task: Task, each: Each = map, *, question: Question) -> Tally:
    """Count what a pass asks of one target.

    It holds less than the task itself: one source's A, a tile for each lane, or the bases of all.

    Args:
        job: what it belongs to.
        task: the target.
        each: goes over parts of it, as many at once as the task was planned with.
        question: what is counted.

    Raises:
        MergeFailedError: a subclass of it says what failed.
    """
    part = _asked_of(job, task, question)
    if part is None:
        return Tally(question, 1, job.dtype)
    window = task_window(job, part)

    def count(device: torch.device, lean: Task) -> Tally:
        sources = TargetSources(job, lean, device, window, hashed=False)
        work = Work(job, lean, sources, device, watched(job, each if lean is part else map))
        with torch.inference_mode(), sources.checked():
            tally = _count(work, question)
            # Before anything is made of what was counted.
            job.files.check(sources.files)
        return tally

    return attempt(job, part, count)


def _asked_of(job: Job, task: Task, question: Question) -> Task | None:
    """Return the task with no more sources than are needed; None where none of them is."""
    adapters = job.plan.sources.adapter[task.first : task.last]
    (asked,) = np.isin(adapters, list(question.searches)).nonzero()
    if not len(asked):
        return None
    if task.route in IN_BASES:
        # The bases are of all. No factors are held, for what is counted has their room.
        return replace(task, factors=0)
    first, last = task.first + int(asked[0]), task.first + int(asked[-1]) + 1
    return replace(task, first=first, last=last)


def _count(work: Work, question: Question) -> Tally:
    dtype = work.job.dtype
    tally = Tally(question, 1, dtype)
    for adapter, number, tensor in _tensors(work, question):
        over = Here(tensor, len(tensor.spans), work.each)
        for place, search in enumerate(question.searches[adapter]):
            counts = tally.of(adapter, place)
            if search.settled == digits(dtype):
                value = found_value(search, dtype)
                counts[number] += sum(map(sum, over(count_equals, value)))
                continue
            found = accumulate(over(count_panel, search)).cpu().numpy()
            if not search.settled:
                _check_finite(found, dtype)
            counts += found
    return tally


def _check_finite(counts: np.ndarray, dtype: torch.dtype) -> None:
    """Refuse what is beyond the largest number, by the first digits of the magnitudes.

    Raises:
        FloatingPointError: there is such an element.
    """
    infinity = {torch.float32: 0x7F80, torch.float64: 0x7FF0}[dtype]
    if counts[infinity:].any():
        raise FloatingPointError("a tensor overflows")


def _tensors(work: Work, question: Question) -> Iterator[Tensor]:
    """Yield the tensors of the adapters that are asked for, as the rule sees them."""
    asked = [i for i, p in enumerate(work.sources.positions) if p in question.searches]
    if work.task.route == "fold":
        yield from _factors(work, asked)
    elif work.task.route in IN_BASES:
        yield from _coordinates(work, asked)
    else:
        yield from _deltas(work, asked)


def _factors(work: Work, asked: Sequence[int]) -> Iterator[Tensor]:
    for number, readers in enumerate((work.sources.a, work.sources.b)):
        spans = flat_tiles(readers[0].factor.elements)
        buffers = _buffers(readers[0], spans.longest)
        for i in asked:
            fill = partial(_factor_tile, readers[i], spans)
            yield work.sources.positions[i], number, _tiled(spans, fill, buffers)


def _factor_tile(reader: FactorReader, spans: Spans, t: int, out: torch.Tensor) -> torch.Tensor:
    return reader.elements(*spans[t], out=out)


def _deltas(work: Work, asked: Sequence[int]) -> Iterator[Tensor]:
    width = work.task.n
    rows = row_tiles(work.task.m, width)
    spans = [(start * width, stop * width) for start, stop in rows]
    buffers = _buffers(work.sources.a[0], rows.longest * width)
    for i in asked:
        # Read once for all tiles, where the task might have no room for that.
        fill = partial(_delta_tile, work, i, work.sources.a[i].whole())
        yield work.sources.positions[i], 0, _tiled(spans, fill, buffers)


def _delta_tile(work: Work, i: int, a: torch.Tensor, t: int, out: torch.Tensor) -> torch.Tensor:
    work.job.check()
    start, stop = row_tiles(work.task.m, work.task.n)[t]
    tile = out[: (stop - start) * work.task.n]
    b = work.sources.b[i].rows(start, stop)
    delta_tile(b, a, work.sources.scalings[i], out=tile.view(stop - start, -1))
    return tile


def _coordinates(work: Work, asked: Sequence[int]) -> Iterator[Tensor]:
    seen = coordinates_of(work)
    if seen is None:
        return
    spans = [(start * seen.width, stop * seen.width) for start, stop in seen.rows]
    buffers = _buffers(work.sources.a[0], max(stop - start for start, stop in spans))
    for i in asked:
        yield work.sources.positions[i], 0, _tiled(spans, partial(seen.fill, i), buffers)


def _buffers(reader: FactorReader, size: int) -> Pool[torch.Tensor]:
    return Pool(lambda: reader.new_buffer(size))


def _tiled(
    spans: Spans,
    fill: Callable[[int, torch.Tensor], torch.Tensor],
    buffers: Pool[torch.Tensor],
) -> Tiled:
    def tiles(panel: range) -> Iterator[torch.Tensor]:
        with buffers.lend() as buffer:
            for t in panel:
                yield fill(t, buffer)

    return Tiled(spans, tiles)
