"""`streammerge push`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from streammerge.cli.console import (
    command_line,
    remark,
    say,
    say_json,
    stopped_by_signals,
    with_exit_codes,
)

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
    from streammerge.api import push as run

    pushed = stoppable(run, output, repo, as_json=as_json, **options)
    if as_json:
        say_json(asdict(pushed))
    else:
        say(said_of(pushed))


def stoppable(
    call: Callable[..., Pushed], output: Any, repo: str, *, as_json: bool, **options: Any
) -> Pushed:
    """Call what pushes an output, and tell its notices; stopped by a signal, it says how to go
    on."""
    words = ["push", str(output), repo]
    for name, value in options.items():
        words += [f"--{name}"] if value is True else [f"--{name}", value] if value else []
    run = stopped_by_signals(
        lambda **_: call(output, repo, **options), lambda: command_line(*words)
    )
    pushed = run(as_json=as_json)
    for notice in pushed.notices:
        remark(f"note: {notice}")
    return pushed


def said_of(pushed: Pushed) -> str:
    """Return the line that says what lies on the Hub."""
    return f"{pushed.url}: {len(pushed.files)} files, commit {pushed.commit}"
