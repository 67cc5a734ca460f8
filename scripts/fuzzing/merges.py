"""Fuzzes merges against the float64 restatement, and one way to run them against another.

    scripts/fuzz-merges [--minutes M | --cases N] [--seed S] [--only CASE]

A case is a random recipe, of any rule in any space that it goes with, on random small adapters. It
is merged twice: serially with ample memory, and as the case says (threads, tight memory, scratch,
pread), which has to give the same bytes. What lies in the files is compared with what the formulas
give: factors by their elements, truncated matrices by their residual. Where rounding decides there
is no one right answer: what is pruned or elected, equal singular values at a cut, directions that
cancel. Such targets are counted as undecided, with the reason. What docs/methods.md refuses has to
be refused, and for that reason. A failure is printed with its number.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np

from fuzzing import refusals
from fuzzing.judging import judge
from fuzzing.outcomes import Found, Judged
from fuzzing.recipes import Case, make_case
from streammerge import errors, events
from streammerge.adapter import Adapter, NameTable
from streammerge.budget import Budget
from streammerge.output.staging import Staging
from streammerge.planner import make_plan
from streammerge.plans import Plan
from streammerge.readers import read_adapters
from streammerge.recipe import Recipe
from streammerge.run import run_plan

AMPLE = 2**30


def run_case(seed: int, number: int, found: Found) -> None:
    """Run one case and enter what it gives."""
    case = make_case(Random(f"{seed}/{number}"))
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as place:
        try:
            problem = _run(case, number, Path(place), found)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            problem = f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
    found.merges += 1
    if problem:
        found.failures.append(f"case {number}: {problem}")


def _run(case: Case, number: int, place: Path, found: Found) -> str:
    paths, due = case.write(place), refusals.reasons(case)
    recipe = Recipe(adapters=paths, **case.options)
    manifests = read_adapters(paths, NameTable())
    with tempfile.TemporaryDirectory() as scratch:
        try:
            plans = _plans(case, recipe, manifests, scratch)
        except (errors.RecipeError, errors.IncompatibleError) as error:
            reason = refusals.reason_of(error)
            found.refused[f"{case.rule}: {reason}"] += 1
            return "" if reason in due else f"refused for {reason}: {error}"
        if due:
            return f"not refused for {', '.join(sorted(due))}"
        outcomes = [_merge(plan, manifests, place / f"out{i}") for i, plan in enumerate(plans)]
    names = [type(outcome).__name__ if outcome else "" for outcome in outcomes]
    if names[0] != names[1]:
        return f"serial gives {outcomes[0]!r}, the other way {outcomes[1]!r}"
    if outcomes[0]:
        return _failure(case, outcomes[0], found)
    for path in sorted((place / "out0").iterdir()):
        if path.read_bytes() != (place / "out1" / path.name).read_bytes():
            return f"{path.name}: serial and the other way differ ({plans[1].concurrency} threads)"
    found.routes.update(task.route for task in plans[0].tasks)
    iterated = frozenset(task.target for task in plans[0].tasks if task.passes)
    judged = Judged(case, number, plans[0].dtype, iterated, found)
    # By a density of nothing the restatement divides what it then leaves out.
    with np.errstate(all="ignore"):
        return "; ".join(judge(judged, place / "out0"))


def _plans(case: Case, recipe: Recipe, manifests: list[Adapter], scratch: str) -> tuple[Plan, Plan]:
    """A serial plan with ample memory, and one as the case says."""

    def plan(room: int, workers: int, io: str, spill: str | None) -> Plan:
        reserved = Budget(0, "", process_bytes=0, threads=workers).reserved_bytes
        budget = Budget(reserved + workers * room, "fuzzing", process_bytes=0, threads=workers)
        return make_plan(manifests, recipe, budget, io=io, scratch=spill)

    try:
        plan(0, 1, "mmap", None)
        least = 0
    except errors.BudgetError as error:
        least = error.projected_bytes
    room = int(least * (1 + case.spare))
    spill = scratch if case.scratch else None
    return plan(AMPLE, 1, "mmap", None), plan(room, case.workers, case.io, spill)


def _merge(plan: Plan, manifests: list[Adapter], out: Path) -> errors.StreammergeError | None:
    try:
        with Staging(out) as staging:
            run_plan(plan, manifests, staging, events.ignore)
            staging.publish()
    except errors.MergeFailedError as error:
        return error
    return None


def _failure(case: Case, error: errors.StreammergeError, found: Found) -> str:
    """Whether a merge had a reason to fail; these adapters give few."""
    found.refused[type(error).__name__] += 1
    if isinstance(error, errors.ClampError) and error.quantile == case.options.get("clamp"):
        return "" if error.limit <= 0 else f"clamped at {error.limit}: {error}"
    return f"{type(error).__name__}: {error}"


# ---------------------------------------------------------------------------------------------


def main() -> int:
    """Run what is asked for; the exit code says whether something failed."""
    options = _parse()
    found, began = Found(), time.perf_counter()
    if options.only is not None:
        print(make_case(Random(f"{options.seed}/{options.only}")).options)
        run_case(options.seed, options.only, found)
    else:
        limit = math.inf if options.cases else 60 * options.minutes
        most = options.cases or math.inf
        number, shown = options.first, 0
        while time.perf_counter() - began < limit and found.merges < most:
            run_case(options.seed, number, found)
            for failure in found.failures[shown:]:
                print(failure, flush=True)
            number, shown = number + 1, len(found.failures)
    _report(found, options.seed, time.perf_counter() - began)
    return 1 if found.failures else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/fuzz-merges",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="how long [10]")
    parser.add_argument("--cases", type=int, default=0, help="how many, instead of how long")
    parser.add_argument("--seed", type=int, default=0, help="of all of them [0]")
    parser.add_argument("--first", type=int, default=0, help="number of the first case [0]")
    parser.add_argument("--only", type=int, metavar="CASE", help="one case")
    return parser.parse_args()


def _report(found: Found, seed: int, seconds: float) -> None:
    print(f"cases       {found.merges} (seed {seed}), each merged in two ways, {seconds:.0f} s")
    print(f"compared    {_counts(found.targets)}")
    for kind in sorted({kind for kind, _ in found.kinds}):
        total = found.kinds[kind, True] + found.kinds[kind, False]
        why = Counter({w: n for (k, w), n in found.undecided.items() if k == kind})
        share = found.share_undecided(kind)
        print(f"undecided   {kind}: {share:.1%} of {total}", f"({_counts(why)})" if why else "")
    print(f"routes      {_counts(found.routes)}")
    print(f"no merge    {_counts(found.refused) or 'none'}")
    for way, (share, number) in sorted(found.worst.items()):
        print(f"worst       {way}: {share:.3g} of the tolerance (case {number})")
    print(f"failures    {len(found.failures)}")
    for failure in found.failures[:20]:
        print(f"  {failure}")


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


if __name__ == "__main__":
    sys.exit(main())
