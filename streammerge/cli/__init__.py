"""The command line: prints and exits. Whatever is heavy is imported inside the commands."""

from __future__ import annotations

import click

from streammerge.cli.consolidate import consolidate
from streammerge.cli.inspect import inspect
from streammerge.cli.merge import merge
from streammerge.cli.methods import methods
from streammerge.cli.plan import plan
from streammerge.cli.push import push
from streammerge.cli.verify import verify

EXIT_CODES = """\b
Exit codes:
  0   done
  1   failed during the work (NaN, disk, a fault); nothing lies at the output's name
  2   refused before any work (usage, headers, budget); nothing was written
  75  stopped by a signal or the time limit; --resume goes on
"""


@click.group(epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="streammerge")
def main() -> None:
    """Merge LoRA adapters: files in, one adapter out, no base model, bounded memory."""


for command in (merge, plan, inspect, methods, verify, consolidate, push):
    main.add_command(command)
