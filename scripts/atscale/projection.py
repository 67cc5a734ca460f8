"""From plans and measured rates to tables: makespan, speed-up, efficiency and what bounds it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from atscale.calibration import measure_case, measure_client, with_submission
from atscale.cases import Case, all_cases
from atscale.makespan import Projection, Rates, Terms, best, project
from atscale.runs import Stages, table
from streammerge.budget import GIB
from streammerge.plans import Plan

WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)

HEADS = "workers | makespan | speed-up | efficiency | bound by | its share of the makespan"

SPLIT = " | workers a target"


@dataclass(frozen=True)
class Assumed:
    """What cannot be measured here."""

    memory: int
    """Of each worker, in bytes."""
    file_system: float
    """Bytes a second."""
    link: float
    """Bytes a second."""
    latency: float
    """Seconds."""


@dataclass(frozen=True)
class Measured:
    """What was measured for a case, and its plan."""

    case: Case
    plan: Plan
    rates: Rates
    terms: Terms
    stages: Stages
    small: Plan
    """Of the miniature."""


def report(folder: Path, assumed: Assumed) -> str:
    """Measure the rates, project all cases and return what was found."""
    terms = replace(
        measure_client(folder),
        file_system=assumed.file_system,
        link=assumed.link,
        latency=assumed.latency,
    )
    measured = [_measure(case, folder, terms, assumed) for case in all_cases()]
    print("all is measured; projecting", file=sys.stderr, flush=True)
    return "\n\n".join([_terms(terms), *map(_case, measured)])


def _measure(case: Case, folder: Path, terms: Terms, assumed: Assumed) -> Measured:
    rates, stages, small = measure_case(case, folder)
    plan = case.plan(assumed.memory)
    check_like(plan, small)
    terms = with_submission(terms, plan, case, folder)
    return Measured(case, plan, rates, terms, stages, small)


def _terms(terms: Terms) -> str:
    return (
        f"Measured: a bundle costs the scheduler {1e3 * terms.bundle_seconds:.2f} ms; sealing "
        f"costs the client {1e6 * terms.seal_seconds:.0f} µs a target and "
        f"{1e9 * terms.seal_byte_seconds:.2f} s a GB; finishing {1e6 * terms.finish_seconds:.0f} "
        f"µs a target and {1e9 * terms.finish_byte_seconds:.2f} s a GB.\n"
        f"Assumed: the file system moves {terms.file_system / 1e9:g} GB/s, a worker's link "
        f"{terms.link / 1e9:g} GB/s, with {1e3 * terms.latency:g} ms to another worker."
    )


def _case(measured: Measured) -> str:
    case, plan, rates, terms = measured.case, measured.plan, measured.rates, measured.terms
    stages, small = measured.stages, measured.small
    whole = [project(plan, rates, terms, workers) for workers in WORKERS]
    shared = [best(plan, rates, terms, workers) for workers in WORKERS]
    route = small.tasks[0].route
    facts = (
        f"{len(plan.tasks):,} targets, {case.adapters:,} adapters of rank {case.rank}; reads "
        f"{plan.read_bytes / 1e9:,.0f} GB, writes {plan.write_bytes / 1e9:.1f} GB; "
        f"{sum(task.flops for task in plan.tasks):.3g} planned operations by route {route}, a "
        f"worker holding {plan.projected_bytes / GIB:.1f} GiB. Measured: "
        f"{rates.flops[route] / 1e9:.2f} billion of them a second on one core "
        f"({stages.targets} targets of {small.tasks[0].m}×{small.tasks[0].n}, "
        f"{small.tasks[0].last} adapters, {stages.tasks:.1f} s); "
        f"to write them down takes the client {1e3 * terms.submit_bundle_seconds:.2f} ms a bundle "
        f"and {1e6 * terms.submit_seconds:.0f} µs a target."
    )
    parts = [f"## {case.name}, {case.method}", facts, _table(whole)]
    if any(projection.team > 1 for projection in shared):
        parts += ["Where targets are shared:", _table(shared, shared=True)]
    return "\n\n".join(parts)


def check_like(plan: Plan, small: Plan) -> None:
    """Check that a miniature's rate says something of a plan.

    Raises:
        ValueError: it goes another way, or holds less, so that it computes or reads again.
    """
    for which in (plan, small):
        for task in which.tasks:
            sources = task.last - task.first
            held = task.factors == sources or task.route == "fold"
            if task.route != small.tasks[0].route or not held or task.spilled:
                raise ValueError(f"{task.target}: {task.route}, {task.factors} of {sources} held")


def _table(projections: Sequence[Projection], *, shared: bool = False) -> str:
    first = projections[0].seconds
    rows: list[list[Any]] = []
    for projection in projections:
        speedup = first / projection.seconds
        row = [
            projection.workers,
            duration(projection.seconds),
            speedup,
            f"{speedup / projection.workers:.0%}",
            projection.bound,
            f"{projection.bounds[projection.bound] / projection.seconds:.0%}",
        ]
        rows.append([*row, projection.team] if shared else row)
    return table(HEADS + SPLIT if shared else HEADS, rows)


def duration(seconds: float) -> str:
    """Return seconds for people."""
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
