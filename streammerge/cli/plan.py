"""`streammerge plan`."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from streammerge.cli.console import (
    command_line,
    facts,
    note,
    say,
    say_json,
    table,
    tip,
    with_exit_codes,
)
from streammerge.cli.options import OUTPUT, merge_options
from streammerge.cli.program import Sectioned, section

if TYPE_CHECKING:
    from streammerge.plans import Census, Plan

SHOWN_TASKS = 8

EXAMPLES = """\b
Examples:
  streammerge plan A B C --method ties_svd --density 0.2
  streammerge plan A B C --method ties_svd --density 0.2 --max-memory 512MiB
  streammerge plan A B C --json
"""


@click.command(cls=Sectioned, epilog=EXAMPLES)
@merge_options
@section(
    OUTPUT,
    click.option("-o", "--output", type=click.Path(), help="Checked if given; nothing is written."),
)
@with_exit_codes
def plan(adapters: tuple[str, ...], output: str | None, as_json: bool, **options: Any) -> None:
    """Show what a merge would read, write and hold. Runs nothing.

    It is read off the adapters' headers alone. What does not fit --max-memory is refused, with the
    smallest that works.
    """
    show_plan(adapters, output, as_json=as_json, notes=True, **options)


def show_plan(
    adapters: tuple[str, ...], output: str | None, *, as_json: bool, notes: bool, **options: Any
) -> None:
    """Print the plan of a merge; `options` are those of the Python call."""
    from streammerge.api import plan as make

    made = make(adapters, output, **options)
    if as_json:
        say_json(json.loads(made.to_json()))
        return
    say(*_totals(made), "", *_largest(made))
    if notes:
        for notice in made.notices:
            note(notice)
    tip(f"merge it:  {_merging(sys.argv[1:], output)}")


def _merging(words: Sequence[str], output: str | None) -> str:
    """Return the command line that does what was planned."""
    kept = [word for word in words if word != "--dry-run"]
    if "plan" in kept:
        kept[kept.index("plan")] = "merge"
    where = [] if output else ["-o", "OUT"]
    return command_line(*kept, *where)


def _totals(plan: Plan) -> list[str]:
    from streammerge.budget import format_size

    ranks = Counter(task.rank for task in plan.targets)
    routes = Counter(task.route for task in plan.tasks)
    at_most, policy = ("at most ", f"; {plan.recipe['rank']}") if plan.late else ("", "")
    rows: list[tuple[str, object]] = [
        ("method", plan.method),
        ("adapters", len(plan.recipe["adapters"])),
        ("targets", len(plan.targets)),
        ("extra tensors", _extras(plan)),
        ("output rank", f"{at_most}{_counts(ranks)}{policy}"),
        ("output dtype", plan.dtype),
        ("reads", format_size(plan.read_bytes)),
        *([("before", _census(plan.census))] if plan.census else []),
        ("writes", f"{at_most}{format_size(plan.write_bytes)} in {len(plan.files)} file(s)"),
        ("route", _counts(routes)),
        ("tasks at once", _concurrency(plan)),
        ("memory allowed", f"{format_size(plan.allowed_bytes)}, {plan.allowed_origin}"),
        ("memory reserved", f"{format_size(plan.reserved_bytes)} for the process itself"),
        ("memory projected", f"{format_size(plan.projected_bytes)} at most"),
        ("device", _device(plan)),
        ("merged matrix", _kept(plan)),
        ("scratch", _scratch(plan)),
        ("arithmetic", f"{plan.flops / 1e9:.2f} Gflop"),
        ("time, roughly", f"{plan.seconds:.0f} s" if plan.seconds >= 1 else "under a second"),
    ]
    return facts(rows)


def _census(census: Census) -> str:
    from streammerge.budget import format_size

    return (
        f"thresholds over whole adapters: {census.passes} passes at most for each "
        f"{census.adapters_at_once} adapter(s), which read {format_size(census.read_bytes)}"
    )


def _extras(plan: Plan) -> str:
    from streammerge.budget import format_size

    written = [task for task in plan.tasks if task.is_extra]
    left = sum(len(module.tensors) for module in plan.extras if module.done == "drop")
    if not written:
        return f"{left} left out" if left else "none"
    return (
        f"{len(written)} ({plan.recipe['extras']}): reads "
        f"{format_size(sum(task.read_bytes for task in written))}, writes "
        f"{format_size(sum(task.write_bytes for task in written))}; {left} left out"
    )


def _concurrency(plan: Plan) -> str:
    alone = sum(task.alone for task in plan.tasks)
    lanes = max((task.lanes for task in plan.tasks if task.alone), default=0)
    text = str(plan.concurrency)
    if alone:
        text += f"; {alone} target(s) alone, {lanes} thread(s) each"
    teams = Counter(task.team for task in plan.tasks if task.team > 1)
    for team, count in sorted(teams.items()):
        text += f"; {count} target(s) shared by {team} workers"
    return text


def _counts(counts: Counter[Any]) -> str:
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{value} ({count} targets)" for value, count in counts.most_common(6))


def _scratch(plan: Plan) -> str:
    from streammerge.budget import format_size

    if plan.scratch is None:
        return "none"
    if not plan.scratch_bytes:
        return "nothing goes there"
    return f"{format_size(plan.scratch_bytes)} at most, in {plan.scratch}"


def _device(plan: Plan) -> str:
    from streammerge.budget import format_size

    if plan.device == "cpu":
        return f"cpu, {plan.device_origin}"
    held = plan.in_flight([task.device_bytes for task in plan.tasks])
    allowed = format_size(plan.device_allowed_bytes)
    memory = f"{format_size(held)} of its memory at most, {allowed} allowed"
    return f"{plan.device}, {plan.device_origin}; {memory}"


def _kept(plan: Plan) -> str:
    """Say where the tiles of merged matrices are kept between the passes over them."""
    from streammerge.tiling import row_tiles

    routes = ("left_basis", "both_bases", "shared_bases")
    in_bases = [task for task in plan.tasks if task.route in routes]
    if in_bases:
        held = sum(task.resident for task in in_bases)
        return f"coordinates in bases, {held} tiles of them held in memory"
    streamed = [task for task in plan.tasks if task.route == "krylov"]
    if not streamed:
        return "no tile is needed twice"
    tiles = {task: len(row_tiles(task.m, task.n)) for task in streamed}
    held = sum(task.resident for task in streamed)
    spilled = sum(task.spilled for task in streamed)
    made = sum(tiles.values()) - held - spilled
    return (
        f"{sum(tiles.values())} tiles in {len(streamed)} targets: {held} held in memory, "
        f"{spilled} on scratch, {made} made again in each pass"
    )


def _largest(plan: Plan) -> list[str]:
    from streammerge.budget import format_size

    tasks = sorted(plan.tasks, key=lambda task: (-task.projected_bytes, task.target))
    rows: list[tuple[object, ...]] = [
        (
            task.target,
            f"{task.m}x{task.n}",
            task.last - task.first,
            task.rank,
            task.route,
            format_size(task.read_bytes),
            format_size(task.write_bytes),
            format_size(task.projected_bytes),
        )
        for task in tasks[:SHOWN_TASKS]
    ]
    more = len(tasks) - len(rows)
    header = ("target", "shape", "adapters", "rank", "route", "reads", "writes", "holds")
    shown = table(rows, header)
    return [*shown, f"… and {more} targets that hold no more"] if more else shown
