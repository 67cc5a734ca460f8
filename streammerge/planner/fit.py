"""How many tasks run at once, and what each of them keeps in memory, inside the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from streammerge.budget import CPU, Budget, Device, format_size
from streammerge.catalog import RuleSpec
from streammerge.errors import BudgetError
from streammerge.planner.cost import arithmetic, prefers_scratch
from streammerge.planner.hold import Draft, hold, least
from streammerge.planner.memory import (
    factor_tiles,
    project,
    project_beside,
    project_fetched,
    project_host,
    project_team,
)
from streammerge.plans import EXTRA_ROUTES, Region, Task
from streammerge.tiling import factor_groups, gram_blocks, panels, row_tiles


@dataclass(frozen=True)
class Limits:
    """Where tasks run, and what those in flight may hold there."""

    budget: Budget
    device: Device
    together: int = 1
    """Tasks in flight at once, of those that are not alone."""
    whole: float = 0.0
    """Operations of all tasks."""
    workers: int = 1
    """Processes that run tasks, each within the budget."""

    @property
    def on_device(self) -> bool:
        """Whether tasks compute somewhere else than in the process's own memory."""
        return self.device.name != CPU

    @property
    def room(self) -> int:
        """Bytes for all that is computed with at once."""
        if self.on_device:
            return self.device.allowed_bytes
        return self.budget.allowed_bytes - self.budget.reserved_bytes


def fit(
    drafts: Sequence[Draft], rule: RuleSpec, budget: Budget, device: Device, workers: int
) -> Limits:
    """Return the limits, with as many threads as leave room for every task alone.

    Raises:
        BudgetError: not even on one thread does every task fit.
    """
    limits = Limits(budget, device, workers=workers)
    # A tensor that is no factor does not go to a device.
    needs = [
        0 if limits.on_device and draft.course.route in EXTRA_ROUTES else least(draft, rule)
        for draft in drafts
    ]
    worst = max(range(len(drafts)), key=needs.__getitem__)
    hosts = [_on_host(draft, rule, limits) for draft in drafts]
    worst_host = max(range(len(drafts)), key=hosts.__getitem__)
    while limits.budget.threads > 1 and hosts[worst_host] > _host_room(limits):
        limits = replace(limits, budget=replace(limits.budget, threads=limits.budget.threads - 1))
    if limits.on_device and needs[worst] > limits.room:
        target = drafts[worst].group.target
        raise _refuse(target, needs[worst], device.allowed_bytes, needs[worst], device.name)
    if hosts[worst_host] > _host_room(limits):
        smallest = hosts[worst_host] + limits.budget.reserved_bytes
        target = drafts[worst_host].group.target
        origin = f"{budget.origin}; {format_size(limits.budget.reserved_bytes)} for the process"
        fetched = project_fetched(drafts[worst_host].shape)
        if fetched:
            origin += (
                f"; {format_size(fetched)} of it for what is fetched from the Hub, which is held "
                "while the target is merged: without --stream it is not"
            )
        raise _refuse(target, hosts[worst_host], budget.allowed_bytes, smallest, origin)
    limits = replace(limits, whole=sum(arithmetic(d.course, rule, d.shape) for d in drafts))
    beside = sum(not _is_alone(draft, rule, limits) for draft in drafts)
    together = max(1, min(limits.budget.threads, beside))
    if beside == len(drafts):
        # No thread is started that has nothing to do.
        limits = replace(limits, budget=replace(limits.budget, threads=together))
    return replace(limits, together=together)


def _on_host(draft: Draft, rule: RuleSpec, limits: Limits) -> int:
    """Return what a task holds in the process's memory at least."""
    if not limits.on_device or draft.course.route in EXTRA_ROUTES:
        held = least(draft, rule)
    else:
        held = project_host(draft.shape) + draft.tally
    return held + project_beside(draft.shape)


def _host_room(limits: Limits) -> int:
    return limits.budget.allowed_bytes - limits.budget.reserved_bytes


def _is_alone(draft: Draft, rule: RuleSpec, limits: Limits) -> bool:
    """Whether a task runs with no other beside it.

    So that cores do not wait for one large target at the end, one that is a good part of the work
    is shared by them; and so is one that is too large for its part of the memory.
    """
    if _team(draft, rule, limits) > 1:
        return True
    threads = limits.budget.threads
    if threads == 1:
        return False
    host = _on_host(draft, rule, limits)
    if least(draft, rule) * threads > limits.room or host * threads > _host_room(limits):
        return True
    work = arithmetic(draft.course, rule, draft.shape)
    if work < SHARED_WORK or _parts(draft, rule) < threads:
        return False
    return work * threads * ROUNDS > limits.whole


SHARED_WORK = 5 * 10**8
"""Operations of a target that is worked on by several threads at least: with fewer it is done
before they have begun."""

ROUNDS = 8
"""A target is worked on by all threads where fewer than so many of its size make up each one's
share of the work."""


PASS_WORK = 7 * 10**9
"""Operations of a pass over a target that is shared by several workers at least: a good part of a
second, for the panels of each are asked for over a network."""


def _team(draft: Draft, rule: RuleSpec, limits: Limits) -> int:
    """Return how many workers share a target: as many as have a panel of it.

    One that is a good part of the work is shared, so that the others do not wait for the worker
    that has it; it must leave room for what travels between them.
    """
    if limits.workers == 1 or draft.course.route not in ("krylov", "sum") or draft.shape.fetched:
        # What is fetched is held by one worker, and not fetched by each.
        return 1
    work = arithmetic(draft.course, rule, draft.shape)
    others = limits.workers * limits.budget.threads * ROUNDS
    searched = rule.cuts * len(draft.shape.ranks) + rule.joint_passes
    passes = searched + draft.course.passes * (2 if draft.course.route == "sum" else 1)
    if work < PASS_WORK * passes or work * others <= limits.whole:
        return 1
    team = min(limits.workers, _parts(draft, rule))
    needed, host = least(draft, rule, 2), 0
    travelling = project_team(draft.shape, draft.course)
    if limits.on_device:
        host = project_host(draft.shape) + travelling
    else:
        needed += travelling
    return team if needed <= limits.room and host <= _host_room(limits) else 1


def _parts(draft: Draft, rule: RuleSpec) -> int:
    """Into how many parts a target's work falls that can be done side by side."""
    shape, route = draft.seen, draft.course.route
    if route == "fold":
        return min(map(len, factor_tiles(rule, shape)))
    if route == "sum":
        return len(panels(len(factor_groups(shape.ranks, shape.m + shape.n))))
    if route == "gram":
        blocks = len(gram_blocks(shape.total_rank))
        return blocks * (blocks + 1)  # pairs of blocks, of the A's and of the B's
    return (
        1
        if route in ("concatenate", "core", *EXTRA_ROUTES)
        else len(panels(len(row_tiles(shape.m, shape.n))))
    )


def _refuse(target: str, projected: int, allowed: int, smallest: int, origin: str) -> BudgetError:
    return BudgetError(
        f"{target}: this merge needs {format_size(smallest)} ({smallest} bytes) at least; allowed "
        f"are {format_size(allowed)} ({origin})",
        target=target,
        projected_bytes=projected,
        allowed_bytes=allowed,
        smallest_bytes=smallest,
    )


def plan_task(
    draft: Draft,
    rule: RuleSpec,
    limits: Limits,
    scratch: str | None,
    regions: tuple[Region, ...],
) -> Task:
    """Return a draft as a task, holding as much as the limits allow."""
    shape, course = draft.shape, draft.course
    alone = _is_alone(draft, rule, limits)
    room = limits.room if alone else limits.room // limits.together
    team = _team(draft, rule, limits)
    travelling = project_team(shape, course) if team > 1 else 0
    travelling += project_beside(shape)
    if not limits.on_device:
        room -= travelling
    lanes = _lanes(draft, rule, limits, room, team) if alone else 1
    # Who leads a team has buffers of its own beside those of its share.
    holding = hold(draft, rule, room, lanes + (team > 1))
    spilled = 0
    if course.route == "krylov" and scratch and prefers_scratch(rule, shape):
        spilled = len(row_tiles(shape.m, shape.n)) - holding.tiles
    held = project(course, rule, shape, holding)
    device = limits.on_device and course.route not in EXTRA_ROUTES
    host = project_host(shape) if device else held
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
        alone=alone,
        lanes=lanes,
        team=team,
        read_bytes=shape.source_bytes,
        write_bytes=sum(region.nbytes for region in regions),
        projected_bytes=host + travelling,
        device_bytes=held if device else 0,
        flops=arithmetic(course, rule, shape),
        regions=regions,
    )


def _lanes(draft: Draft, rule: RuleSpec, limits: Limits, room: int, team: int) -> int:
    """Return how many threads work on a task that is alone: as many as there is room for."""
    if limits.on_device:
        return 1
    leading = team > 1
    lanes = min(limits.budget.threads, -(-_parts(draft, rule) // team))
    while lanes > 1 and least(draft, rule, lanes + leading) > room:
        lanes -= 1
    return lanes
