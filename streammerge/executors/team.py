"""Workers of a dask cluster that share a target: one leads, and asks all for panels of a pass.

A pass is a small graph: a node for each member, which applies an operation to the member's panels.
Members keep what they have made of the target between passes. One that is lost takes nothing with
it that another could not make again, so its panels go to one that is left.
"""

from __future__ import annotations

import pickle
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from distributed import Client, Future, Worker, get_worker, wait, worker_client

from streammerge.allocator import give_back
from streammerge.errors import WorkerError
from streammerge.executors.remote import Terms, admit, run_tasks, stored
from streammerge.executors.workers import LOST, POLL_SECONDS, running
from streammerge.kernels.each import Over
from streammerge.plans import Task
from streammerge.tiling import Pieces, panels
from streammerge.worker import (
    Errand,
    Job,
    Lanes,
    Member,
    Part,
    Receipt,
    one_thread_each,
    packed,
    run_task,
    unpacked,
)

R = TypeVar("R")


def lead(path: str, terms: Terms, members: Sequence[str]) -> tuple[str, list[Receipt]]:
    """Run a task together with other workers and write what comes out into a part file.

    Args:
        path: where the task's plan and manifests lie.
        terms: what the workers must be like.
        members: addresses of the workers that share it.

    Returns:
        The part file and the receipt, as of a bundle of one task.

    Raises:
        WorkerError: the worker is not like those that the run began with, or none is left.
        MergeFailedError: a subclass of it says what failed.
    """
    parcel, gate = admit(get_worker(), path, terms)

    def run(job: Job, task: Task) -> Receipt:
        # The members hold what is held; the buffers of one more lane were planned for this.
        leading = replace(task, resident=0, spilled=0, factors=0, lanes=1)
        with worker_client() as client:
            team = Team(client, members, path, terms, job)
            try:
                return run_task(job, leading, team=team)
            finally:
                team.part()

    return run_tasks(parcel, Path(path), gate, run)


class Team:
    """The workers that share a target, as the one sees them that leads.

    What is large lies in files beside the target's plan, which all of them see; only names and
    small results go through the scheduler. So nothing that dask keeps, drops or copies is waited
    for.
    """

    def __init__(
        self, client: Client, members: Sequence[str], path: str, terms: Terms, job: Job
    ) -> None:
        """Make it.

        Args:
            client: of the scheduler.
            members: addresses of the workers.
            path: where the target's plan and manifests lie.
            terms: what the workers must be like.
            job: the target, in a plan of its own.
        """
        self._client = client
        self._members = list(members)
        self._path = Path(path)
        self._terms = terms
        self._task = job.plan.tasks[0]
        self._job = job
        self._asked = 0

    def over(self, part: Part, count: int) -> Over:
        """Return the panels of a part that has so many tiles, or groups."""

        def apply(operation: Callable[..., R], *args: Any) -> Iterator[R]:
            return self._pass(part, panels(count), operation, args)

        return apply

    def part(self) -> None:
        """Have all members let go of the target, those that are there."""
        with suppress(*LOST):
            asked = [(m, self._submit(m, "leave", leave, str(self._path))) for m in self._members]
            while asked:
                wait_for([future for _, future in asked])
                there = running(self._client)
                asked = [(m, future) for m, future in asked if m in there and not future.done()]

    def _pass(
        self, part: Part, whole: list[range], operation: Callable[..., R], args: tuple[Any, ...]
    ) -> Iterator[R]:
        """Yield operation(part, panel, *args) of all panels, in order."""
        pieces = Pieces(len(whole), min(self._task.team, len(whole)))
        shares = deque(whole[start:stop] for start, stop in pieces)
        asked: deque[tuple[str, list[range], Future[Any]]] = deque()
        with written(self._path.parent, packed(args)) as given:

            def ask(share: list[range]) -> tuple[str, list[range], Future[Any]]:
                busy = [member for member, _, _ in asked]
                member = min(self._members, key=busy.count)
                values = str(self._path), self._terms, Errand(part, operation, share), str(given)
                return member, share, self._submit(member, operation.__name__, work_on, *values)

            try:
                while shares or asked:
                    self._check()
                    while shares and len(asked) < len(self._members):
                        asked.append(ask(shares.popleft()))
                    member, share, future = asked[0]
                    file = self._answer(member, future)
                    if file is None:
                        asked[0] = ask(share)
                        continue
                    asked.popleft()
                    with taken(file) as results:
                        yield from (unpacked(result, self._job.device) for result in results)
            finally:
                with suppress(*LOST):
                    self._client.cancel([future for _, _, future in asked])

    def _submit(
        self, member: str, what: str, function: Callable[..., Any], *args: Any
    ) -> Future[Any]:
        """Have a member call a function; its node says for which target and what for."""
        self._asked += 1
        key = f"merge-{self._task.target}-{what}-{self._asked:04d}-{uuid.uuid4().hex[:8]}"
        return self._client.submit(function, *args, key=key, workers=[member], pure=False)

    def _answer(self, member: str, future: Future[Any]) -> Path | None:
        """Wait for the file with a member's results; None if the member is lost.

        What was done may be lost with the member before it is fetched, and nobody else may do it
        again: so it is asked for again and again whether the member is there.
        """
        while True:
            wait_for([future])
            self._check()
            if future.done():
                try:
                    return Path(future.result(timeout=POLL_SECONDS))
                except TimeoutError:
                    continue
                except CancelledError:
                    return None
            if member not in self._members:
                return None

    def _check(self) -> None:
        """Leave out members that are lost, or take no work.

        Raises:
            TaskStoppedError: the run is over.
            WorkerError: no member is left.
        """
        # The file goes when nobody waits for the target any more.
        self._job.check()
        there = running(self._client)
        self._members = [member for member in self._members if member in there]
        if not self._members:
            raise WorkerError("all workers that shared a target were lost")


def wait_for(futures: Sequence[Future[Any]]) -> None:
    """Wait a second for one of some futures."""
    with suppress(TimeoutError):
        wait(futures, timeout=POLL_SECONDS, return_when="FIRST_COMPLETED")


@contextmanager
def written(directory: Path, value: Any) -> Iterator[Path]:
    """Write a value into a file, which stays as long as the block lasts."""
    path = directory / f"{uuid.uuid4().hex}.given"
    try:
        with path.open("xb") as stream:
            pickle.dump(value, stream, protocol=5)
        yield path
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def taken(path: Path) -> Iterator[Iterator[Any]]:
    """Return the values in a file, one after another, and remove it afterwards."""
    with path.open("rb") as stream:
        yield _values(stream)
    path.unlink()


def _values(stream: BinaryIO) -> Iterator[Any]:
    # Written by this very run, into a directory that only its user may write to.
    for _ in range(pickle.load(stream)):
        yield pickle.load(stream)


class _Seat:
    """A worker's place in a team: what it has of the target that it shares, one at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._path = ""
        self._member: Member | None = None

    def join(self, worker: Worker, path: str, terms: Terms) -> Member:
        """Return what the worker has of the target at `path`; that of another one is let go."""
        if self._member is None or self._path != path:
            self.leave()
            parcel, _ = admit(worker, path, terms)
            self._path, self._member = path, Member(parcel.job(Path(path)), parcel.plan.tasks[0])
        return self._member

    def leave_what_is_over(self) -> None:
        """Let go of a target whose plan is gone."""
        if not Path(self._path).exists():
            self.leave()

    @property
    def taken(self) -> bool:
        """Whether the worker has anything of a target."""
        return self._member is not None

    def leave(self, path: str | None = None) -> None:
        """Let go of the target at `path`; of any where None is given."""
        if self._member is not None and path in (None, self._path):
            self._member.close()
            self._member = None
            give_back()


_SEATS: dict[str, _Seat] = {}
"""By a worker's address: a process may hold several workers."""


def work_on(path: str, terms: Terms, errand: Errand, given: str) -> str:
    """Do an errand for the target that a team shares.

    Args:
        path: where the target's plan and manifests lie.
        terms: what the worker must be like.
        errand: what is wanted.
        given: file with the operation's arguments, as `packed` gave them.

    Returns:
        The file with the results of its panels: how many, and each, as `packed` gives them.

    Raises:
        TaskStoppedError: the run is over.
        WorkerError: the worker is not like those that the run began with.
        MergeFailedError: a subclass of it says what failed.
    """
    worker = get_worker()
    seat = _SEATS.setdefault(worker.address, _Seat())
    results = Path(path).with_name(f"{uuid.uuid4().hex}.results")
    with seat.lock, stored(results):
        member = seat.join(worker, path, terms)
        lanes = min(member.job.plan.tasks[0].lanes, worker.state.nthreads)
        args = pickle.loads(Path(given).read_bytes())
        try:
            with one_thread_each(), ThreadPoolExecutor(lanes) as pool, results.open("xb") as stream:
                each = Lanes(pool, lanes, member.job.stopped) if lanes > 1 else map
                pickle.dump(len(errand.panels), stream)
                for result in member.work_on(errand, args, each):
                    pickle.dump(result, stream, protocol=5)
        except BaseException:
            # Its threads were told to stop, and what it holds may be half made.
            seat.leave()
            raise
    return str(results)


def leave(path: str) -> None:
    """Let go of the target at `path`, if the worker has any of it."""
    seat = _SEATS.get(get_worker().address)
    if seat is not None:
        with seat.lock:
            seat.leave(path)


def tidy_worker() -> None:
    """Let go of a target of a run that is over, whose leader could not say so."""
    seat = _SEATS.get(get_worker().address)
    if seat is not None:
        with seat.lock:
            seat.leave_what_is_over()
