"""Factor space: the rule sees all A's, and apart from them all B's."""

from __future__ import annotations

import math
from collections.abc import Sequence


def factor_weights(
    weights: Sequence[float], scalings: Sequence[float]
) -> tuple[list[float], list[float]]:
    """Return the weights of the A's and of the B's.

    With q = weight·scaling: sgn(q)·√|q| on A, √|q| on B, so that one adapter alone gives q·B·A.
    The sign sits on A only; on both it would cancel. sgn(0) is +1. (PEFT 0.21.2,
    `_generalized_task_arithmetic_weighted_adapter`.)
    """
    q = [weight * scaling for weight, scaling in zip(weights, scalings, strict=True)]
    roots = [math.sqrt(abs(value)) for value in q]
    return [
        math.copysign(r, value) if value else r for r, value in zip(roots, q, strict=True)
    ], roots
