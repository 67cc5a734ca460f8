"""The readable definition of a run: one task after another."""

from __future__ import annotations

from collections.abc import Callable

from streammerge.plans import Task
from streammerge.worker import Job, Receipt, one_thread_each, run_task


def run_serial(job: Job, on_receipt: Callable[[Task, Receipt], None]) -> list[Receipt]:
    """Run all tasks of a job in the plan's order and return their receipts in that order."""
    receipts = []
    with one_thread_each():
        for task in job.plan.tasks:
            receipts.append(run_task(job, task))
            on_receipt(task, receipts[-1])
    return receipts
