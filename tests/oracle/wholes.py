"""Rules that see whole deltas, once more: dense, in float64, straight from the definitions.

A delta is a matrix of m x n here, a mean on the sphere a vector of m * n, every SVD a dense one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from oracle.restated import Matrix

Weights = Sequence[float]


def shares(weights: Weights) -> Matrix:
    """The weights over their sum."""
    return np.array(weights) / sum(weights)


# ---------------------------------------------------------------------------------------------
# Coefficient rules


def slerp(deltas: Sequence[Matrix], weights: Weights) -> Matrix:
    """Spherical interpolation of two vectors that are not brought to length 1."""
    if len(deltas) == 1:
        return deltas[0]
    x, y = (delta.ravel() for delta in deltas)
    t = weights[1] / sum(weights)
    cosine = x @ y / (np.linalg.norm(x) * np.linalg.norm(y))
    theta = math.acos(min(1.0, max(-1.0, cosine)))
    if math.sin(theta) < 1e-6:
        return (1 - t) * deltas[0] + t * deltas[1]
    parts = math.sin((1 - t) * theta), math.sin(t * theta)
    return (parts[0] * deltas[0] + parts[1] * deltas[1]) / math.sin(theta)


def _toward(point: Matrix, directions: Sequence[Matrix], weights: Matrix) -> Matrix:
    """The mean of the directions' logarithms at a point, a tangent vector there."""
    total = np.zeros_like(point)
    for weight, direction in zip(weights, directions, strict=True):
        cosine = float(np.clip(direction @ point, -1, 1))
        rest = direction - cosine * point
        if np.linalg.norm(rest) > 1e-9:
            total += weight * math.acos(cosine) * rest / np.linalg.norm(rest)
    return total


def _follow(point: Matrix, tangent: Matrix) -> Matrix:
    length = float(np.linalg.norm(tangent))
    if length < 1e-15:
        return point
    return math.cos(length) * point + math.sin(length) * tangent / length


def _on_the_sphere(deltas: Sequence[Matrix], weights: Weights, steps: int) -> Matrix:
    norms = [float(np.linalg.norm(delta)) for delta in deltas]
    directions = [d.ravel() / n for d, n in zip(deltas, norms, strict=True)]
    part = shares(weights)
    point = sum(p * d for p, d in zip(part, directions, strict=True))
    point = point / np.linalg.norm(point)
    for _ in range(steps):
        tangent = _toward(point, directions, part)
        point = _follow(point, tangent)
        if np.linalg.norm(tangent) < 1e-12:
            break
    return (float(part @ norms) * point).reshape(deltas[0].shape)


def multislerp(deltas: Sequence[Matrix], weights: Weights) -> Matrix:
    """One step from the mean direction, at the mean length."""
    return _on_the_sphere(deltas, weights, 1)


def karcher(deltas: Sequence[Matrix], weights: Weights) -> Matrix:
    """So many steps that nothing moves any more."""
    return _on_the_sphere(deltas, weights, 2000)


def model_stock(deltas: Sequence[Matrix], weights: Weights) -> Matrix:
    """t times the mean, t from the mean cosine of all pairs."""
    count = len(deltas)
    mean = sum(p * d for p, d in zip(shares(weights), deltas, strict=True))
    if count == 1:
        return mean
    units = [d.ravel() / np.linalg.norm(d) for d in deltas]
    pairs = [units[i] @ units[j] for i in range(count) for j in range(i)]
    cosine = max(0.0, float(np.mean(pairs)))
    return count * cosine / (1 + (count - 1) * cosine) * mean


def norm_matched(deltas: Sequence[Matrix], weights: Weights) -> Matrix:
    """The mean, at the mean length of what it is made of."""
    part = shares(weights)
    mean = sum(p * d for p, d in zip(part, deltas, strict=True))
    wanted = sum(abs(p) * np.linalg.norm(d) for p, d in zip(part, deltas, strict=True))
    return mean * (wanted / np.linalg.norm(mean))


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


def tsv(deltas: Sequence[Matrix], weights: Weights) -> Matrix:
    """All triples of all deltas side by side, U and V made orthonormal."""
    u, s, v = zip(*(svd(delta) for delta in weighted(deltas, weights)), strict=True)
    return (polar(np.hstack(u)) * np.concatenate(s)) @ polar(np.hstack(v)).T


def iso_c(deltas: Sequence[Matrix], weights: Weights, rank: int) -> Matrix:
    """The sum's leading directions, with one value."""
    u, s, v = svd(np.sum(weighted(deltas, weights), axis=0))
    return s[:rank].mean() * u[:, :rank] @ v[:, :rank].T


def iso_cts(
    deltas: Sequence[Matrix], weights: Weights, rank: int, *, common: float = 0.8
) -> Matrix:
    """Common directions of the sum and each delta's own beside them, with one value."""
    count = len(deltas)
    own = round((rank - int(rank * common)) / count)
    own = min(max(1, own), (rank - 1) // count)
    u, s, v = svd(np.sum(weighted(deltas, weights), axis=0))
    parts = [(u[:, : rank - count * own], s[: rank - count * own], v[:, : rank - count * own])]
    left = parts[0][0]
    for delta in weighted(deltas, weights) if own else ():
        own_u, own_s, own_v = svd(delta - left @ (left.T @ delta))
        kept = min(own, int((own_s > 1e-6 * np.linalg.norm(delta, 2)).sum()))
        parts.append((own_u[:, :kept], own_s[:kept], own_v[:, :kept]))
    u, s, v = (np.concatenate(part, axis=-1) for part in zip(*parts, strict=True))
    return s.mean() * polar(u) @ polar(v).T


# ---------------------------------------------------------------------------------------------
# Bases that the deltas share


def shared_bases(deltas: Sequence[Matrix], rank: int, beta: float) -> tuple[Matrix, Matrix]:
    """U and V of the Tucker-2 decomposition: HOSVD, then HOOI until nothing moves any more."""
    norms = np.array([np.linalg.norm(delta) for delta in deltas])
    wanted = beta * norms + (1 - beta) * norms.mean()
    scaled = [d * (w / n) for d, w, n in zip(deltas, wanted, norms, strict=True)]

    def leading(parts: Sequence[Matrix]) -> Matrix:
        u, s, _ = np.linalg.svd(np.hstack(parts), full_matrices=False)
        u = u[:, :rank][:, s[:rank] > 1e-9 * s[0]]
        return u * np.sign(np.take_along_axis(u, np.abs(u).argmax(axis=0)[None], axis=0)[0])

    u, v = leading(scaled), leading([delta.T for delta in scaled])
    for _ in range(3000):
        before = u
        u = leading([delta @ v for delta in scaled])
        v = leading([delta.T @ u for delta in scaled])
        if np.linalg.norm(u - before) < 1e-13:
            break
    return u, v


COEFFICIENT: dict[str, Callable[[Sequence[Matrix], Weights], Matrix]] = {
    "slerp": slerp,
    "multislerp": multislerp,
    "karcher": karcher,
    "model_stock": model_stock,
    "norm_matched": norm_matched,
}
