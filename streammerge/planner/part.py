"""A part of a plan: some of its tasks with all that they need and nothing else, to be sent away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from streammerge.adapter import Adapter, NameTable
from streammerge.plans import OutputFile, Plan, Sources, Task


def take_part(
    plan: Plan, adapters: Sequence[Adapter] | Mapping[int, Adapter], tasks: Sequence[Task]
) -> tuple[Plan, dict[int, Adapter]]:
    """Return a plan of some of a plan's tasks, which write into one file, one after another.

    Adapters keep their positions, for weights and random masks go by them.

    Args:
        plan: the whole.
        adapters: its manifests, by their positions.
        tasks: some of its tasks.

    Returns:
        The part, and by position the manifests of the rows that it needs.
    """
    rows = np.concatenate([np.arange(task.first, task.last) for task in tasks])
    positions, old_rows = plan.sources.adapter[rows], plan.sources.row[rows]
    new_rows, table, taken = np.empty_like(old_rows), NameTable(), {}
    for position in np.unique(positions).tolist():
        mine = np.flatnonzero(positions == position)
        new_rows[mine] = np.arange(len(mine))
        taken[position] = adapters[position].take(old_rows[mine], table)
    moved, first, offset = [], 0, 0
    for task in tasks:
        last, regions = first + task.last - task.first, []
        for region in task.regions:
            regions.append(replace(region, file=0, offset=offset))
            offset += region.nbytes
        moved.append(replace(task, first=first, last=last, regions=tuple(regions)))
        first = last
    part = replace(
        plan,
        tasks=tuple(moved),
        sources=Sources(positions, new_rows, plan.sources.scaling[rows]),
        files=(OutputFile("part", offset),),
        config={},
        notices=(),
    )
    return part, taken
