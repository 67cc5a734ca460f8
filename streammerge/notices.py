"""What the user should know of modules that are done, and what stopped nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from streammerge.plans import Plan

if TYPE_CHECKING:  # it loads torch
    from streammerge.finish import ModuleReport


def module_notices(modules: Sequence[ModuleReport], planned: Plan) -> list[str]:
    """Return what is to be said of a merge's modules."""
    steps = {module.target: module.last_step for module in modules if module.last_step}
    return [
        *_short([module.target for module in modules if not module.rank_reached], planned),
        *_missed([module.target for module in modules if not module.converged]),
        *_undecided([module.target for module in modules if not module.basis_unique]),
        *unsettled_notices(steps, planned, told="streammerge.json says of how much in each"),
    ]


def unsettled_notices(steps: Mapping[str, float], planned: Plan, *, told: str) -> Iterator[str]:
    """Say of iterations that they have used up their steps.

    Args:
        steps: how far the last step of each such target went.
        planned: the merge.
        told: where more is told.
    """
    if steps:
        target = max(steps, key=steps.__getitem__)
        yield (
            f"in {len(steps)} targets the iteration of {planned.rule} in {planned.space} space had "
            f"not come to rest when its steps were used up: its last one was of "
            f"{steps[target]:.1e} at most (in {target}); {told}"
        )


def _short(targets: Sequence[str], planned: Plan) -> Iterator[str]:
    if targets:
        yield (
            f"in {len(targets)} targets no rank up to the largest one allowed keeps what "
            f"{planned.recipe['rank']} asks for (such as {targets[0]}); streammerge.json says what "
            "is kept"
        )


def _missed(targets: Sequence[str]) -> Iterator[str]:
    if targets:
        yield (
            f"{len(targets)} targets did not reach the tolerance of the truncated SVD in the "
            f"planned passes (such as {targets[0]}); streammerge.json says how far each is off"
        )


def _undecided(targets: Sequence[str]) -> Iterator[str]:
    if targets:
        yield (
            f"the bases of {len(targets)} targets have singular values that are as good as equal "
            f"(such as {targets[0]}), so that rounding decides between their directions: on other "
            "hardware the result may be another one"
        )
