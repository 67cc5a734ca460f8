"""How deltas agree with one another, from their factors: never an m × n matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from streammerge.kernels.spectra import Triples


@dataclass(frozen=True)
class Stack:
    """The singular triples of several deltas side by side, each filled up to one count k."""

    u: torch.Tensor
    """m × (deltas·k)."""
    s: torch.Tensor
    """deltas × k; zero where filled up."""
    v: torch.Tensor
    """n × (deltas·k)."""

    @classmethod
    def of(cls, deltas: Sequence[Triples], k: int) -> Stack:
        """Return the stack of these; none of them has more than k."""
        u, v = (
            torch.cat([pad(getattr(d, side), (0, k - len(d.s))) for d in deltas], 1)
            for side in "uv"
        )
        return cls(u, torch.stack([pad(d.s, (0, k - len(d.s))) for d in deltas]), v)


@dataclass(frozen=True)
class Meeting:
    """What the deltas of one stack are to those of another: left × right matrices, float64."""

    inner: torch.Tensor
    """⟨Δ_i, Δ_j⟩ = tr(Δ_iᵀ·Δ_j)."""
    columns: torch.Tensor
    """Overlap of the column spaces: the mean squared cosine of their principal angles."""
    rows: torch.Tensor
    """The same of the row spaces."""


def meet(left: Stack, right: Stack) -> Meeting:
    """Return inner products and overlaps of all pairs.

    With P = U_iᵀ·U_j and Q = V_iᵀ·V_j, the inner product is Σ s_a·s_b·P_ab·Q_ab, and the squared
    singular values of P are the squared cosines of the principal angles between the column spaces
    (Björck and Golub, Math. Comp. 27, 1973), whose sum is ‖P‖²_F. A delta that is zero has no
    space: its overlaps are NaN.
    """
    p, q = left.u.mT @ right.u, left.v.mT @ right.v
    sizes = [stack.s.count_nonzero(1) for stack in (left, right)]
    fewest = torch.minimum(sizes[0][:, None], sizes[1][None, :]).double()
    shape = (*left.s.shape, *right.s.shape)

    def over_pairs(values: torch.Tensor) -> torch.Tensor:
        return values.view(shape).sum((1, 3))

    columns, rows = over_pairs(p.square()) / fewest, over_pairs(q.square()) / fewest
    scale = torch.outer(left.s.flatten(), right.s.flatten())
    return Meeting(over_pairs(p.mul_(q).mul_(scale)), columns, rows)


def sign_counts(sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each pair how often their signs differ, and how often neither is zero.

    Args:
        sample: deltas × elements.
    """
    signs = sample.sign()
    both = signs.abs() @ signs.abs().mT
    return ((both - signs @ signs.mT) / 2).double(), both.double()


def minority_mass(sample: torch.Tensor) -> tuple[float, float]:
    """Return Σ over elements of the smaller of Σ|positive| and Σ|negative| terms, and all of Σ|x|.

    Their ratio is the share of the mass that pulls against the sum's sign: 0 where all agree, and
    at most 1/2.

    Args:
        sample: deltas × elements, as they are summed: with their weights.
    """
    sample = sample.double()
    above, below = sample.clamp(min=0).sum(0), sample.clamp(max=0).sum(0).neg()
    return float(torch.minimum(above, below).sum()), float((above + below).sum())


def spread(length: int, count: int) -> torch.Tensor:
    """Return `count` places of 0 … length - 1, evenly spaced; all where there are fewer."""
    count = min(length, count)
    return (2 * torch.arange(count) + 1) * length // (2 * count)
