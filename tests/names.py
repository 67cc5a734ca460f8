"""Names of what is merged how, for tests that go over many of them: "ties", or "ties@core"."""

from __future__ import annotations

from streammerge.catalog import RuleSpec
from streammerge.registry import METHODS, RULES

IN_BASES = (
    "ties@core",
    "ties@knots",
    "dare_ties@core",
    "dare_linear@knots",
    "magnitude_prune@core",
    "magnitude_prune@knots",
    "ties@ctm",
)
"""Rules in spaces that no method is named after; with the other rules they work alike."""


def chosen(name: str) -> dict[str, str]:
    """The options of a name."""
    method, _, space = name.partition("@")
    return {"method": method} | ({"space": space} if space else {})


def rule_of(name: str) -> RuleSpec:
    """The rule of a name."""
    return RULES[METHODS[chosen(name)["method"]].rule]


def most(name: str) -> int | None:
    """How many adapters it takes at most: `adapters[: most(name)]` are as many as it may have."""
    return rule_of(name).most_adapters


def space_of(name: str) -> str:
    """The space of a name."""
    options = chosen(name)
    return options.get("space", METHODS[options["method"]].space)
