"""Rules that see whole deltas, once more: dense, in float64, straight from the definitions.

A delta is a matrix of m x n here, a mean on the sphere a vector of m * n, every SVD a dense one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from oracle import restated
from oracle.restated import Matrix

Weights = Sequence[float]

NOWHERE = 1e-9
"""A length, or the sine of an angle, below this is none."""


def shares(weights: Weights) -> Matrix:
    """The weights over their sum."""
    return np.array(weights) / sum(weights)


# ---------------------------------------------------------------------------------------------
# Coefficient rules: what each delta is multiplied by


def _norms(deltas: Sequence[Matrix]) -> Matrix:
    return np.array([np.linalg.norm(delta) for delta in deltas])


def _over(x: Matrix, y: Matrix) -> Matrix:
    """x/y, and 0 where y is."""
    return np.divide(x, y, out=np.zeros(len(y)), where=y > 0)


def slerp(deltas: Sequence[Matrix], weights: Weights) -> Matrix:
    """Spherical interpolation of two vectors that are not brought to length 1; on the line where
    they are parallel, right across from each other, or zero."""
    if len(deltas) == 1:
        return np.ones(1)
    t = shares(weights)[1]
    line, norms = np.array([1 - t, t]), _norms(deltas)
    if not norms.all():
        return line
    x, y = (delta.ravel() for delta in deltas)
    theta = math.acos(min(1.0, max(-1.0, x @ y / (norms[0] * norms[1]))))
    if math.sin(theta) < 1e-6:
        return line
    return np.array([math.sin((1 - t) * theta), math.sin(t * theta)]) / math.sin(theta)


@dataclass(frozen=True)
class Walk:
    """A mean on the sphere as it was found."""

    coefficients: Matrix
    """Of the deltas."""
    length: float
    """Of the mean of the directions, where the walk began; all of them together are 1 long."""
    across: float
    """The smallest sine of the angle to the point right across from one of the directions, where
    that is not none."""
    steps: int


def toward(point: Matrix, directions: Matrix, weights: Matrix) -> tuple[Matrix, Matrix, float]:
    """The mean of the directions' logarithms at a point, a tangent vector there; what each
    direction is multiplied by in it, less the point; and how near one is to right across.

    A direction that is right across from the point leads nowhere.
    """
    factors, across = np.zeros(len(directions)), 1.0
    for i, direction in enumerate(directions):
        cosine = float(direction @ point)
        sine = float(np.linalg.norm(direction - cosine * point))
        if not direction.any() or not weights[i] or sine < NOWHERE:
            continue
        factors[i] = weights[i] * math.atan2(sine, cosine) / sine
        across = min(across, sine) if cosine < 0 else across
    return factors @ directions - (factors @ (directions @ point)) * point, factors, across


def walk(deltas: Sequence[Matrix], weights: Weights, steps: int) -> Walk:
    """So many steps towards the mean direction from the direction of the mean; what comes out has
    the mean length. A negative weight is that of the opposite direction."""
    norms, given = _norms(deltas), np.array(weights)
    part = np.abs(given) / np.abs(given).sum()
    signs = np.where(given < 0, -1.0, 1.0)
    inverse = _over(signs, norms)
    directions = inverse[:, None] * np.stack([delta.ravel() for delta in deltas])
    point, at, nearest, taken = part @ directions, part, 1.0, 0
    length = float(np.linalg.norm(point))
    if length < NOWHERE:
        return Walk(np.zeros(len(deltas)), length, 1.0, 0)
    point, at = point / length, at / length
    while taken < steps:
        tangent, factors, across = toward(point, directions, part)
        size, nearest, taken = float(np.linalg.norm(tangent)), min(nearest, across), taken + 1
        if size < 1e-13:
            break
        along = factors - (factors @ (directions @ point)) * at
        point, at = (
            math.cos(size) * x + math.sin(size) / size * y
            for x, y in ((point, tangent), (at, along))
        )
    return Walk(float(part @ norms) * at * inverse, length, nearest, taken)


def multislerp(deltas: Sequence[Matrix], weights: Weights) -> Matrix:
    """One step from the mean direction, at the mean length."""
    return walk(deltas, weights, 1).coefficients


def karcher(deltas: Sequence[Matrix], weights: Weights) -> Matrix:
    """So many steps that nothing moves any more."""
    return walk(deltas, weights, 2000).coefficients


def model_stock(deltas: Sequence[Matrix], weights: Weights) -> Matrix:
    """t times the shares, t from the mean cosine of all pairs of those that are there."""
    part, norms = shares(weights), _norms(deltas)
    units = [
        delta.ravel() / norm
        for delta, norm, share in zip(deltas, norms, part, strict=True)
        if norm and share
    ]
    count = len(units)
    if count < 2:
        return part
    pairs = [units[i] @ units[j] for i in range(count) for j in range(i)]
    cosine = max(0.0, float(np.mean(pairs)))
    return count * cosine / (1 + (count - 1) * cosine) * part


def norm_matched(deltas: Sequence[Matrix], weights: Weights) -> Matrix:
    """The shares, brought to the mean length of what they are of; zero where the mean is."""
    part, norms = shares(weights), _norms(deltas)
    length, wanted = float(np.linalg.norm(combined(deltas, part))), float(np.abs(part) @ norms)
    return part * (wanted / length) if length > NOWHERE * wanted else np.zeros(len(part))


def combined(deltas: Sequence[Matrix], coefficients: Weights) -> Matrix:
    """The sum of the deltas times their coefficients."""
    return np.sum(weighted(deltas, coefficients), axis=0)


COEFFICIENT: dict[str, Callable[[Sequence[Matrix], Weights], Matrix]] = {
    "slerp": slerp,
    "multislerp": multislerp,
    "karcher": karcher,
    "model_stock": model_stock,
    "norm_matched": norm_matched,
}


def merged(method: str, deltas: Sequence[Matrix], weights: Weights) -> Matrix:
    """What a coefficient rule makes of the deltas."""
    return combined(deltas, COEFFICIENT[method](deltas, weights))


# ---------------------------------------------------------------------------------------------
# Spectral rules


def svd(x: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """U, s and V of a matrix, without the triples of zero."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    kept = s > 1e-6 * s[0]
    return u[:, kept], s[kept], vt[kept].T


def polar(x: Matrix) -> Matrix:
    """The nearest orthonormal columns, without directions of zero."""
    u, _, v = svd(x)
    return u @ v.T


def weighted(deltas: Sequence[Matrix], weights: Weights) -> list[Matrix]:
    """Each delta times its weight."""
    return [w * d for w, d in zip(weights, deltas, strict=True)]


@dataclass(frozen=True)
class Leading:
    """The leading triples of one matrix, as a spectral rule takes them."""

    u: Matrix
    s: Matrix
    v: Matrix
    whole: Matrix
    """All singular values of the matrix."""
    largest: float
    """Of what values are measured against: below 1e-6 of it they are zero."""
    source: int | None
    """Whose triples they are; None are those of the sum."""


def leading(
    x: Matrix, count: int | None, source: int | None, largest: float | None = None
) -> Leading:
    """The leading triples, so many or all, without those of zero."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    largest = s[0] if largest is None else largest
    kept = int((s > 1e-6 * largest).sum())
    kept = kept if count is None else min(kept, count)
    return Leading(u[:, :kept], s[:kept], vt[:kept].T, s, float(largest), source)


def stacked(parts: Sequence[Leading]) -> tuple[Matrix, Matrix, Matrix]:
    """U, s and V of all parts side by side."""
    u, s, v = (
        np.concatenate([getattr(part, name) for part in parts], axis=-1) for name in ("u", "s", "v")
    )
    return u, s, v


def tsv_parts(deltas: Sequence[Matrix], weights: Weights) -> list[Leading]:
    """All triples of all deltas."""
    return [leading(x, None, i) for i, x in enumerate(weighted(deltas, weights))]


def tsv(deltas: Sequence[Matrix], weights: Weights) -> Matrix:
    """All triples of all deltas side by side, U and V made orthonormal."""
    u, s, v = stacked(tsv_parts(deltas, weights))
    return (polar(u) * s) @ polar(v).T if len(s) else np.zeros(deltas[0].shape)


def iso_c_parts(deltas: Sequence[Matrix], weights: Weights, rank: int) -> list[Leading]:
    """The sum's leading triples."""
    return [leading(combined(deltas, weights), rank, None)]


def iso_cts_parts(
    deltas: Sequence[Matrix], weights: Weights, rank: int, common: float
) -> list[Leading]:
    """The sum's leading triples, and each delta's own beside them."""
    count = len(deltas)
    own = round((rank - int(rank * common)) / count)
    own = min(max(1, own), (rank - 1) // count)
    parts = iso_c_parts(deltas, weights, rank - count * own)
    left = parts[0].u
    for i, delta in enumerate(weighted(deltas, weights) if own else ()):
        parts.append(leading(delta - left @ (left.T @ delta), own, i, np.linalg.norm(delta, 2)))
    return parts


def with_one_value(parts: Sequence[Leading], shape: tuple[int, int]) -> Matrix:
    """Orthonormal directions of all parts, with their mean value."""
    u, s, v = stacked(parts)
    return s.mean() * polar(u) @ polar(v).T if len(s) else np.zeros(shape)


def iso_c(deltas: Sequence[Matrix], weights: Weights, rank: int) -> Matrix:
    """The sum's leading directions, with one value."""
    return with_one_value(iso_c_parts(deltas, weights, rank), deltas[0].shape)


def iso_cts(
    deltas: Sequence[Matrix], weights: Weights, rank: int, *, common: float = 0.8
) -> Matrix:
    """Common directions of the sum and each delta's own beside them, with one value."""
    return with_one_value(iso_cts_parts(deltas, weights, rank, common), deltas[0].shape)


# ---------------------------------------------------------------------------------------------
# Bases that the deltas share


@dataclass(frozen=True)
class Shared:
    """Two bases that N deltas share, and how they were found."""

    u: Matrix
    v: Matrix
    values: tuple[Matrix, Matrix]
    """Singular values of all deltas side by side, c times each, and of them turned: where the
    iteration starts."""
    sweeps: int
    moved: float
    """By the last sweep."""
    margin: float
    """How far each basis is from another order, or other signs: see restated.settled."""


def find_shared(
    deltas: Sequence[Matrix], rank: int, beta: float, *, sweeps: int = 3000, step: bool = False
) -> Shared:
    """The Tucker-2 decomposition: HOSVD, then HOOI until nothing moves any more, or so many sweeps.

    With `step` one step of orthogonal iteration stands for each SVD, as docs/methods.md has it. In
    the end each basis is that of the left singular vectors of what the other one sees.
    """
    norms = _norms(deltas)
    wanted = beta * norms + (1 - beta) * norms.mean()
    scaled = [d * c for d, c in zip(deltas, _over(wanted, norms), strict=True)]
    starts = [_left_of(np.hstack(x)) for x in (scaled, _turned(scaled))]
    # All of them lie in the spaces that they span, where everything is smaller.
    spanned = [u[:, s > NOWHERE * s[0]] for u, s in starts]
    values = starts[0][1], starts[1][1]
    inside = [spanned[0].T @ delta @ spanned[1] for delta in scaled]
    u, v = (np.eye(x.shape[1])[:, :rank] for x in spanned)
    taken, moved = 0, math.inf if u.size and v.size else 0.0
    while taken < sweeps and moved >= 1e-13:
        before = u, v
        u = _led([x @ v for x in inside], u, step=step)
        v = _led([x.T @ u for x in inside], v, step=step)
        moved, taken = max(map(_moved, before, (u, v))), taken + 1
    margins = []
    seen = [x @ v for x in inside], [x.T @ u for x in inside]
    u, v = (span[:, :0] for span in spanned)
    if seen[0][0].size and seen[1][0].size:
        turned = []
        for span, parts in zip(spanned, seen, strict=True):
            left, s, right = np.linalg.svd(np.hstack(parts), full_matrices=False)
            signed, *_, margin = restated.settled(span @ left[:, :rank], s[:rank], right[:rank])
            turned.append(signed)
            margins.append(margin)
        u, v = turned
    return Shared(u, v, values, taken, moved, min(margins, default=1.0))


def _turned(deltas: Sequence[Matrix]) -> list[Matrix]:
    return [delta.T for delta in deltas]


def _left_of(x: Matrix) -> tuple[Matrix, Matrix]:
    """Left singular vectors and singular values; of a wide matrix those of the triangle of its QR,
    which has the same."""
    if x.shape[1] > x.shape[0]:
        x = np.linalg.qr(x.T, mode="r").T
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    return u, s


def _led(parts: Sequence[Matrix], before: Matrix, *, step: bool) -> Matrix:
    """The leading left singular vectors of the parts side by side, or a step towards them."""
    seen = np.hstack(parts)
    u, s, _ = np.linalg.svd(seen @ (seen.T @ before) if step else seen, full_matrices=False)
    rank = before.shape[1]
    return u[:, :rank][:, s[:rank] > NOWHERE * s[0]]


def _moved(before: Matrix, after: Matrix) -> float:
    """The sine of the largest angle between two spaces."""
    if before.shape != after.shape:
        return math.inf
    return float(np.linalg.norm(after - before @ (before.T @ after)))


def shared_bases(deltas: Sequence[Matrix], rank: int, beta: float) -> tuple[Matrix, Matrix]:
    """U and V of the Tucker-2 decomposition."""
    found = find_shared(deltas, rank, beta)
    return found.u, found.v
