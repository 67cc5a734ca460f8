"""What of drawn recipes has to be refused, as docs/methods.md says."""

from __future__ import annotations

from fuzzing.outcomes import is_global, targets_of
from fuzzing.recipes import Case
from streammerge import errors
from streammerge.ranks import RankPolicy

SHARES = ("slerp", "model_stock", "norm_matched")
OF_RANK = ("iso_c", "iso_cts")
LARGEST = ("ties", "magnitude_prune", "breadcrumbs")
CANCELLED = 1e-12

UNEQUAL = "unequal ranks"


def reasons(case: Case) -> set[str]:
    """Each option that has to be refused; and unequal ranks, in factor space."""
    found = set()
    if case.rule in OF_RANK and isinstance(case.options.get("rank"), RankPolicy):
        found.add("rank")
    if is_global(case) and case.rule not in LARGEST:
        found.add("threshold_scope")
    for here in targets_of(case).values():
        if case.rule == "slerp" and len(here.sources) > 2:
            found.add("method")
        total, size = sum(here.weights), sum(map(abs, here.weights))
        if case.rule in SHARES and size > 0 and abs(total) <= CANCELLED * size:
            found.add("weights")
        if case.space == "factor" and len({len(source.a) for source in here.sources}) > 1:
            found.add(UNEQUAL)
    return found


def reason_of(error: errors.RefusedError) -> str:
    """What a refusal says that it is for."""
    if isinstance(error, errors.RecipeError):
        return str(error.option)
    return UNEQUAL if isinstance(error, errors.IncompatibleError) else type(error).__name__
