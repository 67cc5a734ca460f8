"""One worker process and two, of a thread each, on the same merge: speed-up and memory."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import streammerge
from atscale.runs import Call, Stages, fresh, make_adapters, say, table, timed
from clusters import LocalCluster, cluster_of
from streammerge.budget import MIB

MANY = {f"layers.{i}.q_proj": (2048, 2048) for i in range(64)}
"""Targets that workers take one by one."""

SHARED = {"lm_head": (14_000, 14_000)}
"""A target that workers share."""

OPTIONS: dict[str, Any] = {"method": "ties_svd", "density": 0.2}

HEADS = "workers | whole s | working s | tasks' own s | peak of a worker MiB | allowed MiB"


def measure(folder: Path, layers: dict[str, tuple[int, int]], repeats: int) -> str:
    """Measure in turn; return medians and the ratio."""
    adapters = make_adapters(
        folder / "-".join(map(str, next(iter(layers.values())))), layers, 8, 16
    )
    runs: dict[int, list[tuple[Stages, int, int]]] = {1: [], 2: []}
    for _ in range(repeats):
        for workers, taken in runs.items():
            with fresh(folder / "cluster") as place, cluster_of(place, workers) as cluster:
                taken.append(_measure_once(folder, adapters, cluster))
            say(f"{workers} workers", taken[-1][0])
    rows, medians = [], {}
    for workers, taken in runs.items():
        stages = [run[0] for run in taken]
        medians[workers] = [
            statistics.median(getattr(s, name) for s in stages)
            for name in ("whole", "working", "tasks")
        ]
        peak, allowed = max(run[1] for run in taken), min(run[2] for run in taken)
        rows.append([workers, *medians[workers], peak / MIB, allowed / MIB])
    whole, working, _ = (one / two for one, two in zip(medians[1], medians[2], strict=True))
    return (
        f"{table(HEADS, rows)}\n\nSpeed-up of two workers: {working:.2f} of the work, "
        f"{whole:.2f} of the whole call."
    )


def _measure_once(
    folder: Path, adapters: tuple[str, ...], cluster: LocalCluster
) -> tuple[Stages, int, int]:
    """Return the times, the most that a worker had in memory, and what it was allowed."""
    options = {**OPTIONS, "scheduler": cluster.address}
    allowed = streammerge.plan(adapters, **options).allowed_bytes
    stages = timed(Call(adapters, str(folder / "output"), options))
    return stages, max(_peak(worker.pid) for worker in cluster.workers), allowed


def _peak(pid: int) -> int:
    """Return VmHWM of a process, in bytes."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024
