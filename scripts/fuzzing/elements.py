"""What element-wise rules make of a target, and where rounding decides what that is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fuzzing.outcomes import Present
from fuzzing.recipes import Case
from oracle import restated, wholes
from oracle.masks import draws
from oracle.restated import Coordinates, Matrix
from streammerge.draw import keep_limit, random_bits, stream_key

DECIDED = {"float32": 2e-6, "float64": 1e-13}
"""A threshold or a vote that is this far from falling the other way, relatively."""
CLEAR = 1e-3
"""From this margin on bases are compared; what rounding leaves grows as it falls."""
SWEEPS = 120
"""Of an iteration on shared bases, which gives up after 200."""
SETTLED = 1e-11
"""Bases that a sweep moves by less have settled."""
ENDS = 1e-10
"""By how much the last sweep of a merge may move them."""
NULL = (1e-8, 1e-4)
"""Singular values between these shares of the largest may be taken for zero or not: an iteration on
shared bases squares them, in float64, and takes those below 1e-6 for zero."""

FAINT = {"float32": 2e-5, "float64": 2e-11}
"""Coordinates below this share of the largest may be zero in the product: they neither vote there
nor count."""

THRESHOLD = "a threshold within rounding"
VARIANCE = "a threshold of variances within rounding"
VOTE = "a vote within rounding"
MASK = "a mask within rounding"
ORDER = "magnitudes of a row within rounding"
BASES = "singular values or entries of bases too near each other"
UNSETTLED = "shared bases that did not settle, or not in one place"


@dataclass(frozen=True)
class Seen:
    """The tensors of one target that a rule is applied to, a whole adapter each but in factor
    space."""

    case: Case
    here: Present
    name: str
    """A or B in factor space, else the space."""
    tensors: Sequence[Matrix]
    margin: float = 1.0
    """How far rounding is from having a say in the bases: 1 is far."""
    why: str = ""
    """Why they are not unique."""
    unsure: float = 0.0
    """How far they may be off besides, relatively."""
    pruned: Mapping[int, Matrix] = field(default_factory=dict)
    """By position what is left of them by thresholds over whole adapters."""

    @property
    def density(self) -> Any:
        """The share that is kept."""
        return self.case.options.get("density")

    @property
    def weights(self) -> list[float]:
        """Those that the rule sees: in factor space roots, of which the A's have the signs."""
        if self.case.space != "factor":
            return list(self.here.weights)
        pairs = zip(self.here.weights, self.here.sources, strict=True)
        q = [w * s.scaling for w, s in pairs]
        return [math.copysign(math.sqrt(abs(x)), x if self.name == "A" else 1.0) for x in q]

    @property
    def whole(self) -> bool:
        """Whether all elements are whole numbers times a scaling."""
        return all(held.whole for held in self.here.held) and self.case.space in ("factor", "delta")

    @property
    def dyadic(self) -> bool:
        """Whether what a rule sees of small whole numbers is exact."""
        scalings = [source.scaling * 64 for source in self.here.sources]
        return self.case.space == "factor" or all(x.is_integer() for x in scalings)

    @property
    def exact(self) -> bool:
        """Whether equals are equal in the product too: in factor space, of inputs that the
        arithmetic holds; of whole numbers under one scaling."""
        stored = self.case.options["compute_dtype"] == "float64" or all(
            held.dtype != "F64" for held in self.here.held
        )
        return (self.case.space == "factor" and stored) or self.whole

    @property
    def limit(self) -> float:
        """What of two elements is more than rounding, relatively."""
        rounding = max(DECIDED[self.case.options["compute_dtype"]], self.unsure)
        return rounding / self.margin if self.margin else math.inf

    def errors(self) -> list[float]:
        """How far elements of each tensor may be off."""
        unsure = 0.0 if self.exact else self.limit
        return [unsure * float(np.abs(x).max(initial=0.0)) for x in self.tensors]


def parameters_of(case: Case) -> dict[str, float]:
    """Of the rule and the space."""
    return dict(case.options.get("parameters", ()))


def is_random(case: Case) -> bool:
    """Whether elements are dropped at random."""
    return case.rule.startswith(("dare", "della"))


def least_odds(case: Case) -> float:
    """The smallest number that elements are divided by, about."""
    if not is_random(case):
        return 1.0
    least = case.options["density"] - parameters_of(case).get("epsilon", 0.0) / 2
    return float(max(least, 5e-4))


# ---------------------------------------------------------------------------------------------
# What a rule sees


def in_factors(case: Case, here: Present) -> list[Seen]:
    """The A's, and the B's."""
    return [Seen(case, here, x, [getattr(s, x.lower()) for s in here.sources]) for x in "AB"]


def in_space(case: Case, here: Present, rank: int) -> tuple[Seen, Coordinates]:
    """Deltas or their coordinates, and how an answer is brought back.

    Of a weighted sum there are no coordinates, but in shared bases of a rank.
    """
    if case.space == "ctm":
        return _in_shared_bases(case, here, rank)
    deltas = [source.delta for source in here.sources]
    if case.space == "delta" or case.rule == "linear":
        return Seen(case, here, "delta", deltas), Coordinates(
            deltas, np.eye(len(deltas[0])), None, 1
        )
    found = restated.in_coordinates(case.space, here.sources)
    why = BASES if found.margin < CLEAR else ""
    return Seen(case, here, case.space, found.tensors, found.margin, why), found


def _in_shared_bases(case: Case, here: Present, rank: int) -> tuple[Seen, Coordinates]:
    """Coordinates in shared bases, which both iterations have to find in one place.

    A weighted sum hangs on the spaces alone, other rules on each vector.
    """
    deltas, beta = [source.delta for source in here.sources], parameters_of(case)["beta"]
    found = wholes.find_shared(deltas, rank, beta, sweeps=SWEEPS)
    other = wholes.find_shared(deltas, rank, beta, sweeps=SWEEPS, step=True)
    tensors = restated.without_rounding([found.u.T @ delta @ found.v for delta in deltas])
    seen = Coordinates(tensors, found.u, found.v, 1.0 if case.rule == "linear" else found.margin)
    why = BASES if seen.margin < CLEAR else ""
    if any(_is_unclear(values, rank) for values in found.values):
        why = BASES
    if max(found.moved, other.moved, *_apart(found, other)) > SETTLED:
        why = UNSETTLED
    # By how much each sweep comes nearer: what is left when the last one moved so little.
    rate = 1e-13 ** (1 / max(1, found.sweeps, other.sweeps))
    unsure = ENDS * rate / (1 - rate)
    return Seen(case, here, "ctm", tensors, seen.margin, why, unsure), seen


def _is_unclear(values: Matrix, rank: int) -> bool:
    """Whether it is rounding which directions an iteration begins from."""
    shares = values / values[0] if values[0] else values
    doubtful = (shares[:rank] > NULL[0]) & (shares[:rank] < NULL[1])
    tied = rank < len(shares) and shares[rank - 1] > NULL[0]
    return bool(doubtful.any() or (tied and shares[rank] > (1 - 1e-6) * shares[rank - 1]))


def _apart(one: wholes.Shared, other: wholes.Shared) -> list[float]:
    """How far two iterations ended from each other."""
    pairs = ((one.u, other.u), (one.v, other.v))
    if any(x.shape != y.shape for x, y in pairs):
        return [math.inf]
    # What rounding leaves of two that agree is far below what one sweep may move.
    return [1e-3 * float(np.linalg.norm(y - x @ (x.T @ y))) for x, y in pairs]


# ---------------------------------------------------------------------------------------------
# Thresholds over whole adapters


def prune_together(case: Case, everything: Iterable[Seen]) -> dict[tuple[str, str], Seen]:
    """By target and tensor, what is seen with what is left of it by one threshold an adapter.

    Args:
        case: it.
        everything: in the output's order, A before B.
    """
    seen = list(everything)
    gamma, density = parameters_of(case).get("gamma", 0.0), case.options["density"]
    pruned: list[dict[int, Matrix]] = [{} for _ in seen]
    why = [one.why for one in seen]
    for position in range(len(case.adapters)):
        mine = [
            (k, one.here.positions.index(position))
            for k, one in enumerate(seen)
            if position in one.here.positions
        ]
        flat = [seen[k].tensors[place] for k, place in mine]
        size = sum(x.size for x in flat)
        start = int(gamma * size)
        parts = restated.prune_together(flat, density, gamma)
        unsure = [seen[k].errors()[place] for k, place in mine]
        if len({seen[k].here.target for k, _ in mine}) > 1:
            # Whole numbers under several scalings are equal where these are exact.
            kept = zip(unsure, mine, flat, strict=True)
            unsure = [
                error if seen[k].dyadic else max(error, seen[k].limit * np.abs(x).max(initial=0.0))
                for error, (k, _), x in kept
            ]
        errors = [np.full(x.size, error) for x, error in zip(flat, unsure, strict=True)]
        values = np.concatenate([x.ravel() for x in flat])
        cuts = (start, start + int(density * size))
        clear = all(restated.is_clear_cut(values, np.concatenate(errors), cut) for cut in cuts)
        doubt = next((seen[k].why for k, _ in mine if seen[k].why), "" if clear else THRESHOLD)
        for (k, _), part in zip(mine, parts, strict=True):
            pruned[k][position] = part
            why[k] = why[k] or doubt
    return {
        (one.here.target, one.name): replace(one, why=reason, pruned=left)
        for one, reason, left in zip(seen, why, pruned, strict=True)
    }


# ---------------------------------------------------------------------------------------------
# What a rule makes of it


def answer(seen: Seen) -> Matrix:
    """What the rule makes of the tensors."""
    case, tensors = seen.case, seen.tensors
    sign = case.options.get("majority_sign", "total")
    if seen.pruned:
        pruned = [seen.pruned[i] for i in seen.here.positions]
        return restated.combine(case.rule, pruned, seen.weights, sign)
    shape = tensors[0].shape
    if not math.prod(shape):
        return np.zeros(shape)
    return restated.apply_rule(
        case.rule,
        tensors,
        seen.weights,
        density=seen.density,
        majority_sign=sign,
        masks=_masks(seen) if is_random(case) else None,
        parameters=parameters_of(case),
    )


def _masks(seen: Seen) -> list[Any]:
    """What is kept at random, or for DELLA what is drawn."""
    shape, seed, target = seen.tensors[0].shape, seen.case.options["seed"], seen.here.target
    if not math.prod(shape):
        return [np.zeros(shape, bool) for _ in seen.here.positions]
    if seen.case.rule.startswith("della"):
        return [draws(i, target, seen.name, shape, seed) for i in seen.here.positions]
    keys = [stream_key(seed, i, target, seen.name) for i in seen.here.positions]
    bits = [random_bits(key, 0, math.prod(shape)).numpy().reshape(shape) for key in keys]
    return [x < keep_limit(seen.density) for x in bits]


def doubt(seen: Seen) -> str:
    """Why rounding may change what is pruned or elected; nothing where it cannot.

    Small whole numbers are exact; so are, in factor space, inputs that the arithmetic holds.
    """
    case, tensors, density = seen.case, seen.tensors, seen.density
    if seen.why:
        return seen.why
    if case.rule in ("linear", "dare_linear") or density == 0 or not tensors[0].size:
        return ""
    limit = seen.limit
    if case.rule == "consensus":
        gap = restated.consensus_gap(tensors, seen.weights, parameters_of(case))
        return "" if len(tensors) == 1 or gap > limit else MASK
    pruned, why = _pruned(seen, limit)
    if why or case.rule in ("magnitude_prune", "breadcrumbs", "della_linear"):
        return why
    return VOTE if _is_close(seen, pruned) else ""


def _is_close(seen: Seen, pruned: Sequence[Matrix]) -> bool:
    """Whether rounding may have a say in an election."""
    case = seen.case
    if seen.name in ("core", "knots", "ctm") and _has_faint(case, pruned):
        return True
    if case.options["majority_sign"] == "frequency":
        return False
    halved = case.rule == "dare_ties" and math.frexp(seen.density)[0] == 0.5
    exact = seen.whole and seen.dyadic and (halved or not is_random(case))
    return not exact and restated.election_gap(pruned) <= seen.limit


def _has_faint(case: Case, pruned: Sequence[Matrix]) -> bool:
    """Whether a coordinate votes that may be taken for rounding."""
    sizes = np.abs(np.stack(pruned))
    faint = FAINT[case.options["compute_dtype"]] * sizes.max(initial=0.0)
    return bool(((sizes > 0) & (sizes < faint)).any())


def _pruned(seen: Seen, limit: float) -> tuple[Sequence[Matrix], str]:
    """What a rule that prunes votes with, and why that is not certain."""
    case, tensors, density = seen.case, seen.tensors, seen.density
    if seen.pruned:
        return [seen.pruned[i] for i in seen.here.positions], ""
    if case.rule.startswith("della"):
        epsilon = parameters_of(case)["epsilon"]
        drawn = zip(tensors, _masks(seen), strict=True)
        pruned = [restated.prune_by_rank(x, u, density, epsilon) for x, u in drawn]
        clear = epsilon == 0 or seen.whole or all(restated.rank_gap(x) > limit for x in tensors)
        return pruned, "" if clear else ORDER
    if case.rule == "sce":
        exact = seen.whole and seen.dyadic and len(tensors) in (1, 2, 4)
        clear = exact or restated.variance_gap(tensors, density) > limit
        return restated.select_varied(tensors, density), "" if clear else VARIANCE
    if case.rule.startswith("dare"):
        pairs = zip(tensors, _masks(seen), strict=True)
        return [restated.prune_by_mask(x, kept, density) for x, kept in pairs], ""
    gamma = parameters_of(case).get("gamma", 0.0)
    clear = all(
        restated.is_clear_cut(x.ravel(), np.full(x.size, error), cut)
        for x, error in zip(tensors, seen.errors(), strict=True)
        for cut in (int(gamma * x.size), int(gamma * x.size) + int(density * x.size))
    )
    return [
        restated.prune_to_crumbs(x, density, gamma) for x in tensors
    ], "" if clear else THRESHOLD
