"""A dask cluster: workers that are asked and checked first, and then run bundles of tasks."""

from __future__ import annotations

import os
import pickle
import pkgutil
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from distributed import Client, as_completed
from distributed.scheduler import KilledWorker

from streammerge.adapter import Adapter
from streammerge.budget import Budget, Device
from streammerge.errors import ClusterError, StorageError, WorkerError
from streammerge.executors import workers
from streammerge.executors.bundles import bundles, node_name
from streammerge.executors.remote import Terms, WorkerFacts, describe, look, run_bundle
from streammerge.executors.workers import (
    LOST,
    VERSION,
    addresses,
    ask,
    check_alike,
    check_scheduler,
    common_budget,
    connect,
    lost_as,
)
from streammerge.output.parts import seal
from streammerge.planner.part import take_part
from streammerge.plans import Plan, Task
from streammerge.worker import Job, Receipt


class Cluster:
    """The workers of a dask cluster, for one merge."""

    def __init__(self, scheduler: str | os.PathLike[str] | Client) -> None:
        """Connect to it.

        Args:
            scheduler: an address (tcp://…, tls://…), a scheduler file, or a client, which stays
                open.

        Raises:
            ClusterError: it cannot be reached.
        """
        self._open = ExitStack()
        if isinstance(scheduler, Client):
            self._client = scheduler
        else:
            self._client = self._open.enter_context(connect(os.fspath(scheduler)))
        self._run = f"streammerge-{uuid.uuid4().hex[:8]}"
        self._workers: list[WorkerFacts] = []
        self._mixed = False

    def __enter__(self) -> Self:
        self._open.enter_context(self._client.as_current())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(*LOST):
            self._open.close()

    @property
    def size(self) -> int:
        """How many workers have answered."""
        return len(self._workers)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides the rounding of results on the workers; what each has, where it differs."""
        found = self._workers[0].fingerprint
        if all(worker.fingerprint == found for worker in self._workers):
            return dict(found)
        return {"mixed": [worker.fingerprint for worker in self._workers]}

    def survey(
        self, max_memory: int | None, device: str, max_vram: int | None, *, mixed_hardware: bool
    ) -> tuple[Budget, Device]:
        """Ask all workers what they are; return what each of them may take.

        Args:
            max_memory: for each worker's process, in bytes; what the smallest has when None.
            device: where tasks compute, as torch spells it.
            max_vram: of each worker's device, in bytes; what is free when None.
            mixed_hardware: whether workers may round differently.

        Returns:
            What the least of the workers has.

        Raises:
            ClusterError: there is no worker, or they do not fit together or with what is asked.
            RecipeError: a worker has no such device.
        """
        self._mixed = mixed_hardware
        with lost_as(ClusterError):
            check_scheduler(self._client)
            with suppress(TimeoutError):
                self._client.wait_for_workers(1, timeout=workers.ANSWER_SECONDS)
            # By name, so that a worker without it says so; a function that it cannot load would
            # end it.
            ask(self._client, pkgutil.resolve_name, "streammerge.executors.remote:describe")
            self._workers = list(ask(self._client, describe, device, max_vram).values())
        if not self._workers:
            raise ClusterError(f"no worker has come within {workers.ANSWER_SECONDS} s")
        check_alike(self._workers, mixed=self._mixed)
        return common_budget(self._workers, max_memory), min(
            (worker.device for worker in self._workers), key=lambda found: found.allowed_bytes
        )

    def check_files(self, plan: Plan, adapters: Sequence[Adapter], directory: Path) -> None:
        """Check that all workers see the inputs and the output's directory as they are here.

        Raises:
            ClusterError: one does not.
        """
        files = [file for adapter in adapters for file in _anywhere(adapter).files]
        content = uuid.uuid4().bytes
        parts = self._make_directory(directory)
        probe = parts / "probe"
        _write(probe, content)
        with lost_as(ClusterError):
            problems = ask(self._client, look, files, str(probe), content, plan.scratch)
        for worker, problem in problems.items():
            if problem:
                raise ClusterError(problem, worker=worker)

    def run(
        self, job: Job, tasks: Sequence[Task], on_receipt: Callable[[Task, Receipt], None]
    ) -> None:
        """Run tasks of a job on the workers and seal what they write into the output.

        Raises:
            TaskStoppedError: the time is over.
            WorkerError: the cluster was lost, or a worker again and again with a task.
            MergeFailedError: a subclass of it says what failed.
        """
        directory = self._make_directory(job.directory)
        futures: dict[Any, tuple[Task, ...]] = {}
        try:
            with lost_as(WorkerError):
                self._submit(job, tasks, directory, futures)
                self._collect(job, futures, on_receipt)
        finally:
            with suppress(*LOST):
                self._client.cancel(list(futures))
            left = _remove(directory)
        if left:
            raise StorageError("cannot be removed", path=str(left))

    def _submit(
        self,
        job: Job,
        tasks: Sequence[Task],
        directory: Path,
        futures: dict[Any, tuple[Task, ...]],
    ) -> None:
        """Give the scheduler all bundles."""
        terms = Terms(
            run=self._run,
            version=VERSION,
            fingerprint=None if self._mixed else self._workers[0].fingerprint,
        )
        threads = sum(worker.threads for worker in self._workers)
        adapters = [_anywhere(job.adapters[i]) for i in range(len(job.adapters))]
        for number, bundle in enumerate(bundles(tasks, threads)):
            path = directory / f"{number:05d}.tasks"
            _write(path, pickle.dumps(take_part(job.plan, adapters, bundle)))
            key = f"{node_name(bundle, number)}-{self._run}"
            future = self._client.submit(run_bundle, str(path), terms, key=key)
            futures[future] = bundle

    def _collect(
        self,
        job: Job,
        futures: dict[Any, tuple[Task, ...]],
        on_receipt: Callable[[Task, Receipt], None],
    ) -> None:
        """Seal the parts as they come."""
        names = [file.name for file in job.plan.files]
        for future in self._finished(job, futures):
            bundle = futures.pop(future)
            part, receipts = _result(future, bundle)
            # Released, or its tasks would run again if the worker were lost later.
            future.release()
            regions = [region for task in bundle for region in (task.a, task.b)]
            checksums = [checksum for receipt in receipts for checksum in receipt.checksums]
            moves = list(zip(regions, checksums, strict=True))
            seal(Path(part), job.directory, job.starts, names, moves)
            for task, receipt in zip(bundle, receipts, strict=True):
                on_receipt(task, receipt)

    def _finished(self, job: Job, futures: dict[Any, tuple[Task, ...]]) -> Iterator[Any]:
        """Yield futures as they finish, until there are none; the caller takes them out."""
        seen = time.monotonic()
        while futures:
            job.check()
            try:
                yield from as_completed(list(futures), timeout=workers.POLL_SECONDS)
            except TimeoutError:
                if addresses(self._client):
                    seen = time.monotonic()
                elif time.monotonic() - seen > workers.ANSWER_SECONDS:
                    raise WorkerError("there is no worker any more") from None

    def _make_directory(self, output: Path) -> Path:
        """Return where this run's bundles and parts lie; nobody else may write there."""
        directory = output / f".{self._run}"
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot be made ({error.strerror})", path=str(directory)) from error
        return directory


def _anywhere(adapter: Adapter) -> Adapter:
    """Return the manifest with paths that do not depend on the directory one works in."""
    files = (replace(file, path=str(Path(file.path).absolute())) for file in adapter.files)
    return replace(adapter, files=tuple(files))


def _result(future: Any, bundle: Sequence[Task]) -> tuple[str, list[Receipt]]:
    try:
        result: tuple[str, list[Receipt]] = future.result()
    except KilledWorker as error:
        raise WorkerError(
            "workers were lost with it again and again; their logs say why. Too little memory is "
            "the usual reason",
            worker=error.last_worker.address,
            targets=tuple(task.target for task in bundle),
        ) from error
    return result


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise StorageError(f"cannot be written ({error.strerror})", path=str(path)) from error


def _remove(directory: Path) -> Path | None:
    """Remove a run's directory, in which workers may still be writing; return it if it stays."""
    # Under another name first: what they write from now on has nowhere to go.
    gone = directory.with_name(f"{directory.name}-over")
    with suppress(OSError):
        directory.rename(gone)
    for _ in range(2):
        shutil.rmtree(gone, ignore_errors=True)
    return gone if gone.exists() else None
