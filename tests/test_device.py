"""Device memory: counted tensor by tensor, and run out of on purpose; no GPU is needed for it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import streammerge
from dialects import pairs, write_mlx
from making import WEIGHTS, Layer, linear, write_adapter
from names import chosen, rule_of
from streammerge import errors, worker
from streammerge.adapter import NameTable
from streammerge.api import plan
from streammerge.budget import Budget, Device
from streammerge.executors.serial import run_serial
from streammerge.output.writer import allocate
from streammerge.planner import make_plan
from streammerge.planner.memory import PINNED_BYTES, PINNED_SLOTS
from streammerge.plans import Plan
from streammerge.readers import read_adapters
from streammerge.recipe import Recipe
from streammerge.worker import Job, factors, run_task, transfer
from streammerge.worker import run as worker_run
from streammerge.worker.transfer import Transfer

MIB = 1024**2
LAYERS = {"wide": linear(1536, 3072, 16), "tall": linear(3072, 640, 16)}
METHODS = ("linear", "cat", "svd", "ties", "dare_ties", "ties_svd", "dare_linear_svd")
IN_BASES = ("ties@core", "dare_ties@knots")
BY_MORE = (
    "consensus",
    "della",
    "della@factor",
    "della_linear@core",
    "sce",
    "sce@factor",
    "sce@knots",
)
"""Rules that hold what the others do not."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and look at what it made."""
        made = func(*args, **(kwargs or {}))
        inputs = {
            x.untyped_storage()._cdata
            for x in tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        }
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in inputs or storage._cdata in self._alive:
                    self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.now())
        return made

    def now(self) -> int:
        """Return the bytes that are alive."""
        self._alive = {key: ref for key, ref in self._alive.items() if not ref[0].expired()}
        return sum(nbytes for _, nbytes in self._alive.values())


class FailOnce(TorchDispatchMode):
    """Raises an out-of-memory error in the place of one operation."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation, or fail."""
        self.left -= 1
        if self.left == 0:
            raise torch.OutOfMemoryError("injected")
        return func(*args, **(kwargs or {}))


def make_job(
    folder: Path, method: str, *, max_memory: int = 4096 * MIB, layers: dict[str, Layer] = LAYERS
) -> Job:
    """Plan a merge and return the job, its output files allocated."""
    paths = [str(write_adapter(folder / f"in{i}", layers, seed=i, dtype="BF16")) for i in range(5)]
    density = 0.2 if rule_of(method).needs_density else None
    options: dict[str, Any] = {**chosen(method), "density": density}
    made = plan(paths, max_memory=max_memory, workers=1, **options)
    return job_of(made, paths, folder)


def job_of(made: Plan, paths: list[str], folder: Path) -> Job:
    """Return the job of a plan."""
    output = folder / "out"
    output.mkdir()
    regions = made.regions
    starts = allocate(output, made.files, regions)
    return Job(made, read_adapters(paths, NameTable()), output, starts)


@pytest.mark.parametrize("method", [*METHODS, *IN_BASES, *BY_MORE])
def test_tensors_stay_below_the_projection(method: str, tmp_path: Path) -> None:
    """The same formula speaks of a device's memory, where only tensors count."""
    job = make_job(tmp_path, method)
    for task in job.plan.tasks:
        with LiveBytes() as live:
            run_task(job, task)
        assert live.peak <= task.projected_bytes
        assert live.peak >= 0.2 * (task.projected_bytes - 12 * MIB)


@pytest.mark.parametrize("method", [*METHODS, *IN_BASES, *BY_MORE])
def test_nothing_stays_behind(method: str, tmp_path: Path) -> None:
    """A task's tensors go when it ends: a cycle would hold them until the collector comes by."""
    job = make_job(tmp_path, method)
    with LiveBytes():  # the first operations under a dispatch mode leave something in torch
        run_task(job, job.plan.tasks[0])
    gc.collect()
    gc.disable()
    try:
        with LiveBytes() as live:
            for task in job.plan.tasks:
                run_task(job, task)
        assert live.now() == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("at", [1, 3, 40, 400])
def test_out_of_memory_is_tried_again_with_less(at: int, tmp_path: Path) -> None:
    """Nothing is held the second time, and the bytes are the same."""
    job = make_job(tmp_path, "ties_svd", layers={"wide": LAYERS["wide"]})
    (task,) = job.plan.tasks
    assert task.resident
    assert task.factors
    assert task.stacked
    expected = run_task(job, task).checksums
    with FailOnce(at) as failing:
        receipt = run_task(job, task)
    assert failing.left < 0
    assert receipt.checksums == expected
    assert receipt.device == "cpu"


def test_out_of_device_memory_ends_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path, "ties_svd", layers={"wide": LAYERS["wide"]})
    (task,) = job.plan.tasks
    expected = run_task(job, task).checksums
    tried: list[tuple[str, int]] = []
    run_on: Callable[..., Any] = worker_run._run_on

    def full_device(device: torch.device, job: Job, attempt: Any, *rest: Any, **how: Any) -> Any:
        tried.append((device.type, attempt.resident))
        if device.type != "cpu":
            raise torch.OutOfMemoryError("injected")
        return run_on(device, job, attempt, *rest, **how)

    monkeypatch.setattr(worker_run, "_run_on", full_device)
    job.device = torch.device("cuda")
    receipt = run_task(job, task)
    assert tried == [("cuda", task.resident), ("cuda", 0), ("cpu", 0)]
    assert receipt.device == "cpu"
    assert receipt.checksums == expected


@pytest.fixture
def device_like(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's own memory is reached as a device's is."""
    monkeypatch.setattr(factors, "CPU", "nowhere")
    monkeypatch.setattr(transfer, "PINNED_BYTES", 10_000)


@pytest.mark.parametrize("method", METHODS)
def test_the_way_to_a_device(method: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """In pieces, as stored, converted there: the same bytes, and within the projection."""
    job = make_job(tmp_path, method)
    expected = [run_task(job, task) for task in job.plan.tasks]
    request.getfixturevalue("device_like")
    for task, receipt in zip(job.plan.tasks, expected, strict=True):
        with LiveBytes() as live:
            found = run_task(job, task)
        assert replace(found, seconds=0.0) == replace(receipt, seconds=0.0)
        assert live.peak <= task.projected_bytes + PINNED_SLOTS * 10_000


def test_the_way_to_a_device_for_what_lies_transposed(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    shapes = {"up": (5000, 30, 3), "down": (30, 700, 3)}
    paths = [str(write_mlx(tmp_path / f"in{i}", pairs(shapes, seed=i), 3, 2.0)) for i in range(2)]
    job = job_of(plan(paths, method="ties", density=0.5, workers=1), paths, tmp_path)
    expected = [run_task(job, task) for task in job.plan.tasks]
    request.getfixturevalue("device_like")
    for task, receipt in zip(job.plan.tasks, expected, strict=True):
        assert replace(run_task(job, task), seconds=0.0) == replace(receipt, seconds=0.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [b"\xc0\x7f", b"\x80\x7f"])
@pytest.mark.usefixtures("device_like")
def test_what_is_not_finite_is_found_on_a_device(method: str, value: bytes, tmp_path: Path) -> None:
    """At the end, whatever it has done by then."""
    job = make_job(tmp_path, method)
    weights = tmp_path / "in2" / WEIGHTS
    data = weights.read_bytes()
    weights.write_bytes(data[:-2] + value)
    fresh = read_adapters([str(tmp_path / f"in{i}") for i in range(5)], NameTable())
    job = Job(job.plan, fresh, job.directory, job.starts)
    with pytest.raises(errors.NonFiniteError, match="in2"):
        run_serial(job, job.plan.tasks, lambda _, __: None)


def test_pinned_memory_is_used_again_when_the_device_has_taken_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the stream of that device says, which need not be the process's own."""
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: f"of {device}")
    said: list[str] = []

    class Event:
        def __init__(self, name: str) -> None:
            self.name = name

        def record(self, stream: str) -> None:
            assert stream == "of cpu"
            said.append(f"{self.name} sent")

        def synchronize(self) -> None:
            said.append(f"{self.name} awaited")

    way = Transfer(torch.device("cpu"))
    for name, slot in zip("ab", way._slots, strict=True):
        slot._taken = Event(name)
    stored = torch.arange(2 * PINNED_BYTES + 100, dtype=torch.int32).to(torch.float32)
    assert torch.equal(way.send(stored), stored)
    # Nine pieces: the ninth is a rest.
    assert said[:4] == ["a sent", "b sent", "a awaited", "a sent"]
    assert said.count("a awaited") == said.count("a sent") - 1
    assert said.count("b awaited") == said.count("b sent") - 1


def test_no_memory_anywhere_is_an_error_of_its_own(tmp_path: Path) -> None:
    job = make_job(tmp_path, "svd", layers={"wide": LAYERS["wide"]})
    (task,) = job.plan.tasks
    with FailOnce(5), pytest.raises(errors.MemoryExhaustedError, match="wide"):
        run_task(job, task)


def test_device_memory_is_planned(tmp_path: Path) -> None:
    """Less of it means fewer tiles held and the same tiles; the host holds little."""
    paths = [str(write_adapter(tmp_path / f"in{i}", LAYERS, seed=i)) for i in range(3)]
    recipe = Recipe(tuple(paths), "ties_svd", (1.0, 1.0, 1.0), density=0.2)
    manifests = read_adapters(paths, NameTable())
    budget = Budget(2048 * MIB, "test", threads=1)
    with pytest.raises(errors.BudgetError, match="cuda") as refused:
        make_plan(manifests, recipe, budget, device=Device("cuda", MIB))
    sizes = (refused.value.smallest_bytes + 6 * MIB, 4000 * MIB)
    plans = [make_plan(manifests, recipe, budget, device=Device("cuda", size)) for size in sizes]
    for made, size in zip(plans, sizes, strict=True):
        assert made.device == "cuda"
        for task in made.tasks:
            assert 0 < task.device_bytes <= size
    small, large = (made.tasks[1] for made in plans)
    assert small.resident < large.resident
    assert replace(small, resident=0, factors=0, stacked=False, device_bytes=0) == replace(
        large, resident=0, factors=0, stacked=False, device_bytes=0
    )
    on_cpu = make_plan(manifests, recipe, budget).tasks[1]
    assert large.projected_bytes < on_cpu.projected_bytes


@pytest.mark.parametrize("device", ["nonsense", "cuda:77", "meta"])
def test_a_device_that_is_not_there(device: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "in", LAYERS)
    with pytest.raises(errors.RecipeError, match="is not there"):
        streammerge.plan([adapter], device=device, max_vram="1GiB")


def test_vram_without_a_device(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "in", LAYERS)
    with pytest.raises(errors.RecipeError, match="max_vram"):
        streammerge.plan([adapter], max_vram="1GiB")


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_agrees_with_the_cpu(method: str, tmp_path: Path) -> None:
    """To rounding, through the residual where something is truncated."""
    paths = [write_adapter(tmp_path / f"in{i}", LAYERS, seed=i) for i in range(3)]
    density = 0.2 if rule_of(method).needs_density else None
    results = {
        device: streammerge.merge(
            paths, tmp_path / device, method=method, density=density, device=device
        )
        for device in ("cpu", "cuda")
    }
    for on_cpu, on_gpu in zip(results["cpu"].modules, results["cuda"].modules, strict=True):
        assert on_gpu.device == "cuda"
        if on_cpu.relative_error is not None:
            assert on_gpu.relative_error == pytest.approx(on_cpu.relative_error, rel=1e-4)


# ---------------------------------------------------------------------------------------------
# Which device


def test_auto_is_the_cpu_without_an_accelerator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    adapter = write_adapter(tmp_path / "in", LAYERS)
    made = plan([adapter], device="auto", max_vram="1GiB")
    assert made.device == "cpu"
    assert made.device_origin == "there is no accelerator"


@pytest.mark.parametrize(
    ("layers", "vram", "device", "origin"),
    [
        ({"small": linear(64, 64, 4)}, 2**30, "cpu", "s on the CPU"),
        ({"huge": linear(40_000, 30_000, 16)}, 2**34, "cuda", "s projected on cuda"),
        ({"huge": linear(40_000, 30_000, 16)}, MIB, "cpu", "cuda"),
    ],
)
def test_auto_takes_what_is_projected_to_be_faster(
    layers: dict[str, Layer],
    vram: int,
    device: str,
    origin: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the CPU where it does not fit on the device."""
    monkeypatch.setattr(worker, "find_device", lambda *_: Device("cuda", vram))
    paths = [write_adapter(tmp_path / f"in{i}", layers, seed=i) for i in range(2)]
    made = plan(paths, method="ties_svd", density=0.2, device="auto", max_memory="8GiB")
    assert made.device == device
    assert origin in made.device_origin


@pytest.mark.gpu
def test_auto_finds_the_gpu() -> None:
    found = worker.find_device("auto", None)
    assert found.name == "cuda"
    assert found.allowed_bytes > MIB
    assert set(worker.fingerprint("cuda")) == {*worker.fingerprint("cpu"), "model"}
