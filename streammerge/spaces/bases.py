"""Coordinates of factors in an orthonormal basis; shared by the spaces that have one."""

from __future__ import annotations

import torch

from streammerge.planner.memory import CONVERTED

ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-12}
"""Below this share of the whole a direction, or a coordinate, is rounding, and zero."""


def coordinates(basis: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Return basisᵀ·factor, with zeros where a column has nothing of a direction.

    What rounding leaves there would have a vote, and be counted, as any small number is.

    Args:
        basis: s × k, orthonormal columns.
        factor: s × r.

    Returns:
        k × r, contiguous.

    Raises:
        FloatingPointError: a column's length is not finite.
    """
    # The basis, wider than a factor, stands on the right: in float64 that takes half the time.
    found = (factor.mT @ basis).mT.contiguous()
    # In float64, for a norm may overflow where no element does, and all would be below it. Of a
    # block nothing is kept: small things between large ones keep the heap from being used again.
    squares = factor.new_zeros(factor.shape[1], dtype=torch.float64)
    for block in torch.split(factor, max(1, CONVERTED // factor.shape[1])):
        squares.add_(torch.linalg.vector_norm(block, dim=0, dtype=torch.float64).square_())
    lengths = squares.sqrt_()
    if not bool(torch.isfinite(lengths).all()):
        raise FloatingPointError("factors overflow: their norm is not finite")
    limits = (lengths * ROUNDING[factor.dtype]).to(found.dtype)
    return found.masked_fill_(found.abs() < limits, 0.0)
