"""`streammerge report`."""

from __future__ import annotations

import click

from streammerge.cli.console import note, say, say_json, with_exit_codes

EXAMPLES = """\b
Examples:
  streammerge report OUT
  streammerge report OUT -o merge.html --png plots
"""


@click.command(epilog=EXAMPLES)
@click.argument("output", type=click.Path())
@click.option(
    "-o",
    "--page",
    type=click.Path(),
    default="report.html",
    show_default=True,
    help="The HTML file to write.",
)
@click.option("--png", "plots", type=click.Path(), help="Directory for the figures as PNG files.")
@click.option("--all-targets", is_flag=True, help="Compare in all targets, however long it takes.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
@with_exit_codes
def report(output: str, page: str, plots: str | None, all_targets: bool, as_json: bool) -> None:
    """Write a merge as a page: what was kept, and how the adapters agree.

    One HTML file that loads nothing. Adapters are compared where they still lie unchanged; else the
    page says which are missing.
    """
    from streammerge.reporting import report as write

    made = write(output, page, plots=plots, all_targets=all_targets)
    if as_json:
        say_json(made.to_dict())
        return
    for why in made.missing:
        note(f"not compared: {why}")
    files = f", {len(made.plots)} plots in {plots}" if plots else ""
    say(f"{made.page}: {len(made.adapters)} adapters compared{files}")
