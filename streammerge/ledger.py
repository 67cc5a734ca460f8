"""What is done of a run: a receipt for each finished target, here and in the journal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from streammerge.kernels.census import Standing
from streammerge.output.journal import Journal
from streammerge.plans import Plan, Task
from streammerge.worker import Receipt

_MODULUS = 2**128


class Ledger:
    """Keeps a run's receipts; one call at a time."""

    def __init__(self, plan: Plan, journal: Journal) -> None:
        self._plan = plan
        self._journal = journal
        self._done: dict[str, Receipt] = {}
        self._sums = [0] * len(plan.recipe["adapters"])
        self._counts = [0] * len(self._sums)
        self._standings: dict[tuple[int, tuple[float, ...]], Standing] = {}

    def begin(
        self,
        identity: dict[str, Any],
        kept: Iterable[tuple[Task, Receipt]],
        standings: Iterable[Standing] = (),
    ) -> None:
        """Open the journal, with what an earlier run has done and is taken over.

        Args:
            identity: what the run is.
            kept: finished targets.
            standings: how far searches for thresholds have come, later ones behind.

        Raises:
            StorageError: the file system refused.
        """
        self._stand(standings)
        counted = [one.to_dict() for one in self._standings.values()]
        self._journal.begin(identity, self._take_over(kept), counted)

    def note(self, standings: Sequence[Standing]) -> None:
        """Take how far searches for thresholds have come in a pass.

        Raises:
            StorageError: the file system refused.
        """
        self._journal.note([one.to_dict() for one in standings])
        self._stand(standings)

    def standing(self, search: Standing) -> Standing:
        """Return how far a search has come, that begins like this."""
        return self._standings.get((search.adapter, search.shares), search)

    def _stand(self, standings: Iterable[Standing]) -> None:
        self._standings.update({(one.adapter, one.shares): one for one in standings})

    def record(self, task: Task, receipt: Receipt) -> None:
        """Take the receipt of a finished target.

        Raises:
            StorageError: the file system refused.
        """
        self._journal.append(receipt.to_dict())
        self._keep(task, receipt)

    def _take_over(self, kept: Iterable[tuple[Task, Receipt]]) -> Iterator[dict[str, Any]]:
        for task, receipt in kept:
            self._keep(task, receipt)
            yield receipt.to_dict()

    @property
    def unfinished(self) -> tuple[Task, ...]:
        """What is still to be done, in the plan's order."""
        return tuple(task for task in self._plan.tasks if task.target not in self._done)

    @property
    def receipts(self) -> list[Receipt]:
        """The receipts of all targets in the plan's order, without what is in `inputs`."""
        return [self._done[task.target] for task in self._plan.tasks]

    @property
    def inputs(self) -> list[tuple[int, str]]:
        """How many targets of each adapter were read, and one checksum over their tensors."""
        return [(n, f"{total:032x}") for n, total in zip(self._counts, self._sums, strict=True)]

    def _keep(self, task: Task, receipt: Receipt) -> None:
        positions = self._plan.sources.adapter[task.first : task.last].tolist()
        for position, digest in zip(positions, receipt.inputs, strict=True):
            # A sum, for targets finish in any order; and what was added need not be kept.
            self._sums[position] = (self._sums[position] + int(digest, 16)) % _MODULUS
            self._counts[position] += not task.is_extra
        self._done[task.target] = replace(receipt, inputs=())
