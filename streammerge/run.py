"""Runs a plan into a directory: allocate, execute, finish. Loading this module loads torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from streammerge import events
from streammerge.adapter import Adapter
from streammerge.assembly import assemble
from streammerge.errors import StoppedError, StorageError, StreammergeError
from streammerge.executors.serial import run_serial
from streammerge.finish import ModuleReport, finish
from streammerge.kernels.census import Cuts, Question, Standing, Tally, take_census
from streammerge.ledger import Ledger
from streammerge.output.header import metadata_of
from streammerge.output.journal import Unfinished
from streammerge.output.staging import Staging
from streammerge.output.writer import allocate, clear, forget, reopen
from streammerge.plans import Census, Plan, Task
from streammerge.registry import RULES
from streammerge.resume import check_same, identity, standings_of, take_back
from streammerge.worker import (
    Job,
    Perform,
    Receipt,
    TaskStoppedError,
    count_task,
    fingerprint,
    run_task,
)

if TYPE_CHECKING:
    from streammerge.executors.cluster import Cluster

Execute = Callable[[Job, Sequence[Task], Callable[[Task, Any], None], Perform], None]


def run_plan(
    plan: Plan,
    adapters: Sequence[Adapter],
    staging: Staging,
    tell: events.OnEvent,
    *,
    cluster: Cluster | None = None,
    mixed_hardware: bool = False,
    deadline: float = math.inf,
) -> tuple[Plan, list[Receipt], tuple[ModuleReport, ...]]:
    """Write the output of a plan into its staging directory, checked and durable.

    Args:
        plan: what to do.
        adapters: the manifests that it was made from.
        staging: where the output's files are written, and what an unfinished run has left there.
        tell: hears of every finished task.
        cluster: whose workers run the tasks, instead of this process.
        mixed_hardware: whether the run may have been begun where results round otherwise.
        deadline: when it is to stop, on the clock of `time.monotonic`.

    Returns:
        The plan, with the ranks and places that came out where those were late; receipts and
        reports, in the order of its tasks.

    Raises:
        ResumeError: what was begun is not what is planned.
        StoppedError: the time is over; the journal says what is done.
        MergeFailedError: a subclass of it says what failed.
    """
    found = fingerprint(plan.device) if cluster is None else cluster.fingerprint(plan.device)
    now = identity(plan, adapters, found)
    unfinished, directory = staging.unfinished, staging.draft if plan.late else staging.path
    if unfinished is not None:
        before = unfinished.identity
        check_same(staging.output, before, now, mixed_hardware=mixed_hardware)
        found = now["fingerprint"] = _both(before["fingerprint"], found)
    if plan.late:
        directory.mkdir(exist_ok=True)
        clear(staging.path)  # an assembly may have been begun
    starts, reopened = _open_files(plan, staging, directory)
    if cluster is not None:
        cluster.check_files(plan, adapters, directory)
    ledger = Ledger(plan, staging.journal)
    job = Job(plan, adapters, directory, starts, deadline)
    try:
        taken = take_back(plan, reopened, directory, starts, job.check_time) if reopened else ()
        ledger.begin(now, taken, standings_of(reopened) if reopened else ())
        if plan.census is not None:
            job.cuts = _find_cuts(job, ledger, plan.census, tell, cluster)
        _execute(job, ledger, tell, cluster)
        if plan.late:
            plan, starts = assemble(
                plan, ledger.receipts, directory, starts, staging.path, check=job.check_time
            )
        reports = finish(
            plan,
            adapters,
            staging.path,
            starts,
            ledger,
            cuts=job.cuts,
            fingerprint=found,
            check=job.check_time,
        )
    except TaskStoppedError as error:
        done, targets = len(plan.tasks) - len(ledger.unfinished), len(plan.tasks)
        raise StoppedError("the time limit is over", done=done, targets=targets) from error
    except OSError as error:
        if isinstance(error, StreammergeError):
            raise
        # What nobody foresaw, such as a limit of open files that is reached anywhere.
        raise StorageError(f"{error.strerror}", path=str(error.filename or directory)) from error
    finally:
        job.files.close()
    return plan, ledger.receipts, reports


def _open_files(
    plan: Plan, staging: Staging, directory: Path
) -> tuple[tuple[int, ...], Unfinished | None]:
    """Return where the data of each file begin that tasks write to, and the unfinished run that
    wrote to them."""
    if staging.unfinished is not None:
        starts = reopen(directory, plan.files, plan.regions, metadata_of(plan))
        if starts is not None:
            for file in plan.files:
                forget(directory / file.name)
            return starts, staging.unfinished
        staging.journal.drop()
    return allocate(directory, plan.files, plan.regions, metadata_of(plan)), None


def _both(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return what decided the rounding of a run that was done in two places."""
    if before == now:
        return now
    parts = [*before.get("mixed", [before]), *now.get("mixed", [now])]
    return {"mixed": [part for i, part in enumerate(parts) if part not in parts[:i]]}


def _find_cuts(
    job: Job, ledger: Ledger, census: Census, tell: events.OnEvent, cluster: Cluster | None
) -> Cuts:
    """Return the thresholds over whole adapters: those that are not known yet are looked for."""
    targets = job.plan.targets
    places = {task.target: place for place, task in enumerate(targets)}
    passes = itertools.count(1)

    def count(question: Question) -> Tally:
        total = Tally(question, len(targets), job.dtype)
        read = sum(task.read_bytes for task in targets)
        tell(events.Counting(next(passes), most, len(targets), read))

        def on_tally(tasks: Sequence[Task], tally: Tally) -> None:
            total.add(tally, [places[task.target] for task in tasks])
            for task in tasks:
                tell(events.Counted(task.target, task.read_bytes))

        if cluster is not None:
            cluster.count(job, targets, question, on_tally)
        else:
            perform = partial(count_task, question=question)
            _executor(job.plan)(job, targets, lambda task, tally: on_tally([task], tally), perform)
        return total

    searches = [ledger.standing(one) for one in _searches(job.plan)]
    waiting = {one.adapter for one in searches if not one.is_done(job.dtype)}
    most = census.passes * -(-len(waiting) // census.adapters_at_once)
    for standings in take_census(searches, census.adapters_at_once, job.dtype, count):
        ledger.note(standings)
    found = [ledger.standing(one) for one in searches]
    return Cuts.of(found, [task.target for task in targets], job.dtype)


def _searches(plan: Plan) -> list[Standing]:
    """Return what is looked for in each adapter that has a target."""
    rows = max(task.last for task in plan.targets)
    adapters, first = np.unique(plan.sources.adapter[:rows], return_index=True)
    densities = plan.sources.density[first].tolist()
    outliers = (plan.parameters["gamma"],) if RULES[plan.rule].sparsity == "middle" else ()
    return [
        Standing(adapter, shares)
        for adapter, density in zip(adapters.tolist(), densities, strict=True)
        for shares in ((*outliers, density)[:count] for count in range(1, len(outliers) + 2))
    ]


def _execute(job: Job, ledger: Ledger, tell: events.OnEvent, cluster: Cluster | None) -> None:
    """Run what is still to be done."""
    tasks = ledger.unfinished
    plan = job.plan
    done = len(plan.tasks) - len(tasks)
    if done:
        tell(events.Resumed(done, len(plan.tasks)))
    read, write = (
        sum(getattr(task, f"{way}_bytes") for task in tasks) for way in ("read", "write")
    )
    tell(events.Planned(len(tasks), read, write))

    def on_receipt(task: Task, receipt: Receipt) -> None:
        ledger.record(task, receipt)
        written = receipt.done(task).write_bytes
        tell(events.TaskDone(task.target, task.read_bytes, written, receipt.seconds))

    if tasks:
        if cluster is not None:
            cluster.run(job, tasks, on_receipt)
        else:
            _executor(plan)(job, tasks, on_receipt, run_task)


def _executor(plan: Plan) -> Execute:
    if plan.concurrency == 1:
        return run_serial
    # dask takes a while to load and is not needed for one task at a time.
    from streammerge.executors.threads import run_threads  # noqa: PLC0415

    return run_threads
