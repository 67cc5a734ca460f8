"""One merge in a process of its own, with the times of its stages."""

from __future__ import annotations

import cProfile
import json
import os
import pstats
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import streammerge
from making import linear, write_adapter
from streammerge import events
from streammerge.executors import bundles

TOP = 15

WARM_UP = 4


@dataclass(frozen=True)
class Stages:
    """Seconds of a merge."""

    planning: float
    """Reading headers, planning, asking workers, allocating."""
    working: float
    """Until the last target's receipt is there."""
    finishing: float
    """Making durable, reading back, the record."""
    tasks: float
    """What all tasks took, by themselves."""
    targets: int
    profile: str | None = None

    @property
    def whole(self) -> float:
        """The whole call."""
        return self.planning + self.working + self.finishing


@dataclass(frozen=True)
class Call:
    """What to merge, and how."""

    adapters: tuple[str, ...]
    output: str
    options: dict[str, Any]
    bundles_per_thread: int = bundles.BUNDLES_PER_THREAD
    profile: bool = False


def timed(call: Call) -> Stages:
    """Merge in a fresh process, after what was written before has come to the disk."""
    shutil.rmtree(call.output, ignore_errors=True)
    os.sync()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        stages = process.submit(_merge, call).result()
    shutil.rmtree(call.output)
    return stages


def _merge(call: Call) -> Stages:
    bundles.BUNDLES_PER_THREAD = call.bundles_per_thread
    # What is loaded and started once is not measured.
    warm = Path(call.output).parent / "warm-up"
    layers = {f"layers.{i}": linear(384, 384, 4) for i in range(WARM_UP)}
    paths = [write_adapter(warm / f"in{seed}", layers, seed=seed) for seed in range(2)]
    streammerge.merge(paths, warm / "out", **call.options, on_event=events.ignore)
    shutil.rmtree(warm)
    times = {}

    def note(event: events.Event) -> None:
        times[type(event)] = time.perf_counter()

    profile = cProfile.Profile()
    if call.profile:
        profile.enable()
    began = time.perf_counter()
    result = streammerge.merge(call.adapters, call.output, **call.options, on_event=note)
    ended = time.perf_counter()
    profile.disable()
    timings = json.loads((Path(call.output) / "streammerge-timings.json").read_text())
    return Stages(
        planning=times[events.Planned] - began,
        working=times[events.TaskDone] - times[events.Planned],
        finishing=ended - times[events.TaskDone],
        tasks=sum(timings["target_seconds"].values()),
        targets=len(result.modules),
        profile=_functions(profile) if call.profile else None,
    )


def _functions(profile: cProfile.Profile) -> str:
    """Return the functions with the most time of their own, and those with the most in all."""
    stats = pstats.Stats(profile)
    lines = [f"{stats.total_tt:.1f} s under the profile"]
    for column, what in ((2, "own"), (3, "with what it calls")):
        rows = sorted(stats.stats.items(), key=lambda item: -item[1][column])[:TOP]
        lines.append(f"{what}:")
        lines += [
            f"  {row[column]:8.2f} s {row[1]:9,} calls  {Path(path).name}:{line} {name}"
            for (path, line, name), row in rows
        ]
    return "\n".join(lines)


def make_adapters(
    folder: Path, layers: dict[str, tuple[int, int]], count: int, rank: int
) -> tuple[str, ...]:
    """Write adapters with normal factors in bfloat16, unless they are there; return their paths."""
    paths = [folder / f"adapter{seed:04d}" for seed in range(count)]
    for seed, path in enumerate(paths):
        if path.is_dir():
            continue
        unfinished = path.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        shapes = {target: linear(m, n, rank) for target, (m, n) in layers.items()}
        write_adapter(unfinished, shapes, seed=seed, dtype="BF16")
        unfinished.rename(path)
    return tuple(map(str, paths))


@contextmanager
def fresh(path: Path) -> Iterator[Path]:
    """Give a name at which nothing lies, and clear it up afterwards."""
    shutil.rmtree(path, ignore_errors=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def say(what: str, stages: Stages) -> None:
    """Tell on stderr that something was measured."""
    found = {k: round(v, 3) for k, v in asdict(stages).items() if isinstance(v, float)}
    print(f"{what}: {found}", file=sys.stderr, flush=True)


def table(heads: str, rows: Sequence[Sequence[Any]]) -> str:
    """Return a markdown table."""
    lines = [f"| {' | '.join(number(cell) for cell in row)} |" for row in rows]
    return "\n".join([f"| {heads} |", "|" + "---|" * (heads.count("|") + 1), *lines])


def number(value: Any) -> str:
    """Three figures."""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if value and not 1e-4 <= abs(value) < 1e9:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
