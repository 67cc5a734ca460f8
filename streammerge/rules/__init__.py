"""Rules: how N tensors become one. One file and one pure function each, registered below.

What a rule is called, needs and costs stands in the catalog under the same name. The kinds differ
in what they see: a tile of all tensors, the deltas' inner products, or their singular triples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from streammerge.rules.breadcrumbs import breadcrumbs
from streammerge.rules.consensus import consensus
from streammerge.rules.dare_linear import dare_linear
from streammerge.rules.dare_ties import dare_ties
from streammerge.rules.della import della
from streammerge.rules.della_linear import della_linear
from streammerge.rules.inner import Inner
from streammerge.rules.iso_c import iso_c
from streammerge.rules.iso_cts import iso_cts
from streammerge.rules.karcher import karcher
from streammerge.rules.linear import linear
from streammerge.rules.magnitude_prune import magnitude_prune
from streammerge.rules.model_stock import model_stock
from streammerge.rules.multislerp import multislerp
from streammerge.rules.norm_matched import norm_matched
from streammerge.rules.sce import sce
from streammerge.rules.slerp import slerp
from streammerge.rules.spectrum import Spectrum
from streammerge.rules.ties import ties
from streammerge.rules.tile import Tile
from streammerge.rules.tsv import tsv

Rule = Callable[[Tile], torch.Tensor]
"""An element-wise rule."""

Coefficients = Callable[[Inner], torch.Tensor]
"""A coefficient rule: returns what each delta is multiplied by, float64."""

Spectral = Callable[[Spectrum[Any]], Any]
"""A spectral rule: returns the leading triples of the merge."""

FUNCTIONS: dict[str, Rule] = {
    "breadcrumbs": breadcrumbs,
    "consensus": consensus,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "della": della,
    "della_linear": della_linear,
    "linear": linear,
    "magnitude_prune": magnitude_prune,
    "sce": sce,
    "ties": ties,
}

COEFFICIENTS: dict[str, Coefficients] = {
    "karcher": karcher,
    "model_stock": model_stock,
    "multislerp": multislerp,
    "norm_matched": norm_matched,
    "slerp": slerp,
}

SPECTRAL: dict[str, Spectral] = {"iso_c": iso_c, "iso_cts": iso_cts, "tsv": tsv}

__all__ = ["COEFFICIENTS", "FUNCTIONS", "SPECTRAL", "Inner", "Rule", "Spectrum", "Tile"]
