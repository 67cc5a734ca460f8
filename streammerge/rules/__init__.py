"""Rules: how N tensors become one. One file and one pure function each, registered below.

What a rule is called, needs and costs stands in the catalog under the same name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from streammerge.rules.breadcrumbs import breadcrumbs
from streammerge.rules.dare_linear import dare_linear
from streammerge.rules.dare_ties import dare_ties
from streammerge.rules.linear import linear
from streammerge.rules.magnitude_prune import magnitude_prune
from streammerge.rules.ties import ties
from streammerge.rules.tile import Tile

Rule = Callable[[Tile], torch.Tensor]

FUNCTIONS: dict[str, Rule] = {
    "breadcrumbs": breadcrumbs,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "linear": linear,
    "magnitude_prune": magnitude_prune,
    "ties": ties,
}

__all__ = ["FUNCTIONS", "Rule", "Tile"]
