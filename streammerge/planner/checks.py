"""What of the adapters is refused, or remarked on, before anything is planned."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from streammerge.adapter import Adapter
from streammerge.errors import IncompatibleError, RecipeError
from streammerge.planner.align import Alignment
from streammerge.recipe import Recipe


def check_range(
    adapters: Sequence[Adapter], recipe: Recipe, scaling: Sequence[npt.NDArray[np.float64]]
) -> None:
    """Check that the compute dtype can hold every weight times every scaling.

    Raises:
        RecipeError: it cannot.
    """
    limit = float(np.finfo(recipe.compute_dtype).max)
    for adapter, weight, values in zip(adapters, recipe.weights, scaling, strict=True):
        largest = max(abs(weight), float(np.abs(values).max() * max(1.0, abs(weight))))
        if not largest <= limit:
            raise RecipeError(
                f"{adapter.path}: weight {weight:g} times its scaling leaves the range of "
                f"{recipe.compute_dtype}",
                option="weights",
            )


def check_bases(adapters: Sequence[Adapter], recipe: Recipe) -> list[str]:
    """Compare what the configs say of the base; only strict_base makes a difference an error."""
    notices = [f"{a.path}: no adapter_config.json" for a in adapters if a.config is None]
    configs = [(a.path, a.config) for a in adapters if a.config is not None]
    bases = {config.base_model: path for path, config in reversed(configs)}
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


def partial_targets(adapters: Sequence[Adapter], alignment: Alignment) -> list[str]:
    partial = [g.target for g in alignment.groups if g.last - g.first < len(adapters)]
    if not partial:
        return []
    notice = (
        f"{len(partial)} of {len(alignment.groups)} targets are not in all adapters (such as "
        f"{partial[0]}); they are merged from those that have them"
    )
    return [notice]
