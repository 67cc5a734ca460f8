"""What a worker of a dask cluster does: says what it is, looks at files, runs bundles of tasks.

These functions are sent by name, so scheduler and workers need streammerge. What they are given and
return is small: a bundle's plan and manifests lie in a file beside the output, which all workers
see.
"""

from __future__ import annotations

import pickle
import platform
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TypeVar
from weakref import WeakValueDictionary

from distributed import Worker, get_worker

from streammerge.adapter import Adapter, TensorFile
from streammerge.allocator import give_back
from streammerge.budget import CPU, Device, Grant, format_size, granted_by_machine
from streammerge.errors import (
    MergeFailedError,
    RecipeError,
    StorageError,
    StreammergeError,
    WorkerError,
)
from streammerge.hub import Ranges
from streammerge.kernels.census import Cuts, Question, Tally
from streammerge.kernels.each import Each
from streammerge.output.parts import make_part
from streammerge.output.space import find_scratch
from streammerge.output.writer import sync_file
from streammerge.plans import OutputFile, Plan, Task
from streammerge.registry import origin
from streammerge.worker import (
    Job,
    Lanes,
    Receipt,
    TaskStoppedError,
    count_task,
    find_device,
    fingerprint,
    measure_process,
    one_thread_each,
    rule_problem,
    run_task,
    warm_up,
)

R = TypeVar("R")

SAFE_SHARE = 0.75
"""Of a worker's memory limit: at 0.8 of it dask lets a worker begin no more tasks."""


@dataclass(frozen=True)
class WorkerFacts:
    """What a worker is; sizes in bytes."""

    address: str
    host: str
    version: str
    rule_origin: str | None
    """The distribution that brings the rule there, and its version; None of streammerge's own."""
    rule_problem: str | None
    """Why the rule cannot be used there."""
    threads: int
    limit_bytes: int | None
    """What it may take of the memory limit beyond which dask stops it; None where it has none."""
    granted: tuple[Grant, ...]
    """What its machine, its control groups and its job grant."""
    process_bytes: int
    """What it holds before any task, with all libraries loaded and warm."""
    fingerprints: dict[str, dict[str, str]]
    """What decides the rounding of results on the CPU, and on its device."""
    device: Device


@dataclass(frozen=True)
class Terms:
    """What a worker of a run must be like; one that comes late is held to it with each bundle."""

    run: str
    """Name of the run."""
    version: str
    """Of streammerge."""
    fingerprint: dict[str, str] | None
    """What decides the rounding of results; None if any will do."""


def describe(device: str, max_vram: int | None, rule: str) -> WorkerFacts:
    """Return what the worker is that this runs on.

    Args:
        device: where tasks are to compute, as torch spells it.
        max_vram: in bytes; what is free on the device, with headroom, when None.
        rule: that tasks are to apply.

    Raises:
        RecipeError: it has no such device.
    """
    worker = get_worker()
    problem = rule_problem(rule)
    found = find_device(device, max_vram)
    return WorkerFacts(
        address=worker.address,
        host=platform.node(),
        version=metadata.version("streammerge"),
        rule_origin=origin(rule),
        rule_problem=problem,
        threads=worker.state.nthreads,
        limit_bytes=_limit(worker),
        granted=tuple(granted_by_machine()),
        # One that lacks the rule is refused, whatever it holds.
        process_bytes=0 if problem else measure_process(rule),
        fingerprints={name: fingerprint(name) for name in (CPU, found.name)},
        device=found,
    )


def other_rule(
    rule: str, expected: str | None, found: str | None, problem: str | None
) -> str | None:
    """Return why a worker cannot apply a rule as the others do; None if it can.

    Args:
        rule: its name.
        expected: the distribution that is to bring it, and its version.
        found: that which brings it there.
        problem: why it cannot be used there.
    """
    if found == expected:
        return problem
    if found is None:
        return f"lacks {expected}, which brings the rule {rule} ({problem})"
    return f"has the rule {rule} of {found}, not of {expected or 'streammerge'}"


def look(
    files: Sequence[TensorFile], probe: str, content: bytes, scratch: str | None
) -> str | None:
    """Return what is wrong with the worker's view of its files; None if nothing is.

    Args:
        files: the inputs.
        probe: a file that was just written where parts will be.
        content: what is in it.
        scratch: directory for tiles.
    """
    problem = _look_at_hub([file for file in files if file.etag is not None])
    problem = problem or _look_here([file for file in files if file.etag is None])
    if problem is not None:
        return problem
    directory = Path(probe).parent
    try:
        if Path(probe).read_bytes() != content:
            return f"sees another {directory}"
        # What may be written is known by writing.
        mine = directory / uuid.uuid4().hex
        mine.touch()
        mine.unlink()
        find_scratch(scratch or "none", None)
    except OSError as error:
        return f"cannot write to {directory} ({error.strerror}), where the output is made"
    except RecipeError as error:
        return str(error)
    return None


def _look_here(files: Sequence[TensorFile]) -> str | None:
    for file in files:
        try:
            status = Path(file.path).stat()
        except OSError as error:
            return f"does not see {file.path} ({error.strerror})"
        if (status.st_size, status.st_mtime_ns, status.st_ino) != (
            file.size,
            file.mtime_ns,
            file.inode,
        ):
            return f"sees another {file.path}"
    return None


def _look_at_hub(files: Sequence[TensorFile]) -> str | None:
    """Return what is wrong with the worker's view of the Hub: one file of each repository."""
    ranges, first = Ranges(), {file.path.partition("@")[0]: file for file in files}
    for repo, file in first.items():
        try:
            if ranges.open(file.path) != file:
                return f"sees another {file.path}"
        except MergeFailedError as error:
            return f"cannot read {repo} on the Hub, with the token that it has: {error}"
    return None


@dataclass(frozen=True)
class Parcel:
    """What a worker needs to run a bundle of tasks."""

    plan: Plan
    """Of these tasks alone."""
    adapters: dict[int, Adapter]
    """The manifests of what they read, by position."""
    cuts: Cuts | None
    """Thresholds over whole adapters, where they are known."""

    def job(self, path: Path) -> Job:
        """Return the tasks' job; when `path` is gone, where the parcel lies, it is over."""
        return Job(self.plan, self.adapters, path.parent, starts=(0,), lease=path, cuts=self.cuts)


class Gate:
    """Holds a worker to the plan: so many tasks in flight at once, or one that is alone."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._free = threading.Semaphore(slots)
        self._door = threading.Lock()

    @contextmanager
    def passed(self, *, alone: bool) -> Iterator[None]:
        """Wait for room for a task and keep it as long as the block lasts."""
        needed = self._slots if alone else 1
        # One at a time waits, so a task that needs all slots gets them as others end.
        with self._door:
            for _ in range(needed):
                self._free.acquire()
        try:
            yield
        finally:
            self._free.release(needed)


_GATES: WeakValueDictionary[tuple[str, str], Gate] = WeakValueDictionary()
"""By run and worker, as long as a bundle is in hand: a process may hold several workers."""

_MAKING_GATES = threading.Lock()


def run_bundle(path: str, terms: Terms) -> tuple[str, list[Receipt]]:
    """Run the tasks of a bundle and write what comes out into a part file of this attempt.

    Args:
        path: where the bundle's plan and manifests lie.
        terms: what the worker must be like.

    Returns:
        The part file and the receipts, in the order of the tasks.

    Raises:
        WorkerError: the worker is not like those that the run began with.
        MergeFailedError: a subclass of it says what failed.
    """
    worker = get_worker()
    parcel, gate = admit(worker, path, terms)
    threads = worker.state.nthreads
    return run_tasks(
        parcel, Path(path), gate, lambda job, task: _on_lanes(job, task, threads, run_task)
    )


def count_bundle(path: str, terms: Terms, asked: str) -> str:
    """Count what a pass asks of the targets of a bundle.

    Args:
        path: where the bundle's plan and manifests lie.
        terms: what the worker must be like.
        asked: file with what is asked.

    Returns:
        The file with what was counted, as `Tally.packed` gives it.

    Raises:
        WorkerError: the worker is not like those that the run began with.
        StorageError: the file system refused.
        MergeFailedError: a subclass of it says what failed.
    """
    worker = get_worker()
    parcel, gate = admit(worker, path, terms)
    question: Question = pickle.loads(Path(asked).read_bytes())
    perform = partial(count_task, question=question)
    job, threads = parcel.job(Path(path)), worker.state.nthreads
    tally = Tally(question, len(parcel.plan.tasks), job.dtype)
    try:
        with one_thread_each():
            for place, task in enumerate(parcel.plan.tasks):
                with gate.passed(alone=task.alone):
                    tally.add(_on_lanes(job, task, threads, perform), [place])
    finally:
        job.files.close()
        give_back()
    counted = Path(path).with_name(f"{uuid.uuid4().hex}.counted")
    with stored(counted):
        counted.write_bytes(pickle.dumps(tally.packed(), protocol=5))
    return str(counted)


def admit(worker: Worker, path: str, terms: Terms) -> tuple[Parcel, Gate]:
    """Return what lies at `path`, and the gate for its tasks.

    Raises:
        WorkerError: the worker is not like those that the run began with.
    """
    # A worker that came late has not been asked to describe itself.
    warm_up()
    # The file was written by this very run, into a directory that only its user may write to.
    parcel: Parcel = pickle.loads(Path(path).read_bytes())
    plan = parcel.plan
    problem = _misfit(worker, plan, terms)
    if problem:
        targets = tuple(task.target for task in plan.tasks)
        raise WorkerError(problem, worker=worker.address, targets=targets)
    with _MAKING_GATES:
        gate = _GATES.setdefault((terms.run, worker.address), Gate(plan.concurrency))
    return parcel, gate


def _misfit(worker: Worker, plan: Plan, terms: Terms) -> str | None:
    """Return why a worker must not run tasks of a plan."""
    if metadata.version("streammerge") != terms.version:
        return f"has streammerge {metadata.version('streammerge')}, the others {terms.version}"
    problem = other_rule(plan.rule, plan.rule_origin, origin(plan.rule), rule_problem(plan.rule))
    if problem is not None:
        return problem
    found, limit = fingerprint(plan.device), _limit(worker)
    if terms.fingerprint not in (None, found):
        return f"computes with {found}, the others with {terms.fingerprint}; see mixed_hardware"
    if limit is not None and limit < plan.projected_bytes:
        return f"may take {format_size(limit)}, the plan {format_size(plan.projected_bytes)}"
    return None


def run_tasks(
    parcel: Parcel, path: Path, gate: Gate, run: Callable[[Job, Task], Receipt]
) -> tuple[str, list[Receipt]]:
    """Run the tasks of a part of a plan and write what comes out into a part file of this attempt.

    Args:
        parcel: the part, with what it needs.
        path: where it lies; when it is gone, the run is over.
        gate: lets in as many tasks at once as there is room for.
        run: runs one of them.

    Returns:
        The part file and the receipts.

    Raises:
        MergeFailedError: a subclass of it says what failed.
    """
    plan = parcel.plan
    part = make_part(path.parent, plan.write_bytes)
    plan = replace(plan, files=(OutputFile(part.name, plan.write_bytes),))
    job = replace(parcel, plan=plan).job(path)
    receipts = []
    try:
        with one_thread_each():
            for task in plan.tasks:
                with gate.passed(alone=task.alone):
                    receipts.append(run(job, task))
        sync_file(part)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    finally:
        job.files.close()
        give_back()
    return str(part), receipts


def _on_lanes(job: Job, task: Task, threads: int, perform: Callable[[Job, Task, Each], R]) -> R:
    lanes = min(task.lanes, threads)
    if not task.alone or lanes == 1:
        return perform(job, task, map)
    with ThreadPoolExecutor(lanes) as pool:
        return perform(job, task, Lanes(pool, lanes, job.stopped))


@contextmanager
def stored(path: Path) -> Iterator[None]:
    """Have a file system's refusal told as such, and leave no file of it."""
    try:
        yield
    except OSError as error:
        path.unlink(missing_ok=True)
        if isinstance(error, StreammergeError):
            raise
        if not path.parent.is_dir():
            raise TaskStoppedError from error
        raise StorageError(f"{error.strerror}", path=str(error.filename or path)) from error


def _limit(worker: Worker) -> int | None:
    limit = worker.memory_manager.memory_limit
    return None if limit is None else int(limit * SAFE_SHARE)
