"""Time against the number of adapters, the size and the rank; memory against the adapters.

    PYTHONPATH=scripts .venv/bin/python -m benchmarks.plots FILE DIR

FILE is what `scripts/bench growth --json FILE` wrote. Needs matplotlib>=3.8.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.processes import Figures

LABELS = {"adapters": "adapters", "size": "elements of the matrix, m·n", "rank": "rank"}
SIDES = {"ours": ("streammerge", "-"), "peft": ("PEFT", ":")}


def draw(rows: Sequence[Figures], folder: Path) -> None:
    """Write a picture for each axis on which something was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    for axis, label in LABELS.items():
        chosen = [row for row in rows if row["axis"] == axis]
        _picture(
            chosen,
            label,
            "seconds, without start-up",
            lambda side: side["whole_seconds"],
            folder / f"time-against-{axis}.png",
        )
    adapters = [row for row in rows if row["axis"] == "adapters"]
    _picture(
        adapters,
        LABELS["adapters"],
        "peak of the process, MiB",
        lambda side: side["peak_bytes"] / 2**20,
        folder / "memory-against-adapters.png",
    )


def _picture(
    rows: Sequence[Figures], x: str, y: str, read: Callable[[Figures], float], path: Path
) -> None:
    if not rows:
        return
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        for side, (label, style) in SIDES.items():
            known = [r for r in rows if r["method"] == method and side in r["sides"]]
            axes.plot(
                [row["x"] for row in known],
                [read(row["sides"][side]) for row in known],
                style,
                marker="o",
                color=f"C{number}",
                label=f"{label}, {method}",
            )
    axes.set(xlabel=x, ylabel=y, xscale="log", yscale="log")
    ticks = sorted({row["x"] for row in rows})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
    axes.minorticks_off()
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text())["growth"], Path(sys.argv[2]))
