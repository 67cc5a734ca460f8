"""The model: how long the bundles of a plan take on so many workers, and what bounds it.

Bundles go, in the plan's order, to the worker that is free first. Four things are shared and serve
one request after another: the client, which writes each bundle's plan before the run and copies
each part into the output as it comes; the scheduler, which hands out bundles; and the file system,
whose bandwidth all reading and writing takes from. A worker reads a bundle's bytes, computes, and
writes; in truth these overlap, so the model errs to the slow side by at most their sum.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from streammerge.executors.bundles import bundles
from streammerge.plans import Plan, Task
from streammerge.tiling import PANELS, factor_groups, panels, row_tiles

FLOAT = 4
"""Bytes of a number in a panel that travels."""

SELECTION_STEPS = 2
"""Rounds in which workers would add up histograms for thresholds, before the passes."""

TEAMS = (1, 2, 4, 8, PANELS)
"""Workers on one target, where targets are shared. Sums are taken inside 16 panels and then over
them, so more could not take part without other bytes."""


@dataclass(frozen=True)
class Rates:
    """What one core does."""

    flops: Mapping[str, float]
    """Planned operations a second, by route, with all that a task does beside them."""


@dataclass(frozen=True)
class Terms:
    """What is shared, and what it costs."""

    file_system: float = math.inf
    """Bytes a second, of all workers together."""
    link: float = math.inf
    """Bytes a second, of one worker."""
    latency: float = 0.0
    """Seconds until a message has come to another worker."""
    bundle_seconds: float = 0.0
    """Of the scheduler, for each bundle."""
    submit_seconds: float = 0.0
    """Of the client, for each target, before the work."""
    submit_bundle_seconds: float = 0.0
    """Of the client, for each bundle, before the work."""
    seal_seconds: float = 0.0
    """Of the client, for each target that it copies into the output."""
    seal_byte_seconds: float = 0.0
    """Of the client, for each of the bytes."""
    finish_seconds: float = 0.0
    """Of the client, for each target, when all is done: reading back, the record."""
    finish_byte_seconds: float = 0.0


@dataclass(frozen=True)
class Load:
    """What a bundle asks of everything."""

    compute: float
    """Seconds of a worker."""
    read: float = 0.0
    """Bytes."""
    written: float = 0.0
    """Bytes."""
    scheduler: float = 0.0
    """Seconds."""
    submit: float = 0.0
    """Seconds of the client."""
    seal: float = 0.0
    """Seconds of the client."""


@dataclass(frozen=True)
class Projection:
    """A run on so many workers."""

    workers: int
    team: int
    """Workers on one target."""
    seconds: float
    bounds: Mapping[str, float]
    """What each thing alone would take."""

    @property
    def bound(self) -> str:
        """What bounds it most."""
        return max(self.bounds, key=self.bounds.__getitem__)


def project(plan: Plan, rates: Rates, terms: Terms, workers: int, team: int = 1) -> Projection:
    """Return how long a plan takes.

    Args:
        plan: made for workers of one thread.
        rates: of one core.
        terms: what is shared.
        workers: of one thread each.
        team: how many of them work on one target together.
    """
    slots = max(1, workers // team)
    # A team's members read side by side.
    its_terms = replace(terms, link=terms.link * team)
    loads = [load(bundle, rates, terms, team) for bundle in bundles(plan.tasks, slots)]
    targets = len(plan.tasks)
    finish = targets * terms.finish_seconds + plan.write_bytes * terms.finish_byte_seconds
    longest = max(load((task,), rates, terms, team).compute for task in plan.tasks)
    bounds = {
        "compute": sum(item.compute for item in loads) / slots,
        "longest target": longest,
        "file system": sum(item.read + 3 * item.written for item in loads) / terms.file_system,
        "client": sum(item.submit + item.seal for item in loads) + finish,
        "scheduler": sum(item.scheduler for item in loads),
    }
    return Projection(workers, team, simulate(loads, slots, its_terms) + finish, bounds)


def best(plan: Plan, rates: Rates, terms: Terms, workers: int) -> Projection:
    """Return how long a plan takes where targets are shared, over as many workers as suits it."""
    can_split = any(splits(task, PANELS) for task in plan.tasks)
    teams = [team for team in TEAMS if team == 1 or (can_split and team <= workers)]
    return min(
        (project(plan, rates, terms, workers, team) for team in teams),
        key=lambda projection: projection.seconds,
    )


def load(bundle: Sequence[Task], rates: Rates, terms: Terms, team: int) -> Load:
    """Return what a bundle asks of a team of workers, and of what is shared."""
    written = sum(task.write_bytes for task in bundle)
    # A shared target is a task for each member and one that adds up, in each step.
    nodes = sum(steps(task) * (team + 1) if splits(task, team) else 0 for task in bundle)
    return Load(
        compute=sum(seconds(task, rates, terms, team) for task in bundle),
        read=sum(read_bytes(task) for task in bundle),
        written=written,
        scheduler=(1 + nodes) * terms.bundle_seconds,
        submit=terms.submit_bundle_seconds + len(bundle) * terms.submit_seconds,
        seal=len(bundle) * terms.seal_seconds + written * terms.seal_byte_seconds,
    )


def read_bytes(task: Task) -> int:
    """Return what a task reads of its inputs: in each pass again those that it does not hold."""
    sources = task.last - task.first
    if task.route != "sum":
        return task.read_bytes
    again = task.read_bytes * (sources - task.factors) // sources
    return task.read_bytes + again * (2 * task.passes - 1)


def seconds(task: Task, rates: Rates, terms: Terms, team: int) -> float:
    """Return how long a team computes a target, with what it says to each other.

    What a pass adds to the bases is made orthogonal by one worker; the rest is shared.
    """
    alone = task.flops / rates.flops[task.route]
    if not splits(task, team):
        return alone
    members = min(team, parts(task))
    serial = min(alone, orthogonal_flops(task) / rates.flops[task.route])
    rounds = -(-parts(task) // members) / parts(task)
    talk = steps(task) * 2 * terms.latency + panel_bytes(task, members) / terms.link
    return serial + (alone - serial) * rounds + talk


def splits(task: Task, team: int) -> bool:
    """Whether several workers could share a target's work."""
    return team > 1 and task.route in ("krylov", "sum")


def parts(task: Task) -> int:
    """Return into how many panels a target's work falls, its sources being of the output's rank."""
    if task.route == "krylov":
        return _tile_panels(task.m, task.n)
    return _group_panels(task.rank, task.last - task.first, task.m + task.n)


@lru_cache(maxsize=1024)
def _tile_panels(m: int, n: int) -> int:
    return len(panels(len(row_tiles(m, n))))


@lru_cache(maxsize=1024)
def _group_panels(rank: int, sources: int, sides: int) -> int:
    return len(panels(len(factor_groups((rank,) * sources, sides))))


def steps(task: Task) -> int:
    """Return how often the members of a team would wait for each other."""
    return task.passes + (SELECTION_STEPS if task.route == "krylov" else 0)


def panel_bytes(task: Task, team: int) -> float:
    """Return what goes over the link of the worker that adds up: in each pass the block to all
    members, Mᵀ·M·block from each, and M·block once."""
    block = task.block * FLOAT
    return task.passes * block * (2 * team * task.n + task.m)


def orthogonal_flops(task: Task) -> float:
    """Return what it takes to make the blocks of both bases orthogonal to those before, twice."""
    passes = task.passes * (task.passes + 1) / 2
    return 8 * (task.m + task.n) * task.block**2 * passes


def simulate(loads: Sequence[Load], workers: int, terms: Terms) -> float:
    """Return when the last bundle is sealed, the run beginning at 0."""
    return _Run(loads, workers, terms).finish()


class _Run:
    """Events in the order of time; each shared thing serves requests as they come."""

    def __init__(self, loads: Sequence[Load], workers: int, terms: Terms) -> None:
        self._loads = loads
        self._terms = terms
        self._events: list[tuple[float, int, str, int]] = []
        self._count = 0
        self._next = 0
        self._file_system = self._scheduler = self._end = 0.0
        self._parts: deque[int] = deque()
        # Nothing is sealed before all has been submitted.
        self._client_busy = True
        submitted = 0.0
        self._submitted = []
        for item in loads:
            submitted += item.submit
            self._submitted.append(submitted)
        self._at(submitted, "client free", 0)
        for _ in range(workers):
            self._at(0.0, "worker free", 0)

    def finish(self) -> float:
        """Run until nothing happens any more; return when that was."""
        handlers = {
            "worker free": self._hand_out,
            "handed out": self._read,
            "computed": self._write,
            "written": self._written,
            "client free": self._seal,
        }
        while self._events:
            now, _, what, number = heapq.heappop(self._events)
            self._end = max(self._end, now)
            handlers[what](now, number)
        return self._end

    def _at(self, when: float, what: str, number: int) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, what, number))

    def _hand_out(self, now: float, _: int) -> None:
        if self._next == len(self._loads):
            return
        number, self._next = self._next, self._next + 1
        begun = max(now, self._scheduler, self._submitted[number])
        self._scheduler = begun + self._loads[number].scheduler
        self._at(self._scheduler, "handed out", number)

    def _read(self, now: float, number: int) -> None:
        read = self._transfer(now, self._loads[number].read, self._terms.link)
        self._at(read + self._loads[number].compute, "computed", number)

    def _write(self, now: float, number: int) -> None:
        written = self._transfer(now, self._loads[number].written, self._terms.link)
        self._at(written, "written", number)

    def _written(self, now: float, number: int) -> None:
        self._parts.append(number)
        self._at(now, "worker free", 0)
        if not self._client_busy:
            self._seal(now, 0)

    def _seal(self, now: float, _: int) -> None:
        self._client_busy = bool(self._parts)
        if self._parts:
            item = self._loads[self._parts.popleft()]
            copied = self._transfer(now, 2 * item.written, math.inf)
            self._at(max(copied, now + item.seal), "client free", 0)

    def _transfer(self, now: float, nbytes: float, link: float) -> float:
        """Return when the file system has moved so many bytes."""
        self._file_system = max(self._file_system, now) + nbytes / self._terms.file_system
        return max(self._file_system, now + nbytes / link)
