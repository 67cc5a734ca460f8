"""An order of adapters in which those that are alike stand side by side."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def clustered(similarity: npt.NDArray[np.float64]) -> list[int]:
    """Return the order of the leaves of an average-linkage tree of 1 - similarity.

    Of equal distances the first pair is joined first, and the cluster with the lower first member
    stands first, so the order is one for one matrix.

    Args:
        similarity: symmetric; NaN counts as 0.
    """
    distance = 1.0 - np.nan_to_num(similarity, nan=0.0)
    np.fill_diagonal(distance, np.inf)
    leaves = [[place] for place in range(len(distance))]
    sizes = np.ones(len(distance))
    for _ in range(len(distance) - 1):
        first, second = divmod(int(distance.argmin()), len(distance))
        first, second = min(first, second), max(first, second)
        joined = sizes[first] * distance[first] + sizes[second] * distance[second]
        sizes[first] += sizes[second]
        distance[first] = distance[:, first] = joined / sizes[first]
        distance[first, first] = np.inf
        distance[second] = distance[:, second] = np.inf
        leaves[first] += leaves[second]
    return leaves[0]
