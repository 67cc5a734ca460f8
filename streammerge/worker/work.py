"""One target on its way through a route."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from streammerge.draw import stream_key
from streammerge.kernels.each import Each
from streammerge.output.writer import RegionWriter
from streammerge.plans import Task
from streammerge.spaces.exact import stack_weights
from streammerge.worker.factors import TargetSources
from streammerge.worker.job import Job


@dataclass(frozen=True)
class Work:
    """One target on its way through a route."""

    job: Job
    task: Task
    sources: TargetSources
    device: torch.device
    a: RegionWriter
    b: RegionWriter
    each: Each
    """Goes over parts of the target, several at once where the task has the cores."""

    @property
    def stack_weights(self) -> list[float]:
        """Each source's q = weight·scaling."""
        return stack_weights(self.sources.weights, self.sources.scalings)

    def gaussian(self, purpose: str, columns: int) -> torch.Tensor:
        """Return an n × columns Gaussian matrix, drawn on the CPU so that all devices have it."""
        seed = stream_key(int(self.job.plan.recipe["seed"]), 0, self.task.target, purpose)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(self.task.n, columns, generator=generator, dtype=self.job.dtype)
        return drawn.to(self.device)
