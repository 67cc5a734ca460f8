"""The plan of a run whose ranks have come out of its work: every tensor at its final place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from streammerge.adapter import DIFFUSERS
from streammerge.planner.formats import image_config
from streammerge.planner.layout import OutputTensor, lay_out
from streammerge.planner.output_config import rank_fields
from streammerge.plans import Plan, Task


def settle(plan: Plan, done: Sequence[Task]) -> Plan:
    """Return the plan that a recipe of just these ranks would have had, budget and routes aside.

    Args:
        plan: with the largest ranks that there might have been.
        done: its tasks with the ranks that there are.
    """
    units = [
        tuple(OutputTensor(region.name, region.shape, region.dtype) for region in task.regions)
        for task in done
    ]
    files, regions = lay_out(units, plan.recipe["max_shard_bytes"], plan.format)
    ranks = {task.target: task.rank for task in done if not task.is_extra}
    config = image_config(ranks) if plan.format == DIFFUSERS else plan.config | rank_fields(ranks)
    tasks = tuple(replace(t, regions=places) for t, places in zip(done, regions, strict=True))
    return replace(plan, tasks=tasks, files=files, config=config, late=False)
