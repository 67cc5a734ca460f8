"""Bundles of tasks on their way: written down beside the output, and their parts sealed into it."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from distributed.scheduler import KilledWorker

from streammerge.adapter import Adapter
from streammerge.errors import StorageError, WorkerError
from streammerge.executors.remote import Parcel
from streammerge.output.parts import seal
from streammerge.planner.part import take_part
from streammerge.plans import Task
from streammerge.worker import Job, Receipt


class Parcels:
    """The bundles of a run that workers have in hand."""

    def __init__(
        self, job: Job, directory: Path, take: Callable[[Sequence[Task], Any], None]
    ) -> None:
        """Make it.

        Args:
            job: the run.
            directory: where bundles, and what comes out of them, lie.
            take: takes what came out of a bundle.
        """
        self.job = job
        self.out: dict[Any, tuple[Task, ...]] = {}
        """The bundles in hand, by their futures."""
        self.directory = directory
        self._take = take
        self._adapters = [anywhere(job.adapters[i]) for i in range(len(job.adapters))]
        self._written = 0

    def write(self, bundle: Sequence[Task]) -> tuple[str, int]:
        """Write down what a worker needs to run a bundle; return the file and its number."""
        number, self._written = self._written, self._written + 1
        path = self.directory / f"{number:05d}.tasks"
        cuts = self.job.cuts and self.job.cuts.take([task.target for task in bundle])
        parcel = Parcel(*take_part(self.job.plan, self._adapters, bundle), cuts)
        write_small(path, pickle.dumps(parcel))
        return str(path), number

    def open(self, future: Any) -> None:
        """Take what came out of a bundle.

        Raises:
            MergeFailedError: a subclass of it says what failed.
        """
        bundle = self.out.pop(future)
        result = _result(future, bundle)
        # Released, or its tasks would run again if the worker were lost later.
        future.release()
        self._take(bundle, result)


def sealed(
    job: Job, on_receipt: Callable[[Task, Receipt], None]
) -> Callable[[Sequence[Task], tuple[str, list[Receipt]]], None]:
    """Return what seals the part file of a bundle into the output, and tells of its tasks."""

    def take(bundle: Sequence[Task], result: tuple[str, list[Receipt]]) -> None:
        part, receipts = result
        done = [receipt.done(task) for task, receipt in zip(bundle, receipts, strict=True)]
        regions = [region for task in done for region in task.regions]
        checksums = [checksum for receipt in receipts for checksum in receipt.checksums]
        # A part has room for what was planned at most.
        sizes = [region.nbytes for task in bundle for region in task.regions]
        moves = list(zip(accumulate(sizes[:-1], initial=0), regions, checksums, strict=True))
        names = [file.name for file in job.plan.files]
        seal(Path(part), job.directory, job.starts, names, moves)
        for task, receipt in zip(bundle, receipts, strict=True):
            on_receipt(task, receipt)

    return take


def anywhere(adapter: Adapter) -> Adapter:
    """Return the manifest with paths that do not depend on the directory one works in."""
    if adapter.files[0].etag is not None:
        return adapter  # on the Hub
    files = (replace(file, path=str(Path(file.path).absolute())) for file in adapter.files)
    return replace(adapter, files=tuple(files))


def write_small(path: Path, data: bytes) -> None:
    """Write a small file that need not outlive the run.

    Raises:
        StorageError: the file system refused.
    """
    try:
        path.write_bytes(data)
    except OSError as error:
        raise StorageError(f"cannot be written ({error.strerror})", path=str(path)) from error


def _result(future: Any, bundle: Sequence[Task]) -> Any:
    try:
        return future.result()
    except KilledWorker as error:
        raise WorkerError(
            "workers were lost with it again and again; their logs say why. Too little memory is "
            "the usual reason",
            worker=error.last_worker.address,
            targets=tuple(task.target for task in bundle),
        ) from error
