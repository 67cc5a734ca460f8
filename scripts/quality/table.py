"""Accuracies over seeds as markdown tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from scipy import stats

from quality.merging import Outcome, Setting
from quality.trial import Trial

SURE = 0.05
"""Below this p-value two rows are told apart."""

BEGINS, ENDS = "<!-- eval-quality begins -->", "<!-- eval-quality ends -->"

Figures = Sequence[Sequence[float]]
"""For each seed a figure for each task."""


@dataclass(frozen=True)
class Row:
    """A method over all seeds."""

    label: str
    rank: int
    settings: tuple[Setting, ...]
    shares: Figures
    """Accuracies over those of the tasks' own adapters."""

    @property
    def averages(self) -> list[float]:
        """Over the tasks, for each seed."""
        return [mean(seed) for seed in self.shares]


def report(tasks: Sequence[str], trials: Sequence[Trial]) -> str:
    """Return both tables, and what could not be merged."""
    parts = [
        f"Accuracy in percent, mean ± standard deviation, {len(trials)} seeds:",
        _absolute(tasks, trials),
        "Normalised accuracy of merges, in percent of what the task's own adapter gets right:",
        _normalised(tasks, trials),
        *(f"{label}: refused: {why}" for label, why in refusals(trials)),
    ]
    return "\n\n".join(parts)


def put_into(page: str, tables: str) -> str:
    """Return a page with the tables between its two marks, instead of what stands there.

    Raises:
        ValueError: the page does not have each mark once.
    """
    before, begins, rest = page.partition(BEGINS)
    _, ends, after = rest.partition(ENDS)
    if not begins or not ends or BEGINS in rest or ENDS in after:
        raise ValueError(f"the page needs {BEGINS} and {ENDS}, once each")
    return f"{before}{BEGINS}\n\n{tables}\n\n{ENDS}{after}"


def normalise(accuracies: Sequence[float], own: Sequence[float]) -> tuple[float, ...]:
    """Return each accuracy as a share of what the task's own adapter gets right."""
    return tuple(a / b for a, b in zip(accuracies, own, strict=True))


def rows(trials: Sequence[Trial]) -> list[Row]:
    """Return the methods that merged with every seed, the best average first."""
    found = []
    for outcomes in zip(*(trial.outcomes for trial in trials), strict=True):
        settings = tuple(outcome.setting for outcome in outcomes if outcome.setting is not None)
        if len(settings) == len(trials):
            shares = _shares(outcomes, trials)
            rank = max(outcome.rank for outcome in outcomes)
            found.append(Row(outcomes[0].label, rank, settings, shares))
    return sorted(found, key=lambda row: -mean(row.averages))


def refusals(trials: Sequence[Trial]) -> list[tuple[str, str]]:
    """Return each method that was refused, with the first reason."""
    found: dict[str, str] = {}
    for trial in trials:
        for outcome in trial.outcomes:
            if outcome.refused is not None:
                found.setdefault(outcome.label, outcome.refused)
    return list(found.items())


def told_apart(one: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether a paired t-test over seeds tells two rows' averages apart.

    Seeds share base, adapters and examples between methods, so differences are taken seed by
    seed. With one seed nothing is told apart.
    """
    differences = [a - b for a, b in zip(one, other, strict=True)]
    count = len(differences)
    if count < 2:
        return False
    farthest = stats.t.ppf(1 - SURE / 2, count - 1) * stdev(differences) / math.sqrt(count)
    return bool(abs(mean(differences)) > farthest)


def _shares(outcomes: Iterable[Outcome], trials: Sequence[Trial]) -> Figures:
    return [
        normalise(outcome.test, trial.own) for outcome, trial in zip(outcomes, trials, strict=True)
    ]


def _absolute(tasks: Sequence[str], trials: Sequence[Trial]) -> str:
    heads = ["model", *tasks, "average"]
    named = (
        ("the base model", [trial.base for trial in trials]),
        ("the task's own adapter", [trial.own for trial in trials]),
        ("one adapter, trained on all", [trial.joint for trial in trials]),
    )
    return _table(heads, ([name, *_cells(figures)] for name, figures in named))


def _normalised(tasks: Sequence[str], trials: Sequence[Trial]) -> str:
    """Return the methods' table; ≈ marks those that are not told apart from the best of a rank."""
    heads = ["method", "rank", "weight", "density", *tasks, "average", ""]
    methods = rows(trials)
    rank = min((row.rank for row in methods), default=0)
    best = next((row for row in methods if row.rank == rank), None)
    lines = []
    for row in methods:
        equal = (
            best is not None and row.rank == rank and not told_apart(row.averages, best.averages)
        )
        weights = _span(setting.weight for setting in row.settings)
        densities = _span(s.density for s in row.settings if s.density is not None)
        mark = "≈" if equal else ""
        lines.append(
            [f"`{row.label}`", str(row.rank), weights, densities, *_cells(row.shares), mark]
        )
    for name, figures in (
        ("one adapter, trained on all", [normalise(trial.joint, trial.own) for trial in trials]),
        ("the base model", [normalise(trial.base, trial.own) for trial in trials]),
    ):
        lines.append([name, "", "", "", *_cells(figures), ""])
    return _table(heads, lines)


def _cells(figures: Figures) -> list[str]:
    """Return a cell for each task, and one for the average over tasks."""
    return [_spread(task) for task in zip(*figures, strict=True)] + [
        _spread([mean(seed) for seed in figures])
    ]


def _spread(values: Sequence[float]) -> str:
    """Return mean ± standard deviation, in percent; the mean alone of one value."""
    percent = [100 * value for value in values]
    if len(percent) == 1:
        return f"{percent[0]:.1f}"
    return f"{mean(percent):.1f} ± {stdev(percent):.1f}"


def _span(values: Iterable[float]) -> str:
    """Return what was picked over the seeds: one value, or the smallest and the largest."""
    picked = sorted({f"{value:.2g}" for value in values}, key=float)
    return picked[0] if len(picked) == 1 else "–".join([*picked[:1], *picked[1:][-1:]])


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *body])
