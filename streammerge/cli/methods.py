"""`streammerge methods`."""

from __future__ import annotations

import click

from streammerge.catalog import METHODS, RULES, SPACES, Parameter, SpaceSpec
from streammerge.cli.console import facts, say, say_json, table

EXAMPLES = """\b
Examples:
  streammerge methods
  streammerge methods --json
"""


@click.command(epilog=EXAMPLES)
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def methods(as_json: bool) -> None:
    """List the methods: rule, space, what they need.

    A rule says how several tensors become one, a space what it is applied to: the factors A and B
    on their own, or the deltas that they make.
    """
    rows: list[tuple[object, ...]] = []
    for method in METHODS.values():
        rule, space = RULES[method.rule], SPACES[method.space]
        needs = ["density"] if rule.needs_density else []
        needs += ["equal ranks"] if space.equal_ranks else []
        rows.append(
            (method.name, rule.name, space.name, ", ".join(needs) or "-", rule.summary, rule.source)
        )
    header = ("method", "rule", "space", "needs", "what the rule does", "source")
    if as_json:
        say_json([dict(zip(header, row, strict=True)) | _parameters(str(row[0])) for row in rows])
        return
    say(*table(rows, header), "")
    about: list[tuple[str, object]] = [
        (f"space {space.name}:", _about(space)) for space in SPACES.values()
    ]
    about += [("any rule:", "in any space by --space; but exact is for sums alone")]
    for owner, parameters in _owners():
        about += [
            (f"{one.name} ({owner}):", f"{one.about}; {one.default:g} unless --parameters say so")
            for one in parameters
        ]
    say(*facts(about))


def _owners() -> list[tuple[str, tuple[Parameter, ...]]]:
    """Return what takes parameters, by name."""
    return [
        *((rule.name, rule.parameters) for rule in RULES.values()),
        *((space.name, space.parameters) for space in SPACES.values()),
    ]


def _parameters(name: str) -> dict[str, dict[str, float]]:
    """Return what a method's parameters are when they are not given, for machines."""
    method = METHODS[name]
    takes = (*RULES[method.rule].parameters, *SPACES[method.space].parameters)
    return {"parameters": {one.name: one.default for one in takes}}


def _about(space: SpaceSpec) -> str:
    needs = "; needs equal ranks" if space.equal_ranks else ""
    takes = "; takes a rank and a clamp" if space.truncates else ""
    return f"{space.summary}{needs}{takes} ({space.source})"
