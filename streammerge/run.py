"""Runs a plan into a directory: allocate, execute, finish. Loading this module loads torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from streammerge import events
from streammerge.adapter import Adapter
from streammerge.executors.serial import run_serial
from streammerge.finish import ModuleReport, finish
from streammerge.output.writer import allocate
from streammerge.plans import Plan, Task
from streammerge.worker import Job, Receipt, fingerprint

if TYPE_CHECKING:
    from streammerge.executors.cluster import Cluster


def run_plan(
    plan: Plan,
    adapters: Sequence[Adapter],
    directory: Path,
    tell: events.OnEvent,
    cluster: Cluster | None = None,
) -> tuple[list[Receipt], tuple[ModuleReport, ...]]:
    """Write the output of a plan into an empty directory, checked and durable.

    Args:
        plan: what to do.
        adapters: the manifests that it was made from.
        directory: where the output's files are written.
        tell: hears of every finished task.
        cluster: whose workers run the tasks, instead of this process.

    Returns:
        Receipts and reports, in the order of the plan's tasks.

    Raises:
        MergeFailedError: a subclass of it says what failed.
    """
    if cluster is not None:
        cluster.check_files(plan, adapters, directory)
    regions = [region for task in plan.tasks for region in (task.a, task.b)]
    starts = allocate(directory, plan.files, regions, plan.dtype)
    job = Job(plan, adapters, directory, starts)
    tell(events.Planned(len(plan.tasks), plan.read_bytes, plan.write_bytes))

    def on_receipt(task: Task, receipt: Receipt) -> None:
        tell(events.TaskDone(task.target, task.read_bytes, task.write_bytes, receipt.seconds))

    try:
        receipts = _executor(plan, cluster)(job, on_receipt)
    finally:
        job.files.close()
    found = fingerprint(plan.device) if cluster is None else cluster.fingerprint
    return receipts, finish(plan, adapters, directory, starts, receipts, fingerprint=found)


def _executor(
    plan: Plan, cluster: Cluster | None
) -> Callable[[Job, Callable[[Task, Receipt], None]], list[Receipt]]:
    if cluster is not None:
        return cluster.run
    if plan.concurrency == 1:
        return run_serial
    # dask takes a while to load and is not needed for one task at a time.
    from streammerge.executors.threads import run_threads  # noqa: PLC0415

    return run_threads
