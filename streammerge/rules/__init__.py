"""Rules: how N tensors become one. One file and one pure function each, registered below.

What a rule is called, needs and costs stands in the catalog under the same name. The kinds differ
in what they see: a tile of all tensors, the deltas' inner products, or their singular triples. The
functions of rules that other distributions bring are loaded when they are first asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pkgutil import resolve_name
from typing import Any

import torch

from streammerge.errors import RecipeError
from streammerge.registry import origin, place, problems
from streammerge.rules.breadcrumbs import breadcrumbs
from streammerge.rules.consensus import consensus
from streammerge.rules.dare_linear import dare_linear
from streammerge.rules.dare_ties import dare_ties
from streammerge.rules.della import della
from streammerge.rules.della_linear import della_linear
from streammerge.rules.inner import Combination, Inner
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

Coefficients = Callable[[Inner], Combination]
"""A coefficient rule."""

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


@cache
def function_of(rule: str) -> Rule:
    """Return an element-wise rule's function.

    Raises:
        RecipeError: it is of another distribution, and cannot be loaded.
    """
    if rule in FUNCTIONS:
        return FUNCTIONS[rule]
    where = place(rule)
    if where is None:
        broken = [str(one) for one in problems() if one.rule == rule]
        why = "; ".join(broken) or f"the rule {rule} is not installed here"
        raise RecipeError(why, option="method")
    try:
        found: Rule = resolve_name(where)
    except Exception as error:  # whatever the module of somebody else raises
        why = f"cannot be loaded ({type(error).__name__}: {error})"
        raise _unusable(rule, where, why) from error
    if not callable(found):
        raise _unusable(rule, where, f"is no function, but {type(found).__name__}")
    return found


def load_rule(rule: str) -> None:
    """Load a rule's function now, where another distribution brings it.

    Raises:
        RecipeError: it cannot be loaded.
    """
    if rule not in FUNCTIONS | COEFFICIENTS | SPECTRAL:
        function_of(rule)


def _unusable(rule: str, where: str, why: str) -> RecipeError:
    return RecipeError(
        f"rule {rule} of {origin(rule)}: its function {where} {why}", option="method"
    )


__all__ = [
    "COEFFICIENTS",
    "FUNCTIONS",
    "SPECTRAL",
    "Combination",
    "Inner",
    "Rule",
    "Spectrum",
    "Tile",
    "function_of",
    "load_rule",
]
