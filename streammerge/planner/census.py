"""Passes over all targets that find thresholds over whole adapters: how many adapters each counts,
and what they read and hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from streammerge.catalog import RuleSpec
from streammerge.planner.cost import counting
from streammerge.planner.fit import Limits
from streammerge.planner.hold import Draft
from streammerge.planner.memory import project_census, project_fetched, project_host
from streammerge.planner.routes import COORDINATES
from streammerge.plans import Census, Task

DIGIT_BYTES = 2
"""Bytes of a number that a pass settles."""


def plan_census(
    drafts: Sequence[Draft],
    tasks: Sequence[Task],
    rule: RuleSpec,
    limits: Limits,
    adapters: int,
) -> Census:
    """Return how the thresholds are found.

    Args:
        drafts: those whose elements are counted.
        tasks: what was made of them.
        rule: what the thresholds are for.
        limits: what tasks in flight may hold.
        adapters: how many there are.
    """
    room = limits.budget.allowed_bytes - limits.budget.reserved_bytes
    tally = drafts[0].tally
    held = [_held(draft, task, rule, limits) for draft, task in zip(drafts, tasks, strict=True)]
    sets = list(_in_flight(held, tasks, limits.budget.threads))
    at_once = min((room - sum(sizes)) // (len(sizes) * tally) for sizes in sets)
    at_once = max(1, min(adapters, at_once))
    groups, passes = -(-adapters // at_once), drafts[0].shape.item // DIGIT_BYTES + 1
    costs = [counting(draft.course, rule, draft.shape) for draft in drafts]
    in_bases = drafts[0].course.route in COORDINATES.values()
    read = passes * (groups if in_bases else 1) * sum(task.read_bytes for task in tasks)
    return Census(
        adapters_at_once=at_once,
        passes=passes,
        read_bytes=read,
        flops=passes * sum(groups * bases + counted for bases, counted in costs),
        projected_bytes=max(sum(sizes) + len(sizes) * at_once * tally for sizes in sets),
    )


def _held(draft: Draft, task: Task, rule: RuleSpec, limits: Limits) -> int:
    """Return what is held of a target in the process's memory, without what is counted."""
    if limits.on_device:
        held = project_host(draft.shape)
    else:
        held = project_census(draft.course, rule, draft.shape, task.lanes)
    return held + project_fetched(draft.shape)


def _in_flight(held: Sequence[int], tasks: Sequence[Task], threads: int) -> Iterator[list[int]]:
    """Yield the sizes of targets that are counted at once, for each such set that may be largest:
    those that are alone, and the largest of the others."""
    together = [size for size, task in zip(held, tasks, strict=True) if not task.alone]
    yield from ([size] for size, task in zip(held, tasks, strict=True) if task.alone)
    if together:
        yield sorted(together, reverse=True)[:threads]
