"""What a rule sees: the same tile of N tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """One tile of the N tensors that are to become one.

    The tensors are made when they are asked for, one at a time, so that a thousand adapters take
    no more memory than two.
    """

    tensors: Callable[[], Iterator[torch.Tensor]]
    """Each call goes over the N tensors in the adapters' order. A tensor may be overwritten by
    the rule, and holds its values only until the next one is asked for."""
    largest: Callable[[int, torch.Tensor], torch.Tensor]
    """Returns tensor i with only its largest magnitudes, as its threshold over all tiles says."""
    random: Callable[[int, torch.Tensor], torch.Tensor]
    """Returns tensor i with random elements kept, each divided by the density."""
    weights: Sequence[float]
    majority_sign: str
    """"total": the sign of the sum; "frequency": the sign that more of them have."""
