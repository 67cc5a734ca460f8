"""Runs one task: reads its factors, merges them, writes its two regions, returns a receipt.

A task is idempotent and needs nothing from other tasks, so an executor may run tasks anywhere, in
any order, and again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch

from streammerge.errors import (
    BroughtRuleError,
    ComputeOverflowError,
    MemoryExhaustedError,
    StreammergeError,
)
from streammerge.kernels.each import Each
from streammerge.plans import Task
from streammerge.readers.windows import Window
from streammerge.worker.extras import write_extra
from streammerge.worker.factors import LINALG_ERROR, TargetSources, task_window
from streammerge.worker.job import Job, TaskStoppedError
from streammerge.worker.receipt import Receipt
from streammerge.worker.routes import merge_target
from streammerge.worker.work import Team, Work, Writers

T = TypeVar("T")
R = TypeVar("R")

Perform = Callable[[Job, Task, Each], Any]
"""What an executor does with a task, the last argument going over parts of it."""

_CPU = torch.device("cpu")


def run_task(job: Job, task: Task, each: Each = map, team: Team | None = None) -> Receipt:
    """Merge one target and write its regions.

    Out of device memory, the task is tried again with nothing held but what it cannot do
    without, and then on the CPU; the receipt says where it was done.

    Args:
        job: what it belongs to.
        task: the target.
        each: goes over parts of it, as many at once as the task was planned with.
        team: workers that share it, if any do.

    Raises:
        MergeFailedError: a subclass of it says what failed.
    """
    began = time.perf_counter()
    # An extra tensor is read once, so it is not held, and its rows are not those of factors.
    window = job.window if task.is_extra else task_window(job, task)

    def merge(device: torch.device, lean: Task) -> Receipt:
        if task.is_extra:
            return write_extra(job, task)
        first = lean is task
        work = each if first else map
        try:
            return _run_on(device, job, lean, window, each=work, team=team if first else None)
        except torch.OutOfMemoryError:
            if team is not None:
                team.part()
            raise

    return replace(attempt(job, task, merge), seconds=time.perf_counter() - began)


def attempt(job: Job, task: Task, function: Callable[[torch.device, Task], R]) -> R:
    """Apply a function to a task, and again with less memory when the device has too little.

    Args:
        job: what it belongs to.
        task: what is to be done.
        function: does it, on a device.

    Raises:
        MergeFailedError: a subclass of it says what failed.
    """
    # The number of threads belongs to the calling thread; executors call from their own.
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)
    for device, lean in _attempts(job.device, task):
        try:
            with told(job, task):
                return function(device, lean)
        except torch.OutOfMemoryError as error:
            failure = error
            continue
    raise _exhausted(task) from failure


def _attempts(device: torch.device, task: Task) -> Iterator[tuple[torch.device, Task]]:
    """Yield where and how a task is tried, with less memory each time."""
    lean = replace(task, resident=0, spilled=0, factors=0, stacked=False, lanes=1)
    yield device, task
    if lean != task:
        yield device, lean
    if device != _CPU:
        yield _CPU, lean


def _run_on(
    device: torch.device, job: Job, task: Task, window: Window, *, each: Each, team: Team | None
) -> Receipt:
    sources = TargetSources(job, task, device, window)
    work = Work(job, task, sources, device, watched(job, each), team)
    with (
        torch.inference_mode(),
        job.writer(task.regions[0]) as a,
        job.writer(task.regions[1]) as b,
        sources.checked(),
    ):
        certificate, unsettled = merge_target(work, Writers(a, b))
        # Before anything is said of what was made of them.
        job.files.check(sources.files)
    return Receipt(
        target=task.target,
        checksums=(a.checksum, b.checksum),
        inputs=sources.checksums(task.target),
        certificate=certificate,
        device=device.type,
        seconds=0.0,
        unsettled=unsettled,
    )


@contextmanager
def told(job: Job, task: Task) -> Iterator[None]:
    """Say of what goes wrong in a task what it means.

    Raises:
        MergeFailedError: a subclass of it says what failed.
        torch.OutOfMemoryError: of a device.
    """
    try:
        yield
    except (StreammergeError, TaskStoppedError, torch.OutOfMemoryError):
        raise
    except (FloatingPointError, LINALG_ERROR) as error:
        # The inputs were checked, so these speak of what was made of them; LAPACK refuses NaN and
        # infinity.
        dtype = str(job.dtype).removeprefix("torch.")
        raise ComputeOverflowError(target=task.target, dtype=dtype) from error
    except Exception as error:
        plan = job.plan
        if _is_exhaustion(error):
            raise _exhausted(task) from error
        if plan.rule_origin is None or task.is_extra:
            raise
        # What nobody foresaw, while a rule was at work that is another distribution's.
        raise BroughtRuleError(
            f"{type(error).__name__}: {error}",
            rule=plan.rule,
            origin=plan.rule_origin,
            target=task.target,
        ) from error


def watched(job: Job, each: Each) -> Each:
    """Return `each`, ending with the run: what is held is not read, and may take long."""

    def watched(function: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]:
        def checked(item: T) -> R:
            job.check()
            return function(item)

        return iter(each(checked, items))

    return watched


def _is_exhaustion(error: BaseException) -> bool:
    # torch has no class of its own for a failed allocation on the CPU.
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


def _exhausted(task: Task) -> MemoryExhaustedError:
    return MemoryExhaustedError(target=task.target, projected_bytes=task.projected_bytes)
