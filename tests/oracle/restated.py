"""The methods once more, dense and in float64, straight from the formulas.

Nothing here knows of files, tiles or streammerge. A source is one adapter's share of one target,
with both factors as matrices: B is m x r, A is r x n, and its delta is (B A) * scaling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

FACTOR_METHODS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
DELTA_METHODS = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
METHODS = ("cat", *FACTOR_METHODS, *DELTA_METHODS)
OTHER_RULES = ("breadcrumbs", "della", "della_linear", "sce", "consensus")
"""Rules that PEFT does not have."""
_RULE_OF_DELTA_METHOD = {
    name: "linear" if name == "svd" else name.removesuffix("_svd") for name in DELTA_METHODS
}


@dataclass(frozen=True)
class Source:
    """One adapter's factors for one target."""

    a: Matrix
    b: Matrix
    scaling: float

    @property
    def delta(self) -> Matrix:
        """The change to the weight matrix, m x n."""
        return (self.b @ self.a) * self.scaling


@dataclass(frozen=True)
class FactorMasks:
    """What DARE keeps of each adapter's A and of each adapter's B, or what DELLA draws for them."""

    a: Sequence[Any]
    b: Sequence[Any]


def rule_of(method: str) -> str:
    """The element-wise rule behind a method's name."""
    return _RULE_OF_DELTA_METHOD.get(method, method)


def uses_masks(method: str) -> bool:
    """Whether the method prunes at random."""
    return method.startswith("dare")


def uses_density(method: str) -> bool:
    """Whether the method prunes at all."""
    return rule_of(method) not in ("cat", "linear")


def uses_majority_sign(method: str) -> bool:
    """Whether the method elects a sign."""
    return "ties" in method


def prune_by_magnitude(x: Matrix, density: float) -> Matrix:
    """Keep the int(density * size) largest |x|; of equals, the lowest flat index."""
    if density >= 1:
        return x
    kept = np.argsort(-np.abs(x).ravel(), kind="stable")[: int(density * x.size)]
    pruned = np.zeros(x.size)
    pruned[kept] = x.ravel()[kept]
    return pruned.reshape(x.shape)


def prune_to_crumbs(x: Matrix, density: float, gamma: float) -> Matrix:
    """Of the |x| in falling order, of equals the lowest flat index first: skip the int(gamma *
    size) first, keep the int(density * size) that follow."""
    order = np.argsort(-np.abs(x).ravel(), kind="stable")
    start = int(gamma * x.size)
    kept = order[start : start + int(density * x.size)]
    pruned = np.zeros(x.size)
    pruned[kept] = x.ravel()[kept]
    return pruned.reshape(x.shape)


def prune_together(tensors: Sequence[Matrix], density: float, gamma: float = 0.0) -> list[Matrix]:
    """As if the tensors, in this order, were one vector: skip the int(gamma * size) largest, keep
    the int(density * size) that follow, of equals the first."""
    whole = np.concatenate([x.ravel() for x in tensors])
    pruned = prune_to_crumbs(whole, density, gamma)
    parts = np.split(pruned, np.cumsum([x.size for x in tensors])[:-1])
    return [part.reshape(x.shape) for part, x in zip(parts, tensors, strict=True)]


def prune_by_mask(x: Matrix, keep: Mask, density: float) -> Matrix:
    """Keep what the mask keeps, divided by the density."""
    if density >= 1:
        return x
    return np.where(keep, x / density, 0.0)


def odds_by_rank(x: Matrix, density: float, epsilon: float) -> Matrix:
    """With what probability MagPrune keeps each element: by its rank in its row, from 0 for the
    smallest magnitude on; of equals the one further left is the smaller."""
    ranks = np.argsort(np.argsort(np.abs(x), axis=1, kind="stable"), axis=1)
    share = ranks / (x.shape[1] - 1) if x.shape[1] > 1 else np.full(x.shape, 0.5)
    return density - epsilon / 2 + epsilon * share


def prune_by_rank(x: Matrix, drawn: Matrix, density: float, epsilon: float) -> Matrix:
    """Keep the elements whose draws, uniform in [0, 1), are below their odds, divided by these."""
    odds = odds_by_rank(x, density, epsilon)
    return np.where(drawn < odds, x / odds, 0.0)


def select_varied(tensors: Sequence[Matrix], density: float) -> list[Matrix]:
    """Each with only the int(density * size) elements of largest variance over the tensors, of
    equals those of the lowest flat index; one alone is kept whole."""
    if len(tensors) == 1:
        return list(tensors)
    varied = np.var(np.stack(tensors), axis=0)
    kept = np.zeros(varied.size, bool)
    kept[np.argsort(-varied.ravel(), kind="stable")[: int(density * varied.size)]] = True
    return [np.where(kept.reshape(x.shape), x, 0.0) for x in tensors]


def sce(
    tensors: Sequence[Matrix], weights: Sequence[float], density: float, majority_sign: str
) -> Matrix:
    """Select, calculate, erase: a mean of those that agree, by the squares of what was selected."""
    selected = select_varied(tensors, density)
    squares = np.array([np.square(x).sum() for x in selected])
    shares = squares / squares.sum() if squares.any() else squares
    elected = elect(selected, majority_sign)
    counts = [c * (np.sign(x) == elected) for c, x in zip(shares, selected, strict=True)]
    counted = [c * x for c, x in zip(counts, selected, strict=True)]
    divisor = np.stack(counts).sum(axis=0)
    return weighted_sum(counted, weights) / np.where(divisor > 0, divisor, 1.0)


def consensus(
    tensors: Sequence[Matrix], weights: Sequence[float], parameters: Mapping[str, float]
) -> Matrix:
    """The sum, with the elements that enough TALL masks hold; no more can be asked for than are."""
    terms = [weight * tensor for weight, tensor in zip(weights, tensors, strict=True)]
    total = weighted_sum(tensors, weights)
    masks = [np.abs(t) >= parameters["tall_lambda"] * np.abs(total - t) for t in terms]
    held = np.stack(masks).sum(axis=0) >= min(parameters["agree"], len(tensors))
    return np.where(held, total, 0.0)


def elect(tensors: Sequence[Matrix], majority_sign: str) -> Matrix:
    """The sign that wins at each position; a tied vote elects +1."""
    stacked = np.stack(tensors)
    votes = {"total": stacked, "frequency": np.sign(stacked)}[majority_sign]
    return np.where(votes.sum(axis=0) >= 0, 1.0, -1.0)


def weighted_sum(tensors: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
    """Sum of w_i * x_i."""
    total = np.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        total = total + weight * tensor
    return total


def disjoint_mean(
    tensors: Sequence[Matrix], weights: Sequence[float], majority_sign: str
) -> Matrix:
    """Weighted sum of the values that agree with the elected sign, over their number."""
    elected = elect(tensors, majority_sign)
    agrees = [np.sign(tensor) == elected for tensor in tensors]
    kept = [np.where(ok, tensor, 0.0) for ok, tensor in zip(agrees, tensors, strict=True)]
    count = np.stack(agrees).sum(axis=0)
    return weighted_sum(kept, weights) / np.maximum(count, 1)


def apply_rule(
    rule: str,
    tensors: Sequence[Matrix],
    weights: Sequence[float],
    *,
    density: float | None = None,
    majority_sign: str = "total",
    masks: Sequence[Any] | None = None,
    parameters: Mapping[str, float] = {},
) -> Matrix:
    """One element-wise rule on N tensors of one shape; `masks` are draws where DELLA prunes."""
    if rule == "linear":
        return weighted_sum(tensors, weights)
    if rule == "consensus":
        return consensus(tensors, weights, parameters)
    assert density is not None
    if rule == "sce":
        return sce(tensors, weights, density, majority_sign)
    if rule.startswith("dare"):
        assert masks is not None
        pruned = [prune_by_mask(x, keep, density) for x, keep in zip(tensors, masks, strict=True)]
    elif rule.startswith("della"):
        assert masks is not None
        epsilon = parameters["epsilon"]
        drawn = zip(tensors, masks, strict=True)
        pruned = [prune_by_rank(x, draws, density, epsilon) for x, draws in drawn]
    elif rule == "breadcrumbs":
        pruned = [prune_to_crumbs(x, density, parameters["gamma"]) for x in tensors]
    else:
        pruned = [prune_by_magnitude(x, density) for x in tensors]
    return combine(rule, pruned, weights, majority_sign)


def combine(
    rule: str, pruned: Sequence[Matrix], weights: Sequence[float], majority_sign: str = "total"
) -> Matrix:
    """What a rule makes of tensors that it has pruned."""
    if rule in ("ties", "dare_ties", "della"):
        return disjoint_mean(pruned, weights, majority_sign)
    assert rule in ("magnitude_prune", "dare_linear", "della_linear", "breadcrumbs"), rule
    return weighted_sum(pruned, weights)


def merge_factors(
    method: str,
    sources: Sequence[Source],
    weights: Sequence[float],
    *,
    density: float | None = None,
    majority_sign: str = "total",
    masks: FactorMasks | None = None,
    parameters: Mapping[str, float] = {},
) -> tuple[Matrix, Matrix]:
    """(A, B) of `cat` or of a method in factor space."""
    q = [weight * source.scaling for weight, source in zip(weights, sources, strict=True)]
    if method == "cat":
        a = np.vstack([q_i * source.a for q_i, source in zip(q, sources, strict=True)])
        return a, np.hstack([source.b for source in sources])
    assert method in (*FACTOR_METHODS, *OTHER_RULES), method
    on_b = [math.sqrt(abs(q_i)) for q_i in q]
    on_a = [root if q_i >= 0 else -root for root, q_i in zip(on_b, q, strict=True)]
    shared = {"density": density, "majority_sign": majority_sign, "parameters": parameters}
    masks_a, masks_b = (masks.a, masks.b) if masks else (None, None)
    a = apply_rule(method, [s.a for s in sources], on_a, masks=masks_a, **shared)
    b = apply_rule(method, [s.b for s in sources], on_b, masks=masks_b, **shared)
    return a, b


def merge_delta(
    method: str,
    sources: Sequence[Source],
    weights: Sequence[float],
    *,
    density: float | None = None,
    majority_sign: str = "total",
    masks: Sequence[Mask] | None = None,
) -> Matrix:
    """The merged m x n matrix of an `*svd` method, before it is truncated."""
    deltas = [source.delta for source in sources]
    return apply_rule(
        rule_of(method), deltas, weights, density=density, majority_sign=majority_sign, masks=masks
    )


@dataclass(frozen=True)
class Coordinates:
    """What a rule sees in a space with bases, and how its answer is brought back."""

    tensors: Sequence[Matrix]
    left: Matrix
    right: Matrix | None
    margin: float
    """How far rounding is from having a say in the bases: 1 is far."""

    def back(self, answer: Matrix) -> Matrix:
        """The m x n matrix that an answer stands for."""
        return self.left @ answer if self.right is None else self.left @ answer @ self.right.T


def in_coordinates(space: str, sources: Sequence[Source]) -> Coordinates:
    """The deltas' coordinates, densely, as the papers define them.

    KnOTS: with the deltas side by side = U S [V_1 ... V_N]^T the blocks S V_t^T. Core: with U the
    left singular vectors of the B's side by side and V the right ones of the A's one below the
    other, U^T delta_t V.
    """
    if space == "knots":
        deltas = np.hstack([source.delta for source in sources])
        u, s, vt, margin = settled(*np.linalg.svd(deltas, full_matrices=False))
        blocks = np.split(s[:, None] * vt, len(sources), axis=1)
        return Coordinates(without_rounding(blocks), u, None, margin)
    side_by_side = np.hstack([source.b for source in sources])
    u, _, _, of_left = settled(*np.linalg.svd(side_by_side, full_matrices=False))
    stacked = np.vstack([source.a for source in sources]).T
    v, _, _, of_right = settled(*np.linalg.svd(stacked, full_matrices=False))
    cores = [source.scaling * (u.T @ source.b @ source.a @ v) for source in sources]
    return Coordinates(without_rounding(cores), u, v, min(of_left, of_right))


def without_rounding(tensors: Sequence[Matrix]) -> list[Matrix]:
    """With zeros for what is nothing but rounding, which would vote and be counted."""
    largest = max(np.abs(x).max(initial=0.0) for x in tensors)
    return [np.where(np.abs(x) < 1e-10 * largest, 0.0, x) for x in tensors]


def merge_in(
    space: str, rule: str, sources: Sequence[Source], weights: Sequence[float], **options: Any
) -> Matrix:
    """The merged matrix of a rule in core or KnOTS space, before it is truncated."""
    seen = in_coordinates(space, sources)
    return seen.back(apply_rule(rule, seen.tensors, weights, **options))


def settled(u: Matrix, s: Matrix, vt: Matrix) -> tuple[Matrix, Matrix, Matrix, float]:
    """Without the triples of zero, and with the largest entry of each left vector positive; and
    how far other values, or another sign, are from being as right."""
    kept = s > 1e-9 * s[0]
    u, s, vt = u[:, kept], s[kept], vt[kept]
    if not s.size:
        return u, s, vt, 1.0
    signs = np.sign(np.take_along_axis(u, np.abs(u).argmax(axis=0)[None], axis=0)[0])
    u, vt = u * signs, vt * signs[:, None]
    gaps = np.append((s[:-1] - s[1:]) / s[:-1], s[-1] / s[0])
    signed = (u.max(axis=0) - np.maximum(0, -u.min(axis=0))) / u.max(axis=0)
    return u, s, vt, float(min(gaps.min(), signed.min()))


def best_rank(delta: Matrix, rank: int) -> Matrix:
    """The nearest matrix of that rank, by the dense SVD."""
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def residual(delta: Matrix, rank: int) -> float:
    """Frobenius distance from delta to the nearest matrix of that rank."""
    return float(np.linalg.norm(np.linalg.svd(delta, compute_uv=False)[rank:]))


def clamped_factors(
    delta: Matrix, rank: int, quantile: float, *, like_a: Matrix
) -> tuple[Matrix, Matrix]:
    """(A, B) with all of the magnitude in B, both clamped at one quantile of their entries.

    The quantile is of signed entries, so it depends on the sign of each singular pair, which no
    SVD fixes: the pairs take the signs of `like_a`'s rows.
    """
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    signs = np.where((vt[:rank] * like_a).sum(axis=1) >= 0, 1.0, -1.0)
    b, a = u[:, :rank] * (s[:rank] * signs), vt[:rank] * signs[:, None]
    high = np.quantile(np.concatenate([b.ravel(), a.ravel()]), quantile)
    return np.clip(a, -high, high), np.clip(b, -high, high)


def pruning_gap(x: Matrix, density: float) -> float:
    """Relative distance between the smallest |x| that is kept and the largest that is not."""
    keep = int(density * x.size)
    if keep in (0, x.size):
        return math.inf
    ordered = np.sort(np.abs(x).ravel())[::-1]
    return float((ordered[keep - 1] - ordered[keep]) / ordered[keep - 1])


def is_clear_cut(x: Matrix, errors: Matrix, keep: int) -> bool:
    """Whether the `keep` largest |x| are the largest whatever errors up to these there are.

    Zeros may be anywhere: it makes no difference which of them are kept.
    """
    if not errors.any():
        return True
    order = np.argsort(-np.abs(x), kind="stable")
    kept, rest = order[:keep], order[keep:]
    rest = rest[x[rest] != 0]
    if not len(kept) or not len(rest):
        return True
    least, most = np.abs(x[kept]) - errors[kept], np.abs(x[rest]) + errors[rest]
    return bool(least.min() > most.max())


def rank_gap(x: Matrix) -> float:
    """The smallest distance of two magnitudes in a row, but for zeros, relative to the largest."""
    ordered = np.sort(np.abs(x), axis=1)
    distance = np.diff(ordered, axis=1)[ordered[:, 1:] > 0]
    return float(distance.min() / ordered.max()) if distance.size else math.inf


def variance_gap(tensors: Sequence[Matrix], density: float) -> float:
    """Distance between the smallest deviation over tensors that is kept and the largest that is
    not, relative to the largest value."""
    deviation = np.std(np.stack(tensors), axis=0)
    keep = int(density * deviation.size)
    if len(tensors) == 1 or keep in (0, deviation.size) or not np.any(tensors):
        return math.inf
    ordered = np.sort(deviation.ravel())[::-1]
    return float((ordered[keep - 1] - ordered[keep]) / np.abs(tensors).max())


def consensus_gap(
    tensors: Sequence[Matrix], weights: Sequence[float], parameters: Mapping[str, float]
) -> float:
    """How far the masks are from holding another element, relative to the largest term."""
    terms = np.stack([weight * tensor for weight, tensor in zip(weights, tensors, strict=True)])
    others = parameters["tall_lambda"] * np.abs(terms.sum(axis=0) - terms)
    distance = np.abs(np.abs(terms) - others)[:, terms.any(axis=0)]
    return float(distance.min() / np.abs(terms).max()) if distance.size else math.inf


def election_gap(tensors: Sequence[Matrix]) -> float:
    """The smallest |sum| of a contested vote, relative to the largest value."""
    stacked = np.stack(tensors)
    contested = (stacked > 0).any(axis=0) & (stacked < 0).any(axis=0)
    votes = np.abs(stacked.sum(axis=0))[contested]
    return float(votes.min() / np.abs(stacked).max()) if votes.size else math.inf
