"""How many tasks run at once, and what each of them keeps in memory, inside the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from streammerge.budget import CPU, Budget, Device, format_size
from streammerge.catalog import RuleSpec
from streammerge.errors import BudgetError
from streammerge.planner.align import Group
from streammerge.planner.cost import arithmetic, prefers_scratch
from streammerge.planner.memory import (
    Holding,
    factor_bytes,
    project,
    project_host,
    stack_bytes,
    tile_bytes,
)
from streammerge.planner.routes import Course, Shape
from streammerge.plans import Region, Task, flat_tiles, longest, row_tiles


@dataclass(frozen=True)
class Draft:
    """A task before the budget has had its say."""

    group: Group
    shape: Shape
    course: Course


@dataclass(frozen=True)
class Limits:
    """Where tasks run, and what each of those in flight may hold there."""

    budget: Budget
    device: Device

    @property
    def on_device(self) -> bool:
        """Whether tasks compute somewhere else than in the process's own memory."""
        return self.device.name != CPU

    @property
    def room(self) -> int:
        """Bytes for what a task computes with."""
        if self.on_device:
            return self.device.allowed_bytes // self.budget.threads
        return self.budget.task_bytes


def fit(drafts: Sequence[Draft], rule: RuleSpec, budget: Budget, device: Device) -> Limits:
    """Return the limits with as many tasks in flight as all tasks allow.

    Raises:
        BudgetError: not even one task at a time fits.
    """
    limits = Limits(replace(budget, threads=min(budget.threads, len(drafts))), device)
    needs = [_least(draft, rule) for draft in drafts]
    worst = max(range(len(drafts)), key=needs.__getitem__)
    hosts = [project_host(draft.shape) for draft in drafts] if limits.on_device else needs
    worst_host = max(range(len(drafts)), key=hosts.__getitem__)
    while limits.budget.threads > 1:
        if needs[worst] <= limits.room and hosts[worst_host] <= limits.budget.task_bytes:
            return limits
        limits = replace(limits, budget=replace(limits.budget, threads=limits.budget.threads - 1))
    if limits.on_device and needs[worst] > limits.room:
        target = drafts[worst].group.target
        raise _refuse(target, needs[worst], device.allowed_bytes, needs[worst], device.name)
    if hosts[worst_host] > limits.budget.task_bytes:
        smallest = hosts[worst_host] + limits.budget.reserved_bytes
        target = drafts[worst_host].group.target
        origin = f"{budget.origin}; {format_size(limits.budget.reserved_bytes)} for the process"
        raise _refuse(target, hosts[worst_host], budget.allowed_bytes, smallest, origin)
    return limits


def _refuse(target: str, projected: int, allowed: int, smallest: int, origin: str) -> BudgetError:
    return BudgetError(
        f"{target}: this merge needs {format_size(smallest)} ({smallest} bytes) at least; allowed "
        f"are {format_size(allowed)} ({origin})",
        target=target,
        projected_bytes=projected,
        allowed_bytes=allowed,
        smallest_bytes=smallest,
    )


def _least(draft: Draft, rule: RuleSpec) -> int:
    return project(draft.course, rule, draft.shape, Holding())


def plan_task(
    draft: Draft,
    rule: RuleSpec,
    limits: Limits,
    scratch: str | None,
    places: tuple[Region, Region],
) -> Task:
    """Return a draft as a task, holding as much as the limits allow."""
    shape, course, (a, b) = draft.shape, draft.course, places
    holding = _hold(draft, rule, limits.room)
    spilled = 0
    if course.route == "krylov" and scratch and prefers_scratch(rule, shape):
        spilled = len(row_tiles(shape.m, shape.n)) - holding.tiles
    held = project(course, rule, shape, holding)
    return Task(
        target=draft.group.target,
        m=shape.m,
        n=shape.n,
        rank=shape.rank,
        first=draft.group.first,
        last=draft.group.last,
        route=course.route,
        resident=holding.tiles,
        spilled=spilled,
        factors=holding.factors,
        stacked=holding.stacked,
        block=course.block,
        passes=course.passes,
        read_bytes=shape.source_bytes,
        write_bytes=a.nbytes + b.nbytes,
        projected_bytes=project_host(shape) if limits.on_device else held,
        device_bytes=held if limits.on_device else 0,
        flops=arithmetic(course, rule, shape),
        a=a,
        b=b,
    )


def _hold(draft: Draft, rule: RuleSpec, room: int) -> Holding:
    """Return what a streamed task keeps in memory: first A's, then tiles, as many as fit."""
    shape = draft.shape
    if draft.course.route not in ("fold", "dense", "krylov"):
        return Holding()
    room -= _least(draft, rule)
    factors = _held_factors(shape, room) if draft.course.route != "fold" else 0
    room -= factor_bytes(shape, factors)
    stack = stack_bytes(shape, _tile_elements(draft))
    stacked = rule.sweeps > 1 and stack <= room
    room -= stack if stacked else 0
    if draft.course.route != "krylov":
        # Each tile is made once: for the output, or for a matrix that is held as a whole.
        return Holding(factors=factors, stacked=stacked)
    tiles = min(len(row_tiles(shape.m, shape.n)), room // tile_bytes(shape))
    return Holding(tiles, factors, stacked)


def _held_factors(shape: Shape, room: int) -> int:
    """Return of how many sources the A fits into `room` bytes."""
    sizes = np.cumsum(shape.ranks) * shape.n * shape.item
    return int(np.searchsorted(sizes, room, side="right"))


def _tile_elements(draft: Draft) -> int:
    shape = draft.shape
    if draft.course.route == "fold":
        return max(longest(flat_tiles(shape.rank * side)) for side in (shape.m, shape.n))
    return longest(row_tiles(shape.m, shape.n)) * shape.n
