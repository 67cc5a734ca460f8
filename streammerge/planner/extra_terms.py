"""What decides about extra tensors, and what one of the output is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from streammerge.catalog import RuleSpec, SpaceSpec
from streammerge.planner.extra_groups import Holder
from streammerge.planner.layout import OutputTensor
from streammerge.plans import Route
from streammerge.recipe import Recipe


@dataclass(frozen=True)
class ExtraTensor:
    """One tensor of the output that is no factor."""

    tensor: OutputTensor
    route: Route
    holders: tuple[Holder, ...]
    scalings: tuple[float, ...]
    """Of each holder: what it is multiplied by beside the weight."""
    weights: tuple[float, ...]
    """Of each holder."""


Weight = Callable[[str, int], float]
"""From a module's path and an adapter's position to the adapter's weight there."""


@dataclass(frozen=True)
class Terms:
    """What of a merge decides about its extra tensors."""

    recipe: Recipe
    rule: RuleSpec
    space: SpaceSpec
    dtype: str
    """Of the output, as safetensors spells it."""
    targets: Mapping[str, tuple[int, int]]
    """Kind and m of the output's targets."""
    scalings: Sequence[npt.NDArray[np.float64]]
    """Of the adapters' targets."""
    weight: Weight
    """Of an adapter in a target or another module."""
