"""From what a caller asked for to a plan: recipe, manifests, what the machine or cluster grants."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streammerge import events
from streammerge.adapter import Adapter, NameTable, TensorFile
from streammerge.budget import AUTO, ON_CPU, Budget, Device, allow, parse_size
from streammerge.errors import BudgetError, ClusterError, HubError, RecipeError
from streammerge.hub import parse_id
from streammerge.output.space import allocated_bytes, check_space, find_scratch
from streammerge.output.staging import draft_path, staging_path
from streammerge.planner import make_plan, resolve_method
from streammerge.plans import Plan
from streammerge.readers import read_adapters
from streammerge.recipe import (
    Recipe,
    make_density,
    make_number,
    make_parameters,
    make_paths,
    make_rank,
    make_weights,
)

if TYPE_CHECKING:
    from streammerge.executors.cluster import Cluster

StrPath = str | os.PathLike[str]

IO_WAYS = ("mmap", "pread")


def make_recipe(
    adapters: Sequence[StrPath],
    *,
    weights: Any,
    density: Any,
    parameters: Any,
    max_shard_size: str | int | None,
    **fields: Any,
) -> Recipe:
    """Return the recipe of what a caller asked for, its options checked.

    Raises:
        RecipeError: one of them is not what it should be.
    """
    paths = make_paths(adapters)
    shard = None
    if max_shard_size is not None:
        shard = parse_size(max_shard_size, option="max_shard_size")
    fields["clamp"] = make_number(fields["clamp"], float, option="clamp")
    fields["seed"] = make_number(fields["seed"], int, option="seed")
    fields["rank"] = make_rank(fields["rank"])
    if not isinstance(fields["scaling"], str):
        fields["scaling"] = make_number(fields["scaling"], float, option="scaling")
    return Recipe(
        adapters=paths,
        weights=make_weights(weights, len(paths)),
        density=make_density(density),
        parameters=make_parameters(parameters),
        max_shard_bytes=shard,
        **fields,
    )


def prepare(
    recipe: Recipe,
    cluster: Cluster | None,
    *,
    output: StrPath | None,
    max_memory: str | int | None,
    workers: int | None,
    device: str,
    max_vram: str | int | None,
    io: str,
    stream: bool,
    scratch: StrPath | None,
    mixed_hardware: bool,
) -> tuple[Plan, list[Adapter]]:
    """Return the plan of a recipe and the manifests it was made from; arguments as in `merge`.

    Raises:
        RefusedError: a subclass of it says why the merge cannot be done.
    """
    if io not in IO_WAYS:
        raise RecipeError(f"io must be one of {', '.join(IO_WAYS)}, not {io!r}", option="io")
    rule, _ = resolve_method(recipe)
    vram = None if max_vram is None else parse_size(max_vram, option="max_vram")
    threads = _threads(workers, cluster)
    memory = None if max_memory is None else parse_size(max_memory, option="max_memory")
    manifests = read_adapters(recipe.adapters, NameTable(), store=not stream)
    place = find_scratch(scratch, output)
    if cluster is None:
        budget, found = own_budget(memory, threads, device, vram, [rule.name])
    else:
        budget, found = cluster.survey(
            memory, device, vram, rule.name, mixed_hardware=mixed_hardware
        )
    size = 1 if cluster is None else cluster.size

    def plan_on(where: Device) -> Plan:
        return make_plan(
            manifests,
            recipe,
            budget,
            device=where,
            workers=size,
            io=io,
            scratch=place,
            stream=stream,
        )

    planned = _choose(plan_on, found) if device == AUTO else plan_on(found)
    needs = []
    if output is not None:
        # On a cluster parts lie beside the output until they are sealed into it, and a draft of
        # late ranks until it is assembled, when no part is left.
        copies = 1 if cluster is None and not planned.late else 2
        # What an unfinished run has allocated is gone on with, or removed.
        there = (staging_path(Path(output)), draft_path(Path(output)))
        needed = copies * planned.write_bytes - sum(map(allocated_bytes, there))
        needs.append((os.fspath(Path(output).resolve().parent), needed))
    if place is not None:
        needs.append((place, size * planned.scratch_bytes))
    check_space(needs)
    return planned, manifests


def bring(
    manifests: Sequence[Adapter], tell: events.OnEvent, check: Callable[[], None]
) -> list[Adapter]:
    """Bring what lies on the Hub into its cache; return the manifests of what is there.

    Args:
        manifests: as they were planned with.
        tell: hears of each file.
        check: called now and then; ends it by raising.

    Raises:
        HubError: a file cannot be had.
    """
    remote = [adapter for adapter in manifests if adapter.files[0].etag is not None]
    if not remote:
        return list(manifests)
    # Loads the Hub's client.
    from streammerge.hub.snapshots import download, remember  # noqa: PLC0415

    others = [path for a in remote if a.origin is not None for path in a.origin.others]
    files = {file.path: file for adapter in remote for file in adapter.files}
    tell(events.Downloading(len(files), sum(file.size for file in files.values())))
    places = download(
        [*dict.fromkeys([*others, *files])],
        lambda path, nbytes: tell(events.Downloaded(path, nbytes)) if path in files else None,
        check,
    )
    for adapter in remote:
        asked, path = parse_id(adapter.path), adapter.files[0].path
        if asked is not None:
            remember(path, places[path], asked.revision)
    local = {path: _described(file, places[path]) for path, file in files.items()}
    return [
        replace(adapter, files=tuple(local.get(file.path, file) for file in adapter.files))
        for adapter in manifests
    ]


def _described(file: TensorFile, place: Path) -> TensorFile:
    status = place.stat()
    if status.st_size != file.size:
        raise HubError(
            f"has {status.st_size} bytes in the cache ({place}), and {file.size} on the Hub; "
            "remove it there",
            path=file.path,
            reason="disk",
        )
    return TensorFile(str(place), status.st_size, status.st_mtime_ns, status.st_ino)


def _choose(plan_on: Callable[[Device], Plan], accelerator: Device) -> Plan:
    """Return the plan on an accelerator or on the CPU, whichever is projected to be faster.

    Raises:
        BudgetError: it fits on neither.
    """
    if accelerator == ON_CPU:
        return replace(plan_on(ON_CPU), device_origin="there is no accelerator")
    try:
        there = plan_on(accelerator)
    except BudgetError as error:
        return replace(plan_on(ON_CPU), device_origin=str(error))
    try:
        here = plan_on(ON_CPU)
    except BudgetError as error:
        return replace(there, device_origin=str(error))
    chosen = there if there.seconds < here.seconds else here
    origin = f"{there.seconds:.3g} s projected on {there.device}, {here.seconds:.3g} s on the CPU"
    return replace(chosen, device_origin=origin)


def _threads(workers: int | None, cluster: Cluster | None) -> int:
    asked = make_number(workers, int, option="workers")
    if asked is None:
        return len(os.sched_getaffinity(0))
    if cluster is not None:
        raise RecipeError("workers goes with this machine; a cluster has its own", option="workers")
    if asked < 1:
        raise RecipeError(f"workers must be at least 1, not {workers}", option="workers")
    return asked


def own_budget(
    max_memory: int | None,
    threads: int,
    device: str,
    max_vram: int | None,
    rules: Sequence[str],
) -> tuple[Budget, Device]:
    """Return what this process may take, and where it computes.

    Args:
        max_memory: in bytes; what the machine grants, with headroom, when None.
        threads: tasks at once.
        device: as torch spells it.
        max_vram: of the device, in bytes; what is free when None.
        rules: whose functions will be needed.

    Raises:
        RecipeError: there is no such device, or a function cannot be loaded.
    """
    allowed, origin = allow(max_memory)
    # torch is loaded to measure what the process takes with it, once all that can be refused
    # without it is; an inspection does without.
    from streammerge.worker import find_device, measure_process  # noqa: PLC0415

    found = find_device(device, max_vram)
    return Budget(allowed, origin, measure_process(*rules), threads), found


def open_cluster(scheduler: Any) -> AbstractContextManager[Cluster | None]:
    """Return the cluster of a scheduler, to be entered; None where there is none.

    Raises:
        ClusterError: it cannot be reached, or `distributed` is not installed.
    """
    if scheduler is None:
        return nullcontext()
    try:
        # Needs an extra, and loads torch.
        from streammerge.executors.cluster import Cluster  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ClusterError(
            f"a cluster needs dask's distributed ({error}): pip install 'streammerge[cluster]'"
        ) from error
    return Cluster(scheduler)
