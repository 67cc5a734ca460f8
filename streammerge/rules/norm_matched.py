"""The mean, at the mean length of what it is made of."""

from __future__ import annotations

import torch

from streammerge.rules.inner import BLUR, Combination, Inner


def norm_matched(inner: Inner) -> Combination:
    """Return the shares of the weights times Σ |share|·‖Δ‖ over ‖Σ share·Δ‖.

    The mean of N deltas at right angles is shorter than they are by √N; this one is not. A mean of
    zero has no direction, and stays zero.
    """
    length = inner.length(inner.shares)
    wanted = float(inner.shares.abs() @ inner.norms)
    if length <= BLUR * wanted:
        return Combination(torch.zeros_like(inner.shares))
    return Combination(inner.shares * (wanted / length))
