"""What a spectral rule sees: N deltas of a target by their singular triples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch


class Triples(Protocol):
    """Leading singular triples U·diag(s)·Vᵀ of a matrix."""

    @property
    def u(self) -> torch.Tensor:
        """m × k, orthonormal columns."""

    @property
    def s(self) -> torch.Tensor:
        """k singular values, falling."""

    @property
    def v(self) -> torch.Tensor:
        """n × k, orthonormal columns."""


T = TypeVar("T", bound=Triples)

NULL = 1e-6
"""Singular values below this share of the largest are rounding, and have no direction."""


def count_nonzero(s: torch.Tensor) -> int:
    """Return how many of falling singular values are not zero, nor rounding."""
    return int(torch.count_nonzero(s > NULL * s[:1]))


@dataclass(frozen=True)
class Spectrum(Generic[T]):
    """N deltas, each times its weight, and what can be had of them without any of them.

    A spectral rule returns what `truncate`, `product` or `whole` gives.
    """

    count: int
    """N."""
    rank: int
    """Of the answer."""
    parameters: Mapping[str, float]
    """Those that the catalog says the rule takes, by name."""
    truncate: Callable[[int], T]
    """Returns the leading triples of Σ w_i·Δ_i, as many as asked for; zeros fill them up."""
    stacked: Callable[[int | None, torch.Tensor | None], tuple[torch.Tensor, ...]]
    """Returns U (m × k), s and V (n × k) of all w_i·Δ_i side by side: of each the triples whose
    value is not zero, or so many of them; less what lies in orthonormal columns, where given."""
    polar: Callable[[torch.Tensor], torch.Tensor]
    """Returns the orthonormal columns that are nearest to those of a matrix: P·Qᵀ of its SVD
    P·S·Qᵀ, without values that are rounding. What it is given is used up."""
    product: Callable[[torch.Tensor, torch.Tensor], T]
    """Returns the leading triples of B·A, for B m × k and A k × n; both are used up."""
    whole: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], T]
    """Returns U, s and V as the answer, of which nothing is lost."""
