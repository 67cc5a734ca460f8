"""What every rule, space and method is called, needs and costs. No tensor code lives here.

A *rule* says how N tensors become one, a *space* what the rule is applied to and how the answer
becomes a pair (A, B) again. PEFT's combination types are names for a (rule, space) pair. A rule's
code is one file under `rules/`, a space's one file under `spaces/`; both are found by the name.
"""

from __future__ import annotations

from dataclasses import dataclass

from streammerge.catalog.parameter import Parameter
from streammerge.catalog.rules import RULES, Kind, RuleSpec, Sparsity
from streammerge.catalog.spaces import SPACES, SpaceSpec

__all__ = [
    "METHODS",
    "PARAMETERS",
    "RULES",
    "SPACES",
    "Kind",
    "Method",
    "Parameter",
    "RuleSpec",
    "SpaceSpec",
    "Sparsity",
]


@dataclass(frozen=True)
class Method:
    """One name for a (rule, space) pair."""

    name: str
    rule: str
    space: str


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("linear", "linear", "factor"),
        Method("cat", "linear", "exact"),
        Method("svd", "linear", "delta"),
        Method("ties", "ties", "factor"),
        Method("ties_svd", "ties", "delta"),
        Method("dare_linear", "dare_linear", "factor"),
        Method("dare_ties", "dare_ties", "factor"),
        Method("dare_linear_svd", "dare_linear", "delta"),
        Method("dare_ties_svd", "dare_ties", "delta"),
        Method("magnitude_prune", "magnitude_prune", "factor"),
        Method("magnitude_prune_svd", "magnitude_prune", "delta"),
        Method("breadcrumbs", "breadcrumbs", "delta"),
        Method("della", "della", "delta"),
        Method("della_linear", "della_linear", "delta"),
        Method("sce", "sce", "delta"),
        Method("consensus", "consensus", "delta"),
        Method("slerp", "slerp", "delta"),
        Method("multislerp", "multislerp", "delta"),
        Method("karcher", "karcher", "delta"),
        Method("model_stock", "model_stock", "delta"),
        Method("norm_matched", "norm_matched", "delta"),
        Method("tsv", "tsv", "delta"),
        Method("iso_c", "iso_c", "delta"),
        Method("iso_cts", "iso_cts", "delta"),
        Method("ctm", "linear", "ctm"),
    )
}
"""PEFT's eleven combination types, and what others call by a name of its own."""


PARAMETERS: dict[str, Parameter] = {
    parameter.name: parameter
    for parameters in [
        *(rule.parameters for rule in RULES.values()),
        *(space.parameters for space in SPACES.values()),
    ]
    for parameter in parameters
}
"""All of them, by name."""
