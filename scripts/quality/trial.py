"""One seed from the data to the accuracies of every merge."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from quality.data import TASKS, load
from quality.merging import CANDIDATES, Outcome, best
from quality.training import FULL, Steps, make_bench, train_adapter

SEEDS_APART = 1000


@dataclass(frozen=True)
class Asked:
    """What is the same for every seed."""

    candidates: tuple[str, ...] = tuple(CANDIDATES)
    tasks: tuple[str, ...] = TASKS
    rank: int = 4
    same_start: bool = False
    """Whether all adapters of a seed begin from the same A's."""
    steps: Steps = FULL


@dataclass(frozen=True)
class Trial:
    """What one seed gave: accuracies on test, in the order of the tasks."""

    seed: int
    base: tuple[float, ...]
    own: tuple[float, ...]
    """Of each task's own adapter."""
    joint: tuple[float, ...]
    """Of one adapter of the same rank that was trained on all tasks."""
    outcomes: tuple[Outcome, ...]


def run(asked: Asked, seed: int) -> Trial:
    """Train a base and adapters, merge them by each candidate, and test."""
    # So that sums are added in one order, and processes beside each other do not share cores.
    torch.set_num_threads(1)
    pretraining, tasks = load(seed)
    bench = make_bench(pretraining, (tasks[name] for name in asked.tasks), seed, asked.steps)
    every = range(len(asked.tasks))
    with tempfile.TemporaryDirectory(prefix="eval-quality-") as name:
        folder = Path(name)

        def train(numbers: Sequence[int], called: str) -> Path:
            start = SEEDS_APART * seed + (0 if asked.same_start else numbers[0])
            return train_adapter(
                bench,
                numbers,
                folder / called,
                rank=asked.rank,
                seed=start,
                steps=asked.steps.adapter,
            )

        adapters = [train([number], asked.tasks[number]) for number in every]
        joint = bench.accuracies(bench.load(train(every, "joint")), "test")
        validated, own = (
            [bench.accuracies(bench.load(adapters[number]), part)[number] for number in every]
            for part in ("validation", "test")
        )
        outcomes = tuple(
            best(CANDIDATES[label], bench, adapters, validated, folder=folder, seed=seed)
            for label in asked.candidates
        )
    base = bench.accuracies(bench.base, "test")
    return Trial(seed, tuple(base), tuple(own), tuple(joint), outcomes)
