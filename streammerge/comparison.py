"""What a comparison of methods found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from streammerge.notebook import card


@dataclass(frozen=True)
class ComparedModule:
    """What one method makes of one module; NaN of adapters that do not have it, or are zero."""

    target: str
    """The module's path."""
    rank: int
    """Of the pair."""
    route: str
    """How it was computed, as `streammerge.plans.Route` names it."""
    distances: tuple[float, ...]
    """‖M - Δ_i‖/‖Δ_i‖ of each adapter: M the pair as it would be written, Δ_i its delta."""
    interference: tuple[float, ...]
    """‖(M - Δ_i)·P_i‖/‖Δ_i‖ of each adapter: P_i projects onto the row space of A_i."""
    norm: float
    """‖M‖_F."""
    relative_error: float | None
    """‖M' - M‖/‖M'‖, M' what the rule makes before the cut; None where nothing is cut."""
    settled: bool
    """False where the iteration for the bases (`ctm`), or for the weights of the deltas
    (`karcher`), used up its steps before it came to rest."""
    last_step: float | None
    """How far its last step went then: of bases the norm of the sines of the angles, of weights an
    angle; None where it came to rest, or where nothing was iterated."""
    seconds: float
    """On one core."""


@dataclass(frozen=True)
class ComparedMethod:
    """What one method makes of the sample, all modules as one vector."""

    method: str
    """As it was asked for."""
    rule: str
    space: str
    distances: tuple[float, ...]
    """√Σ‖M - Δ_i‖² / √Σ‖Δ_i‖² of each adapter, over the modules that it has: 0 if the merge is the
    adapter, 1 if it has nothing of it."""
    interference: tuple[float, ...]
    """The same of (M - Δ_i)·P_i: of the distance, what acts on the directions in which the adapter
    reads its input."""
    norm: float
    """√Σ‖M‖²."""
    relative_error: float | None
    """Mean over the modules that are cut to a rank; None where none is."""
    seconds: float
    """Mean of a module, on one core, without reading it."""
    projected_bytes: int
    """The most that one of the modules was planned to hold, with what the comparison holds."""
    modules: tuple[ComparedModule, ...]
    """Each by itself, in the order of `Comparison.targets`."""


@dataclass(frozen=True)
class NotCompared:
    """A method that could not be done."""

    method: str
    why: str


@dataclass(frozen=True, repr=False)
class Comparison:
    """Methods, side by side."""

    adapters: tuple[str, ...]
    """As they were given; the order of all figures that there is one of for each adapter."""
    norms: tuple[float, ...]
    """√Σ‖Δ_i‖² of each adapter over the sample; NaN of one that has none of the modules."""
    targets: tuple[str, ...]
    """The modules of the sample."""
    of: int
    """How many modules there are."""
    methods: tuple[ComparedMethod, ...]
    """In the order that they were asked for."""
    refused: tuple[NotCompared, ...]
    """Those that could not be done."""
    read_bytes: int
    """Of factors: each of the sample once."""
    allowed_bytes: int
    """What the process was allowed to hold."""
    notices: tuple[str, ...] = ()
    """What the user should know and what stops nothing."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it; what is no number is null."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    def __repr__(self) -> str:
        names = ", ".join(one.method for one in self.methods)
        return (
            f"Comparison({names}: {len(self.adapters)} adapters, {len(self.targets)} of {self.of} "
            f"modules)"
        )

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the adapters, and a row for each method."""
        facts = [
            ("modules", f"{len(self.targets):,} of {self.of:,}"),
            *(
                (adapter, f"norm {norm:.4g}")
                for adapter, norm in zip(self.adapters, self.norms, strict=True)
            ),
            *((f"not {one.method}", one.why) for one in self.refused),
        ]
        header = ("method", "distance", "interference", "cut", "norm", "seconds a module")
        rows = [
            (
                one.method,
                f"{mean(one.distances):.3f}",
                f"{mean(one.interference):.3f}",
                "–" if one.relative_error is None else f"{one.relative_error:.3f}",
                f"{one.norm:.4g}",
                f"{one.seconds:.3g}",
            )
            for one in self.methods
        ]
        return card("Comparison", facts, header, rows, more=0, of="methods")


def mean(values: Sequence[float]) -> float:
    """Return the mean of those that are numbers; NaN where none is."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
