"""Tensors whose ranks were late, brought from the draft to their places in the output's files.

Each task has written into a draft, where it has the room of the largest rank that it might have
had. When all of them are done the real files are laid out, header first, without a hole, and every
region is copied. The draft stays until the output is published: a run that is killed meanwhile
assembles again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from streammerge.output.header import metadata_of
from streammerge.output.parts import carry
from streammerge.output.writer import RegionReader, RegionWriter, allocate
from streammerge.planner.late import settle
from streammerge.plans import Plan
from streammerge.worker import Receipt


def assemble(
    plan: Plan,
    receipts: Sequence[Receipt],
    draft: Path,
    starts: Sequence[int],
    directory: Path,
    *,
    check: Callable[[], None],
) -> tuple[Plan, tuple[int, ...]]:
    """Write the output's files; return the plan with the real ranks, and where their data begin.

    Args:
        plan: with the largest ranks.
        receipts: of all its tasks, in their order.
        draft: directory of the files that the tasks have written into.
        starts: where each of these files' data begin.
        directory: to make the output's files in; none of them lies there.
        check: called now and then; raises when the run is to stop.

    Raises:
        StorageError: there is no room, or the file system refused.
        VerificationError: a region of the draft is not what was written.
    """
    done = [receipt.done(task) for task, receipt in zip(plan.tasks, receipts, strict=True)]
    settled = settle(plan, done)
    begins = allocate(directory, settled.files, settled.regions, metadata_of(settled))
    sources = [region for task in done for region in task.regions]
    checksums = [checksum for receipt in receipts for checksum in receipt.checksums]
    with RegionReader(draft, [file.name for file in plan.files], starts) as reader:
        for source, place, checksum in zip(sources, settled.regions, checksums, strict=True):
            check()
            path = directory / settled.files[place.file].name
            carry(reader, source, RegionWriter(path, begins[place.file], place), checksum)
    return settled, begins
