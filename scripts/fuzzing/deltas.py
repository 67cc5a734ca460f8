"""What rules that see whole deltas make of a target, and how far rounding may move that.

The arithmetic is modelled from its conditions in float64: how much of a delta its factors cancel,
how far means are from cancelling, how far apart singular values are at a cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fuzzing.elements import parameters_of
from fuzzing.outcomes import Present
from fuzzing.recipes import Case
from oracle import wholes
from oracle.restated import Matrix, Source

DOUBLE = 1e-14
"""Rounding of what is done in float64 whatever the compute dtype is, with its accumulation."""
STORED = {"float32": 1e-6, "float64": 1e-14}
"""Rounding of what is held in the compute dtype, with its accumulation."""
UNIT = {"float32": 2.0**-24, "float64": 1e-15}
"""How large directions are that are nothing but rounding of what is held."""
CANCELLED = (1e-10, 1e-5)
"""Lengths and sines between these are zero to one arithmetic and not to another."""
NULL = (1e-7, 1e-5)
"""Singular values between these shares of the largest are on the edge of being zero."""
SHORT = 40.0
"""A delta this much shorter than its factors may have a cosine that rounding keeps from -1."""
MOST = 1e-2
"""What rounding moves more than this, relatively, is not compared."""
STEPS = 100
"""Of a Karcher mean, which gives up after 200."""

ACROSS = "directions that cancel, or are nearly right across from each other"
LITTLE = "deltas, or a sum, of which terms cancel nearly all"
SLOW = "a mean on the sphere that did not settle"
EDGE = "singular values on the edge of zero"
NEAR = "singular values nearly equal at a cut"
DEPENDENT = "directions that nearly depend on each other"


@dataclass(frozen=True)
class Answer:
    """What a rule makes of a target."""

    matrix: Matrix
    unsure: float
    """How far rounding may move it, beside what it moves of any sum: a Frobenius norm."""
    scale: float
    """Of the terms that are added up."""
    why: str = ""
    """Why it is not compared."""
    coefficients: tuple[float, ...] = ()


def as_held(case: Case, here: Present) -> Present:
    """The sources as the arithmetic holds them: float32 rounds float64's values when read."""
    if case.options["compute_dtype"] == "float64":
        return here
    sources = [
        Source(*(x.astype(np.float32).astype(np.float64) for x in (s.a, s.b)), s.scaling)
        for s in here.sources
    ]
    return replace(here, sources=tuple(sources))


def lengths(sources: Sequence[Source]) -> Matrix:
    """‖B‖·‖A‖ of each with its scaling: what rounding is relative to."""
    return np.array(
        [abs(s.scaling) * np.linalg.norm(s.b) * np.linalg.norm(s.a) for s in sources], float
    )


# ---------------------------------------------------------------------------------------------
# Coefficient rules


def coefficient_answer(case: Case, here: Present) -> Answer:
    """The sum with a rule's coefficients."""
    here = as_held(case, here)
    deltas = [source.delta for source in here.sources]
    if not any(here.weights):
        return Answer(np.zeros_like(deltas[0]), 0.0, 0.0, coefficients=(0.0,) * len(deltas))
    norms = np.array([np.linalg.norm(delta) for delta in deltas])
    found = wholes.COEFFICIENT[case.rule](deltas, here.weights)
    scale = float(np.abs(found) @ norms)
    there = norms > 0
    # How much of the factors cancels: inner products are squares.
    short = float((lengths(here.sources)[there] / norms[there]).max(initial=1.0))
    worst = short**2
    margin, why = _margin(case, deltas, here.weights, norms)
    # Shares of magnitudes add up to 1, those of a sum to more where weights are negative.
    by_size = case.rule in ("multislerp", "karcher")
    stretch = 1.0 if by_size else float(np.abs(wholes.shares(here.weights)).sum())
    unsure = DOUBLE * len(deltas) * worst * (1 + stretch) / margin**2
    if short > SHORT:
        why = LITTLE
    if not why and unsure > MOST:
        why = ACROSS
    return Answer(
        wholes.combined(deltas, found), unsure * scale, scale, why, tuple(map(float, found))
    )


def _margin(
    case: Case, deltas: Sequence[Matrix], weights: Sequence[float], norms: Matrix
) -> tuple[float, str]:
    """By what the rule divides, relatively, where that may be small; and why it is too unsure."""
    margin, why = 1.0, ""
    if case.rule in ("multislerp", "karcher"):
        walk = wholes.walk(deltas, weights, 1 if case.rule == "multislerp" else 2000)
        margin = min(walk.length, walk.across)
        why = SLOW if case.rule == "karcher" and walk.steps > STEPS else ""
    elif case.rule == "norm_matched":
        part = wholes.shares(weights)
        wanted = float(np.abs(part) @ norms)
        margin = float(np.linalg.norm(wholes.combined(deltas, part))) / wanted if wanted else 1.0
    elif case.rule == "slerp" and len(deltas) == 2 and norms.all():
        x, y = (delta.ravel() / norm for delta, norm in zip(deltas, norms, strict=True))
        cosine = float(x @ y)
        margin = float(np.linalg.norm(y - cosine * x)) if cosine < 0 else 1.0
    if margin <= CANCELLED[0]:
        return 1.0, why
    return margin, ACROSS if margin < CANCELLED[1] else why


# ---------------------------------------------------------------------------------------------
# Spectral rules


def spectral_answer(case: Case, here: Present, rank: int, *, iterated: bool) -> Answer:
    """What a rule makes of singular triples.

    Args:
        case: it.
        here: the target.
        rank: of the output.
        iterated: whether leading triples may be found by iteration, to its tolerance.
    """
    here = as_held(case, here)
    deltas, weights = [source.delta for source in here.sources], here.weights
    if case.rule == "tsv":
        parts = wholes.tsv_parts(deltas, weights)
    elif case.rule == "iso_c":
        parts = wholes.iso_c_parts(deltas, weights, rank)
    else:
        parts = wholes.iso_cts_parts(deltas, weights, rank, parameters_of(case)["common"])
    u, s, v = wholes.stacked(parts)
    matrix = np.zeros(deltas[0].shape)
    if len(s) and case.rule == "tsv":
        matrix = (wholes.polar(u) * s) @ wholes.polar(v).T
    elif len(s):
        matrix = wholes.with_one_value(parts, matrix.shape)
    moved, why = _turned(case, here, parts, iterated=iterated)
    for side in (u, v):
        factor, doubt = _of_polar(case, side)
        moved, why = moved * factor, why or doubt
    if case.rule == "iso_c" and not why:
        # Directions of one matrix depend on nothing.
        moved = max(moved, STORED[case.options["compute_dtype"]])
    if not why and moved > MOST:
        why = NEAR
    scale = float(np.linalg.norm(s)) if case.rule == "tsv" else float(np.linalg.norm(matrix))
    return Answer(matrix, 4 * moved * scale, max(scale, here.scale), why)


def _turned(
    case: Case, here: Present, parts: Sequence[wholes.Leading], *, iterated: bool
) -> tuple[float, str]:
    """How far rounding may turn the parts' triples, and why they are not certain."""
    compute = case.options["compute_dtype"]
    sizes = np.abs(here.weights) * lengths(here.sources)
    ranks = [len(source.a) for source in here.sources]
    moved, of_sum = STORED[compute], 0.0
    for part in parts:
        if part.source is None:
            noise, unit, rank = STORED[compute] * float(sizes.sum()), UNIT[compute], sum(ranks)
            if iterated:
                noise += 1e-4 * float(np.linalg.norm(part.whole))
        else:
            # What lies in the common directions is taken out, with what these are off.
            noise = DOUBLE * float(sizes[part.source]) + of_sum * part.largest
            unit, rank = UNIT["float64"], ranks[part.source]
        kept = len(part.s)
        if not part.largest:
            continue
        values = part.whole / part.largest
        # Where the factors have more columns than directions rounding makes some of the others.
        spare = (values < NULL[1])[:rank].any() or rank > len(values)
        if spare and unit * float(sizes.sum()) > 0.3e-6 * part.largest:
            return moved, LITTLE
        if ((values > NULL[0]) & (values < NULL[1])).any():
            return moved, EDGE
        if not kept:
            continue
        below = float(part.whole[kept]) if kept < len(part.whole) else 0.0
        below = below if below > NULL[1] * part.largest else 0.0
        gap = float(part.s[-1]) - below
        if iterated and part.source is None and below and part.s[-1] < 1.1 * below:
            return moved, NEAR
        # A rotation among all triples of a delta makes no difference to tsv.
        turned = noise / gap if gap > 0 else np.inf
        if turned > MOST:
            return moved, NEAR
        of_sum = max(of_sum, turned if part.source is None else 0.0)
        moved = max(moved, turned)
    return moved, ""


def _of_polar(case: Case, columns: Matrix) -> tuple[float, str]:
    """By how much errors of columns grow when they are made orthonormal, and why that is unsure."""
    if not columns.size:
        return 1.0, ""
    s = np.linalg.svd(columns, compute_uv=False)
    shares = s / s[0]
    if ((shares > NULL[0]) & (shares < NULL[1])).any():
        return 1.0, DEPENDENT
    least = float(shares[shares > NULL[1]].min())
    # The Gram matrix squares the condition.
    unsure = max(STORED[case.options["compute_dtype"]], DOUBLE / least) / least
    return 1 / least, DEPENDENT if unsure > MOST else ""
