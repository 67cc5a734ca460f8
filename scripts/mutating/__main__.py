"""Puts small faults into the planner, the rules and the search for thresholds, one at a time.

    scripts/mutation-test [--count N] [--seed S] [GROUP …]

Each fault is made in a copy of the package, and the tests that are there for that part are run on
the copy. A fault that they do not notice survives and is printed; docs/reliability.md names those
that were looked at. Prints one line for each fault on stderr. A fault takes 5 to 60 seconds.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mutating.mutants import Mutant, mutants

ROOT = Path(__file__).resolve().parents[2]
GROUPS = {
    "planner": (
        ("streammerge/planner/*.py", "streammerge/planner/memory/*.py", "streammerge/tiling.py"),
        ("test_plans", "test_peft_faults", "test_device", "test_loads_in_peft", "test_refusals",
         "test_lanes"),
    ),
    "rules": (
        ("streammerge/rules/*.py", "streammerge/spaces/*.py", "streammerge/kernels/tiles.py"),
        ("test_identities", "test_coefficients", "test_della", "test_sce", "test_consensus",
         "test_breadcrumbs", "test_spectral", "test_thresholds", "test_restated_against_peft",
         "test_against_peft"),
    ),
    "coefficients": (
        ("streammerge/rules/inner.py", "streammerge/rules/karcher.py",
         "streammerge/rules/model_stock.py", "streammerge/rules/multislerp.py",
         "streammerge/rules/norm_matched.py", "streammerge/rules/slerp.py",
         "streammerge/rules/sphere.py", "streammerge/kernels/inner.py"),
        ("test_coefficients",),
    ),
    "spectral": (
        ("streammerge/rules/iso_c.py", "streammerge/rules/iso_cts.py", "streammerge/rules/tsv.py",
         "streammerge/kernels/polar.py", "streammerge/kernels/shared.py"),
        ("test_spectral",),
    ),
    "bases": (
        ("streammerge/kernels/bases.py", "streammerge/spaces/bases.py"),
        ("test_spaces",),
    ),
    "ranks": (("streammerge/kernels/ranks.py",), ("test_della",)),
    "census": (("streammerge/kernels/census.py",), ("test_global_threshold",)),
    "select": (
        ("streammerge/select.py", "streammerge/kernels/thresholds.py", "streammerge/draw.py"),
        ("test_thresholds", "test_draw"),
    ),
}  # fmt: skip
"""Files by parts, and the tests that are there for them, the fast ones first."""

LEFT_OUT = {"census": "cluster or thousand or hard_cap or stopped_in"}
"""Tests of a group that take minutes and are not run, as pytest's -k names them."""

SECONDS = 600
"""A fault that makes tests take longer is noticed."""


@dataclass(frozen=True)
class Candidate:
    """A mutant and where it belongs."""

    group: str
    path: Path
    mutant: Mutant


def main() -> None:
    """Draw faults, run the tests on each, print what survived."""
    parser = argparse.ArgumentParser(
        prog="scripts/mutation-test",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--count", type=int, default=60, help="faults of each group [60]")
    parser.add_argument("--seed", type=int, default=0, help="of the draw [0]")
    options = parser.parse_args()
    totals: Counter[tuple[str, bool]] = Counter()
    for group in options.groups or GROUPS:
        every = candidates(group)
        chosen = random.Random(options.seed).sample(every, min(options.count, len(every)))
        print(f"{group}: {len(chosen)} of {len(every)} faults", file=sys.stderr)
        path = every[0].path
        same = ast.unparse(ast.parse((ROOT / path).read_text()))
        if is_noticed(Candidate(group, path, Mutant(0, "", "", same))):
            raise SystemExit(f"{group}: the tests fail without any fault")
        for candidate in chosen:
            noticed = is_noticed(candidate)
            totals[group, noticed] += 1
            what = "noticed " if noticed else "SURVIVED"
            print(f"{what} {candidate.path}:{candidate.mutant}", file=sys.stderr)
            if not noticed:
                print(f"{candidate.path}:{candidate.mutant}", flush=True)
    for group in options.groups or GROUPS:
        noticed, survived = totals[group, True], totals[group, False]
        print(f"{group}: {noticed + survived} faults, {noticed} noticed, {survived} survived")


def candidates(group: str) -> list[Candidate]:
    """Return every mutant of a group's files."""
    paths = sorted(path for pattern in GROUPS[group][0] for path in ROOT.glob(pattern))
    return [
        Candidate(group, path.relative_to(ROOT), mutant)
        for path in paths
        for mutant in mutants(path.read_text())
    ]


def is_noticed(candidate: Candidate) -> bool:
    """Run the group's tests on a copy with the fault; return whether one fails."""
    with tempfile.TemporaryDirectory(prefix="mutation-test-") as folder:
        copy = Path(folder)
        for name in ("streammerge", "tests", "scripts"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, copy / name)
        (copy / candidate.path).write_text(candidate.mutant.source)
        tests = [f"tests/{name}.py" for name in GROUPS[candidate.group][1]]
        if candidate.group in LEFT_OUT:
            tests += ["-k", f"not ({LEFT_OUT[candidate.group]})"]
        try:
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
                cwd=copy,
                env={**os.environ, "PYTHONPATH": str(copy)},
                capture_output=True,
                timeout=SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return True
        if done.returncode not in (0, 1, 2):
            raise RuntimeError(done.stdout.decode() + done.stderr.decode())
        return done.returncode != 0


if __name__ == "__main__":
    main()
