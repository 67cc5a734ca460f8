"""`streammerge methods`."""

from __future__ import annotations

import click

from streammerge.catalog import METHODS, RULES, SPACES
from streammerge.cli.console import say, say_json, table


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def methods(as_json: bool) -> None:
    """List the methods: rule, space, what they need, what they do."""
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
        say_json([dict(zip(header, row, strict=True)) for row in rows])
        return
    say(*table(rows, header), "")
    for space in SPACES.values():
        say(f"space {space.name}: {space.summary}")
