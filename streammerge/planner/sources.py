"""What takes part in each target, and with which scaling, weight and density."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from streammerge.errors import RecipeError
from streammerge.planner.align import Alignment
from streammerge.planner.extra_terms import ExtraTensor, Weight
from streammerge.plans import Sources
from streammerge.recipe import Recipe
from streammerge.schedule import Value, depths, value_at

CANCELLED = 1e-12
"""A sum of weights that is this share of their magnitudes is zero."""


def resolve(
    alignment: Alignment, scaling: Sequence[npt.NDArray[np.float64]], recipe: Recipe
) -> Sources:
    """Return the plan's source columns.

    Args:
        alignment: all rows, ordered by target, then by adapter.
        scaling: of every row of every adapter.
        recipe: with the weights and densities.

    Raises:
        RecipeError: a schedule holds for no value of a target, or weights that are to be
            normalised cancel.
    """
    starts = np.cumsum([0] + [len(s) for s in scaling[:-1]])
    weight = _column(alignment, recipe.weights, "weights")
    if recipe.normalize:
        _normalize(alignment, weight)
    density = recipe.density
    count = len(recipe.adapters)
    if not isinstance(density, tuple):
        density = (1.0 if density is None else density,) * count
    return Sources(
        adapter=alignment.adapter,
        row=alignment.row,
        scaling=np.concatenate(scaling)[starts[alignment.adapter] + alignment.row],
        weight=weight,
        density=_column(alignment, density, "density"),
    )


def with_extras(sources: Sources, tensors: Sequence[ExtraTensor]) -> Sources:
    """Return the columns with a row more for each tensor of an adapter that is no factor."""
    holders = [holder for one in tensors for holder in one.holders]
    return Sources(
        adapter=np.r_[sources.adapter, np.array([h.position for h in holders], np.int32)],
        row=np.r_[sources.row, np.array([h.row for h in holders], np.int32)],
        scaling=np.r_[sources.scaling, [s for one in tensors for s in one.scalings]],
        weight=np.r_[sources.weight, [w for one in tensors for w in one.weights]],
        density=np.r_[sources.density, np.ones(len(holders))],
    )


def weights_by_name(alignment: Alignment, sources: Sources, recipe: Recipe) -> Weight:
    """Return the function from a module's path and an adapter to its weight there.

    In a target it is that of the target; elsewhere what the recipe says, as it is.
    """
    targets = {group.target: group for group in alignment.groups}

    def weight(module: str, position: int) -> float:
        group = targets.get(module)
        for row in range(group.first, group.last) if group else ():
            if sources.adapter[row] == position:
                return float(sources.weight[row])
        value = recipe.weights[position]
        if not isinstance(value, tuple):
            return float(value)
        (*_, depth) = depths([*targets, module])
        return value_at(value, module, depth, option="weights")

    return weight


def _column(alignment: Alignment, values: Sequence[Value], option: str) -> npt.NDArray[np.float64]:
    """Return each row's value: its adapter's number, or what its adapter's schedule says."""
    plain = [np.nan if isinstance(value, tuple) else float(value) for value in values]
    column = np.array(plain)[alignment.adapter]
    if not any(isinstance(value, tuple) for value in values):
        return column
    groups = alignment.groups
    for group, depth in zip(groups, depths([group.target for group in groups]), strict=True):
        for row in range(group.first, group.last):
            value = values[alignment.adapter[row]]
            if isinstance(value, tuple):
                column[row] = value_at(value, group.target, depth, option=option)
    return column


def _normalize(alignment: Alignment, weight: npt.NDArray[np.float64]) -> None:
    """Divide the weights of each target by their sum, in place; those that are all 0 stay so."""
    for group in alignment.groups:
        weights = weight[group.first : group.last]
        total = float(weights.sum())
        if not weights.any():
            continue
        if abs(total) <= CANCELLED * float(np.abs(weights).sum()):
            raise RecipeError(
                f"normalize: the weights of {group.target} add up to zero", option="normalize"
            )
        weights /= total
