"""Model Stock (arXiv 2403.19522): the mean, as far from the base as its parts agree."""

from __future__ import annotations

import torch

from streammerge.rules.inner import Combination, Inner


def model_stock(inner: Inner) -> Combination:
    """Return t times the shares of the weights, with t = N·cos θ/(1 + (N - 1)·cos θ).

    cos θ is the mean cosine of all pairs. The more the deltas agree, the nearer t is to 1; where
    they are at right angles, or lead apart, it is 0. N and the pairs are of those that are not
    zero, nor their weights; one such delta is taken whole.
    """
    there = (inner.norms > 0) & (inner.shares != 0)
    count = int(torch.count_nonzero(there))
    if count < 2:
        return Combination(inner.shares)
    cosines = inner.cosines[there][:, there]
    pairs = cosines.sum() - cosines.diagonal().sum()
    cosine = max(0.0, float(pairs) / (count * (count - 1)))
    return Combination(count * cosine / (1 + (count - 1) * cosine) * inner.shares)
