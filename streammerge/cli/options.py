"""The options that `merge` and `plan` share; their names are those of the Python call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from streammerge.catalog import METHODS, SPACES


class Numbers(click.ParamType[tuple[float, ...]]):
    """Numbers with commas between them."""

    name = "W1,W2,…"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """Return the numbers."""
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 2.0,0.3,0.7", param, ctx)


class Scaling(click.ParamType[str | float]):
    """The words config and tensor, or a number."""

    name = "config|tensor|VALUE"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | float:
        """Return the word or the number."""
        if value in ("config", "tensor"):
            return str(value)
        try:
            return float(value)
        except ValueError:
            self.fail(f"{value!r} is none of config, tensor, or a number", param, ctx)


_METHOD_HELP = "One of: " + ", ".join(METHODS) + "."

_OPTIONS = (
    click.option("--method", default="svd", show_default=True, help=_METHOD_HELP),
    click.option("--space", help=f"Instead of the method's own: {', '.join(SPACES)}."),
    click.option("--weights", type=Numbers(), help="One for each adapter.  [default: 1.0 each]"),
    click.option("--density", type=float, help="Share of elements kept, 0 to 1."),
    click.option("--rank", type=int, help="Of the output.  [default: the largest of the inputs]"),
    click.option(
        "--majority-sign",
        default="total",
        show_default=True,
        metavar="total|frequency",
        help="How ties elects a sign.",
    ),
    click.option("--clamp", type=float, help="Clamp truncated factors at this quantile, 0 to 1."),
    click.option("--seed", type=int, default=0, show_default=True, help="Of DARE's masks."),
    click.option(
        "--dtype",
        default="auto",
        show_default=True,
        metavar="auto|float32|float16|bfloat16|float64",
        help="Of the output; auto is the widest of the inputs.",
    ),
    click.option(
        "--compute-dtype", default="float32", show_default=True, metavar="float32|float64"
    ),
    click.option(
        "--extras",
        default="error",
        show_default=True,
        metavar="error|drop|first|mean",
        help="What to do about tensors that are not LoRA factors (heads, biases): refuse them, "
        "leave them out, take the first adapter's, or average them by the weights.",
    ),
    click.option(
        "--scaling", type=Scaling(), help="Where a config does not explain a tensor's rank."
    ),
    click.option("--include", metavar="RE", help="Merge only targets in whose name RE is found."),
    click.option("--exclude", metavar="RE", help="Leave out targets in whose name RE is found."),
    click.option("--strict-base", is_flag=True, help="Refuse adapters of different base models."),
    click.option(
        "--max-memory",
        metavar="SIZE",
        help="For each process, like 512MiB.  [default: what the machine grants]",
    ),
    click.option("--workers", type=int, help="Tasks at once.  [default: the number of cores]"),
    click.option(
        "--device",
        default="cpu",
        show_default=True,
        help="cpu, cuda, cuda:1, xpu, …; auto: the accelerator, where that is projected faster.",
    ),
    click.option(
        "--max-vram", metavar="SIZE", help="Of the device's memory.  [default: what is free]"
    ),
    click.option(
        "--io",
        default="mmap",
        show_default=True,
        metavar="mmap|pread",
        help="How inputs are read; pread suits network file systems.",
    ),
    click.option(
        "--scratch",
        type=click.Path(),
        help="Directory for tiles that do not fit into memory, or none.  [default: beside OUT]",
    ),
    click.option(
        "--scheduler",
        metavar="ADDRESS|FILE",
        help="Of a dask cluster that does the work, like tcp://host:8786.",
    ),
    click.option(
        "--mixed-hardware", is_flag=True, help="Let workers of a cluster round differently."
    ),
    click.option("--max-shard-size", metavar="SIZE", help="Write shards and an index."),
    click.option("--overwrite", is_flag=True, help="Replace an earlier output of streammerge."),
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
)


def merge_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the adapters and all shared options to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return click.argument("adapters", nargs=-1, required=True, type=click.Path())(command)
