"""A measurement in a process of its own: how it is started, and how it answers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import ROOT

Figures = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What a process is to do."""

    adapters: tuple[str, ...]
    output: str
    method: str
    density: float | None
    targets: Mapping[str, tuple[int, int]]
    """Each target's m and n."""
    write_bytes: int = 0
    """How much the output holds, for the floor."""


def run_side(side: str, job: Job, warm_up: Job | None = None, *, option: str = "") -> Figures:
    """Run a module of `sides` and return its figures, and the seconds of the whole process.

    The warm-up comes first, in the same process, and is not part of any figure but those.
    """
    # What earlier measurements wrote is on the disk before this one begins.
    os.sync()
    sent = json.dumps([asdict(job), asdict(warm_up) if warm_up else None, option])
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.sides.{side}"],
        input=sent,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        check=False,
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{side} failed on {job.method} of {job.adapters[:1]}")
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures | {"process_seconds": seconds}


def answer(measure: Callable[[Job, str], Figures]) -> None:
    """Be such a process: warm up, measure, print one line."""
    job, warm_up, option = json.load(sys.stdin)
    if warm_up:
        measure(_job(warm_up), "")
    figures = measure(_job(job), option)
    print(json.dumps(figures | {"peak_bytes": peak_bytes()}))


def peak_bytes() -> int:
    """Return VmHWM, the most that this process has had in memory."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def stages(began: float, loaded: float, merged: float, saved: float, output: str) -> Figures:
    """Return the seconds of a peer's three stages, and of making its output durable."""
    return {
        "load_seconds": loaded - began,
        "merge_seconds": merged - loaded,
        "save_seconds": saved - merged,
        "whole_seconds": saved - began,
        "sync_seconds": sync_seconds(output),
    }


def sync_seconds(output: str) -> float:
    """Make what was written durable; return how long that takes.

    Peers leave it to the system, so it is measured apart; streammerge's time contains it.
    """
    began = time.perf_counter()
    for path in Path(output).rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    return time.perf_counter() - began


def _job(fields: dict[str, Any]) -> Job:
    job = Job(**fields)
    return replace(job, adapters=tuple(job.adapters))
