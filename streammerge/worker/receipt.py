"""What a finished task leaves behind: checksums and figures, never tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from streammerge.plans import Task, at_rank


@dataclass(frozen=True)
class Certificate:
    """How good a truncated pair is, for the tensors as written. Estimates; see docs."""

    kept_energy: float
    """Share of the merged matrix's energy ‖M‖²_F that the pair keeps."""
    relative_error: float
    """‖M - B·A‖_F / ‖M‖_F."""
    excess: float
    """How far that is above the best possible of the rank, relatively."""
    converged: bool
    passes: int
    rank: int
    """Of the pair."""
    reached: bool = True
    """Whether that keeps what the recipe's rank policy asks for."""
    directions: tuple[int, ...] = ()
    """Of the bases in which the rule saw coordinates, of columns and perhaps of rows."""
    gap: float | None = None
    """The smallest relative distance of neighbouring singular values of these bases."""


@dataclass(frozen=True)
class Receipt:
    """What a finished task leaves behind."""

    target: str
    checksums: tuple[str, ...]
    """xxh3-128 of its regions, A's and B's."""
    inputs: tuple[str, ...]
    """xxh3-128 of each source's target, scaling, A and B, the two as stored."""
    certificate: Certificate | None
    device: str
    """Where it was computed, which decides the rounding: "cpu", "cuda", …"""
    seconds: float
    unsettled: float = 0.0
    """How far the last step went of an iteration for the bases, or for the coefficients, that has
    used up its steps, as an angle; 0 where it has settled, or nothing is iterated."""

    def done(self, task: Task) -> Task:
        """Return the task that this is of, with the rank that its pair has turned out to have."""
        return task if self.certificate is None else at_rank(task, self.certificate.rank)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it; `from_dict` takes it back."""
        certificate = None if self.certificate is None else vars(self.certificate)
        return {**vars(self), "certificate": certificate}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Receipt:
        """Return the receipt that `to_dict` gave."""
        certificate = fields["certificate"]
        made = {
            "checksums": tuple(fields["checksums"]),
            "inputs": tuple(fields["inputs"]),
            "certificate": None if certificate is None else _certificate(certificate),
        }
        return cls(**{**fields, **made})


def _certificate(fields: dict[str, Any]) -> Certificate:
    return Certificate(**{**fields, "directions": tuple(fields["directions"])})
