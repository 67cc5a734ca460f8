"""One target on its way through a route."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from streammerge.allocator import give_back
from streammerge.draw import stream_key
from streammerge.kernels.each import Each, Here, Over
from streammerge.kernels.thresholds import Quota
from streammerge.kernels.tiles import RuleOptions
from streammerge.plans import Task
from streammerge.spaces.exact import stack_weights
from streammerge.worker.encode import Sink
from streammerge.worker.factors import TargetSources
from streammerge.worker.job import Job

LARGE_BYTES = 32 * 1024**2
"""Targets that are planned with more give memory back between their phases."""

Part = tuple[Any, ...]
"""What of a target is meant: ("stream", i), the tiles of delta i; ("variation",), the variance over
the deltas; ("tiles",), those of all deltas; ("matrix", thresholds, selection), the merged matrix;
("groups", coefficients), the stacks of the sources."""


class Team(Protocol):
    """Several workers that share a target, each with some of its panels."""

    def over(self, part: Part, count: int) -> Over:
        """Return the panels of a part that has so many tiles, or groups."""

    def part(self) -> None:
        """Have all of them let go of the target."""


@dataclass(frozen=True)
class Writers:
    """Where a target's pair goes."""

    a: Sink
    b: Sink


@dataclass(frozen=True)
class Work:
    """One target on its way through a route."""

    job: Job
    task: Task
    sources: TargetSources
    device: torch.device
    each: Each
    """Goes over parts of the target, several at once where the task has the cores."""
    team: Team | None = None
    """Who has the panels, where several workers share the target."""
    coefficients: Sequence[float] | None = None
    """What each delta is multiplied by, where that is not its weight."""
    unsettled: float = 0.0
    """How far the last step went of an iteration for these that has used up its steps."""

    def over(self, part: Part, here: Callable[[], Any], count: int) -> Over:
        """Return the panels of a part of the target, wherever they are.

        Args:
            part: which one.
            here: returns it, if it is to be worked on in this process.
            count: its tiles, or groups.
        """
        if self.team is not None:
            return self.team.over(part, count)
        return Here(here(), count, self.each)

    def quotas(self, tensor: int) -> Sequence[Sequence[Quota]] | None:
        """Return what each source keeps of a tensor; None where each tensor is cut on its own.

        Args:
            tensor: 0 for A, or for all that a rule sees of the target; 1 for B.
        """
        if self.job.plan.census is None:
            return None
        assert self.job.cuts is not None, "thresholds over whole adapters are found before"
        return self.job.cuts.quotas(self.task.target, self.sources.positions, tensor)

    def end_phase(self) -> None:
        """Give back what a phase has left in the heap, before the next one takes its own.

        A task is projected at the larger of two phases where both hold large blocks; the small ones
        of the first would stay beside those of the second. What small targets leave was
        measured to lie within their slack, and giving it back takes longer than it is worth.
        """
        if self.task.projected_bytes > LARGE_BYTES:
            give_back()

    @property
    def weights(self) -> Sequence[float]:
        """What each delta is multiplied by."""
        return self.sources.weights if self.coefficients is None else self.coefficients

    @property
    def options(self) -> RuleOptions:
        """The element-wise rule and what it needs: a sum, where coefficients were found."""
        options = self.job.options
        return options if self.coefficients is None else replace(options, rule="linear")

    @property
    def stack_weights(self) -> list[float]:
        """Each source's q = weight·scaling, or coefficient·scaling."""
        return stack_weights(self.weights, self.sources.scalings)

    def gaussian(self, purpose: str, columns: int, rows: int | None = None) -> torch.Tensor:
        """Return an n × columns Gaussian matrix, drawn on the CPU so that all devices have it.

        Args:
            purpose: another one is drawn for each.
            columns: of it.
            rows: of it, where they are not n.
        """
        seed = stream_key(int(self.job.plan.recipe["seed"]), 0, self.task.target, purpose)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(
            self.task.n if rows is None else rows,
            columns,
            generator=generator,
            dtype=self.job.dtype,
        )
        return drawn.to(self.device)
