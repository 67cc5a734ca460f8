"""streammerge: the whole call, and its tasks alone."""

from __future__ import annotations

import cProfile
import json
import pstats
import time
from pathlib import Path

import streammerge
from benchmarks.processes import Figures, Job, answer

TOP = 12


def measure(job: Job, option: str) -> Figures:
    """Merge once; with the option "profile" also say in which functions the time went."""
    options = {"method": job.method, "density": job.density}
    if option == "profile":
        # A profile sees one thread.
        return _profile(job, options | {"workers": 1})
    began = time.perf_counter()
    result = streammerge.merge(job.adapters, job.output, **options, on_event=lambda _: None)
    whole = time.perf_counter() - began
    timings = json.loads((Path(job.output) / "streammerge-timings.json").read_text())
    return {
        "whole_seconds": whole,
        "merge_seconds": _merging(result.plan, timings["target_seconds"]),
        "routes": sorted({task.route for task in result.plan.tasks}),
        "converged": all(module.converged for module in result.modules),
    }


def _merging(plan: streammerge.Plan, seconds: dict[str, float]) -> float:
    """Return the tasks' own times, those of tasks that run side by side over how many do."""
    return sum(
        seconds[task.target] / (1 if task.alone else plan.concurrency) for task in plan.tasks
    )


def _profile(job: Job, options: dict[str, object]) -> Figures:
    with cProfile.Profile() as profile:
        streammerge.merge(job.adapters, job.output, **options, on_event=lambda _: None)
    stats = pstats.Stats(profile)
    rows = sorted(stats.stats.items(), key=lambda item: -item[1][2])
    return {
        "total_seconds": stats.total_tt,
        "top": [
            {"function": _name(*place), "calls": calls, "seconds": own}
            for place, (_, calls, own, _, _) in rows[:TOP]
        ],
    }


def _name(path: str, line: int, function: str) -> str:
    return function if path == "~" else f"{Path(path).name}:{line} {function}"


if __name__ == "__main__":
    answer(measure)
