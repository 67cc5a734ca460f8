"""`streammerge inspect`."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from streammerge.cli.console import facts, say, say_json, table, with_exit_codes

if TYPE_CHECKING:
    from streammerge.adapter import Adapter
    from streammerge.measuring import Measured

SHOWN = 8
"""Targets and kinds of modules that are listed."""

EXAMPLES = """\b
Examples:
  streammerge inspect A B C
  streammerge inspect A --norms
  streammerge inspect A --json
"""


@click.command(epilog=EXAMPLES)
@click.argument("paths", nargs=-1, required=True, type=click.Path())
@click.option("--norms", is_flag=True, help="Read the weights too: norms and ranks of the deltas.")
@click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON.")
@with_exit_codes
def inspect(paths: tuple[str, ...], norms: bool, as_json: bool) -> None:
    """Show what adapters are, from configs and headers alone.

    Base model, modules, ranks, scaling, dtypes, and what is not a LoRA factor. No tensor is read,
    unless --norms asks for it: the norm of each delta, and over how many directions it is spread.
    """
    from streammerge.api import open_adapter

    found = []
    for position, path in enumerate(paths):
        measured = _measured(path) if norms else None
        about = _facts(measured.adapter if measured else open_adapter(path))
        found.append(about | (_spectra(measured) if measured else {}))
        if not as_json:
            say(*([""] if position else []))
            say(*facts([(name, _shown(value)) for name, value in about.items()]))
            if measured:
                say("", *_norms(measured))
    if as_json:
        say_json(found)


def _measured(path: str) -> Measured:
    from streammerge.measuring import measure

    return measure(path)


def _norms(measured: Measured) -> list[str]:
    """Return a table of the modules with the largest deltas, and what is odd about others."""
    whole = measured.norm**2 or 1.0
    finite = [found for found in measured.targets if found.problem is None]
    largest = sorted(finite, key=lambda found: (-found.norm, found.target))[:SHOWN]
    rows: list[tuple[object, ...]] = [
        (
            found.target,
            f"{found.norm:.4g}",
            f"{found.norm**2 / whole:.1%}",
            f"{found.effective_rank:.1f}",
            f"{found.stable_rank:.1f}",
            f"{found.numerical_rank} of {found.rank}",
        )
        for found in largest
    ]
    heads = ("target", "norm", "share of energy", "effective rank", "stable rank", "rank")
    kinds: dict[str, float] = {}
    for found in finite:
        kind = found.target.rsplit(".", 1)[-1]
        kinds[kind] = kinds.get(kind, 0.0) + found.norm**2 / whole
    by_kind = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    zero = sum(not found.numerical_rank for found in finite)
    deficient = sum(0 < found.numerical_rank < found.rank for found in finite)
    of_what = "of all deltas" if measured.scaled else "of all B·A, for the scaling is unknown"
    totals: list[tuple[str, object]] = [
        ("norm", f"{measured.norm:.4g} {of_what}"),
        ("energy", ", ".join(f"{kind} {share:.1%}" for kind, share in by_kind[:SHOWN])),
        ("zero deltas", str(zero)),
        ("rank-deficient", str(deficient)),
        ("not finite", _shown([found.problem for found in measured.targets if found.problem])),
    ]
    more = len(finite) - len(rows)
    tail = [f"… and {more} targets with smaller norms"] if more else []
    return [*facts(totals), "", *table(rows, heads), *tail]


def _spectra(measured: Measured) -> dict[str, Any]:
    """Return the same for machines: every target, null for what is no number."""

    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {
        "norm": measured.norm,
        "scaled": measured.scaled,
        "spectra": [
            {name: plain(value) for name, value in asdict(found).items()}
            for found in measured.targets
        ],
    }


def _facts(adapter: Adapter) -> dict[str, Any]:
    from streammerge.adapter import DTYPES

    columns, config = adapter.columns, adapter.config
    kinds = ("linear", "embedding", "convolution")
    modules = Counter(adapter.target(row).rsplit(".", 1)[-1] for row in range(len(adapter)))
    unexplained = int((columns.declared_rank != columns.rank).sum())
    explained = bool((columns.declared_rank > 0).all())
    return {
        "path": adapter.path,
        "format": adapter.dialect,
        "base model": config.base_model if config else None,
        "task": config.task_type if config else None,
        "targets": len(adapter),
        "modules": dict(sorted(modules.items())),
        "layers": dict(Counter(kinds[kind] for kind in columns.kind.tolist())),
        "ranks": dict(sorted(Counter(columns.rank.tolist()).items())),
        "alphas": sorted(set(columns.alpha.tolist())) if explained else None,
        "rslora": bool((columns.power == 0.5).any()) if explained else None,
        "dtypes": [DTYPES[code] for code in sorted(set(columns.a_dtype) | set(columns.b_dtype))],
        "parameters": int((columns.rank * (columns.m + columns.n)).sum()),
        "bytes": sum(file.size for file in adapter.files),
        "files": len(adapter.files),
        "key prefixes": list(adapter.prefixes) if adapter.keys is None else [],
        "scaling": f"unknown for {unexplained} targets" if unexplained else "known",
        "extra tensors": list(adapter.extras),
    }


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} ({count})" for name, count in value.items())
    if isinstance(value, list):
        shown = ", ".join(
            f"{item:g}" if isinstance(item, float) else str(item) for item in value[:8]
        )
        return shown + (f", … ({len(value)} in all)" if len(value) > 8 else "") if value else "none"
    return "not stated" if value is None else str(value)
