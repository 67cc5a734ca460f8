"""`streammerge compress`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from streammerge.cli.console import with_exit_codes
from streammerge.cli.merge import ranks_of, run_merge
from streammerge.cli.options import OUTPUT, compress_options, run_options
from streammerge.cli.program import Sectioned, section

if TYPE_CHECKING:
    from streammerge.api import MergeResult

EXAMPLES = """\b
Examples:
  streammerge compress A -o EIGHT --rank 8
  streammerge compress A -o SMALL --rank energy:0.99
  streammerge compress A -o SMALLER --rank error:0.3,max:4 --dtype bfloat16
"""


@click.command(cls=Sectioned, epilog=EXAMPLES)
@compress_options
@section(
    OUTPUT,
    click.option("-o", "--output", required=True, type=click.Path(), help="Directory to make."),
)
@run_options
@with_exit_codes
def compress(adapter: str, output: str, *, rank: str, **options: Any) -> None:
    """Cut one adapter to a smaller rank, of each module its own if need be.

    ADAPTER is a directory or a file of a LoRA, or an id on the Hub. It is merged by itself: each
    module gets the best pair of its rank, which is never larger than it was, and a scaling of 1.
    """
    from streammerge.recipe import as_limit

    run_merge(
        (adapter,),
        output,
        push=None,
        private=False,
        method="svd",
        rank=as_limit(rank),
        summary=_summary,
        **options,
    )


def _summary(result: MergeResult) -> list[str]:
    from streammerge.budget import format_size

    plan = result.plan
    before, after = format_size(plan.read_bytes), format_size(plan.write_bytes)
    share = plan.write_bytes / max(1, plan.read_bytes)
    kept = [(m.kept_energy, m.target) for m in result.modules if m.kept_energy is not None]
    mean = sum(energy for energy, _ in kept) / len(kept)
    worst, target = min(kept)
    size = f"{before} to {after} ({share:.0%}), {result.seconds:.1f} s"
    return [
        f"{result.output}: {len(result.modules)} targets cut to {ranks_of(plan)}, {size}",
        f"energy kept: {mean:.2%} on average, {worst:.2%} at least ({target})",
    ]
