"""A dask cluster: workers that are asked and checked first, and then run bundles of tasks."""

from __future__ import annotations

import os
import pickle
import pkgutil
import shutil
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from distributed import Client, as_completed

from streammerge.adapter import Adapter
from streammerge.budget import ON_CPU, Budget, Device
from streammerge.errors import ClusterError, StorageError, WorkerError
from streammerge.executors import workers
from streammerge.executors.bundles import bundles, node_name
from streammerge.executors.parcels import Parcels, anywhere, sealed, write_small
from streammerge.executors.remote import (
    Terms,
    WorkerFacts,
    count_bundle,
    describe,
    look,
    run_bundle,
)
from streammerge.executors.team import lead, tidy_worker, wait_for
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
from streammerge.kernels.census import Question, Tally
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
        self._seen = 0.0

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

    def fingerprint(self, device: str) -> dict[str, Any]:
        """Return what decides the rounding of results on the workers' devices.

        Args:
            device: where they compute.

        Returns:
            What all have, or what each has, where it differs.
        """
        found = [worker.fingerprints[device] for worker in self._workers]
        if all(one == found[0] for one in found):
            return dict(found[0])
        return {"mixed": found}

    def survey(
        self,
        max_memory: int | None,
        device: str,
        max_vram: int | None,
        rule: str,
        *,
        mixed_hardware: bool,
    ) -> tuple[Budget, Device]:
        """Ask all workers what they are; return what each of them may take.

        Args:
            max_memory: for each worker's process, in bytes; what the smallest has when None.
            device: where tasks compute, as torch spells it.
            max_vram: of each worker's device, in bytes; what is free when None.
            rule: that they are to apply.
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
            ask(self._client, tidy_worker)
            self._workers = list(ask(self._client, describe, device, max_vram, rule).values())
        if not self._workers:
            raise ClusterError(f"no worker has come within {workers.ANSWER_SECONDS} s")
        devices = [worker.device for worker in self._workers]
        least = min(devices, key=lambda found: found.allowed_bytes)
        if any(found.name != least.name for found in devices):
            # Some have another accelerator, or none; the CPU is what all have.
            least = ON_CPU
        check_alike(self._workers, least.name, rule, mixed=self._mixed)
        return common_budget(self._workers, max_memory), least

    def check_files(self, plan: Plan, adapters: Sequence[Adapter], directory: Path) -> None:
        """Check that all workers see the inputs and the output's directory as they are here.

        Raises:
            ClusterError: one does not.
        """
        files = [file for adapter in adapters for file in anywhere(adapter).files]
        content = uuid.uuid4().bytes
        parts = self._make_directory(directory)
        probe = parts / "probe"
        write_small(probe, content)
        with lost_as(ClusterError):
            problems = ask(self._client, look, files, str(probe), content, plan.scratch)
        for worker, problem in problems.items():
            if problem:
                raise ClusterError(problem, worker=worker)

    def run(
        self, job: Job, tasks: Sequence[Task], on_receipt: Callable[[Task, Receipt], None]
    ) -> None:
        """Run tasks of a job on the workers and seal what they write into the output.

        Targets that several workers share come first: while a worker is in a team it does nothing
        else, so what it holds is within the budget.

        Raises:
            TaskStoppedError: the time is over.
            WorkerError: the cluster was lost, or a worker again and again with a task.
            MergeFailedError: a subclass of it says what failed.
        """
        with self._parcels(job, sealed(job, on_receipt)) as parcels:
            self._share(parcels, [task for task in tasks if task.team > 1])
            self._spread(parcels, [task for task in tasks if task.team == 1], run_bundle)

    def count(
        self,
        job: Job,
        tasks: Sequence[Task],
        question: Question,
        on_tally: Callable[[Sequence[Task], Tally], None],
    ) -> None:
        """Have the workers count what a pass asks of the tasks' targets.

        Each target is counted by one worker. What they count comes back in files.

        Raises:
            TaskStoppedError: the time is over.
            WorkerError: the cluster was lost, or a worker again and again with a task.
            MergeFailedError: a subclass of it says what failed.
        """

        def take(bundle: Sequence[Task], counted: str) -> None:
            # Written by this very run, into a directory that only its user may write to.
            parts = pickle.loads(Path(counted).read_bytes())
            Path(counted).unlink()
            on_tally(bundle, Tally(question, len(bundle), job.dtype).unpack(parts))

        with self._parcels(job, take) as parcels:
            asked = parcels.directory / "question"
            write_small(asked, pickle.dumps(question))
            # A name of its own, for dask takes what has the same one for the same.
            what = f"count-{uuid.uuid4().hex[:8]}"
            self._spread(parcels, tasks, count_bundle, str(asked), what=what)

    @contextmanager
    def _parcels(self, job: Job, take: Callable[[Sequence[Task], Any], None]) -> Iterator[Parcels]:
        """Have bundles on their way as long as the block lasts; nothing is left of them."""
        directory = self._make_directory(job.directory)
        parcels = Parcels(job, directory, take)
        try:
            with lost_as(WorkerError):
                self._seen = time.monotonic()
                yield parcels
        finally:
            with suppress(*LOST):
                self._client.cancel(list(parcels.out))
            left = _remove(directory)
        if left:
            raise StorageError("cannot be removed", path=str(left))

    def _share(self, parcels: Parcels, tasks: Sequence[Task]) -> None:
        """Run tasks on several workers each; a worker is in one team at a time."""
        waiting, teams = deque(tasks), dict[Any, list[str]]()
        while waiting or teams:
            parcels.job.check()
            there = self._addresses()
            for future in [f for f, team in teams.items() if not set(team) & set(there)]:
                # Nobody else may lead it, so it would wait for ever.
                self._client.cancel([future])
                waiting.extend(parcels.out.pop(future))
                del teams[future]
            busy = {member for team in teams.values() for member in team}
            free = [address for address in there if address not in busy]
            while waiting and free and (len(free) >= waiting[0].team or not teams):
                task = waiting.popleft()
                team, free = free[: task.team], free[task.team :]
                future = self._submit(parcels, lead, (task,), team, workers=team)
                teams[future] = team
            if teams:
                wait_for(list(teams))
            else:
                time.sleep(workers.POLL_SECONDS)
            for future in [future for future in teams if future.done()]:
                parcels.open(future)
                del teams[future]

    def _spread(
        self,
        parcels: Parcels,
        tasks: Sequence[Task],
        function: Callable[..., Any],
        *args: Any,
        what: str = "merge",
    ) -> None:
        """Have tasks done in bundles, on one worker each."""
        for bundle in bundles(tasks, sum(worker.threads for worker in self._workers)):
            self._submit(parcels, function, bundle, *args, what=what)
        while parcels.out:
            parcels.job.check()
            try:
                for future in as_completed(list(parcels.out), timeout=workers.POLL_SECONDS):
                    parcels.open(future)
            except TimeoutError:
                self._addresses()

    def _submit(
        self,
        parcels: Parcels,
        function: Callable[..., Any],
        bundle: Sequence[Task],
        *args: Any,
        what: str = "merge",
        **options: Any,
    ) -> Any:
        """Give the scheduler a bundle; return its future."""
        path, number = parcels.write(bundle)
        terms = Terms(
            run=self._run,
            version=VERSION,
            fingerprint=None if self._mixed else self.fingerprint(parcels.job.plan.device),
        )
        key = f"{node_name(bundle, number, what)}-{self._run}"
        future = self._client.submit(function, path, terms, *args, key=key, **options)
        parcels.out[future] = tuple(bundle)
        return future

    def _addresses(self) -> list[str]:
        """Return the addresses of the workers that are there.

        Raises:
            WorkerError: there has been none for long.
        """
        found = addresses(self._client)
        if found:
            self._seen = time.monotonic()
        elif time.monotonic() - self._seen > workers.ANSWER_SECONDS:
            raise WorkerError("there is no worker any more")
        return found

    def _make_directory(self, output: Path) -> Path:
        """Return where this run's bundles and parts lie; nobody else may write there."""
        directory = output / f".{self._run}"
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot be made ({error.strerror})", path=str(directory)) from error
        return directory


def _remove(directory: Path) -> Path | None:
    """Remove a run's directory, in which workers may still be writing; return it if it stays."""
    # Under another name first: what they write from now on has nowhere to go.
    gone = directory.with_name(f"{directory.name}-over")
    with suppress(OSError):
        directory.rename(gone)
    for _ in range(2):
        shutil.rmtree(gone, ignore_errors=True)
    return gone if gone.exists() else None
