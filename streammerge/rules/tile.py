"""What a rule sees: the same tile of N tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

Tensors = Callable[[], Iterator[torch.Tensor]]
"""Goes over N tensors in the adapters' order, each time it is called.

A tensor is made when it is asked for and holds its values until the next one is, so that a
thousand adapters take no more memory than two. A rule must not write to it.
"""


@dataclass(frozen=True)
class Tile:
    """One tile of the N tensors that are to become one."""

    tensors: Tensors
    """As they are."""
    largest: Tensors
    """With only their largest magnitudes, by each tensor's threshold over all tiles."""
    middle: Tensors
    """With only their largest magnitudes but for outliers, by two thresholds of each tensor."""
    random: Tensors
    """With random elements kept, divided by the density."""
    ranked: Tensors
    """With random elements kept, the likelier the larger they are in their row, each divided by the
    probability that it is kept with."""
    varied: Tensors
    """With only the elements that vary most over the tensors, where the rule keeps these."""
    shares: Sequence[float]
    """Of each tensor the share that its squares have in those of all, over the elements that vary
    most; none where the rule keeps no such."""
    weights: Sequence[float]
    majority_sign: str
    """"total": the sign of the sum; "frequency": the sign that more of them have."""
    parameters: Mapping[str, float]
    """Those that the catalog says the rule takes, by name."""
    out: torch.Tensor
    """Where the answer goes. All tensors of a tile are flat and of this size."""
    spare: Callable[[int], torch.Tensor]
    """Returns the rule's k-th buffer, uninitialised; the catalog says how many there are."""
