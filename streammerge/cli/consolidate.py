"""`streammerge consolidate`."""

from __future__ import annotations

from dataclasses import asdict

import click

from streammerge.cli.console import remark, say, say_json, with_exit_codes

EXAMPLES = """\b
Examples:
  streammerge consolidate OUT -o ONE
"""


@click.command(epilog=EXAMPLES)
@click.argument("directory", type=click.Path())
@click.option("-o", "--output", required=True, type=click.Path(), help="Directory to make.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier output of streammerge.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@with_exit_codes
def consolidate(directory: str, output: str, overwrite: bool, as_json: bool) -> None:
    """Make the shards of the adapter in DIRECTORY into one file, which PEFT and vLLM load."""
    from streammerge.api import consolidate as run
    from streammerge.budget import format_size

    result = run(directory, output, overwrite=overwrite)
    for notice in result.notices:
        remark(f"note: {notice}")
    if as_json:
        say_json({**asdict(result), "output": str(result.output)})
        return
    compared = "every checksum is right" if result.checksums else "no checksums to compare"
    say(
        f"{output}: {result.tensors} tensors, {format_size(result.write_bytes)}, from "
        f"{result.files} file(s), {compared}"
    )
