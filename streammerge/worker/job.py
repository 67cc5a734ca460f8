"""What a worker needs to run tasks of a plan, and how it sets up its process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from streammerge.adapter import Adapter
from streammerge.kernels.tiles import RuleOptions
from streammerge.output.writer import RegionWriter
from streammerge.plans import Plan, Region
from streammerge.readers.mapped import MappedFiles


class Job:
    """Everything that a worker needs to run tasks of a plan."""

    def __init__(
        self, plan: Plan, adapters: Sequence[Adapter], directory: Path, starts: Sequence[int]
    ) -> None:
        self.plan = plan
        self.adapters = adapters
        self.directory = directory
        self.starts = starts
        """Where each output file's data begin."""
        self.files = MappedFiles()
        recipe = plan.recipe
        self.dtype: torch.dtype = getattr(torch, recipe["compute_dtype"])
        self.output_dtype: torch.dtype = getattr(torch, plan.dtype)
        density = recipe["density"]
        self.options = RuleOptions(
            plan.rule, 1.0 if density is None else float(density), recipe["majority_sign"]
        )

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


def fingerprint() -> dict[str, str]:
    """Return what decides the rounding of results on this machine."""
    build = torch.__config__.show()
    blas = next((line.strip(" -") for line in build.splitlines() if "Math Kernel" in line), "other")
    return {
        "torch": torch.__version__,
        "blas": blas,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": "cpu",
    }
