"""Targets as a grid: kinds of modules down, layers across."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MAX_KINDS = 32
MAX_COLUMNS = 160

OTHER = "other modules"
OUTSIDE = "–"
"""The column of what lies in no layer."""

_LAYER = re.compile(r"(?P<stack>.*?)\.(?P<layer>\d{1,9})(\.(?P<rest>.*))?$", re.DOTALL)
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Grid:
    """Where each target stands; several may share a place."""

    kinds: tuple[str, ...]
    columns: tuple[str, ...]
    places: Mapping[str, tuple[int, int]]

    def mean(self, values: Mapping[str, float | None]) -> npt.NDArray[np.float64]:
        """Return kinds × columns means of what the targets have; NaN where none has anything."""
        total, count = (np.zeros((len(self.kinds), len(self.columns))) for _ in range(2))
        for target, value in values.items():
            if value is not None and np.isfinite(value):
                total[self.places[target]] += value
                count[self.places[target]] += 1
        with np.errstate(invalid="ignore"):
            return np.asarray(total / count)


def make_grid(targets: Sequence[str]) -> Grid:
    """Return the grid of these targets.

    More than MAX_KINDS kinds: the rarest are one. More than MAX_COLUMNS layers: neighbours share a
    column.
    """
    found = {target: _split(target) for target in targets}
    stacks = {stack for stack, layer, _ in found.values() if layer is not None}
    named = {
        target: f"{stack.rsplit('.', 1)[-1]}: {kind}" if len(stacks) > 1 and stack else kind
        for target, (stack, _, kind) in found.items()
    }
    kinds = _kinds(list(named.values()))
    layers = sorted({layer for _, layer, _ in found.values() if layer is not None})
    step = -(-len(layers) // MAX_COLUMNS) or 1
    column = {layer: place // step for place, layer in enumerate(layers)}
    labels = [_span(layers[start : start + step]) for start in range(0, len(layers), step)]
    outside = any(layer is None for _, layer, _ in found.values())
    row = {kind: place for place, kind in enumerate(kinds)}
    return Grid(
        tuple(kinds),
        (*labels, *([OUTSIDE] if outside else [])),
        {
            target: (
                row.get(named[target], len(kinds) - 1),
                len(labels) if layer is None else column[layer],
            )
            for target, (_, layer, _) in found.items()
        },
    )


def _split(target: str) -> tuple[str, int | None, str]:
    """Return a target's stack, layer and kind; numbers below the layer (experts) are one kind."""
    place = _LAYER.match(target)
    if place is None:
        return "", None, target
    kind = _NUMBER.sub("*", "." + (place["rest"] or "itself"))[1:]
    return place["stack"], int(place["layer"]), kind


def _kinds(names: Sequence[str]) -> list[str]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    if len(counts) <= MAX_KINDS:
        return sorted(counts)
    common = sorted(counts, key=lambda name: (-counts[name], name))[: MAX_KINDS - 1]
    return [*sorted(common), OTHER]


def _span(layers: Sequence[int]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}–{layers[-1]}"
