"""Talking to a dask cluster: connecting, asking every worker, what they may take together."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from distributed import Client, wait
from distributed.scheduler import KilledWorker, NoValidWorkerError, NoWorkerError

from streammerge.budget import HEADROOM, Budget, format_size
from streammerge.errors import ClusterError, StreammergeError, WorkerError
from streammerge.executors.remote import WorkerFacts, other_rule
from streammerge.registry import origin

VERSION = metadata.version("streammerge")

CONNECT_SECONDS = 30
"""How long is waited for the scheduler."""

ANSWER_SECONDS = 300
"""How long is waited for a first worker, for the answers of all, and, during the work, while there
is none: jobs may stand in a queue, and loading torch over a network takes a while."""

POLL_SECONDS = 1
"""How often it is looked, while nothing comes back, whether the workers are still there."""

LOST = (CancelledError, OSError, KilledWorker, NoWorkerError, NoValidWorkerError)
"""What distributed raises where a connection, the scheduler or all workers are lost."""


def connect(scheduler: str) -> Client:
    """Return a client of the scheduler with this address or file.

    Raises:
        ClusterError: it cannot be reached.
    """
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
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ClusterError(f"scheduler {scheduler}: cannot be reached ({error})") from error


@contextmanager
def lost_as(kind: type[ClusterError] | type[WorkerError]) -> Iterator[None]:
    """Turn what distributed raises where the cluster is lost into an error of ours."""
    try:
        yield
    except StreammergeError:
        raise  # some of them are OSErrors
    except LOST as error:
        raise kind(f"the cluster was lost ({type(error).__name__}: {error})") from error


def ask(client: Client, question: Callable[..., Any], *args: Any) -> dict[str, Any]:
    """Return every worker's answer by its address; workers that leave meanwhile have none."""
    answers: dict[str, Any] = {}
    asked = {
        address: client.submit(question, *args, workers=[address], pure=False)
        for address in addresses(client)
    }
    end = time.monotonic() + ANSWER_SECONDS
    try:
        while asked:
            with suppress(TimeoutError):
                wait(list(asked.values()), timeout=POLL_SECONDS)
            for address in [a for a, future in asked.items() if future.done()]:
                answers[address] = _answer(asked.pop(address), address)
            there = addresses(client)
            asked = {a: future for a, future in asked.items() if a in there}
            if asked and time.monotonic() > end:
                raise ClusterError(f"has not answered within {ANSWER_SECONDS} s", worker=min(asked))
    finally:
        with suppress(*LOST):
            client.cancel(list(asked.values()))
    return answers


def addresses(client: Client) -> list[str]:
    """Return the addresses of the workers that are there now."""
    # Not scheduler_info, whose answer the client overwrites every two seconds, without workers.
    return sorted(client.nthreads())


def running(client: Client) -> set[str]:
    """Return the addresses of the workers that are there and take work: not those that pause."""
    scheduler: Any = client.scheduler
    return set(client.sync(scheduler.ncores_running))


def check_scheduler(client: Client) -> None:
    """Check that the scheduler can load what it passes on.

    Raises:
        ClusterError: it cannot.
    """
    try:
        version = client.run_on_scheduler(metadata.version, "streammerge")
    except metadata.PackageNotFoundError as error:
        raise ClusterError("the scheduler's environment has no streammerge") from error
    if version != VERSION:
        raise ClusterError(f"the scheduler has streammerge {version}, not {VERSION}")


def check_alike(workers: Sequence[WorkerFacts], device: str, rule: str, *, mixed: bool) -> None:
    """Check that workers have this version and rule and, unless they may be mixed, round alike.

    Args:
        workers: all of them.
        device: where they are to compute.
        rule: that they are to apply.
        mixed: whether they may round differently.

    Raises:
        ClusterError: one does not.
    """
    first = workers[0]
    expected = first.fingerprints[device]
    for worker in workers:
        if worker.version != VERSION:
            raise ClusterError(
                f"has streammerge {worker.version}, not {VERSION}", worker=worker.address
            )
        problem = other_rule(rule, origin(rule), worker.rule_origin, worker.rule_problem)
        if problem is not None:
            raise ClusterError(problem, worker=worker.address)
        found = worker.fingerprints[device]
        if not mixed and found != expected:
            raise ClusterError(
                f"computes with {found}, worker {first.address} with {expected}; results would "
                "depend on which of them did what. Choose like ones, or allow it with "
                "mixed_hardware",
                worker=worker.address,
            )


def common_budget(workers: Sequence[WorkerFacts], max_memory: int | None) -> Budget:
    """Return what each worker may take: what the least of them has, or less.

    Raises:
        ClusterError: one has less than is asked for.
    """
    allowed, least = min((_allowed(worker, workers), worker.address) for worker in workers)
    origin = f"worker {least}"
    if max_memory is not None:
        if max_memory > allowed:
            raise ClusterError(
                f"may take {format_size(allowed)}, which is less than max_memory, "
                f"{format_size(max_memory)}",
                worker=least,
            )
        allowed, origin = max_memory, "max_memory, for each worker"
    return Budget(
        allowed_bytes=allowed,
        origin=origin,
        process_bytes=max(worker.process_bytes for worker in workers),
        threads=max(worker.threads for worker in workers),
    )


def _allowed(worker: WorkerFacts, workers: Sequence[WorkerFacts]) -> int:
    """Return what a worker's process may take."""
    # Jobs on one machine share its memory, but each has for itself what it was granted.
    sharing = Counter(
        (other.host, holder)
        for other in workers
        for holder in {grant.holder for grant in other.granted}
    )
    granted = min(
        int(grant.nbytes * HEADROOM) // sharing[worker.host, grant.holder]
        for grant in worker.granted
    )
    return granted if worker.limit_bytes is None else min(granted, worker.limit_bytes)


def _answer(future: Any, address: str) -> Any:
    try:
        return future.result()
    except (ImportError, AttributeError) as error:
        raise ClusterError(
            f"cannot load streammerge {VERSION} ({error})", worker=address
        ) from error
