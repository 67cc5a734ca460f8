"""Core space: the rule sees the deltas' coordinates in bases of all B's and of all A's.

Panariello et al. 2025, arXiv 2509.17786: U are the left singular vectors of [B_1 … B_N], V the
right ones of [A_1; …; A_N], of the factors as they are; the rule acts on M_t = Uᵀ·(s_t·B_t·A_t)·V,
and its answer M stands for U·M·Vᵀ. No delta is formed: M_t = s_t·(Uᵀ·B_t)·(A_t·V).
"""

from __future__ import annotations

import torch

from streammerge.spaces.bases import coordinates


def core_columns(b: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """Return the coordinates of B, k × r.

    Args:
        b: m × r.
        left: U, m × k; or both without orthonormal columns that they share.
    """
    return coordinates(left, b)


def core_rows(a: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the coordinates of A, r × l; those of B times these times the scaling are M_t.

    Args:
        a: r × n.
        right: V, n × l.
    """
    return coordinates(right, a.mT).mT.contiguous()
