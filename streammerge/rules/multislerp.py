"""Multi-SLERP: a mean of many directions on the sphere, by one step from their mean."""

from __future__ import annotations

from streammerge.rules.inner import Combination, Inner
from streammerge.rules.sphere import at_length_one, facing, step


def multislerp(inner: Inner) -> Combination:
    """Return the coefficients of one step towards the mean direction, at the mean length.

    From the direction of the mean of the deltas at length 1, one step along the sphere; its length
    is the mean of theirs, all by the shares of the weights.
    """
    signs, shares, cosines = facing(inner)
    point = step(at_length_one(shares, cosines), shares, cosines)
    return Combination(signs * point * (shares @ inner.norms) * inner.inverse_norms)
