"""The public calls: each composes a recipe, manifests, a plan, an executor and an output."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streammerge import events
from streammerge.adapter import Adapter, NameTable
from streammerge.budget import CPU, format_size, parse_duration, peak_bytes
from streammerge.consolidation import consolidate
from streammerge.errors import PublishedError, StoppedError, printable
from streammerge.notebook import card
from streammerge.notices import module_notices
from streammerge.output.record import write_timings
from streammerge.output.staging import Staging, check_output
from streammerge.plans import SHOWN, Plan
from streammerge.preparation import StrPath, bring, make_recipe, open_cluster, prepare
from streammerge.publishing import Pushed, check_push, push, upload
from streammerge.publishing import push as push_output
from streammerge.readers import read_adapter
from streammerge.recipe import as_limit
from streammerge.verification import verify

__all__ = [
    "MergeResult",
    "compress",
    "consolidate",
    "merge",
    "open_adapter",
    "plan",
    "push",
    "verify",
]

if TYPE_CHECKING:
    from streammerge.finish import ModuleReport

Setting = float | Sequence[float] | Sequence[Mapping[str, Any]]
"""A number, a gradient over depth, or a list of {"filter": …, "value": …}."""


@dataclass(frozen=True, repr=False)
class MergeResult:
    """What a merge leaves behind."""

    output: Path
    """The directory that was made."""
    plan: Plan
    """What was done, as it was planned; but with the ranks, bytes and files that came out, where a
    rank policy decided them."""
    modules: tuple[ModuleReport, ...]
    """What became of each target, in the plan's order."""
    notices: tuple[str, ...]
    """What the user should know and what stopped nothing."""
    seconds: float
    """How long it took, from the call on, without a push."""
    pushed: Pushed | None = None
    """What lies on the Hub now, where it was asked for."""

    def __repr__(self) -> str:
        return (
            f"MergeResult({str(self.output)!r}: {len(self.modules)} targets, "
            f"{self.plan.write_bytes:,} bytes, {self.seconds:.1f} s)"
        )

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the totals, and the targets that lost most."""
        modules = sorted(self.modules, key=lambda module: -(module.relative_error or 0.0))
        facts = [
            ("output", str(self.output)),
            ("method", str(self.plan.recipe["method"])),
            ("adapters", f"{len(self.plan.recipe['adapters']):,}"),
            ("targets", f"{len(modules):,}"),
            ("bytes", format_size(self.plan.write_bytes)),
            ("seconds", f"{self.seconds:.1f}"),
            *(("note", notice) for notice in self.notices[:SHOWN]),
        ]
        rows = [
            (
                module.target,
                f"{module.m}×{module.n}",
                str(module.rank),
                "–" if module.relative_error is None else f"{module.relative_error:.3g}",
            )
            for module in modules[:SHOWN]
        ]
        header = ("target", "shape", "rank", "relative error")
        return card("MergeResult", facts, header, rows, more=len(modules) - len(rows))


def open_adapter(path: StrPath) -> Adapter:
    """Return the manifest of an adapter; of its weights only the header is read.

    Args:
        path: an adapter's directory or file, PEFT's, diffusers', kohya's or MLX's, or its id on
            the Hub, such as "user/repo@revision".

    Raises:
        AdapterError: a subclass of it says why it cannot be used.
    """
    return read_adapter(os.fspath(path), NameTable())


def plan(
    adapters: Sequence[StrPath],
    output: StrPath | None = None,
    *,
    method: str = "svd",
    weights: Sequence[Setting] | None = None,
    density: float | Sequence[Setting] | None = None,
    parameters: Mapping[str, float] | None = None,
    normalize: bool = False,
    rank: int | str | None = None,
    space: str | None = None,
    majority_sign: str = "total",
    threshold_scope: str = "tensor",
    clamp: float | None = None,
    seed: int = 0,
    dtype: str = "auto",
    format: str = "auto",  # noqa: A002  (the option's name)
    compute_dtype: str = "float32",
    extras: str = "error",
    scaling: str | float | None = None,
    include: str | None = None,
    exclude: str | None = None,
    base_model: str | None = None,
    strict_base: bool = False,
    max_memory: str | int | None = None,
    workers: int | None = None,
    device: str = CPU,
    max_vram: str | int | None = None,
    io: str = "mmap",
    stream: bool = False,
    scratch: StrPath | None = None,
    scheduler: Any = None,
    mixed_hardware: bool = False,
    max_shard_size: str | int | None = None,
    overwrite: bool = False,
) -> Plan:
    """Return what a merge would read, write and hold, from the adapters' headers alone.

    The arguments are those of `merge`; nothing is written, and `output`, when given, is only
    checked. Sizes in the plan are bytes, times seconds.

    Raises:
        RefusedError: a subclass of it says why the merge cannot be done.
    """
    if output is not None:
        check_output(Path(output), overwrite=overwrite)
    recipe = make_recipe(
        adapters,
        method=method,
        weights=weights,
        density=density,
        parameters=parameters,
        normalize=normalize,
        rank=rank,
        space=space,
        majority_sign=majority_sign,
        threshold_scope=threshold_scope,
        clamp=clamp,
        seed=seed,
        dtype=dtype,
        format=format,
        compute_dtype=compute_dtype,
        extras=extras,
        scaling=scaling,
        include=include,
        exclude=exclude,
        base_model=base_model,
        strict_base=strict_base,
        max_shard_size=max_shard_size,
    )
    with open_cluster(scheduler) as cluster:
        return prepare(
            recipe,
            cluster,
            output=output,
            max_memory=max_memory,
            workers=workers,
            device=device,
            max_vram=max_vram,
            io=io,
            stream=stream,
            scratch=scratch,
            mixed_hardware=mixed_hardware,
        )[0]


def merge(
    adapters: Sequence[StrPath],
    output: StrPath,
    *,
    method: str = "svd",
    weights: Sequence[Setting] | None = None,
    density: float | Sequence[Setting] | None = None,
    parameters: Mapping[str, float] | None = None,
    normalize: bool = False,
    rank: int | str | None = None,
    space: str | None = None,
    majority_sign: str = "total",
    threshold_scope: str = "tensor",
    clamp: float | None = None,
    seed: int = 0,
    dtype: str = "auto",
    format: str = "auto",  # noqa: A002  (the option's name)
    compute_dtype: str = "float32",
    extras: str = "error",
    scaling: str | float | None = None,
    include: str | None = None,
    exclude: str | None = None,
    base_model: str | None = None,
    strict_base: bool = False,
    max_memory: str | int | None = None,
    workers: int | None = None,
    device: str = CPU,
    max_vram: str | int | None = None,
    io: str = "mmap",
    stream: bool = False,
    scratch: StrPath | None = None,
    scheduler: Any = None,
    mixed_hardware: bool = False,
    max_shard_size: str | int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    time_limit: str | float | None = None,
    push: str | None = None,
    private: bool = False,
    on_event: events.OnEvent | None = None,
) -> MergeResult:
    """Merge LoRA adapters on disk into one adapter on disk, without the base model.

    Args:
        adapters: directories or files of LoRA adapters, or ids on the Hub such as
            "user/repo@revision", in the order of their weights; PEFT's, diffusers', kohya's and
            MLX's are read.
        output: directory to make; it appears whole, or not at all.
        method: one of PEFT's combination types, such as "svd", "ties" or "dare_ties_svd", or
            another name that `streammerge methods` lists.
        weights: one for each adapter, 1.0 each when None: a number; a list of numbers, spaced
            evenly from the first layer to the last; or a list of {"filter": …, "value": …}, of
            which the first holds whose filter is found in the target's name.
        density: share of elements kept, in [0, 1]; for the methods that prune or drop. A number
            for all adapters, or a list with one for each, like the weights.
        parameters: numbers that the method takes besides these, by name, such as {"gamma": 0.02}
            for "breadcrumbs"; `streammerge methods` lists them, and what they are when not given.
        normalize: divide the weights by their sum, in each target over the adapters that have it.
        rank: of the output, for truncating methods; the largest of the inputs when None. Or what
            decides it in each target: "max:64", 64, but no more than the sum of the inputs' ranks
            there, where the result has no higher one; "energy:0.95,max:64", the smallest that keeps
            95 % of ‖M‖²_F of the merged matrix M; "error:0.1,max:64", the smallest whose
            ‖M - M_k‖_F is at most 0.1·‖M‖_F. Where no rank does up to `max`, which is the largest
            of the inputs when it is left out, it is that, and a notice says so.
        space: "factor", "delta", "core", "knots" or "exact", instead of the method's own.
        majority_sign: "total" or "frequency", for the methods that elect a sign.
        threshold_scope: for the methods that keep the largest: "tensor" seeks them in each tensor
            on its own, "global" in all of an adapter's tensors in this merge together.
        clamp: quantile in (0, 1] at which truncated factors are clamped, PEFT's `svd_clamp`.
        seed: of DARE's masks and of the iteration's start.
        dtype: of the output: "float32", "float16", "bfloat16", "float64", or "auto" for the
            widest of the inputs.
        format: of the output: "peft", "diffusers" (one pytorch_lora_weights.safetensors that a
            pipeline loads), or "auto" for that of the inputs.
        compute_dtype: "float32" or "float64".
        extras: what to do about tensors that are not LoRA factors, such as heads and biases:
            "error" refuses them, "drop" leaves them out, "first" takes each module's from the first
            adapter that has it, "mean" averages them by the weights.
        scaling: "config", "tensor" or a number, where a config does not explain a tensor's rank.
        include: merge only targets in whose name this regular expression is found.
        exclude: leave out targets in whose name it is found.
        base_model: what the output's config names as its base, instead of what the adapters' do.
        strict_base: refuse adapters that name different base models.
        max_memory: for the whole process, in bytes or like "2GiB"; what the machine grants, with
            headroom, when None. On a cluster it is for each worker's process.
        workers: tasks at once on this machine; the number of cores when None.
        device: where tiles are made and decomposed: "cpu", "cuda", "cuda:1", "xpu", …; "auto" for
            the accelerator, where there is one and it is projected to be faster.
        max_vram: of the device's memory, in bytes or like "8GiB"; what is free when None.
        io: "mmap", or "pread" for network file systems.
        stream: read adapters on the Hub from there while they are merged, and store nothing of
            them; they are downloaded into the Hub's cache first when False.
        scratch: directory on a disk for tiles that do not fit into memory, or "none" to make them
            again instead; the output's own parent when None and it is on a disk.
        scheduler: of a dask cluster whose workers do it, instead of this machine: an address such
            as "tcp://host:8786", a scheduler file, or a `distributed.Client`. All workers must see
            inputs and output under the same names.
        mixed_hardware: let workers take part that round differently; the bytes then depend on
            which of them did what.
        max_shard_size: write shards of at most this size, with an index; one file when None.
        overwrite: replace an earlier output of streammerge, which may be one of the inputs. A
            directory that holds anything else is never replaced. An unfinished merge into the
            same output is dropped.
        resume: go on with an unfinished merge into the same output, where there is one; what it
            has done is read back and checked. The bytes are those of an undisturbed run.
        time_limit: stop after this long, in seconds or like "50m"; what is done is kept.
        push: bring the output to this repository of the Hugging Face Hub ("user/name") as well, as
            `streammerge.push` does, once it is published here.
        private: make that repository a private one.
        on_event: called with what happens; notices become Python warnings when None.

    Returns:
        Where the output lies, what was planned, and what became of each target.

    Raises:
        RefusedError: before any work, a subclass of it says why; nothing was written.
        MergeFailedError: during the work; nothing lies at the output's name. Where `resumable`,
            what was done is kept.
        StoppedError: at the time limit; what is done is kept.
        PublishedError: with `resume`, the output is there already, made by this very merge, which
            was killed while it cleared up. It has been pushed, where that was asked for.
        PushError: the output is there, and could not be brought to the Hub.
        KeyboardInterrupt: at a signal; what is done is kept. None once the output is published,
            but for one during the push.
    """
    began = time.perf_counter()
    deadline = math.inf
    if time_limit is not None:
        deadline = time.monotonic() + parse_duration(time_limit, option="time_limit")
    tell = on_event or _warn
    if push is not None:
        check_push(push)
    recipe = make_recipe(
        adapters,
        method=method,
        weights=weights,
        density=density,
        parameters=parameters,
        normalize=normalize,
        rank=rank,
        space=space,
        majority_sign=majority_sign,
        threshold_scope=threshold_scope,
        clamp=clamp,
        seed=seed,
        dtype=dtype,
        format=format,
        compute_dtype=compute_dtype,
        extras=extras,
        scaling=scaling,
        include=include,
        exclude=exclude,
        base_model=base_model,
        strict_base=strict_base,
        max_shard_size=max_shard_size,
    )
    try:
        Staging(Path(output)).settle(recipe.to_dict() if resume else None)
    except PublishedError:
        if push is not None:
            push_output(output, push, private=private)
        raise
    check_output(Path(output), overwrite=overwrite)
    with open_cluster(scheduler) as cluster:
        planned, manifests = prepare(
            recipe,
            cluster,
            output=output,
            max_memory=max_memory,
            workers=workers,
            device=device,
            max_vram=max_vram,
            io=io,
            stream=stream,
            scratch=scratch,
            mixed_hardware=mixed_hardware,
        )
        for notice in planned.notices:
            tell(events.Notice(notice))
        if not stream:
            manifests = bring(manifests, tell, lambda: _check_time(deadline, len(planned.tasks)))
        # Loads torch, so it waits until all that can be refused without it has been.
        from streammerge.run import run_plan  # noqa: PLC0415

        with Staging(Path(output), overwrite=overwrite, resume=resume) as staging:
            planned, receipts, modules = run_plan(
                planned,
                manifests,
                staging,
                tell,
                cluster=cluster,
                mixed_hardware=mixed_hardware,
                deadline=deadline,
            )
            seconds = time.perf_counter() - began
            timings = {receipt.target: receipt.seconds for receipt in receipts}
            peak = peak_bytes() if cluster is None else None
            write_timings(staging.path, planned, timings, seconds, peak)
            staging.publish()
            # Told before it is cleared up, where an interrupt is none any more.
            tell(events.Published(os.fspath(output), planned.write_bytes))
    late = [
        *module_notices(modules, planned),
        *(f"{left}; the next merge clears up" for left in staging.left),
    ]
    for notice in late:
        tell(events.Notice(notice))
    result = MergeResult(Path(output), planned, modules, (*planned.notices, *late), seconds)
    return result if push is None else _with_push(result, push, tell, private=private)


def compress(
    adapter: StrPath,
    output: StrPath,
    *,
    rank: int | str,
    dtype: str = "auto",
    format: str = "auto",  # noqa: A002  (the option's name)
    compute_dtype: str = "float32",
    extras: str = "error",
    scaling: str | float | None = None,
    include: str | None = None,
    exclude: str | None = None,
    base_model: str | None = None,
    max_memory: str | int | None = None,
    workers: int | None = None,
    device: str = CPU,
    max_vram: str | int | None = None,
    io: str = "mmap",
    stream: bool = False,
    scratch: StrPath | None = None,
    scheduler: Any = None,
    mixed_hardware: bool = False,
    max_shard_size: str | int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    time_limit: str | float | None = None,
    on_event: events.OnEvent | None = None,
) -> MergeResult:
    """Cut one adapter to a smaller rank: its merge by itself, with "svd" and a weight of 1.

    Each module gets the best pair of its rank, of scaling 1. All arguments are those of `merge`,
    and so is what is returned and raised.

    Args:
        adapter: a directory or a file, or an id on the Hub.
        output: directory to make.
        rank: of each module, such as 8; or what each of them has to keep, such as "energy:0.99" or
            "error:0.1,max:32". No module's is larger than it was: 8 is the "max:8" of `merge`.
        dtype: of the output; "auto" is that of the adapter.
        format: of the output.
        compute_dtype: of the arithmetic.
        extras: what to do about tensors that are not LoRA factors.
        scaling: where the config does not explain a tensor's rank.
        include: take only modules in whose name this regular expression is found.
        exclude: leave out modules in whose name it is found.
        base_model: what the output's config names as its base.
        max_memory: for the whole process.
        workers: tasks at once.
        device: where they compute.
        max_vram: of the device's memory.
        io: "mmap" or "pread".
        stream: read an adapter on the Hub from there, and store nothing of it.
        scratch: directory for tiles that do not fit into memory.
        scheduler: of a dask cluster.
        mixed_hardware: let workers take part that round differently.
        max_shard_size: write shards of at most this size.
        overwrite: replace an earlier output, which may be the adapter itself.
        resume: go on where it was stopped.
        time_limit: stop after this long.
        on_event: called with what happens.

    Returns:
        Where the output lies, and what became of each target.

    Raises:
        RefusedError: before any work, as of `merge`.
        MergeFailedError: during the work.
        StoppedError: at the time limit; what is done is kept.
        PublishedError: with `resume`, the output is there already.
    """
    return merge(
        [adapter],
        output,
        rank=as_limit(rank),
        dtype=dtype,
        format=format,
        compute_dtype=compute_dtype,
        extras=extras,
        scaling=scaling,
        include=include,
        exclude=exclude,
        base_model=base_model,
        max_memory=max_memory,
        workers=workers,
        device=device,
        max_vram=max_vram,
        io=io,
        stream=stream,
        scratch=scratch,
        scheduler=scheduler,
        mixed_hardware=mixed_hardware,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        resume=resume,
        time_limit=time_limit,
        on_event=on_event,
    )


def _with_push(
    result: MergeResult, repo: str, tell: events.OnEvent, *, private: bool
) -> MergeResult:
    """Bring a merge's output to the Hub; it has been read back just now."""
    pushed = upload(result.output, repo, private=private)
    for notice in pushed.notices:
        tell(events.Notice(notice))
    return replace(result, notices=(*result.notices, *pushed.notices), pushed=pushed)


def _check_time(deadline: float, targets: int) -> None:
    if time.monotonic() > deadline:
        raise StoppedError("the time limit is over", done=0, targets=targets)


class StreammergeWarning(UserWarning):
    """A notice, where nobody listens to events."""


def _warn(event: events.Event) -> None:
    if isinstance(event, events.Notice):
        warnings.warn(printable(event.message), StreammergeWarning, stacklevel=3)
