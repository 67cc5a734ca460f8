"""Multi-SLERP: a mean of many directions on the sphere, by one step from their mean."""

from __future__ import annotations

import torch

from streammerge.rules.inner import Inner
from streammerge.rules.sphere import at_length_one, step


def multislerp(inner: Inner) -> torch.Tensor:
    """Return the coefficients of one step towards the mean direction, at the mean length.

    From the direction of the mean of the deltas at length 1, one step along the sphere; its length
    is the mean of theirs, all by the shares of the weights.
    """
    start = at_length_one(inner.shares, inner.cosines)
    point = step(start, inner.shares, inner.cosines)
    return point * (inner.shares @ inner.norms) * inner.inverse_norms
