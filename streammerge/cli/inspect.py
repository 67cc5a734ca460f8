"""`streammerge inspect`."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from streammerge.cli.console import facts, say, say_json, with_exit_codes

if TYPE_CHECKING:
    from streammerge.adapter import Adapter


EXAMPLES = """\b
Examples:
  streammerge inspect A B C
  streammerge inspect A --json
"""


@click.command(epilog=EXAMPLES)
@click.argument("paths", nargs=-1, required=True, type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON.")
@with_exit_codes
def inspect(paths: tuple[str, ...], as_json: bool) -> None:
    """Show what adapters are, from configs and headers alone.

    Base model, modules, ranks, scaling, dtypes, and what is not a LoRA factor. No tensor is read.
    """
    from streammerge.api import open_adapter

    found = [_facts(open_adapter(path)) for path in paths]
    if as_json:
        say_json(found)
        return
    for position, about in enumerate(found):
        if position:
            say("")
        say(*facts([(name, _shown(value)) for name, value in about.items()]))


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
