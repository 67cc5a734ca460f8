"""The options that `merge` and `plan` share; their names are those of the Python call."""

from __future__ import annotations

from collections.abc import Callable

import click

from streammerge.catalog import SPACES
from streammerge.cli.parameter_types import (
    Density,
    MethodName,
    MethodOption,
    Names,
    Numbers,
    Parameters,
    Scaling,
    Word,
)
from streammerge.cli.program import section
from streammerge.recipe import (
    COMPUTE_DTYPES,
    EXTRAS,
    FORMATS,
    MAJORITY_SIGNS,
    OUTPUT_DTYPES,
    THRESHOLD_SCOPES,
)

OUTPUT = "Output"
RUN = "Run"
"""Headings that the commands have options of their own under."""


_RANK = Word("max:64", "energy:0.95", "error:0.1", name="R|max:R|energy:E[,max:R]|error:X[,max:R]")

_COMPUTE_DTYPE = click.option(
    "--compute-dtype",
    type=Word(*COMPUTE_DTYPES),
    default="float32",
    show_default=True,
    help="Of the arithmetic; float64 is slower, to check with.",
)

_METHOD = (
    click.option("--method", cls=MethodOption, type=MethodName(), default="svd", show_default=True),
)

_RULE = (
    click.option(
        "--weights",
        type=Numbers(),
        help="One number for each adapter.  [default: 1.0 each]",
    ),
    click.option(
        "--density",
        type=Density(),
        help="Share of the elements that ties, dare and magnitude_prune keep, 0 to 1; one for "
        "all adapters, or one for each.",
    ),
    click.option(
        "--parameters",
        type=Parameters(),
        help="What the method takes besides these, as `streammerge methods` lists it, like "
        "gamma=0.02.",
    ),
    click.option("--normalize", is_flag=True, help="Divide the weights by their sum."),
    click.option(
        "--rank",
        type=_RANK,
        help="Of the output, where it is truncated; or, in each module, R but no more than the "
        "inputs' ranks together where the method leaves no more, or the smallest that keeps the "
        "share E of the energy, or has at most the relative error X.  "
        "[default: the largest of the inputs]",
    ),
    click.option(
        "--space",
        type=Word(*SPACES),
        help="What the rule is applied to, instead of the method's own.",
    ),
    click.option(
        "--majority-sign",
        type=Word(*MAJORITY_SIGNS),
        default="total",
        show_default=True,
        help="How ties elects a sign: of the sum, or of the most adapters.",
    ),
    click.option(
        "--clamp",
        type=float,
        metavar="QUANTILE",
        help="Clamp truncated factors at this quantile, 0 to 1.",
    ),
    click.option(
        "--seed",
        type=int,
        metavar="N",
        default=0,
        show_default=True,
        help="Of what dare drops: the same seed, the same bytes.",
    ),
    _COMPUTE_DTYPE,
)

_SCOPE = (
    click.option(
        "--threshold-scope",
        type=Word(*THRESHOLD_SCOPES),
        default="tensor",
        show_default=True,
        help="Where ties and magnitude_prune look for the largest: in each tensor, or in the whole "
        "adapter.",
    ),
)
"""What is one for all of an adapter's targets is none for a sample of them."""

_CHOICE = (
    click.option("--include", metavar="RE", help="Merge only modules in whose name RE is found."),
    click.option("--exclude", metavar="RE", help="Leave out modules in whose name RE is found."),
)

_SCALING = (
    click.option(
        "--scaling",
        type=Scaling("config", "tensor", name="config|tensor|VALUE"),
        help="Where a config does not explain a tensor's rank: alpha over the config's rank, "
        "over the tensor's, or this number.",
    ),
)

_INPUTS = (
    click.option(
        "--extras",
        type=Word(*EXTRAS),
        default="error",
        show_default=True,
        help="What to do about tensors that are not LoRA factors (heads, biases): refuse them, "
        "leave them out, take the first adapter's, or average them by the weights.",
    ),
    *_SCALING,
    click.option(
        "--base-model", metavar="ID", help="Named by the output, instead of what the adapters name."
    ),
)

_INPUTS_TOGETHER = (
    click.option("--strict-base", is_flag=True, help="Refuse adapters of different base models."),
)

_MEMORY = (
    click.option(
        "--max-memory",
        metavar="SIZE",
        help="For the whole process, like 512MiB; on a cluster, for each worker's.  "
        "[default: what the machine grants]",
    ),
)

_MACHINE = (
    *_MEMORY,
    click.option(
        "--workers",
        type=int,
        metavar="N",
        help="Tasks at once on this machine.  [default: the number of cores]",
    ),
    click.option(
        "--device",
        type=Word("cpu", "auto", "cuda", "cuda:0", "cuda:1", "xpu", name="NAME"),
        default="cpu",
        show_default=True,
        help="cpu, cuda, cuda:1, xpu, …; auto: the accelerator, where that is projected faster.",
    ),
    click.option(
        "--max-vram", metavar="SIZE", help="Of the device's memory.  [default: what is free]"
    ),
    click.option(
        "--io",
        type=Word("mmap", "pread"),
        default="mmap",
        show_default=True,
        help="How inputs are read; pread suits network file systems.",
    ),
    click.option(
        "--stream",
        is_flag=True,
        help="Read adapters on the Hub while they are merged; store nothing of them.",
    ),
    click.option(
        "--scratch",
        type=click.Path(),
        metavar="DIR",
        help="For tiles that do not fit into memory, or none.  [default: beside OUT]",
    ),
    click.option(
        "--scheduler",
        type=click.Path(),
        metavar="ADDRESS|FILE",
        help="Of a dask cluster that does the work, like tcp://host:8786.",
    ),
    click.option(
        "--mixed-hardware",
        is_flag=True,
        help="Let workers that round differently take part; bytes then depend on which did what.",
    ),
)

_DTYPE = (
    click.option(
        "--dtype",
        type=Word(*OUTPUT_DTYPES, name="NAME"),
        default="auto",
        show_default=True,
        help="float32, float16, bfloat16 or float64; auto: the widest of the inputs.",
    ),
)

_OUTPUT = (
    *_DTYPE,
    click.option(
        "--format",
        type=Word(*FORMATS),
        default="auto",
        show_default=True,
        help="Whose names and layout it has; auto is that of the inputs.",
    ),
    click.option(
        "--max-shard-size",
        metavar="SIZE",
        help="Write files of at most this size, and an index.  [default: one file]",
    ),
)

_OVERWRITE = (
    click.option("--overwrite", is_flag=True, help="Replace an earlier output of streammerge."),
)

_RUN = (click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),)

_SECTIONS = {
    "What to make": (*_METHOD, *_RULE, *_SCOPE),
    "What to take": (*_CHOICE, *_INPUTS, *_INPUTS_TOGETHER),
    "Memory and machine": _MACHINE,
    OUTPUT: (*_OUTPUT, *_OVERWRITE),
    RUN: _RUN,
}

_COMPARED = {
    "What to compare": (
        click.option(
            "--methods",
            required=True,
            type=Names(),
            help="Names that `streammerge methods` lists, each perhaps with a space of its own: "
            "svd,ties_svd,ties@core.",
        ),
        click.option(
            "--sample",
            type=int,
            metavar="K",
            default=16,
            show_default=True,
            help="How many modules, evenly over kinds and depth; --seed draws others.",
        ),
        *_RULE,
        *_DTYPE,
    ),
    "What to take": (*_CHOICE, *_SCALING),
    "Memory and machine": _MEMORY,
    RUN: _RUN,
}
"""Options of a comparison; what of them does not go with a method is left out for it."""

_HERE = {"Memory and machine": _MACHINE, OUTPUT: _OVERWRITE, RUN: _RUN}
"""What a recipe does not decide."""


def merge_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the adapters and all shared options to a command."""
    for title, options in reversed(_SECTIONS.items()):
        command = section(title, *options)(command)
    return click.argument("adapters", nargs=-1, required=True, type=click.Path())(command)


def compare_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the adapters and the options of a comparison to a command."""
    for title, options in reversed(_COMPARED.items()):
        command = section(title, *options)(command)
    return click.argument("adapters", nargs=-1, required=True, type=click.Path())(command)


def machine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that decide no byte of the output to a command."""
    for title, options in reversed(_HERE.items()):
        command = section(title, *options)(command)
    return command


def compress_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the adapter, the rank and all options that go with one adapter to a command."""
    rank = click.option(
        "--rank",
        required=True,
        type=_RANK,
        help="Of each module R, or its own rank where that is smaller; or the smallest that keeps "
        "the share E of the energy, or has at most the relative error X.",
    )
    own = {"What to make": (rank, _COMPUTE_DTYPE), "What to take": (*_CHOICE, *_INPUTS)}
    for title, options in reversed((_SECTIONS | own).items()):
        command = section(title, *options)(command)
    return click.argument("adapter", type=click.Path())(command)


run_options = section(
    RUN,
    click.option("--dry-run", is_flag=True, help="Print what `streammerge plan` prints; no more."),
    click.option(
        "--resume", is_flag=True, help="Go on with an unfinished merge, where there is one."
    ),
    click.option(
        "--time-limit", metavar="TIME", help="Stop after so long, like 50m; --resume goes on."
    ),
    click.option(
        "--quiet", is_flag=True, help="No progress; with --json nothing but the JSON, notes in it."
    ),
)
"""Adds what the commands share that merge."""

push_options = section(
    OUTPUT,
    click.option(
        "--push",
        metavar="USER/NAME",
        help="Then bring it to this repository of the Hugging Face Hub.",
    ),
    click.option("--private", is_flag=True, help="Make that repository a private one."),
)
"""Adds where an output goes besides."""
