"""Six tasks on real data that scikit-learn ships, each as pictures of 8 × 8 with labels.

Three have pictures of digits that no base model was pretrained on, changed in one way each: what
fits one way does not fit another. Three are tables, drawn as pictures: one block for each feature,
the brighter the larger.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn import datasets
from sklearn.model_selection import train_test_split

SIDE = 8
PRETRAINING = 0.33
"""Share of the digits that the base model is pretrained on, upright. No task has them."""
TRAINING = 0.4
"""Share of a task's examples that its adapter is trained on."""
VALIDATION = 0.24
"""Share on which a merge's settings are picked; it is tested on the rest."""
LARGEST = 2.5
"""Standard deviations of a feature that are drawn as full brightness."""

Pictures = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Examples:
    """Pictures with labels."""

    pictures: torch.Tensor
    """n × 8 × 8, float32, from -1 to 1."""
    labels: torch.Tensor
    """n, int64, from 0 on."""


@dataclass(frozen=True)
class Task:
    """One task, its examples split three ways."""

    name: str
    classes: int
    training: Examples
    validation: Examples
    test: Examples


CHANGES: dict[str, Callable[[Pictures], Pictures]] = {
    "turned": lambda pictures: np.rot90(pictures, axes=(1, 2)),
    "mirrored": lambda pictures: pictures[:, :, ::-1],
    "inverted": lambda pictures: -pictures,
}
"""What is done to the digits, by the task's name."""

TABLES: dict[str, tuple[Callable[[], datasets.Bunch], tuple[int, int]]] = {
    "cancer": (datasets.load_breast_cancer, (8, 4)),
    "wine": (datasets.load_wine, (4, 4)),
    "iris": (datasets.load_iris, (2, 2)),
}
"""The data, and the grid of blocks that holds one for each feature."""

TASKS = (*CHANGES, *TABLES)


def load(seed: int) -> tuple[Examples, dict[str, Task]]:
    """Return the examples for pretraining, and the tasks by their names.

    The seed decides how the data are split. The digits are split once for all tasks: a picture
    that is tested on in one is not trained on in another.
    """
    digits = datasets.load_digits()
    pictures, labels = digits.images / 8 - 1, digits.target
    base, rest = train_test_split(
        np.arange(len(labels)), train_size=PRETRAINING, stratify=labels, random_state=seed
    )
    tasks = {
        name: _split(name, change(pictures[rest]), labels[rest], seed)
        for name, change in CHANGES.items()
    }
    for name, (read, grid) in TABLES.items():
        table = read()
        tasks[name] = _split(name, draw(table.data, grid), table.target, seed)
    return _examples(pictures[base], labels[base]), tasks


def draw(table: NDArray[np.float64], grid: tuple[int, int]) -> Pictures:
    """Return a table's rows as pictures, a block of one brightness for each feature.

    Features are brought to mean 0 and deviation 1 over the whole table, without a look at labels.
    Blocks of the grid without a feature are grey.
    """
    standard = (table - table.mean(axis=0)) / table.std(axis=0)
    bright = np.clip(standard / LARGEST, -1, 1)
    rows, columns = grid
    blocks = np.zeros((len(table), rows * columns))
    blocks[:, : table.shape[1]] = bright
    block = np.ones((SIDE // rows, SIDE // columns))
    return np.stack([np.kron(each.reshape(grid), block) for each in blocks])


def _split(name: str, pictures: Pictures, labels: Labels, seed: int) -> Task:
    everything = np.arange(len(labels))
    training, rest = train_test_split(
        everything, train_size=TRAINING, stratify=labels, random_state=seed
    )
    share = VALIDATION / (1 - TRAINING)
    validation, test = train_test_split(
        rest, train_size=share, stratify=labels[rest], random_state=seed
    )
    parts = (_examples(pictures[part], labels[part]) for part in (training, validation, test))
    return Task(name, int(labels.max()) + 1, *parts)


def _examples(pictures: Pictures, labels: Labels) -> Examples:
    return Examples(
        torch.tensor(np.ascontiguousarray(pictures), dtype=torch.float32),
        torch.tensor(labels, dtype=torch.int64),
    )
