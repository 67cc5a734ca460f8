"""`streammerge methods`."""

from __future__ import annotations

import click

from streammerge.catalog import SPACES, Parameter, SpaceSpec
from streammerge.cli.console import facts, note, say, say_json, table
from streammerge.registry import METHODS, RULES, origin, problems

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
    on their own, or the deltas that they make. Rules that other installed distributions bring are
    among them; those of them that cannot be used are noted.
    """
    rows: list[tuple[object, ...]] = []
    for method in METHODS.values():
        rule, space = RULES[method.rule], SPACES[method.space]
        needs = ["density"] if rule.needs_density else []
        needs += ["equal ranks"] if space.equal_ranks else []
        rows.append(
            (method.name, rule.name, space.name, ", ".join(needs) or "-", rule.summary, rule.source)
        )
    for broken in problems():
        note(broken)
    header = ("method", "rule", "space", "needs", "what the rule does", "source")
    if as_json:
        say_json([dict(zip(header, row, strict=True)) | _more(str(row[0])) for row in rows])
        return
    say(*table(rows, header), "")
    about: list[tuple[str, object]] = [
        (f"space {space.name}:", _about(space)) for space in SPACES.values()
    ]
    about += [
        ("element-wise rules:", "in any space by --space, but exact, which is for sums"),
        ("coefficient rules:", "in delta and exact; spectral rules: in delta"),
    ]
    for owner, parameters in _owners():
        about += [
            (f"{one.name} ({owner}):", f"{one.about}; {one.default:g} unless --parameters say so")
            for one in parameters
        ]
    about += [
        (f"rule {rule}:", f"of {origin(rule)}, not of streammerge")
        for rule in RULES
        if origin(rule)
    ]
    say(*facts(about))


def _owners() -> list[tuple[str, tuple[Parameter, ...]]]:
    """Return what takes parameters, by name."""
    return [
        *((rule.name, rule.parameters) for rule in RULES.values()),
        *((space.name, space.parameters) for space in SPACES.values()),
    ]


def _more(name: str) -> dict[str, object]:
    """Return what else machines are told of a method: its parameters when they are not given, and
    the distribution that brings its rule."""
    method = METHODS[name]
    takes = (*RULES[method.rule].parameters, *SPACES[method.space].parameters)
    return {
        "parameters": {one.name: one.default for one in takes},
        "distribution": origin(method.rule),
    }


def _about(space: SpaceSpec) -> str:
    needs = "; needs equal ranks" if space.equal_ranks else ""
    takes = "; takes a rank and a clamp" if space.truncates else ""
    return f"{space.summary}{needs}{takes} ({space.source})"
