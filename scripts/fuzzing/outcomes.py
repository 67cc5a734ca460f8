"""What is seen of fuzzed merges: comparisons, what could not be compared and why, and failures."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from fuzzing.recipes import Case, Held
from oracle.restated import Source
from streammerge.catalog import RULES

EXACT, FOUND, ELEMENTS, TRUNCATED, CLAMPED, CHOSEN, UNDECIDED = (
    "exact",
    "found weights",
    "elements",
    "truncated",
    "clamped",
    "ranks chosen",
    "undecided",
)

ROUNDING = {"float32": 1e-5, "float64": 1e-11}
"""Of the arithmetic, relative to the largest terms: elements as tests compare them."""
RESIDUAL = 1e-4
"""How far a truncation may be from the best one, relatively."""
OUTPUT_ROUNDING = {"float64": 0.0, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SUBNORMAL = {"float64": 0.0, "float32": 1e-38, "float16": 6e-8, "bfloat16": 1e-38}


@dataclass
class Found:
    """What was seen so far."""

    merges: int = 0
    targets: Counter[str] = field(default_factory=Counter)
    routes: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    undecided: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Of each kind of rule and space why targets could not be compared."""
    kinds: Counter[tuple[str, bool]] = field(default_factory=Counter)
    """Of each kind of rule and space, what was compared, and what could not be."""
    worst: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Of each way of comparing the largest share of its tolerance, and the case."""
    failures: list[str] = field(default_factory=list)

    def share_undecided(self, kind: str) -> float:
        """How much of a kind could not be compared."""
        return self.kinds[kind, False] / max(1, self.kinds[kind, False] + self.kinds[kind, True])


@dataclass(frozen=True)
class Judged:
    """A case that was merged, and where what is seen of it is entered."""

    case: Case
    number: int
    dtype: str
    """Of the output."""
    iterated: frozenset[str]
    """Targets of which the plan allows an iteration on the factors."""
    found: Found

    def compare(self, way: str, share: float) -> None:
        """Enter a comparison."""
        self.found.targets[way] += 1
        self.found.kinds[kind_of(self.case), True] += 1
        if not share <= self.found.worst.get(way, (-1.0, 0))[0]:
            self.found.worst[way] = share, self.number

    def leave(self, why: str) -> None:
        """Enter what has no one right answer, by rounding that decides."""
        self.found.targets[UNDECIDED] += 1
        self.found.kinds[kind_of(self.case), False] += 1
        self.found.undecided[kind_of(self.case), why] += 1


def kind_of(case: Case) -> str:
    """By what undecided shares are told apart."""
    if RULES[case.rule].kind == "spectral":
        return case.rule
    kind = f"{RULES[case.rule].kind}@{case.space}"
    return f"{kind}, global" if is_global(case) else kind


def is_global(case: Case) -> bool:
    """Whether there is one threshold for all of an adapter's tensors."""
    return bool(case.options.get("threshold_scope") == "global")


@dataclass(frozen=True)
class Present:
    """A target's sources with their positions and weights."""

    target: str
    positions: tuple[int, ...]
    held: tuple[Held, ...]
    sources: tuple[Source, ...]
    weights: tuple[float, ...]

    @property
    def scale(self) -> float:
        """Of the merged matrix: the sum of its terms' norms."""
        return sum(
            abs(w) * float(np.linalg.norm(s.delta))
            for w, s in zip(self.weights, self.sources, strict=True)
        )


def targets_of(case: Case) -> dict[str, Present]:
    """All targets with those that have them, in the order of their names."""
    found = {}
    for target in sorted({name for adapter in case.adapters for name in adapter.layers}):
        there = [(i, a) for i, a in enumerate(case.adapters) if target in a.layers]
        found[target] = Present(
            target,
            tuple(i for i, _ in there),
            tuple(adapter for _, adapter in there),
            tuple(adapter.source(target) for _, adapter in there),
            tuple(case.options["weights"][i] for i, _ in there),
        )
    return found
