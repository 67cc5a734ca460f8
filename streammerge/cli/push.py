"""`streammerge push`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from streammerge.cli.console import (
    Wishes,
    command_line,
    remark,
    say,
    say_json,
    with_exit_codes,
)
from streammerge.cli.stopping import Stops, until_stopped

if TYPE_CHECKING:
    from streammerge.publishing import Pushed

EXAMPLES = """\b
Examples:
  streammerge push OUT me/merged
  streammerge push OUT me/merged --private --message "of three"
"""


@click.command(epilog=EXAMPLES)
@click.argument("output", type=click.Path())
@click.argument("repo", metavar="USER/NAME")
@click.option("--private", is_flag=True, help="Make the repository a private one.")
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace an adapter, or a README.md, that is not streammerge's.",
)
@click.option("--message", metavar="TEXT", help="Of the commit.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@with_exit_codes
def push(output: str, repo: str, as_json: bool, **options: Any) -> None:
    """Bring OUTPUT to the Hugging Face Hub, verified, with a model card.

    What the Hub has already is not sent again: a push that was stopped, or failed, goes on.
    """

    def run(_stops: Stops) -> Pushed:
        from streammerge.api import push as verify_and_push

        return verify_and_push(output, repo, **options)

    wishes = Wishes(as_json)
    pushed = until_stopped(run, resuming=pushing(output, repo, **options), wishes=wishes)
    tell_notices(pushed)
    if as_json:
        say_json(asdict(pushed))
    else:
        say(said_of(pushed))


def pushing(output: str, repo: str, **options: Any) -> str:
    """Return the command line that pushes an output, and goes on with that."""
    words = ["push", output, repo]
    for name, value in options.items():
        words += [f"--{name}"] if value is True else [f"--{name}", value] if value else []
    return command_line(*words)


def tell_notices(pushed: Pushed) -> None:
    """Print what the user should know about a push."""
    for notice in pushed.notices:
        remark(f"note: {notice}")


def said_of(pushed: Pushed) -> str:
    """Return the line that says what lies on the Hub."""
    return f"{pushed.url}: {len(pushed.files)} files, commit {pushed.commit}"
