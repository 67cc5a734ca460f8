"""Names of what is merged how, for tests that go over many of them: "ties", or "ties@core"."""

from __future__ import annotations

from streammerge.catalog import RuleSpec
from streammerge.registry import METHODS, RULES

PAIRS = (
    *METHODS,
    *(
        f"{rule.name}@{space}"
        for rule in RULES.values()
        for space in rule.spaces
        if not any((rule.name, space) == (method.rule, method.space) for method in METHODS.values())
    ),
)
"""Every rule in every space that it goes with: the methods, and pairs that none is named after."""


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
