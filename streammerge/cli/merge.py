"""`streammerge merge`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from streammerge.cli.console import (
    Wishes,
    command_line,
    remark,
    say,
    say_json,
    tip,
    with_exit_codes,
)
from streammerge.cli.options import OUTPUT, merge_options, push_options, run_options
from streammerge.cli.plan import show_plan
from streammerge.cli.program import Sectioned, section
from streammerge.cli.push import pushing, said_of, tell_notices
from streammerge.cli.stopping import Stops, resuming_line, until_stopped

if TYPE_CHECKING:
    from collections.abc import Callable

    from streammerge.api import MergeResult
    from streammerge.plans import Plan

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
    summary: Callable[[MergeResult], list[str]] | None = None,
    **options: Any,
) -> None:
    """Merge, or show the plan, and print what came out.

    Args:
        adapters: as in the Python call.
        output: as in the Python call.
        push: where the output is brought to, too.
        private: whether that is made a private one.
        dry_run: whether the plan is shown, and no more.
        resume: as in the Python call.
        time_limit: as in the Python call.
        quiet: whether there is no progress.
        as_json: whether the result is printed as JSON.
        summary: returns what is said of the result; as of a merge when None.
        options: those of the Python call.
    """
    if dry_run:
        show_plan(adapters, output, as_json=as_json, notes=not (quiet and as_json), **options)
        return
    wishes = Wishes(as_json, quiet)
    run = {"resume": resume, "time_limit": time_limit, **options}

    def merge_and_tell(stops: Stops) -> None:
        if push is None:
            result = _merge(adapters, output, lambda: stops.over(0), wishes, options=run)
        else:
            result = _merge_and_push(
                adapters, output, stops, wishes, repo=push, private=private, options=run
            )
        if as_json:
            say_json(_facts(result))
            return
        say(*(summary or _summary)(result))
        if not quiet:
            tip(*_next_steps(output))

    until_stopped(merge_and_tell, resuming=resuming_line(), wishes=wishes)


def _next_steps(output: str) -> tuple[str, ...]:
    return (
        f"load it:   PeftModel.from_pretrained(model, {output!r})",
        f"check it:  {command_line('verify', output)}",
    )


def _merge_and_push(
    adapters: tuple[str, ...],
    output: str,
    stops: Stops,
    wishes: Wishes,
    *,
    repo: str,
    private: bool,
    options: dict[str, Any],
) -> MergeResult:
    """Merge, and bring it to the Hub; what is stopped there, a push goes on with."""
    from streammerge.api import push as verify_and_push
    from streammerge.errors import PublishedError
    from streammerge.publishing import check_push, upload

    check_push(repo)

    def only_the_push_is_left() -> None:
        stops.resuming = pushing(output, repo, private=private)

    try:
        result = _merge(adapters, output, only_the_push_is_left, wishes, options=options)
    except PublishedError:
        only_the_push_is_left()
        pushed = verify_and_push(output, repo, private=private)
        tell_notices(pushed)
        remark(said_of(pushed))
        raise
    pushed = upload(result.output, repo, private=private)
    stops.over(0)
    tell_notices(pushed)
    return replace(result, pushed=pushed)


def _merge(
    adapters: tuple[str, ...],
    output: str,
    on_published: Callable[[], None],
    wishes: Wishes,
    *,
    options: dict[str, Any],
) -> MergeResult:
    from streammerge import events
    from streammerge.api import merge as run
    from streammerge.cli.progress import Progress

    with Progress(quiet=wishes.quiet, notes=not wishes.only_json) as progress:

        def listen(event: events.Event) -> None:
            if isinstance(event, events.Published):
                on_published()
            progress(event)

        return run(adapters, output, on_event=listen, **options)


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
            f"cut to {ranks_of(plan)}: relative error {mean:.3g} on average, {worst:.3g} at most "
            f"({target})"
        )
    if result.pushed is not None:
        lines.append(said_of(result.pushed))
    return lines


def ranks_of(plan: Plan) -> str:
    """Return the rank that most targets have, or, where a policy chose them, from where to where
    they go."""
    asked = plan.recipe["rank"]
    if not isinstance(asked, str):
        return f"rank {plan.usual_rank}"
    ranks = sorted({task.rank for task in plan.targets})
    span = f"ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"rank {ranks[0]}"
    return f"{span} ({asked})"


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
