"""dask on this machine's cores: a graph of bundles of tasks, run by dask's threaded scheduler."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from dask.base import compute
from dask.delayed import delayed

from streammerge.executors.bundles import bundles, node_name
from streammerge.plans import Task
from streammerge.worker import Job, Lanes, Perform, one_thread_each, run_task

T = TypeVar("T")

OnResult = Callable[[Task, Any], None]


def run_threads(
    job: Job, tasks: Sequence[Task], on_result: OnResult, perform: Perform = run_task
) -> None:
    """Run tasks of a job, as many at once as the plan allows.

    What the tasks in flight hold together is within the budget: large targets come one after
    another, each worked on by several threads; then the pool has as many threads as the plan lets
    tasks be in flight, and each runs one task at a time.

    Args:
        job: what they belong to.
        tasks: what is done.
        on_result: hears of each one's result, of one at a time.
        perform: does one of them.
    """
    report = _one_at_a_time(on_result)
    together = [task for task in tasks if not task.alone]
    nodes = [
        delayed(_run_bundle, pure=False)(
            _Hidden(job),
            _Hidden(bundle),
            report,
            _Hidden(perform),
            dask_key_name=node_name(bundle, number),
        )
        for number, bundle in enumerate(bundles(together, job.plan.concurrency))
    ]
    with one_thread_each(), ThreadPoolExecutor(job.plan.concurrency) as pool:
        try:
            for task in tasks:
                if task.alone:
                    # Not for one lane: a failure in it ends the job, and out of device memory a
                    # task is tried again.
                    each = Lanes(pool, task.lanes, job.stopped) if task.lanes > 1 else map
                    report(task, perform(job, task, each))
            compute(*nodes, scheduler="threads", pool=pool, optimize_graph=False)
        except BaseException:
            # Other threads end their task at its next tile.
            job.stopped.set()
            raise


def _run_bundle(
    job: _Hidden[Job],
    bundle: _Hidden[tuple[Task, ...]],
    report: OnResult,
    perform: _Hidden[Perform],
) -> None:
    for task in bundle.value:
        report(task, perform.value(job.value, task, map))


class _Hidden(Generic[T]):
    """A value that dask passes on as it is, without looking into it for more graph."""

    def __init__(self, value: T) -> None:
        self.value = value


def _one_at_a_time(on_result: OnResult) -> OnResult:
    lock = threading.Lock()

    def report(task: Task, result: Any) -> None:
        with lock:
            on_result(task, result)

    return report
