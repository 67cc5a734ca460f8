"""What scheduling costs: a merge of so many tiny targets, serial, on threads, and on workers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atscale.calibration import measure_case
from atscale.cases import Case, all_cases
from atscale.runs import Call, Stages, fresh, make_adapters, say, table, timed
from clusters import cluster_of
from streammerge.executors.bundles import BUNDLES_PER_THREAD

FINE = 1024
"""Bundles a thread, for what a bundle costs."""

HEADS = (
    "executor | workers | bundles | whole s | planning s | working s | finishing s | tasks' own s "
    "| scheduling µs a target | all but tasks µs a target"
)


def measure(folder: Path, targets: int) -> str:
    """Measure all ways, and return what was found."""
    adapters = _adapters(folder, targets)
    found = {
        way: _measure_way(folder, adapters, way)
        for way in (
            ("serial", 1, BUNDLES_PER_THREAD),
            ("threads", 2, BUNDLES_PER_THREAD),
            ("cluster", 1, BUNDLES_PER_THREAD),
            ("cluster", 2, BUNDLES_PER_THREAD),
            ("cluster", 1, FINE),
        )
    }
    rows = [_row(way, stages) for way, stages in found.items()]
    parts = [table(HEADS, rows), _of_a_bundle(found), _shares(folder, found)]
    return "\n\n".join(parts)


def profile(folder: Path, targets: int) -> str:
    """Return in which functions the client's time goes while one worker works."""
    adapters = _adapters(folder, targets)
    parts = []
    for bundles in (BUNDLES_PER_THREAD, FINE):
        stages = _measure_way(folder, adapters, ("cluster", 1, bundles), profiled=True)
        parts.append(f"{bundles} bundles: {stages.profile}")
    return "\n\n".join(parts)


Way = tuple[str, int, int]


def _adapters(folder: Path, targets: int) -> tuple[str, ...]:
    layers = {f"layers.{i // 4}.{'qkvo'[i % 4]}_proj": (64, 64) for i in range(targets)}
    return make_adapters(folder / f"tiny-{targets}", layers, 2, 4)


def _measure_way(
    folder: Path, adapters: tuple[str, ...], way: Way, *, profiled: bool = False
) -> Stages:
    executor, workers, bundles = way
    options: dict[str, Any] = {"method": "linear"}
    with _scheduler(folder, workers if executor == "cluster" else 0) as address:
        if address:
            options["scheduler"] = address
        else:
            options["workers"] = workers
        call = Call(adapters, str(folder / "output"), options, bundles, profiled)
        stages = timed(call)
    say(str(way), stages)
    return stages


@contextmanager
def _scheduler(folder: Path, workers: int) -> Iterator[str | None]:
    """Give the address of a cluster of so many workers; of none, nothing."""
    if not workers:
        yield None
        return
    with fresh(folder / "cluster") as place, cluster_of(place, workers) as cluster:
        yield cluster.address


def _row(way: Way, stages: Stages) -> list[Any]:
    executor, workers, bundles = way
    return [
        executor,
        workers,
        0 if executor == "serial" else workers * bundles,
        *(stages.whole, stages.planning, stages.working, stages.finishing, stages.tasks),
        1e6 * _scheduling(way, stages),
        1e6 * (stages.whole - stages.tasks / workers) / stages.targets,
    ]


def _scheduling(way: Way, stages: Stages) -> float:
    """Return what the work took beyond the tasks' own time, for each target."""
    return (stages.working - stages.tasks / way[1]) / stages.targets


def _of_a_bundle(found: dict[Way, Stages]) -> str:
    few, many = found["cluster", 1, BUNDLES_PER_THREAD], found["cluster", 1, FINE]
    beyond = [stages.working - stages.tasks for stages in (few, many)]
    seconds = (beyond[1] - beyond[0]) / (FINE - BUNDLES_PER_THREAD)
    return f"A bundle more costs {1e3 * seconds:.2f} ms on a cluster of one worker."


def _shares(folder: Path, found: dict[Way, Stages]) -> str:
    """Return what scheduling is of a run of targets of real size."""
    rows = []
    for case in all_cases():
        if case.name == "MoE":
            own, count = _target_seconds(folder, case)
            for way, stages in found.items():
                extra = _scheduling(way, stages)
                # Each worker takes so many targets of its own.
                rows.append([case.method, *way, 1e3 * own, count, _share(extra, own / way[1])])
    heads = "method | executor | workers | bundles a thread | ms a target | targets | scheduling"
    return table(heads, rows)


def _target_seconds(folder: Path, case: Case) -> tuple[float, int]:
    _, stages, _ = measure_case(case, folder)
    return stages.tasks / stages.targets, len(case.layers)


def _share(extra: float, own: float) -> str:
    return f"{extra / (extra + own):.2%}"
