"""The readable definition of a run: one task after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from streammerge.plans import Task
from streammerge.worker import Job, Perform, one_thread_each, run_task


def run_serial(
    job: Job,
    tasks: Sequence[Task],
    on_result: Callable[[Task, Any], None],
    perform: Perform = run_task,
) -> None:
    """Run tasks of a job in their order.

    Args:
        job: what they belong to.
        tasks: what is done.
        on_result: hears of each one's result.
        perform: does one of them.
    """
    with one_thread_each():
        for task in tasks:
            on_result(task, perform(job, task, map))
