"""`streammerge run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from streammerge.cli.console import with_exit_codes
from streammerge.cli.merge import run_merge
from streammerge.cli.options import OUTPUT, machine_options, push_options, run_options
from streammerge.cli.program import Sectioned, section

EXAMPLES = """\b
Examples:
  streammerge run RECIPE.yaml -o SUM
  streammerge run SUM/streammerge_config.yml -o SUM-AGAIN
  streammerge run RECIPE.yaml -o SUM-SMALL --max-memory 512MiB --time-limit 50m --resume
"""


@click.command(cls=Sectioned, epilog=EXAMPLES)
@click.argument("recipe", type=click.Path())
@section(
    OUTPUT,
    click.option(
        "-o",
        "--output",
        type=click.Path(),
        help="Directory to make.  [default: what the recipe says]",
    ),
)
@machine_options
@push_options
@run_options
@with_exit_codes
def run(recipe: str, output: str | None, **options: Any) -> None:
    """Merge as a recipe file says.

    RECIPE is a YAML file that says what `merge` takes as options, in the words of mergekit where
    they fit. Every output holds the recipe that makes it again, as streammerge_config.yml.
    """
    from streammerge.errors import RecipeFileError
    from streammerge.recipe_file import read_recipe

    read = read_recipe(Path(recipe))
    where = output or read.output
    if where is None:
        raise RecipeFileError("says no output; give one with -o", path=recipe)
    run_merge(read.adapters, where, **read.options, **options)
