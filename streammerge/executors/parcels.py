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
from streammerge.output.parts import seal
from streammerge.planner.part import take_part
from streammerge.plans import Task
from streammerge.worker import Job, Receipt


class Parcels:
    """The bundles of a run that workers have in hand."""

    def __init__(
        self, job: Job, directory: Path, on_receipt: Callable[[Task, Receipt], None]
    ) -> None:
        """Make it.

        Args:
            job: the run.
            directory: where bundles and parts lie.
            on_receipt: hears of every task that is done.
        """
        self.job = job
        self.out: dict[Any, tuple[Task, ...]] = {}
        """The bundles in hand, by their futures."""
        self._directory = directory
        self._on_receipt = on_receipt
        self._adapters = [anywhere(job.adapters[i]) for i in range(len(job.adapters))]
        self._written = 0

    def write(self, bundle: Sequence[Task]) -> tuple[str, int]:
        """Write down what a worker needs to run a bundle; return the file and its number."""
        number, self._written = self._written, self._written + 1
        path = self._directory / f"{number:05d}.tasks"
        write_small(path, pickle.dumps(take_part(self.job.plan, self._adapters, bundle)))
        return str(path), number

    def open(self, future: Any) -> None:
        """Seal what came out of a bundle into the output.

        Raises:
            MergeFailedError: a subclass of it says what failed.
        """
        bundle = self.out.pop(future)
        part, receipts = _result(future, bundle)
        # Released, or its tasks would run again if the worker were lost later.
        future.release()
        job = self.job
        done = [receipt.done(task) for task, receipt in zip(bundle, receipts, strict=True)]
        regions = [region for task in done for region in task.regions]
        checksums = [checksum for receipt in receipts for checksum in receipt.checksums]
        # A part has room for what was planned at most.
        sizes = [region.nbytes for task in bundle for region in task.regions]
        moves = list(zip(accumulate(sizes[:-1], initial=0), regions, checksums, strict=True))
        names = [file.name for file in job.plan.files]
        seal(Path(part), job.directory, job.starts, names, moves)
        for task, receipt in zip(bundle, receipts, strict=True):
            self._on_receipt(task, receipt)


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
