"""`streammerge compare`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from streammerge.cli.console import facts, note, say, say_json, table, with_exit_codes
from streammerge.cli.options import compare_options
from streammerge.cli.program import Sectioned

if TYPE_CHECKING:
    from streammerge.comparison import ComparedMethod, Comparison

SHOWN = 8
"""Adapters that are listed."""

EXAMPLES = """\b
Examples:
  streammerge compare A B C --methods svd,ties_svd,dare_ties_svd --density 0.3
  streammerge compare A B C --methods svd,ties_svd,ties@core --density 0.2 --sample 4 --json
"""


@click.command(cls=Sectioned, epilog=EXAMPLES)
@compare_options
@with_exit_codes
def compare(
    adapters: tuple[str, ...], methods: tuple[str, ...], as_json: bool, **options: Any
) -> None:
    """Merge some of the modules by several methods, and show how they differ; writes nothing.

    Each method's pair against each adapter's own delta: how far it is from it, and how much of that
    is on the directions in which the adapter reads its input (interference); what the cut to the
    rank loses; norm, time and memory. 0 is the adapter itself, 1 is nothing of it.
    """
    from streammerge.comparing import compare as run

    found = run(adapters, methods=methods, **options)
    if as_json:
        say_json(found.to_dict())
        return
    for one in found.notices:
        note(one)
    for refused in found.refused:
        note(f"not compared: {refused.method}: {refused.why}")
    say(*facts(_about(found)), "", *_methods(found), "", *_adapters(found))


def _about(found: Comparison) -> list[tuple[str, object]]:
    from streammerge.budget import format_size

    return [
        ("adapters", len(found.adapters)),
        ("modules", f"{len(found.targets)} of {found.of}"),
        ("read", f"{format_size(found.read_bytes)}, once"),
        ("memory allowed", format_size(found.allowed_bytes)),
    ]


def _methods(found: Comparison) -> list[str]:
    """Return a row for each method: means over the adapters."""
    from streammerge.budget import format_size
    from streammerge.comparison import mean

    rows: list[tuple[object, ...]] = [
        (
            one.method,
            _share(mean(one.distances)),
            _share(mean(one.interference)),
            _share(one.relative_error),
            f"{one.norm:.4g}",
            f"{one.seconds:.3g} s",
            format_size(one.projected_bytes),
        )
        for one in found.methods
    ]
    header = ("method", "distance", "interference", "cut", "norm", "a module", "holds")
    return table(rows, header)


def _adapters(found: Comparison) -> list[str]:
    """Return a row for each adapter: its distance to each method, and of that the interference."""
    rows: list[tuple[object, ...]] = [
        (adapter, f"{found.norms[i]:.4g}", *(_both(one, i) for one in found.methods))
        for i, adapter in list(enumerate(found.adapters))[:SHOWN]
    ]
    more = len(found.adapters) - len(rows)
    tail = [f"… and {more} more adapters; --json has all"] if more else []
    header = ("distance (interference) of", "norm", *(one.method for one in found.methods))
    return [*table(rows, header), *tail]


def _both(one: ComparedMethod, i: int) -> str:
    return f"{_share(one.distances[i])} ({_share(one.interference[i])})"


def _share(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.3f}"
