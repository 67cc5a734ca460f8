"""What becomes of tensors that are not LoRA factors: left out, taken from one, or averaged.

`docs/extras.md` says it for users, `docs/decisions/extras.md` why it is so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from streammerge.adapter import DTYPE_BITS, DTYPES, ITEM_BYTES, PREFIX, Adapter
from streammerge.errors import ExtraTensorsError, IncompatibleError, RecipeError
from streammerge.planner.align import Group as Rows
from streammerge.planner.extra_config import NO_HEADS, HeadConfig, head_config
from streammerge.planner.extra_groups import Extras, Group, Holder, gather_extras
from streammerge.planner.extra_names import (
    COPY,
    LORA_BIAS,
    TOKEN_ADAPTER,
    TOKENS,
    grouped_by_kind,
    read_name,
)
from streammerge.planner.extra_terms import ExtraTensor, Terms
from streammerge.planner.hold import Draft
from streammerge.planner.layout import OutputTensor
from streammerge.planner.lora_bias import lora_biases
from streammerge.planner.routes import Course, Shape
from streammerge.plans import ExtraModule


@dataclass(frozen=True)
class ExtraPlan:
    """What becomes of all extra tensors."""

    tensors: tuple[ExtraTensor, ...] = ()
    modules: tuple[ExtraModule, ...] = ()
    config: HeadConfig = NO_HEADS
    notices: tuple[str, ...] = ()


def check_extras(adapters: Sequence[Adapter], policy: str) -> None:
    """Have the user choose what to do with extra tensors.

    Raises:
        ExtraTensorsError: an adapter has some, and nothing was chosen.
    """
    for adapter in adapters:
        if policy == "error" and adapter.extras:
            raise ExtraTensorsError(
                f"holds {len(adapter.extras)} tensors that are not LoRA factors: "
                f"{grouped_by_kind(adapter.extras)}. Choose --extras drop to leave them out of the "
                "output, first to take each module's from the first adapter that has it, or mean "
                "to average them by the weights",
                path=adapter.path,
                names=adapter.extras,
            )


def plan_extras(adapters: Sequence[Adapter], terms: Terms) -> ExtraPlan:
    """Return what becomes of the extra tensors.

    Raises:
        RefusedError: a subclass of it says why they cannot be merged as asked.
    """
    if not any(len(adapter.extra_columns) for adapter in adapters):
        return ExtraPlan()
    policy = terms.recipe.extras
    if policy == "drop":
        return _drop(adapters)
    found = gather_extras(adapters, frozenset(terms.targets))
    tensors: list[ExtraTensor] = []
    modules: list[ExtraModule] = []
    notices: list[str] = []
    for group in found.groups:
        made, told = _take(found, terms, group)
        tensors += made
        notices += told
        modules.append(_module(group.module, group.kind, policy, made))
    taken = {module.module: module.adapters for module in modules}
    for target, bias in lora_biases(found, terms).items():
        tensors.append(bias)
        modules.append(_module(target, LORA_BIAS, "sum", [bias]))
    modules += [
        ExtraModule(name, COPY, "drop", tuple(positions), (name,))
        for name, positions in sorted(found.copies.items())
    ]
    return ExtraPlan(
        tensors=tuple(tensors),
        modules=tuple(modules),
        config=head_config(found, taken, lora_bias=any(one.route == "bias" for one in tensors)),
        notices=(_summary(adapters, modules), *notices),
    )


def _take(found: Extras, terms: Terms, group: Group) -> tuple[list[ExtraTensor], list[str]]:
    """Return a group's tensors by the recipe's policy, and notices."""
    if terms.recipe.extras == "first":
        chosen, notices = _first(found, group)
        return [_copied(found, holders) for holders in chosen], notices
    return [
        _averaged(found, terms, holders, group.module) for holders in _weighted(found, terms, group)
    ], []


def _module(module: str, kind: str, done: str, made: Sequence[ExtraTensor]) -> ExtraModule:
    positions = sorted({holder.position for one in made for holder in one.holders})
    return ExtraModule(module, kind, done, tuple(positions), tuple(one.tensor.name for one in made))


def extra_drafts(
    adapters: Sequence[Adapter], tensors: Sequence[ExtraTensor], first: int, compute_dtype: str
) -> Iterator[Draft]:
    """Yield each tensor as a task before the budget has had its say.

    Args:
        adapters: the sources.
        tensors: of the output.
        first: row of the plan's sources at which theirs begin.
        compute_dtype: as torch spells it.
    """
    for one in tensors:
        last = first + len(one.holders)
        extras = [adapters[holder.position].extra(holder.row) for holder in one.holders]
        height = one.tensor.shape[0] if one.tensor.shape else 1
        shape = Shape(
            m=height,
            n=math.prod(one.tensor.shape[1:]),
            rank=0,
            ranks=(1,) * len(extras),
            source_bytes=sum(extra.nbytes for extra in extras),
            stored_item=max((_item(extra.dtype) for extra in extras), default=1),
            item=ITEM_BYTES[compute_dtype],
            out_item=_item(one.tensor.dtype),
        )
        yield Draft(Rows(one.tensor.name, first, last), shape, Course(one.route))
        first = last


def _item(dtype: str) -> int:
    return max(8, DTYPE_BITS[dtype]) // 8


def _drop(adapters: Sequence[Adapter]) -> ExtraPlan:
    held: dict[int, list[int]] = {}
    for position, adapter in enumerate(adapters):
        for number in adapter.extra_columns.name.tolist():
            held.setdefault(number, []).append(position)
    names = {adapters[0].table.names[number]: tuple(found) for number, found in held.items()}
    count = sum(bool(len(adapter.extra_columns)) for adapter in adapters)
    return ExtraPlan(
        modules=tuple(
            ExtraModule(name, read_name(name).kind, "drop", names[name], (name,))
            for name in sorted(names)
        ),
        notices=(
            f"{len(names)} extra tensors dropped from {count} of {len(adapters)} adapters: "
            + grouped_by_kind(sorted(names)),
        ),
    )


def _first(found: Extras, group: Group) -> tuple[list[list[Holder]], list[str]]:
    """Return a group's tensors as the first adapter has them that has all of them.

    A weight and a bias belong together, so they are never taken from two.

    Raises:
        IncompatibleError: no adapter has all of them.
    """
    whole = len(group.tensors)
    complete = [p for p in group.positions if len(group.held_by(p)) == whole]
    if not complete:
        paths = [found.adapters[p].path for p in group.positions]
        raise IncompatibleError(
            f"{group.module}: no adapter holds all of {', '.join(group.tensors)}: "
            + "; ".join(
                f"{found.adapters[p].path} has {', '.join(group.held_by(p))}"
                for p in group.positions[:4]
            )
            + ". Choose --extras drop",
            target=group.module,
            paths=tuple(paths),
        )
    chosen = complete[0]
    picked = [[holders[chosen]] for holders in group.tensors.values()]
    for (holder,), holders in zip(picked, group.tensors.values(), strict=True):
        mine = found.extra(holder)
        for other in holders.values():
            theirs = found.extra(other)
            if theirs.shape != mine.shape:
                notice = (
                    f"{group.module} is taken from {found.adapters[chosen].path}; in "
                    f"{found.adapters[other.position].path} it has another shape "
                    f"({list(theirs.shape)}, not {list(mine.shape)})"
                )
                return picked, [notice]
    return picked, []


def _weighted(found: Extras, terms: Terms, group: Group) -> Iterator[list[Holder]]:
    """Yield the holders of each of a group's tensors that have a part in its mean.

    Raises:
        IncompatibleError: they do not all have the same tensors, or not of the same shape.
        RecipeError: their weights make no mean.
    """
    positions = group.positions
    weights = {position: terms.weight(group.module, position) for position in positions}
    negative = [p for p in positions if weights[p] < 0]
    if negative or not any(weights[p] for p in positions):
        what = "a negative weight" if negative else "only weights of 0"
        where = found.adapters[(negative or positions)[0]].path
        raise RecipeError(
            f"{group.module}: {where} and {what} make no mean of full values; choose --extras "
            "first or drop",
            option="extras",
        )
    parts = [p for p in positions if weights[p]]
    for path, holders in group.tensors.items():
        for position in parts:
            if position not in holders:
                having = found.adapters[min(holders)].path
                raise IncompatibleError(
                    f"{path} is in {having}, but not in {found.adapters[position].path}, which "
                    f"has {', '.join(group.held_by(position))}; a mean needs the same tensors of "
                    f"{group.module}. Choose --extras first or drop",
                    target=group.module,
                    paths=(having, found.adapters[position].path),
                )
        chosen = [holders[position] for position in parts]
        _check_shapes(found, path, chosen)
        yield chosen


def _check_shapes(found: Extras, path: str, holders: Sequence[Holder]) -> None:
    first = found.extra(holders[0])
    for holder in holders[1:]:
        extra = found.extra(holder)
        if extra.shape != first.shape:
            paths = [found.adapters[h.position].path for h in (holders[0], holder)]
            raise IncompatibleError(
                f"{path} is {list(first.shape)} in {paths[0]}, but {list(extra.shape)} in "
                f"{paths[1]}: of different shapes, such as heads for other labels, there is no "
                "mean. Choose --extras first or drop",
                target=path,
                paths=tuple(paths),
            )


def _copied(found: Extras, holders: Sequence[Holder]) -> ExtraTensor:
    """Return a tensor whose bytes are those of its holders, bit for bit."""
    extras = [found.extra(holder) for holder in holders]
    return ExtraTensor(
        OutputTensor(_name(found, holders[0]), extras[0].shape, extras[0].dtype),
        "copy",
        tuple(holders),
        (1.0,) * len(holders),
        (1.0,) * len(holders),
    )


def _averaged(found: Extras, terms: Terms, holders: Sequence[Holder], module: str) -> ExtraTensor:
    """Return the mean of a tensor; of whole numbers and the like there is none unless all agree.

    Raises:
        IncompatibleError: their dtypes do not go together.
    """
    extras = [found.extra(holder) for holder in holders]
    present = {extra.dtype for extra in extras}
    if not present <= set(DTYPES):
        if len(present) == 1:
            return _copied(found, holders)
        paths = tuple(found.adapters[holder.position].path for holder in holders)
        raise IncompatibleError(
            f"{extras[0].key}: of {' and '.join(sorted(present))} there is no mean; choose "
            "--extras first or drop",
            target=holders[0].name.path,
            paths=paths,
        )
    auto = terms.recipe.dtype == "auto"
    if auto and len(holders) == 1:
        return _copied(found, holders)
    dtype = _widest(present) if auto else terms.dtype
    return ExtraTensor(
        OutputTensor(_name(found, holders[0]), extras[0].shape, dtype),
        "mean",
        tuple(holders),
        (1.0,) * len(holders),
        tuple(terms.weight(module, holder.position) for holder in holders),
    )


def _widest(present: set[str]) -> str:
    """Return the dtype that holds the values of all of these."""
    if len(present) == 1:
        return next(iter(present))
    return "F64" if "F64" in present else "F32"


def _name(found: Extras, holder: Holder) -> str:
    """Return a tensor's full name in the output, where LoRA may wrap another set of modules."""
    name = holder.name
    if name.kind == TOKENS:
        return f"{PREFIX}{name.module}.{TOKEN_ADAPTER}.{name.parameter}"
    within = name.module in found.targets or name.module.endswith(f".{TOKEN_ADAPTER}")
    return f"{PREFIX}{name.module}{'.base_layer' if within else ''}.{name.parameter}"


def _summary(adapters: Sequence[Adapter], modules: Sequence[ExtraModule]) -> str:
    """Return one line about what is done."""
    kinds: dict[tuple[str, str], list[ExtraModule]] = {}
    for module in modules:
        kinds.setdefault((module.kind, module.done), []).append(module)
    parts = []
    for (kind, done), found in kinds.items():
        count = sum(len(module.tensors) for module in found)
        positions = sorted({position for module in found for position in module.adapters})
        names = ", ".join(module.module for module in found[:3]) + (", …" * (len(found) > 3))
        sources = ", ".join(adapters[position].path for position in positions[:2])
        sources += f" and {len(positions) - 2} more" if len(positions) > 2 else ""
        verb = {"first": "from", "mean": "mean of", "sum": "sum of", "drop": "left out of"}[done]
        parts.append(f"{count} of kind '{kind}' ({names}) {verb} {sources}")
    return "extra tensors: " + "; ".join(parts)
