"""Merges by every method of the catalog, each at the settings that do best on validation."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import streammerge
from quality.training import Bench
from streammerge import events
from streammerge.catalog import METHODS, RULES
from streammerge.errors import RefusedError

DENSITIES = (0.2, 0.5)
ELSEWHERE = tuple((rule, space) for space in ("core", "knots") for rule in ("ties", "dare_ties"))
"""Rules that are tried in other spaces than those of their methods."""


@dataclass(frozen=True)
class Candidate:
    """A method, in its own space or another."""

    method: str
    space: str

    @property
    def is_own(self) -> bool:
        """Whether the space is the method's own."""
        return self.space == METHODS[self.method].space

    @property
    def label(self) -> str:
        """What it is called in tables, and in `--methods`."""
        return self.method if self.is_own else f"{self.method}@{self.space}"


CANDIDATES = {
    candidate.label: candidate
    for candidate in (
        *(Candidate(method.name, method.space) for method in METHODS.values()),
        *(Candidate(rule, space) for rule, space in ELSEWHERE),
    )
}


@dataclass(frozen=True)
class Setting:
    """What is picked on validation: one weight for all adapters, and a density."""

    weight: float
    density: float | None


@dataclass(frozen=True)
class Outcome:
    """What became of a candidate with one seed."""

    label: str
    refused: str | None = None
    """Why it cannot merge these adapters at all."""
    setting: Setting | None = None
    rank: int = 0
    """The largest of the output's."""
    test: tuple[float, ...] = ()
    """Accuracy in each task, with the setting."""


def weights_for(adapters: int) -> tuple[float, ...]:
    """Return the weights that every method is tried with: from the mean to the sum."""
    return (1 / adapters, 2 / adapters, 0.5, 1.0)


def settings_for(candidate: Candidate, adapters: int) -> Iterator[Setting]:
    """Yield the grid of a candidate: the same weights for all, densities where its rule has one."""
    needs = RULES[METHODS[candidate.method].rule].needs_density
    for density in DENSITIES if needs else (None,):
        for weight in dict.fromkeys(weights_for(adapters)):
            yield Setting(weight, density)


def merge(
    candidate: Candidate, setting: Setting, adapters: Sequence[Path], output: Path, seed: int
) -> Path:
    """Merge by streammerge.

    Raises:
        RefusedError: the method does not take these adapters.
    """
    streammerge.merge(
        adapters,
        output,
        method=candidate.method,
        space=None if candidate.is_own else candidate.space,
        weights=[setting.weight] * len(adapters),
        density=setting.density,
        seed=seed,
        workers=1,
        on_event=events.ignore,
    )
    return output


def best(
    candidate: Candidate,
    bench: Bench,
    adapters: Sequence[Path],
    own: Sequence[float],
    *,
    folder: Path,
    seed: int,
) -> Outcome:
    """Return how a candidate does on test with the setting that did best on validation.

    Best is the largest mean of normalised accuracies; of equals the first of the grid. `own` has
    what each adapter gets right in its own task on validation.
    """
    outcome, highest = None, -math.inf
    output = folder / "merged"
    for setting in settings_for(candidate, len(adapters)):
        try:
            merge(candidate, setting, adapters, output, seed)
        except RefusedError as error:
            return Outcome(candidate.label, refused=str(error))
        model = bench.load(output)
        found = bench.accuracies(model, "validation")
        mean = sum(a / b for a, b in zip(found, own, strict=True)) / len(own)
        if mean > highest:
            highest, test = mean, tuple(bench.accuracies(model, "test"))
            outcome = Outcome(candidate.label, None, setting, _rank(output), test)
        shutil.rmtree(output)
    assert outcome is not None  # the grid is never empty
    return outcome


def _rank(adapter: Path) -> int:
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return max([config["r"], *config["rank_pattern"].values()])
