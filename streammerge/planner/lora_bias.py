"""Biases of deltas (PEFT's lora_bias): they are scaled and weighted as the deltas are."""

from __future__ import annotations

from collections.abc import Mapping

from streammerge.adapter import DTYPES, EMBEDDING, PREFIX
from streammerge.errors import CorruptFileError, ExtraTensorsError
from streammerge.planner.extra_groups import Extras, Holder
from streammerge.planner.extra_terms import ExtraTensor, Terms
from streammerge.planner.layout import OutputTensor

Rows = Mapping[int, Mapping[str, int]]
"""By adapter and target, the row of its columns."""


def lora_biases(found: Extras, terms: Terms) -> dict[str, ExtraTensor]:
    """Return the bias of every target's delta by its path, where any adapter has one.

    PEFT gives a bias to all targets or to none, so those that no adapter has are zeros.

    Raises:
        ExtraTensorsError: the merge is no weighted sum of deltas, or a target cannot have one.
        CorruptFileError: a bias does not fit its target.
    """
    positions = {position for holders in found.biases.values() for position in holders}
    rows = {position: _rows(found, position) for position in positions}
    for target, holders in found.biases.items():
        for holder in holders.values():
            _check_fit(found, target, holder, rows)
            if target in terms.targets:
                _check_sense(found, terms, holder)
    held = {target: h for target, h in found.biases.items() if target in terms.targets}
    if not held:
        return {}
    return {t: _bias(terms, t, held.get(t, {}), rows) for t in sorted(terms.targets)}


def _rows(found: Extras, position: int) -> dict[str, int]:
    adapter = found.adapters[position]
    return {adapter.target(row): row for row in range(len(adapter))}


def _bias(terms: Terms, target: str, holders: Mapping[int, Holder], rows: Rows) -> ExtraTensor:
    _, m = terms.targets[target]
    chosen = [holders[position] for position in sorted(holders)]
    return ExtraTensor(
        OutputTensor(f"{PREFIX}{target}.lora_B.bias", (m,), terms.dtype),
        "bias",
        tuple(chosen),
        tuple(float(terms.scalings[h.position][rows[h.position][target]]) for h in chosen),
        tuple(terms.weight(target, h.position) for h in chosen),
    )


def _check_fit(found: Extras, target: str, holder: Holder, rows: Rows) -> None:
    adapter, extra = found.adapters[holder.position], found.extra(holder)
    row = rows[holder.position].get(target)
    if row is None or extra.shape != (int(adapter.columns.m[row]),):
        raise CorruptFileError(
            f"shape {list(extra.shape)}: is no bias of a B factor beside it",
            path=extra.file.path,
            tensor=extra.key,
        )


def _check_sense(found: Extras, terms: Terms, holder: Holder) -> None:
    extra = found.extra(holder)
    if terms.rule.name != "linear" or terms.space.name == "factor":
        problem = "which only a weighted sum of deltas (svd, cat) makes one of"
    elif any(kind == EMBEDDING for kind, _ in terms.targets.values()):
        problem = "which PEFT does not load beside LoRA on an embedding"
    elif extra.dtype not in DTYPES:
        problem = f"and its dtype is {extra.dtype}"
    else:
        return
    raise ExtraTensorsError(
        f"{extra.key} is a bias of a delta (lora_bias), {problem}; choose --extras drop to leave "
        "all extra tensors out",
        path=found.adapters[holder.position].path,
        names=(extra.key,),
    )
