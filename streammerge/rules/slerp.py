"""SLERP: from one delta to another along the arc between them (Shoemake 1985)."""

from __future__ import annotations

import math

import torch

from streammerge.rules.inner import Combination, Inner

PARALLEL = 1e-6
"""Below this sine of the angle the arc is a line."""


def slerp(inner: Inner) -> Combination:
    """Return sin((1-t)·θ)/sin θ and sin(t·θ)/sin θ for two deltas at the angle θ.

    t is the second one's share of the weights. Where they are parallel, or one is zero, the arc is
    a line, and the coefficients are 1-t and t; right across from each other there is no one arc,
    and it is the line too. One delta alone is itself.
    """
    if len(inner.weights) == 1:
        return Combination(torch.ones(1, dtype=torch.float64))
    t = float(inner.shares[1])
    cosine = float(inner.cosines[0, 1])
    theta = math.acos(cosine)
    sine = math.sin(theta)
    zero = not bool(inner.norms.all())
    pair = (1 - t, t)
    if not zero and sine > PARALLEL:
        pair = (math.sin((1 - t) * theta) / sine, math.sin(t * theta) / sine)
    return Combination(torch.tensor(pair, dtype=torch.float64))
