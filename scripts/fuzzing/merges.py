"""Fuzzes merges against the float64 restatement, and one way to run them against another.

    scripts/fuzz-merges [--minutes M | --cases N] [--seed S] [--only CASE]

A case is a random recipe on random small adapters. It is merged twice: serially with ample memory,
and as the case says (threads, tight memory, scratch, pread), which has to give the same bytes. What
lies in the files is compared with what the formulas give: factors by their elements, truncated
matrices by their residual. Where rounding decides what is pruned or elected there is no one right
answer; such targets are counted as undecided. A failure is printed with its number.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from fuzzing.recipes import Case, make_case
from making import Tensor, decode
from oracle import restated
from oracle.masks import draws
from oracle.restated import Coordinates, FactorMasks, Matrix, Source
from streammerge import errors, events
from streammerge.adapter import ITEM_BYTES, TORCH_NAMES, Adapter, NameTable
from streammerge.budget import Budget
from streammerge.draw import keep_limit, random_bits, stream_key
from streammerge.output.staging import Staging
from streammerge.planner import make_plan
from streammerge.planner.scaling import scalings
from streammerge.plans import Plan
from streammerge.ranks import RankLimit, RankPolicy
from streammerge.readers import read_adapters
from streammerge.recipe import Recipe
from streammerge.run import run_plan

AMPLE = 2**30

ROUNDING = {"float32": 1e-5, "float64": 1e-11}
"""Of the arithmetic, relative to the largest terms: elements as tests compare them."""
RESIDUAL = 1e-4
"""How far a truncation may be from the best one, relatively."""
DECIDED = {"float32": 2e-6, "float64": 1e-13}
"""A threshold or a vote that is this far from falling the other way, relatively."""
OUTPUT_ROUNDING = {"float64": 0.0, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SUBNORMAL = {"float64": 0.0, "float32": 1e-38, "float16": 6e-8, "bfloat16": 1e-38}
SEPARATED = 1.1
CLEAR = 1e-3
"""From this margin on bases are compared; what rounding leaves grows as it falls."""

EXACT, ELEMENTS, TRUNCATED, CLAMPED, CHOSEN, UNDECIDED = (
    "exact",
    "elements",
    "truncated",
    "clamped",
    "ranks chosen",
    "undecided",
)


@dataclass
class Found:
    """What was seen so far."""

    merges: int = 0
    targets: Counter[str] = field(default_factory=Counter)
    routes: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    worst: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Of each way of comparing the largest share of its tolerance, and the case."""
    failures: list[str] = field(default_factory=list)

    def compare(self, way: str, share: float, case: int) -> None:
        """Enter a comparison."""
        self.targets[way] += 1
        if not share <= self.worst.get(way, (-1.0, 0))[0]:
            self.worst[way] = share, case


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
    paths = case.write(place)
    recipe = Recipe(adapters=paths, **case.options)
    manifests = read_adapters(paths, NameTable())
    with tempfile.TemporaryDirectory() as scratch:
        plans = _plans(case, recipe, manifests, scratch)
        outcomes = [_merge(plan, manifests, place / f"out{i}") for i, plan in enumerate(plans)]
    names = [type(outcome).__name__ if outcome else "" for outcome in outcomes]
    if names[0] != names[1]:
        return f"serial gives {outcomes[0]!r}, the other way {outcomes[1]!r}"
    if outcomes[0]:
        return _refusal(case, outcomes[0], found)
    for path in sorted((place / "out0").iterdir()):
        if path.read_bytes() != (place / "out1" / path.name).read_bytes():
            return f"{path.name}: serial and the other way differ ({plans[1].concurrency} threads)"
    found.routes.update(task.route for task in plans[0].tasks)
    judged = Judged(case, number, plans[0].dtype, found)
    # By a density of nothing the restatement divides what it then leaves out.
    with np.errstate(all="ignore"):
        return "; ".join(_judge(judged, place / "out0"))


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


def _refusal(case: Case, error: errors.StreammergeError, found: Found) -> str:
    """Whether a merge had a reason to fail; these adapters give few."""
    found.refused[type(error).__name__] += 1
    if isinstance(error, errors.ClampError) and case.options.get("clamp"):
        return ""
    return f"{type(error).__name__}: {error}"


# ---------------------------------------------------------------------------------------------
# What the formulas give


@dataclass(frozen=True)
class Present:
    """A target's sources with their positions and weights."""

    target: str
    positions: tuple[int, ...]
    sources: tuple[Source, ...]
    weights: tuple[float, ...]

    @property
    def scale(self) -> float:
        """Of the merged matrix: the sum of its terms' norms."""
        return sum(
            abs(w) * float(np.linalg.norm(s.delta))
            for w, s in zip(self.weights, self.sources, strict=True)
        )


def _present(case: Case, target: str) -> Present:
    held = [(i, a) for i, a in enumerate(case.adapters) if target in a.layers]
    return Present(
        target,
        tuple(i for i, _ in held),
        tuple(adapter.source(target) for _, adapter in held),
        tuple(case.options["weights"][i] for i, _ in held),
    )


def _masks(case: Case, here: Present, tensor: str, shape: tuple[int, int]) -> list[Any]:
    """What is kept at random, or for DELLA what is drawn."""
    if not math.prod(shape):
        return [np.zeros(shape, bool) for _ in here.positions]
    if case.rule.startswith("della"):
        return [draws(i, here.target, tensor, shape, case.options["seed"]) for i in here.positions]
    limit = keep_limit(case.options["density"])
    return [
        (
            random_bits(
                stream_key(case.options["seed"], i, here.target, tensor), 0, math.prod(shape)
            )
            < limit
        )
        .numpy()
        .reshape(shape)
        for i in here.positions
    ]


def _common(case: Case) -> dict[str, Any]:
    return {
        "density": case.options.get("density"),
        "majority_sign": case.options.get("majority_sign", "total"),
        "parameters": dict(case.options.get("parameters", ())),
    }


def _is_decided(
    case: Case, here: Present, tensors: Sequence[Matrix], tensor: str, margin: float = 1.0
) -> bool:
    """Whether rounding cannot change what is pruned or elected.

    Small whole numbers are exact; so are, in factor space, inputs that the arithmetic holds.
    """
    compute, density = case.options["compute_dtype"], case.options.get("density")
    if case.rule in ("linear", "dare_linear") or density == 0:
        return True
    held = [case.adapters[i] for i in here.positions]
    whole = all(adapter.whole for adapter in held) and tensor not in ("core", "knots")
    decided = DECIDED[compute] / margin
    if case.rule == "consensus":
        weights = _seen_weights(case, here, tensor)
        gap = restated.consensus_gap(tensors, weights, _common(case)["parameters"])
        return len(tensors) == 1 or gap > decided
    pruned, settled = list(tensors), True
    if case.rule.startswith("della"):
        epsilon = _common(case)["parameters"]["epsilon"]
        settled = epsilon == 0 or whole or all(restated.rank_gap(x) > decided for x in tensors)
        drawn = zip(tensors, _masks(case, here, tensor, tensors[0].shape), strict=True)
        pruned = [restated.prune_by_rank(x, u, density, epsilon) for x, u in drawn]
    elif case.rule == "sce":
        exact = whole and _is_dyadic(case, here) and len(tensors) in (1, 2, 4)
        settled = exact or restated.variance_gap(tensors, density) > decided
        pruned = restated.select_varied(tensors, density)
    elif not case.rule.startswith("dare"):
        stored = case.space == "factor" and (
            compute == "float64" or all(adapter.dtype != "F64" for adapter in held)
        )
        gamma = _common(case)["parameters"].get("gamma", 0.0)
        cuts = [density + gamma] + ([gamma] if gamma else [])
        with np.errstate(invalid="ignore"):
            gaps = [restated.pruning_gap(x, share) for x in tensors for share in cuts]
        settled = stored or whole or all(g > decided or math.isnan(g) for g in gaps)
        pruned = [restated.prune_by_magnitude(x, density) for x in tensors]
    elif density < 1:
        keeps = _masks(case, here, tensor, tensors[0].shape)
        pruned = [
            restated.prune_by_mask(x, k, density) for x, k in zip(tensors, keeps, strict=True)
        ]
    if not settled:
        return False
    if (
        case.rule in ("magnitude_prune", "breadcrumbs", "della_linear")
        or case.options["majority_sign"] == "frequency"
    ):
        return True
    dyadic = not _is_random(case) or (case.rule == "dare_ties" and math.frexp(density)[0] == 0.5)
    return (whole and dyadic and _is_dyadic(case, here)) or restated.election_gap(pruned) > decided


def _is_dyadic(case: Case, here: Present) -> bool:
    """Whether what a rule sees of small whole numbers is exact."""
    return case.space == "factor" or all((s.scaling * 64).is_integer() for s in here.sources)


def _is_random(case: Case) -> bool:
    return case.rule.startswith(("dare", "della"))


def _least_odds(case: Case) -> float:
    """The smallest number that elements are divided by, about."""
    least = case.options["density"] - _common(case)["parameters"].get("epsilon", 0.0) / 2
    return float(max(least, 5e-4))


def _seen_weights(case: Case, here: Present, tensor: str) -> list[float]:
    """The weights that a rule sees: in factor space roots, of which the A's have the signs."""
    if case.space != "factor":
        return list(here.weights)
    q = [w * s.scaling for w, s in zip(here.weights, here.sources, strict=True)]
    return [math.copysign(math.sqrt(abs(x)), x if tensor == "A" else 1.0) for x in q]


# ---------------------------------------------------------------------------------------------
# What lies in the files


@dataclass(frozen=True)
class Judged:
    """A case that was merged, and where what is seen of it is entered."""

    case: Case
    number: int
    dtype: str
    """Of the output."""
    found: Found

    def compare(self, way: str, share: float) -> None:
        """Enter a comparison."""
        self.found.compare(way, share, self.number)


def _judge(judged: Judged, out: Path) -> Iterator[str]:
    case = judged.case
    (merged,) = read_adapters([str(out)], NameTable())
    targets = {merged.target(row): row for row in range(len(merged))}
    if targets.keys() != {t for adapter in case.adapters for t in adapter.layers}:
        yield "other targets"
    if not (scalings(merged, None) == 1.0).all():
        yield "a scaling that is not 1"
    largest = max(layer.rank for adapter in case.adapters for layer in adapter.layers.values())
    for target, row in sorted(targets.items()):
        here = _present(case, target)
        a, b = (_matrix(merged, row, side) for side in "AB")
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            yield f"{target}: not finite"
        elif case.space in ("delta", "core", "knots"):
            yield from _judge_delta(judged, here, (a, b), largest)
        else:
            yield from _judge_factors(judged, here, (a, b))


def _matrix(adapter: Adapter, row: int, side: str) -> Matrix:
    factor = adapter.factor(row, side)
    size = ITEM_BYTES[TORCH_NAMES[factor.dtype]] * factor.elements
    data = Path(factor.file.path).read_bytes()[factor.offset : factor.offset + size]
    values = decode(Tensor(factor.dtype, factor.shape, data))
    rank = int(adapter.columns.rank[row])
    return values.reshape((rank, -1) if side == "A" else (-1, rank))


def _judge_factors(
    judged: Judged, here: Present, found_pair: tuple[Matrix, Matrix]
) -> Iterator[str]:
    case = judged.case
    exact = case.space == "exact"
    masks = None
    if _is_random(case):
        shapes = here.sources[0].a.shape, here.sources[0].b.shape
        masks = FactorMasks(*(_masks(case, here, t, s) for t, s in zip("AB", shapes, strict=True)))
    expected = restated.merge_factors(
        "cat" if exact else case.rule, here.sources, here.weights, masks=masks, **_common(case)
    )
    roots = [math.sqrt(abs(w * s.scaling)) for w, s in zip(here.weights, here.sources, strict=True)]
    for side, got, right in zip("AB", found_pair, expected, strict=True):
        tensors = [getattr(source, side.lower()) for source in here.sources]
        if got.shape != right.shape:
            yield f"{here.target} {side}: shape {got.shape}, not {right.shape}"
        elif not exact and not _is_decided(case, here, tensors, side):
            judged.found.targets[UNDECIDED] += 1
        else:
            factors = roots if not exact else [r * r if side == "A" else 1.0 for r in roots]
            terms = sum(r * np.abs(x).max() for r, x in zip(factors, tensors, strict=True))
            if _is_random(case):
                terms /= _least_odds(case)
            allowed = ROUNDING[case.options["compute_dtype"]] * terms + SUBNORMAL[judged.dtype]
            allowed = allowed + OUTPUT_ROUNDING[judged.dtype] * np.abs(right)
            with np.errstate(divide="ignore", invalid="ignore"):
                share = float(np.nanmax(np.append(np.abs(got - right) / allowed, 0.0)))
            judged.compare(EXACT if exact else ELEMENTS, share)
            if not share <= 1:
                yield f"{here.target} {side}: {share:.3g} times the tolerance from the formula"


def _judge_delta(
    judged: Judged, here: Present, pair: tuple[Matrix, Matrix], largest: int
) -> Iterator[str]:
    case = judged.case
    a, b = pair
    seen = _seen(case, here)
    m, n = here.sources[0].delta.shape
    asked = case.options.get("rank")
    policy = asked if isinstance(asked, RankPolicy) else None
    limited = isinstance(asked, RankPolicy | RankLimit)
    limit = min((asked.largest if limited else asked) or largest, m, n)
    if limited and (case.rule == "linear" or case.space in ("core", "knots")):
        limit = min(limit, sum(len(source.a) for source in here.sources))
    rank = min(max(1, len(a)), limit) if policy else limit
    if a.shape != (rank, n) or b.shape != (m, rank):
        yield f"{here.target}: shapes {a.shape} and {b.shape}, not of rank {rank}"
        return
    rounding, cast = ROUNDING[case.options["compute_dtype"]], OUTPUT_ROUNDING[judged.dtype]
    bases = seen.margin if case.space != "delta" else 1.0
    if bases < CLEAR or not _is_decided(case, here, seen.tensors, case.space, bases):
        judged.found.targets[UNDECIDED] += 1
        return
    shape = seen.tensors[0].shape
    masks = _masks(case, here, case.space, shape) if _is_random(case) else None
    merged = np.zeros(shape)
    if merged.size:
        merged = restated.apply_rule(
            case.rule, seen.tensors, here.weights, masks=masks, **_common(case)
        )
    expected = seen.back(merged)
    scale = here.scale / (_least_odds(case) if masks else 1.0)
    sizes = float(np.linalg.norm(a) * np.linalg.norm(b))
    nothing = (
        SUBNORMAL[judged.dtype] * math.sqrt(rank * m * n) * (np.abs(a).max() + np.abs(b).max())
    )
    allowed = rounding * scale / bases + 3 * cast * sizes + float(nothing) + 1e-300
    if policy:
        yield from _judge_rank(judged, here, expected, policy, ranks=(rank, limit), allowed=allowed)
    if case.options.get("clamp"):
        yield from _judge_clamped(judged, here, pair, expected, (rank, allowed))
        return
    distance = float(np.linalg.norm(expected - b @ a))
    best = restated.residual(expected, rank)
    share = max(0.0, distance - best * (1 + RESIDUAL)) / allowed
    judged.compare(TRUNCATED, share)
    if not share <= 1:
        yield (
            f"{here.target}: residual {distance:.9g}, the best is {best:.9g}: {share:.3g} times "
            "the tolerance"
        )


def _judge_rank(
    judged: Judged,
    here: Present,
    expected: Matrix,
    policy: RankPolicy,
    *,
    ranks: tuple[int, int],
    allowed: float,
) -> Iterator[str]:
    """Compare the rank that was chosen, of those up to a limit, with the smallest that will do."""
    rank, limit = ranks
    norm = float(np.linalg.norm(expected))
    rounding = 1e-5 if judged.case.options["compute_dtype"] == "float32" else 1e-12
    most = max(policy.lost_share, rounding**2) * norm**2
    # As far as the matrix may be off, and the certificate of an iteration.
    unsure = 2 * norm * allowed + allowed**2 + RESIDUAL * norm**2
    lost = [restated.residual(expected, k) ** 2 for k in (rank, rank - 1)]
    judged.found.targets[CHOSEN] += 1
    if rank < limit and lost[0] > most + unsure:
        yield f"{here.target}: rank {rank} of {limit} loses {lost[0]:.6g}, more than {most:.6g}"
    if rank > 1 and lost[1] < most - unsure:
        yield f"{here.target}: rank {rank}, and one less loses {lost[1]:.6g} of {most:.6g}"


def _seen(case: Case, here: Present) -> Coordinates:
    """What the rule sees in a space whose result is truncated."""
    if case.space == "delta" or case.rule == "linear":
        return Coordinates([s.delta for s in here.sources], np.eye(len(here.sources[0].b)), None, 1)
    return restated.in_coordinates(case.space, here.sources)


def _judge_clamped(
    judged: Judged,
    here: Present,
    pair: tuple[Matrix, Matrix],
    expected: Matrix,
    limits: tuple[int, float],
) -> Iterator[str]:
    """Compare where every pair of singular vectors is the same in any SVD, and its sign is known.

    The quantile may fall on an entry that is nothing but rounding, so that all is measured against
    the entries before they are clamped.
    """
    rank, allowed = limits
    a = pair[0]
    sigma = np.append(np.linalg.svd(expected, compute_uv=False), 0.0)[: rank + 1]
    unclear = sigma[rank - 1] <= 1e-3 * sigma[0] or (sigma[:-1] < SEPARATED * sigma[1:]).any()
    if unclear or not np.abs(a).max(axis=1).min() > SUBNORMAL[judged.dtype]:
        judged.found.targets[UNDECIDED] += 1
        return
    clamp = judged.case.options["clamp"]
    right = restated.clamped_factors(expected, rank, clamp, like_a=a)
    whole = restated.clamped_factors(expected, rank, 1.0, like_a=a)
    # Vectors turn by the rounding over the gaps, of which the smallest is a tenth.
    steady = 30 * (allowed / sigma[rank - 1] + RESIDUAL)
    share = max(
        float(np.abs(got - x).max() / (steady * np.abs(y).max()))
        for got, x, y in zip(pair, right, whole, strict=True)
    )
    judged.compare(CLAMPED, share)
    if not share <= 1:
        yield f"{here.target}: clamped factors are {share:.3g} times the tolerance off"


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
