"""`streammerge verify`."""

from __future__ import annotations

import click

from streammerge.cli.console import say, say_json, with_exit_codes

EXAMPLES = """\b
Examples:
  streammerge verify OUT
  streammerge verify OUT --json
"""


@click.command(epilog=EXAMPLES)
@click.argument("output", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@with_exit_codes
def verify(output: str, as_json: bool) -> None:
    """Check an output from its files alone.

    Every checksum in its streammerge.json, headers, shapes and config. An adapter that has no
    streammerge.json is checked as far as headers and config go.
    """
    from streammerge.api import verify as check

    result = check(output)
    if as_json:
        say_json(
            {"path": str(result.path), "targets": result.targets, "checksums": result.checksums}
        )
    elif result.checksums:
        say(f"{output}: {result.targets} targets, every checksum is right")
    else:
        say(
            f"{output}: {result.targets} targets, headers and config are sound; there is no "
            "streammerge.json, so no checksums to compare"
        )
