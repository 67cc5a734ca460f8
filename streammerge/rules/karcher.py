"""The Karcher mean of the deltas' directions: the point of the sphere from which they average out.

Karcher 1977 (Riemannian center of mass and mollifier smoothing); the iteration is gradient descent
of step 1 (Afsari, Tron and Vidal 2013, arXiv 1201.0925).
"""

from __future__ import annotations

import math

import torch

from streammerge.rules.inner import Combination, Inner
from streammerge.rules.sphere import at_length_one, facing, step

STEPS = 200
"""At most; directions with something in common take some ten, 200 at right angles 160."""

SETTLED = 1e-14
"""A step shorter than this is the last."""


def karcher(inner: Inner) -> Combination:
    """Return the mean direction, at the mean length, by the shares, and whether it has settled."""
    signs, shares, cosines = facing(inner)
    shortest = _shortest(cosines)
    point = at_length_one(shortest @ shares, cosines)
    for _ in range(STEPS):
        following = shortest @ step(point, shares, cosines)
        change = following - point
        point = following
        moved = math.sqrt(max(0.0, float(change @ cosines @ change)))
        if moved <= SETTLED:
            break
    return Combination(
        signs * point * (shares @ inner.norms) * inner.inverse_norms,
        unsettled=moved if moved > SETTLED else 0.0,
    )


def _shortest(cosines: torch.Tensor) -> torch.Tensor:
    """Return what brings coordinates to the shortest ones of the same point.

    Of directions that depend on one another some combinations are zero; steps that add up along
    these would end in coordinates without bounds, that cancel.
    """
    values, vectors = torch.linalg.eigh(cosines)
    there = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    kept: torch.Tensor = vectors[:, there]
    return kept @ kept.mT
