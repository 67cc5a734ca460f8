"""One workload measured: every side of it in turn, several times, and the medians."""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import streammerge
from benchmarks.floors import unavoidable_flops
from benchmarks.inputs import WARM_UP, cache, make_inputs
from benchmarks.processes import Figures, Job, run_side
from benchmarks.workloads import Inputs, Workload
from capped import run_cli

ONCE = ("core",)
"""Peers that take so long that one measurement has to do."""

Run = Callable[[], Figures]


@dataclass(frozen=True)
class Bench:
    """Where and how often."""

    folder: Path
    repeats: int

    def measure(
        self, workload: Workload, sides: Sequence[str], once: Sequence[str] = ONCE
    ) -> Figures:
        """Return what was measured of a workload: facts, medians, and every sample.

        Args:
            workload: what to merge.
            sides: "cli" for the command line, else modules of `sides`; measured in this order,
                again and again.
            once: sides that are measured the first time only.
        """
        job, facts = self.prepare(workload)
        runs = {side: self._run_of(side, job) for side in sides}
        samples: dict[str, list[Figures]] = {side: [] for side in sides}
        for turn in range(self.repeats):
            for side, run in runs.items():
                if turn and side in once:
                    continue
                shutil.rmtree(self.folder / "output", ignore_errors=True)
                (self.folder / "output").mkdir()
                samples[side].append(run())
                say(f"{workload.name}, {turn + 1} of {self.repeats}, {side}", samples[side][-1])
        shutil.rmtree(self.folder / "output")
        medians = {side: median(taken) for side, taken in samples.items()}
        return facts | {"sides": medians, "samples": samples}

    def prepare(self, workload: Workload) -> tuple[Job, Figures]:
        """Make a workload's inputs and plan it; return the job and what is known beforehand."""
        adapters = make_inputs(workload.inputs, self.folder)
        cache(adapters)
        planned = streammerge.plan(adapters, method=workload.method, density=workload.density)
        job = self._job(workload, workload.inputs, adapters, "output", planned.write_bytes)
        facts = {
            "name": workload.name,
            "method": workload.method,
            "inputs": asdict(workload.inputs),
            "read_bytes": planned.read_bytes,
            "write_bytes": planned.write_bytes,
            "planned_flops": sum(task.flops for task in planned.tasks),
            "unavoidable_flops": unavoidable_flops(workload.method, workload.inputs),
        }
        return job, facts

    def profile(self, workload: Workload) -> Figures:
        """Return where streammerge's time goes, by functions."""
        return self._alone(workload, "ours", "profile")

    def quality(self, workload: Workload) -> Figures:
        """Return how far the result is from the best one."""
        return self._alone(workload, "quality")

    def _alone(self, workload: Workload, side: str, option: str = "") -> Figures:
        job, _ = self.prepare(workload)
        shutil.rmtree(self.folder / "output", ignore_errors=True)
        (self.folder / "output").mkdir()
        warm_up = self._warm_up(workload) if side == "ours" else None
        figures = run_side(side, job, warm_up, option=option)
        say(f"{workload.name}, {option or side}", figures)
        return figures

    def _run_of(self, side: str, job: Job) -> Run:
        if side == "cli":
            return lambda: run_command_line(job)
        warm_up = None if side == "disk" else self._warm_up(job)
        return lambda: run_side(side, job, warm_up)

    def _warm_up(self, like: Job | Workload) -> Job:
        adapters = make_inputs(WARM_UP, self.folder)
        return self._job(like, WARM_UP, adapters, "warm-up")

    def _job(
        self,
        like: Job | Workload,
        inputs: Inputs,
        adapters: list[str],
        output: str,
        write_bytes: int = 0,
    ) -> Job:
        return Job(
            adapters=tuple(adapters),
            output=str(self.folder / "output" / output),
            method=like.method,
            density=like.density,
            targets=dict.fromkeys(inputs.names, (inputs.m, inputs.n)),
            write_bytes=write_bytes,
        )


def run_command_line(job: Job) -> Figures:
    """Run `streammerge merge` as a user would; return its seconds and its peak."""
    density = [] if job.density is None else ["--density", str(job.density)]
    arguments = [*job.adapters, "-o", job.output, "--method", job.method, *density, "--quiet"]
    began = time.perf_counter()
    run = run_cli(["merge", *arguments])
    seconds = time.perf_counter() - began
    if run.returncode:
        raise SystemExit(f"streammerge merge failed: {run.stderr[-500:]}")
    return {"process_seconds": seconds, "peak_bytes": run.peak_bytes}


def median(samples: Sequence[Mapping[str, object]]) -> Figures:
    """Return the median of every number; of anything else, the last."""
    last = samples[-1]
    return {
        key: statistics.median(sample[key] for sample in samples)
        if isinstance(value, int | float) and not isinstance(value, bool)
        else value
        for key, value in last.items()
    }


def say(what: str, figures: Figures) -> None:
    """Tell on stderr that something was measured."""
    seconds = figures.get("whole_seconds", figures["process_seconds"])
    print(f"{what}: {seconds:.3g} s", file=sys.stderr, flush=True)
