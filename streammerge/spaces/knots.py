"""KnOTS space: the rule sees the deltas' coordinates in one left basis of all of them.

Stoica et al. 2024, arXiv 2410.19735: with [Δ_1 … Δ_N] = U·S·[V_1 … V_N]ᵀ the rule acts on the
blocks S·V_tᵀ, k × n, and its answer stands for U·answer. U being orthonormal, S·V_tᵀ = Uᵀ·Δ_t =
s_t·(Uᵀ·B_t)·A_t, so that neither the deltas nor their V's are formed. And U are the left singular
vectors of [B_1·L_1 … B_N·L_N], with L_t·L_tᵀ = s_t²·A_t·A_tᵀ, which has k columns instead of N·n.
"""

from __future__ import annotations

import torch

from streammerge.spaces.bases import coordinates


def knots_factor(b: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """Return the coordinates of B, whose product with A times the scaling is the block S·Vᵀ.

    Args:
        b: m × r.
        left: U, m × k; or both without orthonormal columns that they share.
    """
    return coordinates(left, b)
