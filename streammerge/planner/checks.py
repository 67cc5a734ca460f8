"""What of the adapters is refused, or remarked on, before anything is planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from streammerge.adapter import PEFT, Adapter
from streammerge.catalog import RuleSpec
from streammerge.errors import IncompatibleError, RecipeError
from streammerge.planner.align import Alignment
from streammerge.planner.sources import CANCELLED
from streammerge.plans import Sources
from streammerge.recipe import Recipe

Floats = npt.NDArray[np.float64]


SHOWN = 4
"""Adapters that a message names."""


def check_range(adapters: Sequence[Adapter], sources: Sources, dtype: str) -> None:
    """Check that the compute dtype can hold every weight times every scaling.

    Raises:
        RecipeError: it cannot.
    """
    weight, scaling = np.abs(sources.weight), np.abs(sources.scaling)
    with np.errstate(over="ignore", invalid="ignore"):
        largest = np.maximum(weight, scaling * np.maximum(1.0, weight))
    for row in np.flatnonzero(~(largest <= np.finfo(dtype).max))[:1]:
        raise RecipeError(
            f"{adapters[sources.adapter[row]].path}: weight {sources.weight[row]:g} times its "
            f"scaling leaves the range of {dtype}",
            option="weights",
        )


def check_shares(sources: Sources, rule: RuleSpec, parameters: Mapping[str, float]) -> None:
    """Check that a rule can keep and drop the shares that were asked for, and they are possible.

    Raises:
        RecipeError: what is kept and what is dropped as outliers are more than all, or elements
            would be kept with a probability that is none.
    """
    if rule.sparsity == "middle":
        _check_outliers(float(sources.density.max()), rule, parameters["gamma"])
    elif rule.sparsity == "ranked":
        _check_odds(sources.density, rule, parameters["epsilon"])


def _check_outliers(kept: float, rule: RuleSpec, dropped: float) -> None:
    if kept + dropped > 1:
        raise RecipeError(
            f"{rule.name} cannot keep {kept:g} of the elements and drop {dropped:g} of them as "
            "outliers; density and gamma are at most 1 together",
            option="parameters",
        )


def check_sources(
    adapters: Sequence[Adapter], sources: Sources, alignment: Alignment, rule: RuleSpec
) -> None:
    """Check that a rule can do with each target's adapters and their weights.

    Weights that are all 0 are no shares of anything, and need not be: nothing is wanted of the
    target then.

    Raises:
        RecipeError: there are too many, or weights that are shared out cancel.
    """
    for group in alignment.groups:
        count = group.last - group.first
        if rule.most_adapters is not None and count > rule.most_adapters:
            raise RecipeError(
                f"{group.target}: {rule.name} takes {rule.most_adapters} adapters, and {count} "
                "have it; multislerp and karcher take any number",
                option="method",
            )
        weights = sources.weight[group.first : group.last]
        if not rule.shares or not weights.any():
            continue
        # What is left of weights that cancel is rounding.
        if abs(weights.sum()) <= CANCELLED * np.abs(weights).sum():
            paths = [adapters[i].path for i in sources.adapter[group.first : group.last]]
            raise RecipeError(
                f"{group.target}: {rule.name} goes by each weight's share of their sum, which is "
                f"zero of {_listed(weights, paths)}; change a weight, or leave the target out with "
                "exclude",
                option="weights",
            )


def _listed(weights: Floats, paths: Sequence[str]) -> str:
    """Return the first of some adapters' weights, and how many more there are."""
    shown = [f"{w:g} of {p}" for w, p in zip(weights[:SHOWN], paths, strict=False)]
    left = len(paths) - len(shown)
    return f"{', '.join(shown)} and {left} more" if left else " and ".join(shown)


def _check_odds(densities: Floats, rule: RuleSpec, epsilon: float) -> None:
    least, most = float(densities.min()), float(densities.max())
    for density, odds in ((least, least - epsilon / 2), (most, most + epsilon / 2)):
        if not 0 < odds <= 1 + ROUNDING:
            raise RecipeError(
                f"{rule.name} would keep elements with the probability {odds:g}: density and half "
                f"of epsilon ({density:g} and {epsilon / 2:g}) must stay in (0, 1]",
                option="parameters",
            )


def check_one_density(alignment: Alignment, sources: Sources, rule: RuleSpec) -> None:
    """Check that a rule that keeps the same elements of all adapters is told how many.

    Raises:
        RecipeError: adapters of a target have different densities.
    """
    if rule.sparsity != "varied":
        return
    for group in alignment.groups:
        densities = sources.density[group.first : group.last]
        if densities.min() < densities.max():
            raise RecipeError(
                f"{group.target}: {rule.name} keeps the same elements of all adapters, so density "
                f"must be the same for all, not {densities.min():g} and {densities.max():g}",
                option="density",
            )


ROUNDING = 1e-12
"""Of sums of numbers that were given in decimals."""


def check_bases(adapters: Sequence[Adapter], recipe: Recipe) -> list[str]:
    """Compare what the configs say of the base; only strict_base makes a difference an error."""
    without = [a for a in adapters if a.config is None and a.dialect == PEFT]
    notices = [f"{a.path}: no adapter_config.json" for a in without]
    configs = [(a.path, a.config) for a in adapters if a.config is not None]
    bases = {config.base_model: path for path, config in reversed(configs)}
    if recipe.base_model is not None:
        bases[recipe.base_model] = "asked for"
    if len(bases) > 1:
        named = ", ".join(f"{base!r} ({path})" for base, path in reversed(bases.items()))
        message = f"the adapters name different base models: {named}"
        if recipe.strict_base:
            raise IncompatibleError(message, target=None, paths=tuple(bases.values()))
        notices.append(message)
    if len({config.fan_in_fan_out for _, config in configs}) > 1:
        notices.append(
            "the adapters disagree on fan_in_fan_out, which changes nothing in the files; the "
            "output says true"
        )
    return notices


def unwanted_targets(weights: Mapping[str, Floats]) -> list[str]:
    """Say in which targets all weights are 0, of the weights of each."""
    unwanted = [target for target, given in weights.items() if not given.any()]
    if not unwanted:
        return []
    notice = (
        f"in {len(unwanted)} of {len(weights)} targets all adapters that have them have "
        f"the weight 0 (such as {unwanted[0]}); their deltas are zero"
    )
    return [notice]


def partial_targets(adapters: Sequence[Adapter], alignment: Alignment) -> list[str]:
    partial = [g.target for g in alignment.groups if g.last - g.first < len(adapters)]
    if not partial:
        return []
    notice = (
        f"{len(partial)} of {len(alignment.groups)} targets are not in all adapters (such as "
        f"{partial[0]}); they are merged from those that have them"
    )
    return [notice]
