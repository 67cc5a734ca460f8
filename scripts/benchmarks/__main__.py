"""streammerge beside PEFT, plain scripts and the machine's limits, on the same files, in turn.

    scripts/bench [WORKLOAD … | growth] [--repeats N] [--quality] [--profile]
                  [--json FILE] [--folder DIR] [--small]
    scripts/bench --again FILE

Prints markdown tables; what is going on is said on stderr. docs/benchmarks.md says what each
figure is. All of it takes an hour or two on two cores, most of it PEFT's, some 2 GB of disk and
several GB of memory. With --small a workload takes a quarter of a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

from benchmarks.growth import measure_point, points
from benchmarks.measure import Bench
from benchmarks.processes import Figures, Job, run_side
from benchmarks.tables import report
from benchmarks.workloads import FULL, SMALL, Workload, workloads

GROWTH = "growth"


def main() -> None:
    """Measure what was asked for, or print what was measured before."""
    options = parse()
    figures = json.loads(options.again.read_text()) if options.again else measure_all(options)
    print(report(figures))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = [*workloads(FULL), GROWTH]
    parser.add_argument(
        "what", nargs="*", choices=[[], *names], metavar="WORKLOAD", help=", ".join(names)
    )
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each side [3]")
    parser.add_argument("--quality", action="store_true", help="compare with the best residual")
    parser.add_argument("--profile", action="store_true", help="profile each workload once more")
    parser.add_argument("--small", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--json", type=Path, help="where all figures go")
    parser.add_argument("--again", type=Path, help="show the figures of an earlier --json instead")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp/streammerge-bench"))
    return parser.parse_args()


def measure_all(options: argparse.Namespace) -> Figures:
    """Measure, and write the figures down after every workload."""
    sizes = SMALL if options.small else FULL
    bench = Bench(options.folder.absolute(), options.repeats)
    bench.folder.mkdir(parents=True, exist_ok=True)
    figures: Figures = {"machine": machine(), "workloads": [], GROWTH: []}

    def keep(kind: str, row: Figures) -> None:
        figures[kind].append(row)
        if options.json:
            options.json.write_text(json.dumps(figures, indent=1))

    for name, workload in workloads(sizes).items():
        if not options.what or name in options.what:
            keep("workloads", measure_workload(bench, workload, options))
    if not options.what or GROWTH in options.what:
        for point in points(sizes):
            keep(GROWTH, measure_point(bench, point))
    return figures


def measure_workload(bench: Bench, workload: Workload, options: argparse.Namespace) -> Figures:
    """Measure all sides of a workload, and what else was asked for."""
    row = bench.measure(workload, ("cli", "ours", *workload.peers, "disk"))
    if options.quality and workload.truncates:
        row["quality"] = bench.quality(workload)
    if options.profile:
        row["profile"] = bench.profile(workload)
    return row


def machine() -> Figures:
    """Return what the figures depend on; the rate of matrix products is measured."""
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    gemm = run_side("gemm", Job((), "", "", None, {}))
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "numpy", "peft", "streammerge")},
        "gemm_flops_a_second": gemm["flops_a_second"],
    }


if __name__ == "__main__":
    main()
