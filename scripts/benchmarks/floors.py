"""What a merge cannot do without: arithmetic, by its method. (Bytes: see `sides/disk.py`.)"""

from __future__ import annotations

from benchmarks.workloads import Inputs

OVERSAMPLING = 8
"""A random start finds R directions with some more columns than R."""


def unavoidable_flops(method: str, inputs: Inputs) -> int:
    """Return the floating-point operations that any way to do it needs, about.

    svd: the Gram matrices of the stacked factors, k²·(m + n) as they are symmetric; or, where
    that is less, one pass of an iteration over the factors, 4·k·(m + n)·(R + 8).
    *_svd: every delta once, 2·m·n·k, and one pass of an iteration over the merged matrix,
    4·m·n·(R + 8). That the rule itself takes time is not counted.
    The others: one multiplication and one addition for each number of a factor.
    """
    m, n, k = inputs.m, inputs.n, inputs.total_rank
    columns = inputs.rank + OVERSAMPLING
    if method == "svd":
        return inputs.targets * min(k * k * (m + n), 4 * k * (m + n) * columns)
    if method.endswith("_svd"):
        return inputs.targets * (2 * m * n * k + 4 * m * n * columns)
    return inputs.targets * 2 * k * (m + n)
