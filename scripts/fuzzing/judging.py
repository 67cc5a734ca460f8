"""Whether what lies in the files of a merge is what the formulas give."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from fuzzing import elements
from fuzzing.deltas import Answer, coefficient_answer, spectral_answer
from fuzzing.elements import Seen
from fuzzing.outcomes import (
    CHOSEN,
    CLAMPED,
    ELEMENTS,
    EXACT,
    FOUND,
    OUTPUT_ROUNDING,
    RESIDUAL,
    ROUNDING,
    SUBNORMAL,
    TRUNCATED,
    Judged,
    Present,
    is_global,
    targets_of,
)
from fuzzing.recipes import Case
from making import Tensor, decode
from oracle import restated, wholes
from oracle.restated import Matrix
from streammerge.adapter import ITEM_BYTES, TORCH_NAMES, Adapter, NameTable
from streammerge.catalog import RULES
from streammerge.planner.scaling import scalings
from streammerge.ranks import RankLimit, RankPolicy
from streammerge.readers import read_adapters

SEPARATED = 1.1
CLAMP = "vectors that are clamped and not unique"

Together = Mapping[tuple[str, str], Seen]
"""What thresholds over whole adapters leave, by target and tensor."""


def judge(judged: Judged, out: Path) -> Iterator[str]:
    """Yield what is wrong with an output."""
    case = judged.case
    (merged,) = read_adapters([str(out)], NameTable())
    rows = {merged.target(row): row for row in range(len(merged))}
    everything = targets_of(case)
    if rows.keys() != everything.keys():
        yield "other targets"
    if not (scalings(merged, None) == 1.0).all():
        yield "a scaling that is not 1"
    together: Together = {}
    if is_global(case):
        together = elements.prune_together(case, _all_seen(case, everything))
    for target, here in everything.items():
        a, b = (_matrix(merged, rows[target], side) for side in "AB")
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            yield f"{target}: not finite"
        elif case.space == "exact":
            yield from _judge_exact(judged, here, (a, b))
        elif case.space == "factor":
            yield from _judge_factors(judged, here, (a, b), together)
        else:
            yield from _judge_truncated(judged, here, (a, b), together)


def _all_seen(case: Case, everything: Mapping[str, Present]) -> Iterator[Seen]:
    for here in everything.values():
        if case.space == "factor":
            yield from elements.in_factors(case, here)
        else:
            yield elements.in_space(case, here, _limit(case, here))[0]


def _matrix(adapter: Adapter, row: int, side: str) -> Matrix:
    factor = adapter.factor(row, side)
    size = ITEM_BYTES[TORCH_NAMES[factor.dtype]] * factor.elements
    data = Path(factor.file.path).read_bytes()[factor.offset : factor.offset + size]
    values = decode(Tensor(factor.dtype, factor.shape, data))
    rank = int(adapter.columns.rank[row])
    return values.reshape((rank, -1) if side == "A" else (-1, rank))


# ---------------------------------------------------------------------------------------------
# Element by element


def _judge_exact(judged: Judged, here: Present, pair: tuple[Matrix, Matrix]) -> Iterator[str]:
    """Compare A's times their weights, one below the other; and B's as they are.

    Weights that a rule has found are taken from the A's, and judged by what they add up to: of
    deltas that depend on each other many weights make the same.
    """
    case, weights, casts = judged.case, here.weights, 1
    if RULES[case.rule].kind == "coefficient":
        answer = coefficient_answer(case, here)
        if answer.why:
            judged.leave(answer.why)
            return
        # They come from what was cast, so that their own rounding adds to that of each element.
        weights, casts = _found_weights(here, pair[0]), 2
        yield from _judge_weights(judged, here, weights, answer)
    factors = [abs(w * s.scaling) for w, s in zip(weights, here.sources, strict=True)]
    expected = restated.merge_factors("cat", here.sources, weights)
    for side, got, right in zip("AB", pair, expected, strict=True):
        sizes = [np.abs(getattr(source, side.lower())).max() for source in here.sources]
        times = factors if side == "A" else [1.0] * len(factors)
        terms = sum(r * x for r, x in zip(times, sizes, strict=True))
        yield from _compare(
            judged, f"{here.target} {side}", (got, right), terms, way=EXACT, casts=casts
        )


def _found_weights(here: Present, a: Matrix) -> tuple[float, ...]:
    """What each A was multiplied by, by least squares."""
    parts = np.split(a, np.cumsum([len(source.a) for source in here.sources])[:-1])
    found = []
    for source, part in zip(here.sources, parts, strict=True):
        scaled = source.a * source.scaling
        squares = float((scaled * scaled).sum())
        found.append(float((part * scaled).sum()) / squares if squares else 0.0)
    return tuple(found)


def _judge_weights(
    judged: Judged, here: Present, weights: tuple[float, ...], answer: Answer
) -> Iterator[str]:
    """Compare the sum that weights make; and they are no larger than it takes."""
    deltas = [source.delta for source in here.sources]
    sizes = [abs(w) * np.linalg.norm(delta) for w, delta in zip(weights, deltas, strict=True)]
    rounding = ROUNDING[judged.case.options["compute_dtype"]] + OUTPUT_ROUNDING[judged.dtype]
    nothing = SUBNORMAL[judged.dtype] * sum(
        float(np.linalg.norm(s.b)) * math.sqrt(s.a.size) for s in here.sources
    )
    allowed = rounding * (sum(sizes) + answer.scale) + answer.unsure + nothing + 1e-300
    share = float(np.linalg.norm(wholes.combined(deltas, weights) - answer.matrix)) / allowed
    judged.compare(FOUND, share)
    if not share <= 1:
        yield f"{here.target}: the sum is {share:.3g} times the tolerance from the formula"
    if not sum(sizes) <= 3 * answer.scale + allowed:
        yield f"{here.target}: weights {weights} that cancel, of {answer.coefficients}"


def _judge_factors(
    judged: Judged, here: Present, pair: tuple[Matrix, Matrix], together: Together
) -> Iterator[str]:
    case = judged.case
    for alone, got in zip(elements.in_factors(case, here), pair, strict=True):
        seen = together.get((here.target, alone.name), alone)
        why = elements.doubt(seen)
        if why:
            judged.leave(why)
            continue
        sizes = [np.abs(x).max() for x in seen.tensors]
        terms = sum(abs(w) * x for w, x in zip(seen.weights, sizes, strict=True))
        terms /= elements.least_odds(case)
        both = got, elements.answer(seen)
        yield from _compare(judged, f"{here.target} {seen.name}", both, terms, way=ELEMENTS)


def _compare(
    judged: Judged,
    what: str,
    both: tuple[Matrix, Matrix],
    terms: float,
    *,
    way: str,
    casts: int = 1,
) -> Iterator[str]:
    got, right = both
    if got.shape != right.shape:
        yield f"{what}: shape {got.shape}, not {right.shape}"
        return
    allowed = ROUNDING[judged.case.options["compute_dtype"]] * terms
    allowed = (
        allowed + SUBNORMAL[judged.dtype] + casts * OUTPUT_ROUNDING[judged.dtype] * np.abs(right)
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        share = float(np.nanmax(np.append(np.abs(got - right) / allowed, 0.0)))
    judged.compare(way, share)
    if not share <= 1:
        yield f"{what}: {share:.3g} times the tolerance from the formula"


# ---------------------------------------------------------------------------------------------
# By the residual


def _limit(case: Case, here: Present) -> int:
    """The output's rank, or the largest that a policy may choose."""
    asked = case.options.get("rank")
    limited = isinstance(asked, RankPolicy | RankLimit)
    largest = max(layer.rank for adapter in case.adapters for layer in adapter.layers.values())
    limit = min((asked.largest if limited else asked) or largest, *here.sources[0].delta.shape)
    summed = case.rule == "linear" or RULES[case.rule].kind == "coefficient"
    if limited and case.space != "ctm" and (summed or case.space in ("core", "knots")):
        limit = min(limit, sum(len(source.a) for source in here.sources))
    return limit


def _answer(judged: Judged, here: Present, limit: int, together: Together) -> Answer:
    """What the rule makes of the target, before that is truncated."""
    case = judged.case
    if RULES[case.rule].kind == "coefficient":
        return coefficient_answer(case, here)
    if RULES[case.rule].kind == "spectral":
        return spectral_answer(case, here, limit, iterated=here.target in judged.iterated)
    seen, coordinates = elements.in_space(case, here, limit)
    seen = together.get((here.target, seen.name), seen)
    why = elements.doubt(seen)
    scale = here.scale / elements.least_odds(case)
    if why:
        return Answer(coordinates.left, 0.0, scale, why)
    rounding = ROUNDING[case.options["compute_dtype"]]
    matrix = coordinates.back(elements.answer(seen))
    unsure = rounding * (1 / seen.margin - 1) + seen.unsure / seen.margin
    return Answer(matrix, unsure * scale, scale)


def _judge_truncated(
    judged: Judged, here: Present, pair: tuple[Matrix, Matrix], together: Together
) -> Iterator[str]:
    case = judged.case
    a, b = pair
    m, n = here.sources[0].delta.shape
    limit = _limit(case, here)
    policy = asked if isinstance(asked := case.options.get("rank"), RankPolicy) else None
    rank = min(max(1, len(a)), limit) if policy else limit
    if a.shape != (rank, n) or b.shape != (m, rank):
        yield f"{here.target}: shapes {a.shape} and {b.shape}, not of rank {rank}"
        return
    answer = _answer(judged, here, limit, together)
    if answer.why:
        judged.leave(answer.why)
        return
    rounding, cast = ROUNDING[case.options["compute_dtype"]], OUTPUT_ROUNDING[judged.dtype]
    sizes = float(np.linalg.norm(a) * np.linalg.norm(b))
    nothing = (
        SUBNORMAL[judged.dtype] * math.sqrt(rank * m * n) * (np.abs(a).max() + np.abs(b).max())
    )
    allowed = rounding * answer.scale + answer.unsure + 3 * cast * sizes + float(nothing) + 1e-300
    if policy:
        yield from _judge_rank(
            judged, here, answer.matrix, policy, ranks=(rank, limit), allowed=allowed
        )
    if case.options.get("clamp"):
        yield from _judge_clamped(judged, here, pair, answer.matrix, (rank, allowed))
        return
    distance = float(np.linalg.norm(answer.matrix - b @ a))
    best = restated.residual(answer.matrix, rank)
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
        judged.leave(CLAMP)
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
