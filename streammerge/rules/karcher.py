"""The Karcher mean of the deltas' directions: the point of the sphere from which they average out.

Karcher 1977 (Riemannian center of mass and mollifier smoothing); the iteration is gradient descent
of step 1 (Afsari, Tron and Vidal 2013, arXiv 1201.0925).
"""

from __future__ import annotations

import torch

from streammerge.rules.inner import Inner
from streammerge.rules.sphere import at_length_one, facing, step

STEPS = 200
"""At most; directions that are not right across from each other take some ten."""

SETTLED = 1e-14
"""A step shorter than this is the last."""


def karcher(inner: Inner) -> torch.Tensor:
    """Return the coefficients of the mean direction, at the mean length, by the shares."""
    signs, shares, cosines = facing(inner)
    point = at_length_one(shares, cosines)
    for _ in range(STEPS):
        following = step(point, shares, cosines)
        moved = following - point
        point = following
        if float(moved @ cosines @ moved) <= SETTLED**2:
            break
    return signs * point * (shares @ inner.norms) * inner.inverse_norms
