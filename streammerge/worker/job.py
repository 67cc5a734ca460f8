"""What a worker needs to run tasks of a plan, and how it sets up its process."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from streammerge.adapter import Adapter, TensorFile
from streammerge.allocator import give_back, steady_allocator
from streammerge.budget import AUTO, CPU, HEADROOM, Device, resident_bytes, round_process
from streammerge.errors import RecipeError
from streammerge.hub import Ranges, Span
from streammerge.kernels.bases import left_basis
from streammerge.kernels.census import Cuts
from streammerge.kernels.tiles import RuleOptions
from streammerge.output.writer import RegionWriter
from streammerge.plans import Plan, Region
from streammerge.ranks import RankPolicy
from streammerge.readers.windows import Bytes, OpenFiles, mapped, pread
from streammerge.recipe import make_rank
from streammerge.rules import load_rule
from streammerge.spaces.bases import coordinates

LEASE_SECONDS = 1.0
"""How often it is looked whether the run goes on."""


class TaskStoppedError(Exception):
    """A task was ended because the run is over, for a failure elsewhere or for want of time."""


class Job:
    """Everything that a worker needs to run tasks of a plan."""

    def __init__(
        self,
        plan: Plan,
        adapters: Sequence[Adapter] | Mapping[int, Adapter],
        directory: Path,
        starts: Sequence[int],
        deadline: float = math.inf,
        *,
        lease: Path | None = None,
        cuts: Cuts | None = None,
    ) -> None:
        """Set it up.

        Args:
            plan: what is to be done.
            adapters: the manifests that it was made from, by their positions.
            directory: of the output's files.
            starts: where each output file's data begin.
            deadline: when the run is over, on the clock of `time.monotonic`.
            lease: a file; when it is gone, the run is over.
            cuts: thresholds over whole adapters, where they are known already.
        """
        self.cuts = cuts
        """Thresholds over whole adapters, where the plan has such, from the census on."""
        self.plan = plan
        self.adapters = adapters
        self.directory = directory
        self.starts = starts
        self.device = torch.device(plan.device)
        self.files = OpenFiles()
        self._ranges = Ranges()
        self.stopped = threading.Event()
        """Set when the run is over for all: tasks end at their next tile."""
        self._deadline = deadline
        self._lease = lease
        self._looked = time.monotonic()
        self._window = {"mmap": mapped, "pread": pread}[plan.io](self.files)
        recipe = plan.recipe
        self.dtype: torch.dtype = getattr(torch, recipe["compute_dtype"])
        self.output_dtype: torch.dtype = getattr(torch, plan.dtype)
        self.options = RuleOptions(plan.rule, recipe["majority_sign"], plan.parameters)
        rank = make_rank(recipe["rank"])
        self.policy = rank if isinstance(rank, RankPolicy) else None
        """What decides the rank of each target, where that is not known before."""

    def window(self, file: TensorFile, offset: int, nbytes: int) -> Bytes:
        """Return stored bytes of an input.

        Raises:
            TaskStoppedError: the run is over.
        """
        self.check()
        if file.etag is not None:
            return self.fetch([Span(file, offset, nbytes)])[0]
        return self._window(file, offset, nbytes)

    def fetch(self, spans: Sequence[Span]) -> list[Bytes]:
        """Return bytes of files on the Hub, read by ranges, several at once.

        Raises:
            TaskStoppedError: the run is over.
            MergeFailedError: they cannot be had, or are others than those that were planned with.
        """
        return self._ranges.fetch(spans, self.check)

    def check(self) -> None:
        """Go on only while the run does.

        Raises:
            TaskStoppedError: the run is over.
        """
        if self.stopped.is_set():
            raise TaskStoppedError
        self.check_time()
        if self._lease is not None and time.monotonic() - self._looked > LEASE_SECONDS:
            self._looked = time.monotonic()
            if not self._lease.exists():
                self.stopped.set()
                raise TaskStoppedError

    def check_time(self) -> None:
        """Go on only while there is time; also after the tasks.

        Raises:
            TaskStoppedError: the time is over.
        """
        if time.monotonic() > self._deadline:
            raise TaskStoppedError

    def writer(self, region: Region) -> RegionWriter:
        """Return the writer of a region."""
        path = self.directory / self.plan.files[region.file].name
        return RegionWriter(path, self.starts[region.file], region)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Let torch use one thread for each operation, as long as the block lasts.

    Results must not depend on how many threads share an operation; cores are used by tasks.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fingerprint(device: str) -> dict[str, str]:
    """Return what decides the rounding of results on this machine."""
    build = torch.__config__.show()
    blas = next((line.strip(" -") for line in build.splitlines() if "Math Kernel" in line), "other")
    return {
        "torch": torch.__version__,
        "blas": blas,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": torch.device(device).type,
        **_model(torch.device(device)),
    }


def _model(device: torch.device) -> dict[str, str]:
    """Return which model a device is, for those of one kind round apart; nothing of the CPU."""
    if device.type == CPU:
        return {}
    name = getattr(torch.get_device_module(device), "get_device_name", None)
    return {"model": str(name(device)) if name else "unknown"}


def find_device(name: str, max_vram: int | None) -> Device:
    """Return the device of this name, and how much of its memory tasks may take.

    Args:
        name: as torch spells it; "auto" for the accelerator, or the CPU where there is none.
        max_vram: in bytes; what is free on the device, with headroom, when None.

    Raises:
        RecipeError: there is no such device, or its free memory is not known and was not given.
    """
    if name == AUTO:
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is None or not torch.accelerator.is_available():
            return Device()
        return find_device(accelerator.type, max_vram)
    try:
        device = torch.device(name)
        if device.type != CPU:
            torch.ones(1, device=device).item()  # meta tensors have no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RecipeError(f"device {name!r} is not there: {error}", option="device") from error
    if device.type == CPU:
        if max_vram is not None:
            raise RecipeError("max_vram goes with a device other than the CPU", option="max_vram")
        return Device()
    if max_vram is None:
        try:
            free, _ = torch.get_device_module(device).mem_get_info(device)
        except (AttributeError, RuntimeError) as error:  # there is no such call, or it is refused
            raise RecipeError(
                f"say how much of {name} may be used ({error})", option="max_vram"
            ) from error
        max_vram = int(free * HEADROOM)
    return Device(name, max_vram)


def measure_process(*rules: str) -> int:
    """Load and warm up what tasks use, and return what is reserved for the process then.

    BLAS and LAPACK allocate buffers of their own at their first calls, and what brings one of the
    rules from outside may load libraries of its own.

    Raises:
        RecipeError: a rule's function cannot be loaded.
    """
    for rule in rules:
        load_rule(rule)
    warm_up()
    give_back()
    return round_process(resident_bytes())


def rule_problem(rule: str) -> str | None:
    """Return why a rule cannot be used here; None if it can."""
    try:
        load_rule(rule)
    except RecipeError as error:
        return str(error)
    return None


@cache
def warm_up() -> None:
    """Set up the process for tasks and make the first calls, once."""
    steady_allocator()
    with one_thread_each():
        matrix = torch.ones(256, 256)
        torch.linalg.qr(matrix)
        # From so many rows on the buffers of a product do not grow any more.
        torch.ones(4096, 256, dtype=torch.float64) @ matrix.double()
        for values in (matrix @ matrix, matrix.double()):
            torch.linalg.svd(values)
        # What a basis takes is called by no other route: 5 MiB of code at the first call.
        basis, _ = left_basis(torch.eye(64), [64], None, map)
        coordinates(basis.vectors, torch.eye(64))
