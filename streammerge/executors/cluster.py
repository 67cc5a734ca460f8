"""A dask cluster: workers that are asked and checked first, and then run bundles of tasks."""

from __future__ import annotations

import os
import pickle
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from distributed import Client, as_completed, wait
from distributed.scheduler import KilledWorker

from streammerge.adapter import Adapter
from streammerge.budget import HEADROOM, Budget, Device, format_size
from streammerge.errors import ClusterError, WorkerError
from streammerge.executors.bundles import bundles, node_name
from streammerge.executors.remote import Gate, WorkerFacts, describe, look, run_bundle
from streammerge.output.parts import seal
from streammerge.output.writer import write_file
from streammerge.planner.part import take_part
from streammerge.plans import Task
from streammerge.worker import Job, Receipt

CONNECT_SECONDS = 30
"""How long is waited for the scheduler."""

ANSWER_SECONDS = 300
"""How long is waited for a first worker, and for the answers of all: jobs may stand in a queue,
and loading torch over a network takes a while."""

SAFE_SHARE = 0.75
"""Of a worker's memory limit: at 0.8 of it dask lets a worker begin no more tasks."""


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
            self._client = self._open.enter_context(_connect(os.fspath(scheduler)))
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
        self._open.close()

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
        with suppress(TimeoutError):
            self._client.wait_for_workers(1, timeout=ANSWER_SECONDS)
        self._workers = self._ask(describe, device, max_vram)
        if not self._workers:
            raise ClusterError(f"no worker has come within {ANSWER_SECONDS} s")
        self._check_alike()
        allowed, least = min(
            (_allowed(worker, self._workers), worker.address) for worker in self._workers
        )
        origin = f"worker {least}"
        if max_memory is not None:
            if max_memory > allowed:
                raise ClusterError(
                    f"may take {format_size(allowed)}, which is less than max_memory, "
                    f"{format_size(max_memory)}",
                    worker=least,
                )
            allowed, origin = max_memory, "max_memory, for each worker"
        budget = Budget(
            allowed_bytes=allowed,
            origin=origin,
            process_bytes=max(worker.process_bytes for worker in self._workers),
            threads=max(worker.threads for worker in self._workers),
        )
        return budget, min((w.device for w in self._workers), key=lambda d: d.allowed_bytes)

    def check_files(self, adapters: Sequence[Adapter], directory: Path) -> None:
        """Check that all workers see the inputs and the output's directory as they are here.

        Raises:
            ClusterError: one does not.
        """
        files = [file for adapter in adapters for file in adapter.files]
        content = uuid.uuid4().bytes
        probe = directory / ".probe"
        probe.write_bytes(content)
        try:
            problems = self._ask(look, files, str(probe), content)
        finally:
            probe.unlink()
        for worker, problem in zip(self._workers, problems, strict=False):
            if problem:
                raise ClusterError(problem, worker=worker.address)

    def run(self, job: Job, on_receipt: Callable[[Task, Receipt], None]) -> list[Receipt]:
        """Run all tasks of a job on the workers and seal what they write into the output.

        Returns:
            The receipts in the plan's order.

        Raises:
            WorkerError: a worker was lost again and again with a task.
            MergeFailedError: a subclass of it says what failed.
        """
        run = f"streammerge-{uuid.uuid4().hex[:8]}"
        directory = job.directory / ".parts"
        directory.mkdir(mode=0o700)
        threads = sum(worker.threads for worker in self._workers)
        self._client.register_plugin(Gate(run, job.plan.concurrency))
        futures: dict[Any, tuple[Task, ...]] = {}
        expected = None if self._mixed else self._workers[0].fingerprint
        try:
            for number, bundle in enumerate(bundles(job.plan.tasks, threads)):
                path = directory / f"{number:05d}.tasks"
                write_file(path, pickle.dumps(take_part(job.plan, job.adapters, bundle)))
                key = f"{node_name(bundle, number)}-{run}"
                future = self._client.submit(run_bundle, str(path), run, expected, key=key)
                futures[future] = bundle
            done = self._collect(job, futures, on_receipt)
        finally:
            self._client.cancel(list(futures))
            self._client.unregister_worker_plugin(run)
        for path in directory.iterdir():
            # Of attempts that were lost, and the bundles.
            path.unlink()
        directory.rmdir()
        return [done[task.target] for task in job.plan.tasks]

    def _collect(
        self,
        job: Job,
        futures: dict[Any, tuple[Task, ...]],
        on_receipt: Callable[[Task, Receipt], None],
    ) -> dict[str, Receipt]:
        """Seal the parts as they come; return the receipts by target."""
        names = [file.name for file in job.plan.files]
        done: dict[str, Receipt] = {}
        for future in as_completed(list(futures)):
            bundle = futures.pop(future)
            part, receipts = _result(future, bundle)
            # Released, or its tasks would run again if the worker were lost later.
            future.release()
            regions = [region for task in bundle for region in (task.a, task.b)]
            checksums = [checksum for receipt in receipts for checksum in receipt.checksums]
            moves = list(zip(regions, checksums, strict=True))
            seal(Path(part), job.directory, job.starts, names, moves)
            for task, receipt in zip(bundle, receipts, strict=True):
                done[task.target] = receipt
                on_receipt(task, receipt)
        return done

    def _ask(self, question: Callable[..., Any], *args: Any) -> list[Any]:
        """Return every worker's answer; those that have answered once, if any have, in order."""
        known = [worker.address for worker in self._workers]
        addresses = known or sorted(self._client.scheduler_info(n_workers=-1)["workers"])
        futures = [
            self._client.submit(question, *args, workers=[address], pure=False)
            for address in addresses
        ]
        try:
            wait(futures, timeout=ANSWER_SECONDS)
            return [future.result() for future in futures]
        except TimeoutError as error:
            late = [a for a, f in zip(addresses, futures, strict=True) if not f.done()]
            raise ClusterError(
                f"has not answered within {ANSWER_SECONDS} s", worker=late[0]
            ) from error
        except (ImportError, AttributeError) as error:
            raise ClusterError(
                f"the workers cannot load streammerge {metadata.version('streammerge')} ({error})"
            ) from error
        finally:
            self._client.cancel(futures)

    def _check_alike(self) -> None:
        first = self._workers[0]
        for worker in self._workers:
            if worker.version != metadata.version("streammerge"):
                raise ClusterError(
                    f"has streammerge {worker.version}, not {metadata.version('streammerge')}",
                    worker=worker.address,
                )
            if not self._mixed and worker.fingerprint != first.fingerprint:
                raise ClusterError(
                    f"computes with {worker.fingerprint}, worker {first.address} with "
                    f"{first.fingerprint}; results would depend on which of them did what. "
                    "Choose like ones, or allow it with mixed_hardware",
                    worker=worker.address,
                )


def _connect(scheduler: str) -> Client:
    file = Path(scheduler)
    where: dict[str, Any] = {"address": scheduler}
    if "://" not in scheduler:
        if not file.is_file():
            raise ClusterError(
                f"scheduler {scheduler!r} is neither an address like tcp://HOST:PORT nor a file"
            )
        where = {"scheduler_file": str(file)}
    try:
        return Client(**where, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, TimeoutError, ValueError, KeyError) as error:
        raise ClusterError(f"scheduler {scheduler}: cannot be reached ({error})") from error


def _allowed(worker: WorkerFacts, workers: Sequence[WorkerFacts]) -> int:
    """Return what a worker's process may take."""
    beside = Counter(other.host for other in workers)[worker.host]
    granted = int(worker.granted_bytes * HEADROOM) // beside
    limit = worker.memory_limit
    return granted if limit is None else min(granted, int(limit * SAFE_SHARE))


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
