"""`streammerge merge`."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from streammerge.cli.console import (
    command_line,
    remark,
    say,
    say_json,
    stopped_by_signals,
    tip,
    with_exit_codes,
)
from streammerge.cli.options import OUTPUT, merge_options, push_options, run_options
from streammerge.cli.plan import show_plan
from streammerge.cli.program import Sectioned, section
from streammerge.cli.push import said_of, stoppable

if TYPE_CHECKING:
    from streammerge.api import MergeResult

EXAMPLES = """\b
Examples:
  streammerge merge A B -o OUT --weights 0.7,0.3
  streammerge merge A B C -o OUT --method ties --density 0.2 --weights 2.0,0.3,0.7
  streammerge merge A B C -o OUT --method dare_ties_svd --density 0.3 --rank 16 --seed 7
  streammerge merge A B C -o OUT --max-memory 512MiB --time-limit 50m --resume
"""


@click.command(cls=Sectioned, epilog=EXAMPLES)
@merge_options
@section(
    OUTPUT,
    click.option("-o", "--output", required=True, type=click.Path(), help="Directory to make."),
)
@push_options
@run_options
@with_exit_codes
def merge(
    adapters: tuple[str, ...],
    *,
    output: str,
    **options: Any,
) -> None:
    """Merge adapters into one.

    ADAPTERS are directories or files of LoRAs, or ids on the Hub (user/repo@revision), in the
    order of their weights. The output appears whole, or not at all.

    Stopped by SIGTERM, SIGINT or --time-limit it keeps what is done, exits with 75 and prints the
    command that goes on; killed by anything else, the same command with --resume goes on.
    """
    run_merge(adapters, output, **options)


def run_merge(
    adapters: tuple[str, ...],
    output: str,
    *,
    push: str | None,
    private: bool,
    dry_run: bool,
    resume: bool,
    time_limit: str | None,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Merge, or show the plan, and print what came out; `options` are those of the Python call."""
    from streammerge.api import push as verify_and_push
    from streammerge.errors import PublishedError
    from streammerge.publishing import check_push, upload

    if dry_run:
        show_plan(adapters, output, as_json=as_json, notes=not (quiet and as_json), **options)
        return
    if push is not None:
        check_push(push)
    run = {"resume": resume, "time_limit": time_limit, **options}
    try:
        result = _merge(adapters, output, quiet=quiet, as_json=as_json, options=run)
    except PublishedError:
        if push is not None:
            remark(
                said_of(stoppable(verify_and_push, output, push, private=private, as_json=as_json))
            )
        raise
    if push is not None:
        pushed = stoppable(upload, result.output, push, private=private, as_json=as_json)
        result = replace(result, pushed=pushed)
    if as_json:
        say_json(_facts(result))
        return
    say(*_summary(result))
    if not quiet:
        tip(*_next_steps(output))


def _next_steps(output: str) -> tuple[str, ...]:
    return (
        f"load it:   PeftModel.from_pretrained(model, {output!r})",
        f"check it:  {command_line('verify', output)}",
    )


@stopped_by_signals
def _merge(
    adapters: tuple[str, ...], output: str, *, quiet: bool, as_json: bool, options: dict[str, Any]
) -> MergeResult:
    from streammerge.api import merge as run
    from streammerge.cli.progress import Progress

    with Progress(quiet=quiet, notes=not (quiet and as_json)) as progress:
        return run(adapters, output, on_event=progress, **options)


def _summary(result: MergeResult) -> list[str]:
    from streammerge.budget import format_size

    plan = result.plan
    first = (
        f"{result.output}: {len(result.modules)} targets from "
        f"{len(plan.recipe['adapters'])} adapters, {format_size(plan.write_bytes)}, "
        f"{result.seconds:.1f} s"
    )
    lines = [first]
    errors = [(m.relative_error, m.target) for m in result.modules if m.relative_error is not None]
    if errors:
        mean = sum(error for error, _ in errors) / len(errors)
        worst, target = max(errors)
        lines.append(
            f"cut to rank {plan.usual_rank}: relative error {mean:.3g} on average, {worst:.3g} "
            f"at most ({target})"
        )
    if result.pushed is not None:
        lines.append(said_of(result.pushed))
    return lines


def _facts(result: MergeResult) -> dict[str, Any]:
    return {
        "output": str(result.output),
        "read_bytes": result.plan.read_bytes,
        "write_bytes": result.plan.write_bytes,
        "seconds": result.seconds,
        "notices": list(result.notices),
        "pushed": asdict(result.pushed) if result.pushed else None,
        "modules": [asdict(module) for module in result.modules],
    }
