"""The command line: prints and exits. Whatever is heavy is imported inside the commands."""

from __future__ import annotations

import click

from streammerge.cli.compare import compare
from streammerge.cli.completion import completion
from streammerge.cli.compress import compress
from streammerge.cli.consolidate import consolidate
from streammerge.cli.inspect import inspect
from streammerge.cli.merge import merge
from streammerge.cli.methods import methods
from streammerge.cli.plan import plan
from streammerge.cli.program import Program
from streammerge.cli.push import push
from streammerge.cli.report import report
from streammerge.cli.run import run
from streammerge.cli.verify import verify

EPILOG = """\b
Begin with:
  streammerge inspect A B C
  streammerge plan A B C --method ties --density 0.2
  streammerge merge A B C -o OUT --method ties --density 0.2

\b
Exit codes:
  0   done
  1   failed during the work (NaN, disk, a fault); nothing lies at the output's name
  2   refused before any work (usage, headers, budget); nothing was written
  75  stopped by a signal or the time limit; --resume goes on

With --json a command prints its result as JSON, and an error as {"error": …, "exit_code": …}.
"""


@click.group(cls=Program, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="streammerge")
def main() -> None:
    """Merge LoRA adapters: files in, one adapter out, no base model, bounded memory."""


for command in (
    *(merge, run, plan, compare, compress, inspect, verify, report, methods),
    *(consolidate, push, completion),
):
    main.add_command(command)
