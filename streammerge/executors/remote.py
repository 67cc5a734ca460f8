"""What a worker of a dask cluster does: says what it is, looks at files, runs bundles of tasks.

These functions are sent by name, so a worker needs streammerge of the same version. What they are
given and return is small: a bundle's plan and manifests lie in a file beside the output, which all
workers see.
"""

from __future__ import annotations

import os
import pickle
import platform
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import cast

from distributed import get_worker
from distributed.diagnostics.plugin import WorkerPlugin

from streammerge.adapter import Adapter, TensorFile
from streammerge.budget import Device, granted_by_machine
from streammerge.errors import WorkerError
from streammerge.output.parts import make_part
from streammerge.output.writer import sync_file
from streammerge.plans import OutputFile, Plan, Task
from streammerge.worker import (
    Job,
    Lanes,
    Receipt,
    find_device,
    fingerprint,
    measure_process,
    one_thread_each,
    run_task,
    warm_up,
)


@dataclass(frozen=True)
class WorkerFacts:
    """What a worker is; sizes in bytes."""

    address: str
    host: str
    version: str
    threads: int
    memory_limit: int | None
    """dask's; a worker that exceeds it is stopped. None where it has none."""
    granted_bytes: int
    """What its machine grants one process; shared by the workers there that have no limit."""
    process_bytes: int
    """What it holds before any task, with all libraries loaded and warm."""
    fingerprint: dict[str, str]
    device: Device


def describe(device: str, max_vram: int | None) -> WorkerFacts:
    """Return what the worker is that this runs on.

    Args:
        device: where tasks are to compute, as torch spells it.
        max_vram: in bytes; what is free on the device, with headroom, when None.

    Raises:
        RecipeError: it has no such device.
    """
    worker = get_worker()
    return WorkerFacts(
        address=worker.address,
        host=platform.node(),
        version=metadata.version("streammerge"),
        threads=worker.state.nthreads,
        memory_limit=worker.memory_manager.memory_limit,
        granted_bytes=min(granted_by_machine())[0],
        process_bytes=measure_process(),
        fingerprint=fingerprint(device),
        device=find_device(device, max_vram),
    )


def look(files: Sequence[TensorFile], probe: str, content: bytes) -> str | None:
    """Return what is wrong with the worker's view of inputs and output; None if nothing is."""
    for file in files:
        try:
            status = Path(file.path).stat()
        except OSError as error:
            return f"it does not see {file.path} ({error.strerror})"
        if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
            return f"it sees another {file.path}"
    try:
        if Path(probe).read_bytes() == content and os.access(Path(probe).parent, os.W_OK):
            return None
    except OSError:
        pass
    return f"it cannot write to {Path(probe).parent}, where the output is made"


class Gate(WorkerPlugin):
    """Holds a worker to the plan: so many tasks in flight at once, or one that is alone."""

    def __init__(self, run: str, slots: int) -> None:
        """Make it for the run of this name; it is set up on all workers, late ones too."""
        self.name = run
        self._slots = slots

    def setup(self, worker: object) -> None:  # noqa: ARG002  # dask's signature
        """Make what cannot be sent."""
        self._free = threading.Semaphore(self._slots)
        self._door = threading.Lock()

    @contextmanager
    def passed(self, task: Task) -> Iterator[None]:
        """Wait for room for a task and keep it as long as the block lasts."""
        needed = self._slots if task.alone else 1
        # One at a time waits, so a task that needs all slots gets them as others end.
        with self._door:
            for _ in range(needed):
                self._free.acquire()
        try:
            yield
        finally:
            self._free.release(needed)


def run_bundle(path: str, run: str, expected: dict[str, str] | None) -> tuple[str, list[Receipt]]:
    """Run the tasks of a bundle and write what comes out into a part file of this attempt.

    Args:
        path: where the bundle's plan and manifests lie.
        run: name of the run.
        expected: the numeric fingerprint that the worker must have; None if any will do.

    Returns:
        The part file and the receipts, in the order of the tasks.

    Raises:
        WorkerError: the worker rounds in another way than those that the run began with.
        MergeFailedError: a subclass of it says what failed.
    """
    worker = get_worker()
    # A worker that came late has not been asked to describe itself.
    warm_up()
    # The file was written by this very run, into a directory that only its user may write to.
    plan, adapters = pickle.loads(Path(path).read_bytes())
    found = fingerprint(plan.device)
    if expected not in (None, found):
        targets = tuple(task.target for task in plan.tasks)
        message = f"computes with {found}, the others with {expected}; see mixed_hardware"
        raise WorkerError(message, worker=worker.address, targets=targets)
    return _run(plan, adapters, Path(path).parent, cast(Gate, worker.plugins[run]))


def _run(
    plan: Plan, adapters: Sequence[Adapter], directory: Path, gate: Gate
) -> tuple[str, list[Receipt]]:
    part = make_part(directory, plan.write_bytes)
    plan = replace(plan, files=(OutputFile(part.name, plan.write_bytes),))
    job = Job(plan, adapters, directory, starts=(0,))
    receipts = []
    try:
        with one_thread_each():
            for task in plan.tasks:
                with gate.passed(task), ThreadPoolExecutor(task.lanes) as pool:
                    each = Lanes(pool, task.lanes, job.stopped) if task.alone else map
                    receipts.append(run_task(job, task, each))
        sync_file(part)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    finally:
        job.files.close()
    return str(part), receipts
