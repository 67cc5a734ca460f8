"""What the model is given that can be measured here: rates of one core, and the client's costs."""

from __future__ import annotations

import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import streammerge
from atscale.cases import Case
from atscale.makespan import Rates, Terms
from atscale.runs import Call, Stages, fresh, make_adapters, say, timed
from clusters import cluster_of
from streammerge.adapter import Adapter
from streammerge.executors.bundles import bundles
from streammerge.output.parts import make_part, seal
from streammerge.output.writer import RegionReader
from streammerge.planner.part import take_part
from streammerge.plans import Plan, Region, Task

NODES = 3000
"""Tasks that do nothing, for the scheduler's costs."""

TINY = {f"layers.{i}.q_proj": (64, 64) for i in range(4000)}

SEALED = 64
"""Targets of a part that is sealed, for the client's costs."""

SAMPLED = 4
"""Bundles of a plan that are written, of which there may be thousands."""


@dataclass(frozen=True)
class Miniature:
    """Targets small enough to be merged here, by the same route, with the same mix of work.

    At one rank what is done for each element and each adapter is the same for few adapters as for
    many, and so is what a pass over factors does for each.
    """

    layers: dict[str, tuple[int, int]]
    adapters: int


def miniature(case: Case) -> Miniature:
    """Return what stands for a case."""
    if case.name == "MoE":
        # Of full size: half are wide, half high, as in an expert's three.
        count = 48 if case.method == "linear" else 4
        wide, high = (2048, 7168), (7168, 2048)
        return Miniature({f"layers.{i}.p": high if i % 3 == 2 else wide for i in range(count)}, 8)
    layers = {f"layers.{i}.p": (2048, 2048) for i in range(2)}
    return Miniature(layers, 24 if case.method == "ties_svd" else 160)


def measure_case(case: Case, folder: Path) -> tuple[Rates, Stages, Plan]:
    """Merge a case's miniature on one thread; return the rates, the times and its plan."""
    small = miniature(case)
    name = f"{case.name}-{len(small.layers)}x{small.adapters}"
    adapters = make_adapters(folder / name, small.layers, small.adapters, case.rank)
    options: dict[str, Any] = {"method": case.method, "density": case.density, "workers": 1}
    plan = streammerge.plan(adapters, **options)
    stages = timed(Call(adapters, str(folder / "output"), options))
    say(f"{case.name} {case.method}", stages)
    (route,) = {task.route for task in plan.tasks}
    flops = sum(task.flops for task in plan.tasks)
    return Rates({route: flops / stages.tasks}), stages, plan


def measure_client(folder: Path) -> Terms:
    """Return what the client and the scheduler cost, all else being free."""
    adapters = make_adapters(folder / "tiny", TINY, 2, 4)
    call = Call(adapters, str(folder / "output"), {"method": "linear", "workers": 1})
    finish = timed(call).finishing / len(TINY)
    few, small = _seal(folder, 2**10)
    more, large = _seal(folder, 2**22)
    per_byte = (more - few) / (large - small)
    read_back = _read_back(folder)
    return Terms(
        bundle_seconds=_node_seconds(folder),
        seal_seconds=max(0.0, few - small * per_byte) / SEALED,
        seal_byte_seconds=per_byte,
        finish_seconds=finish,
        finish_byte_seconds=read_back,
    )


def with_submission(terms: Terms, plan: Plan, case: Case, folder: Path) -> Terms:
    """Return the terms with what it takes to write this plan down for workers.

    A bundle costs something for each adapter, however few its targets; that, and what a target
    costs, follow from large bundles and small ones.
    """
    manifests = case.manifests()
    (many, slow), (few, fast) = (
        _write_down(plan, manifests, bundles(plan.tasks, threads)[:SAMPLED], folder)
        for threads in (1, 1000)
    )
    each = max(0.0, (slow - fast) / (many - few))
    return replace(terms, submit_seconds=each, submit_bundle_seconds=max(0.0, fast - few * each))


def _write_down(
    plan: Plan, manifests: Sequence[Adapter], chosen: Sequence[Sequence[Task]], folder: Path
) -> tuple[float, float]:
    """Return how many targets a bundle has, and the seconds that one takes; both on average."""
    began = time.perf_counter()
    for number, bundle in enumerate(chosen):
        data = pickle.dumps(take_part(plan, manifests, bundle))
        (folder / f"{number}.tasks").write_bytes(data)
    seconds = time.perf_counter() - began
    return sum(map(len, chosen)) / len(chosen), seconds / len(chosen)


def _node_seconds(folder: Path) -> float:
    """Return what a task that does nothing costs on a scheduler with one worker."""
    from distributed import Client, as_completed  # noqa: PLC0415  (takes seconds to load)

    with (
        fresh(folder / "cluster") as place,
        cluster_of(place, 1) as cluster,
        Client(cluster.address, set_as_default=False) as client,
        client.as_current(),
    ):
        client.submit(abs, 0).result()
        began = time.perf_counter()
        futures = [client.submit(abs, i, key=f"nothing-{i}") for i in range(NODES)]
        for future in as_completed(futures):
            future.release()
        return (time.perf_counter() - began) / NODES


def _seal(folder: Path, nbytes: int) -> tuple[float, int]:
    """Return what it takes to seal a part of regions of this size, and its size."""
    regions = _regions(nbytes)
    total = SEALED * 2 * nbytes
    output = folder / "sealed"
    output.write_bytes(bytes(total))
    part = make_part(folder, total)
    part.write_bytes(bytes(total))
    with RegionReader(folder, (part.name,), (0,)) as reader:
        checksum = reader.checksum(regions[0])
    began = time.perf_counter()
    seal(part, folder, (0,), (output.name,), [(region, checksum) for region in regions])
    seconds = time.perf_counter() - began
    output.unlink()
    return seconds, total


def _read_back(folder: Path) -> float:
    """Return the seconds that it takes to read a byte back and hash it."""
    regions = _regions(2**22)
    path = folder / "read"
    path.write_bytes(bytes(regions[-1].offset + 2**22))
    began = time.perf_counter()
    with RegionReader(folder, (path.name,), (0,)) as reader:
        for region in regions:
            reader.checksum(region)
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds / (len(regions) * 2**22)


def _regions(nbytes: int) -> list[Region]:
    return [Region(f"t{i}", 0, i * nbytes, (nbytes,), nbytes, "U8") for i in range(2 * SEALED)]
