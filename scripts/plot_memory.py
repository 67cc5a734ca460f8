"""Draws docs/figures/memory.png: tasks' projections against their peaks, and time against budget.

    .venv/bin/pip install 'matplotlib>=3.8' && .venv/bin/python scripts/plot_memory.py

Takes about five minutes on two cores, and 60 MB of disk in a temporary directory.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from capped import MIB, run_cli, task_peaks
from making import linear, write_adapter

METHODS = ("linear", "cat", "svd", "ties", "dare_ties", "ties_svd", "dare_linear_svd")
LAYERS = {
    "a": linear(1024, 1024, 16),
    "b": linear(1536, 4096, 16),
    "c": linear(4096, 1024, 32),
    "d": linear(4096, 2048, 16),
}
BUDGETS_MIB = (390, 420, 450, 512, 768, 1024, 2048)
REPEATS = 3


def main() -> None:
    """Measure, and draw what was measured."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        adapters = [
            str(write_adapter(Path(folder) / f"a{i}", LAYERS, seed=i, dtype="BF16"))
            for i in range(8)
        ]
        large = [
            str(
                write_adapter(
                    Path(folder) / f"b{i}", {"up": linear(4096, 8192, 16)}, seed=i, dtype="BF16"
                )
            )
            for i in range(8)
        ]
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5))
        draw_tasks(left, adapters)
        draw_times(right, large, Path(folder))
    figure.tight_layout()
    (ROOT / "docs/figures").mkdir(exist_ok=True)
    figure.savefig(ROOT / "docs/figures/memory.png", dpi=110)


def draw_tasks(axes: Any, adapters: list[str]) -> None:
    """Each task of several merges, with little memory and with much."""
    for method in METHODS:
        density = None if method in ("linear", "cat", "svd") else 0.2
        tasks = [
            task
            for memory in ("384MiB", "2GiB")
            for task in task_peaks(adapters, method=method, density=density, max_memory=memory)[
                "tasks"
            ]
        ]
        axes.scatter(
            [task["projected_bytes"] / MIB for task in tasks],
            [task["peak_bytes"] / MIB for task in tasks],
            label=method,
            s=18,
        )
    end = axes.get_xlim()[1]
    axes.plot([0, end], [0, end], color="grey", linewidth=0.8)
    axes.set(xlabel="projected, MiB", ylabel="measured peak, MiB", title="tasks, one at a time")
    axes.legend(fontsize=8)


def draw_times(axes: Any, adapters: list[str], folder: Path) -> None:
    """ties_svd of 8 × r16 on 4096×8192 in budgets from the floor on, with and without scratch."""
    for scratch, label in (("none", "tiles made again"), (str(folder), "tiles on scratch")):
        seconds = [
            min(merge_seconds(adapters, folder, budget, scratch) for _ in range(REPEATS))
            for budget in BUDGETS_MIB
        ]
        print(label, dict(zip(BUDGETS_MIB, seconds, strict=True)), flush=True)
        axes.plot(BUDGETS_MIB, seconds, marker="o", label=label)
    axes.set_xscale("log", base=2)
    shown = (BUDGETS_MIB[0], 512, 1024, 2048)
    axes.set_xticks(shown, [str(budget) for budget in shown])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set(xlabel="--max-memory, MiB", ylabel="seconds, whole process", title="ties_svd")
    axes.legend(fontsize=8)


def merge_seconds(adapters: list[str], folder: Path, budget: int, scratch: str) -> float:
    """Run the command line with a budget; return its seconds, NaN where it was refused."""
    output = folder / "out"
    shutil.rmtree(output, ignore_errors=True)
    began = time.perf_counter()
    run = run_cli(
        [
            *("merge", *adapters, "-o", str(output), "--method", "ties_svd"),
            *("--density", "0.2", "--max-memory", f"{budget}MiB", "--scratch", scratch),
        ]
    )
    return round(time.perf_counter() - began, 2) if run.returncode == 0 else float("nan")


if __name__ == "__main__":
    main()
