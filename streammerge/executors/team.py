"""Workers of a dask cluster that share a target: one leads, and asks all for panels of a pass.

A pass is a small graph: a node for each member, which applies an operation to the member's panels.
Members keep what they have made of the target between passes. One that is lost takes nothing with
it that another could not make again, so its panels go to one that is left.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from distributed import Client, Future, Worker, get_worker, wait, worker_client

from streammerge.errors import WorkerError
from streammerge.executors.remote import Terms, admit, run_tasks
from streammerge.executors.workers import LOST, POLL_SECONDS, addresses
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
    TaskStoppedError,
    give_back,
    one_thread_each,
    packed,
    run_task,
    unpacked,
)

R = TypeVar("R")

INLINE_BYTES = 2**16
"""Arguments beyond this size go from worker to worker, and not through the scheduler."""

SEND_ATTEMPTS = 3
"""How often it is tried to reach all members; those that are found lost are left out."""


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
    plan, adapters, gate = admit(get_worker(), path, terms)

    def run(job: Job, task: Task) -> Receipt:
        # The members hold what is held; the buffers of one more lane were planned for this.
        leading = replace(task, resident=0, spilled=0, factors=0, lanes=1)
        with worker_client() as client:
            team = Team(client, members, path, terms, job)
            try:
                return run_task(job, leading, team=team)
            finally:
                team.part()

    return run_tasks(plan, adapters, Path(path), gate, run)


class Team:
    """The workers that share a target, as the one sees them that leads."""

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
        self._path = path
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
        """Have all members let go of the target."""
        with suppress(*LOST):
            self._meet()
            wait([self._submit(member, "leave", leave, self._path) for member in self._members])

    def _pass(
        self, part: Part, whole: list[range], operation: Callable[..., R], args: tuple[Any, ...]
    ) -> Iterator[R]:
        """Yield operation(part, panel, *args) of all panels, in order.

        They are cut for the planned team, and none of those that are left has more than one share
        of them in hand: what is on its way was planned like this.
        """
        sent = self._send(packed(args))
        shares = deque(
            whole[start:stop]
            for start, stop in Pieces(len(whole), min(self._task.team, len(whole)))
        )
        asked: deque[tuple[str, list[range], Future[Any]]] = deque()

        def ask(share: list[range]) -> tuple[str, list[range], Future[Any]]:
            busy = [member for member, _, _ in asked]
            member = min(self._members, key=busy.count)
            errand = Errand(part, operation, share)
            values = self._path, self._terms, errand, sent
            return member, share, self._submit(member, operation.__name__, work_on, *values)

        try:
            while shares or asked:
                while shares and len(asked) < len(self._members):
                    asked.append(ask(shares.popleft()))
                member, share, future = asked[0]
                results = self._answer(member, future)
                if results is None:
                    asked[0] = ask(share)
                    continue
                asked.popleft()
                yield from (unpacked(result, self._job.device) for result in results)
                future.release()
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

    def _answer(self, member: str, future: Future[Any]) -> list[Any] | None:
        """Wait for a member's results; None if it is lost."""
        while True:
            try:
                results: list[Any] = future.result(timeout=POLL_SECONDS)
            except TimeoutError:
                # The file goes when nobody waits for the target any more.
                if not Path(self._path).exists():
                    raise TaskStoppedError from None
                self._meet()
                if member not in self._members:
                    return None
            except CancelledError:
                self._meet()
                return None
            else:
                return results

    def _send(self, args: tuple[Any, ...]) -> Any:
        """Return what stands for arguments in a node: large ones are brought to all members."""
        if sum(value.nbytes for value in args if isinstance(value, np.ndarray)) < INLINE_BYTES:
            return args
        for attempt in range(SEND_ATTEMPTS):
            self._meet()
            try:
                (sent,) = self._client.scatter(
                    [args], workers=self._members, broadcast=True, hash=False
                )
            except (OSError, TimeoutError):
                if attempt == SEND_ATTEMPTS - 1:
                    raise
                time.sleep(POLL_SECONDS)
            else:
                return sent
        raise AssertionError("the last attempt raises")

    def _meet(self) -> None:
        """Leave out members that are lost.

        Raises:
            WorkerError: none is left.
        """
        there = set(addresses(self._client))
        self._members = [member for member in self._members if member in there]
        if not self._members:
            raise WorkerError("all workers that shared a target were lost")


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
            plan, adapters, _ = admit(worker, path, terms)
            job = Job(plan, adapters, Path(path).parent, starts=(0,))
            self._path, self._member = path, Member(job, plan.tasks[0])
        return self._member

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


def work_on(
    path: str,
    terms: Terms,
    errand: Errand,
    args: Sequence[Any],
) -> list[Any]:
    """Do an errand for the target that a team shares; return the results of its panels.

    Args:
        path: where the target's plan and manifests lie.
        terms: what the worker must be like.
        errand: what is wanted.
        args: of the operation, as `packed` gave them; the results are such, too.

    Raises:
        WorkerError: the worker is not like those that the run began with.
        MergeFailedError: a subclass of it says what failed.
    """
    worker = get_worker()
    seat = _SEATS.setdefault(worker.address, _Seat())
    with seat.lock:
        member = seat.join(worker, path, terms)
        lanes = min(member.job.plan.tasks[0].lanes, worker.state.nthreads)
        try:
            with one_thread_each(), ThreadPoolExecutor(lanes) as pool:
                each = Lanes(pool, lanes, member.job.stopped) if lanes > 1 else map
                return member.work_on(errand, args, each)
        except BaseException:
            # Its threads were told to stop, and what it holds may be half made.
            seat.leave()
            raise


def leave(path: str) -> None:
    """Let go of the target at `path`, if the worker has any of it."""
    seat = _SEATS.get(get_worker().address)
    if seat is not None:
        with seat.lock:
            seat.leave(path)
