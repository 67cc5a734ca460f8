"""How time and memory grow with the number of adapters, the size of the matrix, and the rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.measure import Bench
from benchmarks.processes import Figures
from benchmarks.workloads import Inputs, Sizes, Workload

AXES = ("adapters", "size", "rank")

PEFT_ELEMENTS = 4096**2
"""Larger matrices take PEFT's dense SVD minutes."""


@dataclass(frozen=True)
class Point:
    """A workload on an axis."""

    axis: str
    x: int
    workload: Workload

    @property
    def asks_peft(self) -> bool:
        """Whether PEFT does it in reasonable time."""
        inputs = self.workload.inputs
        return not self.workload.truncates or inputs.m * inputs.n <= PEFT_ELEMENTS


def points(sizes: Sizes) -> Iterator[Point]:
    """All points; the first value of each axis is that of the other axes' points."""
    for method in sizes.growth_methods:
        targets = 1 if method.endswith("svd") else sizes.growth_targets
        side = sizes.growth_sides[0]
        base = Inputs(sizes.few, sizes.rank, side, side, targets)
        series = {
            "adapters": [(n, replace(base, adapters=n)) for n in sizes.growth_adapters],
            "size": [(s * s, replace(base, m=s, n=s)) for s in sizes.growth_sides],
            "rank": [(r, replace(base, rank=r)) for r in sizes.growth_ranks],
        }
        for axis in AXES:
            for x, inputs in series[axis]:
                yield Point(axis, x, Workload(f"growth {method} {axis} {x}", method, inputs))


def measure_point(bench: Bench, point: Point) -> Figures:
    """Measure streammerge as often as asked, and PEFT once."""
    sides = ("ours", "peft") if point.asks_peft else ("ours",)
    row = bench.measure(point.workload, sides, once=("peft",))
    return {"axis": point.axis, "x": point.x} | row


def exponents(rows: Sequence[Figures]) -> list[Figures]:
    """Return, for each method and axis, the power of x by which each figure grows."""
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        for axis in AXES:
            chosen = [row for row in rows if (row["method"], row["axis"]) == (method, axis)]
            if len(chosen) > 1:
                powers = {name: exponent(chosen, read) for name, read in FIGURES.items()}
                found.append({"method": method, "axis": axis, **powers})
    return found


def exponent(rows: Sequence[Figures], read: Callable[[Figures], float | None]) -> float | None:
    """Return the slope of the least-squares line through the logarithms; None without two."""
    known = [(row["x"], read(row)) for row in rows]
    known = [(x, y) for x, y in known if y]
    if len(known) < 2:
        return None
    x, y = np.log(np.array(known, dtype=float)).T
    return float(np.polyfit(x, y, 1)[0])


def _of(side: str, key: str) -> Callable[[Figures], float | None]:
    return lambda row: row["sides"].get(side, {}).get(key)


FIGURES: dict[str, Callable[[Figures], float | None]] = {
    "whole": _of("ours", "whole_seconds"),
    "merge": _of("ours", "merge_seconds"),
    "flops": lambda row: row["planned_flops"],
    "read": lambda row: row["read_bytes"],
    "written": lambda row: row["write_bytes"],
    "peft_whole": _of("peft", "whole_seconds"),
}
