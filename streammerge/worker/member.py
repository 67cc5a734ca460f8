"""One of several workers that share a target: what it has of it, and what it does when asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from streammerge.kernels.each import Each
from streammerge.kernels.matrices import Stacks
from streammerge.plans import Task
from streammerge.worker.deltas import Deltas, MergedTensors
from streammerge.worker.factors import TargetSources
from streammerge.worker.job import Job
from streammerge.worker.run import watched
from streammerge.worker.sums import stacks_of
from streammerge.worker.work import Part, Work


@dataclass(frozen=True)
class Errand:
    """What a worker is asked to do for a target that it shares."""

    part: Part
    operation: Callable[..., Any]
    """What is applied to the part, a panel of it and further arguments."""
    panels: Sequence[range]
    """Ranges of the part's tiles, or groups."""


class Member:
    """A worker's share of a target: the tiles and factors that it was asked for and holds."""

    def __init__(self, job: Job, task: Task) -> None:
        """Make it; nothing is read before it is asked for."""
        self.job = job
        # The leader hashes what it reads, once for all.
        sources = TargetSources(job, task, job.device, job.window, hashed=False)
        self._work = Work(job, task, sources, job.device, map)
        self._groups: list[Stacks] | None = None

    def work_on(self, errand: Errand, args: Sequence[Any], each: Each) -> Iterator[Any]:
        """Yield operation(part, panel, *args) of every panel of an errand.

        Args:
            errand: the part, the operation and the panels.
            args: arrays stand for tensors, here and in what is returned.
            each: goes over the panels.

        Raises:
            MergeFailedError: a subclass of it says what failed.
        """
        with torch.inference_mode(), self._work.sources.checked():
            thing = self._part(errand.part)
            values = unpacked(tuple(args), self.job.device)

            def apply(panel: range) -> Any:
                return packed(errand.operation(thing, panel, *values))

            yield from watched(self.job, each)(apply, errand.panels)

    def close(self) -> None:
        """Let go of what is held."""
        if "_deltas" in vars(self):
            self._deltas.close()
        self.job.files.close()

    def _part(self, part: Part) -> Any:
        if part[0] == "stream":
            return self._deltas.stream(part[1])
        if part[0] == "variation":
            return self._deltas.tiles.variation()
        if part[0] == "tiles":
            return self._deltas.tiles
        if part[0] == "matrix":
            return self._deltas.matrix(*part[1:])
        return self._stacks(part[1])

    @cached_property
    def _deltas(self) -> MergedTensors:
        return MergedTensors(self._work, Deltas(self._work))

    def _stacks(self, coefficients: Sequence[float] | None) -> list[Stacks]:
        # They are the same in every errand of a target.
        if self._groups is None:
            self._groups = stacks_of(replace(self._work, coefficients=coefficients))
        return self._groups


def packed(value: Any) -> Any:
    """Return a value with arrays for tensors, also inside a tuple: they travel without a copy."""
    if isinstance(value, tuple):
        return tuple(map(packed, value))
    return value.cpu().numpy() if isinstance(value, torch.Tensor) else value


def unpacked(value: Any, device: torch.device) -> Any:
    """Return a value with tensors for arrays, also inside a tuple, on a device.

    They may be written to.
    """
    if isinstance(value, tuple):
        return tuple(unpacked(part, device) for part in value)
    if not isinstance(value, np.ndarray):
        return value
    return torch.from_numpy(value if value.flags.writeable else value.copy()).to(device)
