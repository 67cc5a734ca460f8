"""The readable definition of a run: one task after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from streammerge.plans import Task
from streammerge.worker import Job, Receipt, one_thread_each, run_task


def run_serial(
    job: Job, tasks: Sequence[Task], on_receipt: Callable[[Task, Receipt], None]
) -> None:
    """Run tasks of a job in their order."""
    with one_thread_each():
        for task in tasks:
            on_receipt(task, run_task(job, task))
