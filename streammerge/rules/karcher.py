"""The Karcher mean of the deltas' directions: the point of the sphere from which they average out.

Karcher 1977 (Riemannian center of mass and mollifier smoothing); the iteration is gradient descent
of step 1 (Afsari, Tron and Vidal 2013, arXiv 1201.0925).
"""

from __future__ import annotations

import math

from streammerge.rules.inner import Combination, Inner
from streammerge.rules.sphere import at_length_one, facing, step

STEPS = 200
"""At most; directions with something in common take some ten, 200 at right angles 160."""

SETTLED = 1e-14
"""A step shorter than this is the last."""


def karcher(inner: Inner) -> Combination:
    """Return the mean direction, at the mean length, by the shares, and whether it has settled."""
    signs, shares, cosines = facing(inner)
    point = at_length_one(shares, cosines)
    for _ in range(STEPS):
        following = step(point, shares, cosines)
        change = following - point
        point = following
        moved = math.sqrt(max(0.0, float(change @ cosines @ change)))
        if moved <= SETTLED:
            break
    return Combination(
        signs * point * (shares @ inner.norms) * inner.inverse_norms,
        unsettled=moved if moved > SETTLED else 0.0,
    )
