"""`streammerge merge`."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from streammerge.cli.console import remark, say, say_json, stopped_by_signals, with_exit_codes
from streammerge.cli.options import merge_options
from streammerge.cli.push import said_of, stoppable

if TYPE_CHECKING:
    from streammerge.api import MergeResult


@click.command()
@merge_options
@click.option("-o", "--output", required=True, type=click.Path(), help="Directory to make.")
@click.option("--resume", is_flag=True, help="Go on with an unfinished merge, where there is one.")
@click.option(
    "--time-limit", metavar="TIME", help="Stop after so long, like 50m; --resume goes on."
)
@click.option(
    "--push", metavar="USER/NAME", help="Then bring it to this repository of the Hugging Face Hub."
)
@click.option("--private", is_flag=True, help="Make that repository a private one.")
@click.option("--quiet", is_flag=True, help="No progress.")
@with_exit_codes
def merge(
    adapters: tuple[str, ...],
    output: str,
    push: str | None,
    private: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Merge ADAPTERS (PEFT directories) into one adapter.

    \b
    streammerge merge A B C -o OUT --method ties --weights 2.0,0.3,0.7 --density 0.2

    Stopped by SIGTERM, SIGINT or --time-limit it keeps what is done, exits with 75 and prints the
    command that goes on; killed by anything else, the same command with --resume goes on.
    """
    from streammerge.api import push as verify_and_push
    from streammerge.errors import PublishedError
    from streammerge.pushing import check_push, upload

    if push is not None:
        check_push(push)
    try:
        result = _merge(adapters, output, as_json=as_json, **options)
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
    else:
        say(*_summary(result))


@stopped_by_signals
def _merge(
    adapters: tuple[str, ...],
    output: str,
    *,
    quiet: bool,
    as_json: bool,  # noqa: ARG001  # stopped_by_signals looks at it
    **options: Any,
) -> MergeResult:
    from streammerge.api import merge as run
    from streammerge.cli.progress import Progress

    with Progress(quiet=quiet) as progress:
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
            f"cut to rank {plan.config['r']}: relative error {mean:.3g} on average, {worst:.3g} "
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
