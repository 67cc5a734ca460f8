"""Extra tensors of all adapters, brought together: what belongs to one module, and who has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from streammerge.adapter import Adapter, Extra
from streammerge.errors import CorruptFileError, ExtraTensorsError, IncompatibleError
from streammerge.planner.extra_names import (
    BASE,
    BIAS,
    COPY,
    LORA_BIAS,
    MODULE,
    TOKENS,
    UNKNOWN,
    ExtraName,
    above,
    find_root,
    read_name,
    saved_entries,
)


@dataclass(frozen=True, slots=True)
class Holder:
    """One adapter's tensor."""

    position: int
    """Of the adapter."""
    row: int
    """Of its extra columns."""
    name: ExtraName


@dataclass(frozen=True)
class Group:
    """The tensors that belong to one module and are taken together."""

    module: str
    kind: str
    rooted: bool
    """Whether it is a module that is trained as a whole, with all that lies in it."""
    tensors: Mapping[str, Mapping[int, Holder]]
    """By path in the base model, and by the adapters' positions."""

    @property
    def positions(self) -> list[int]:
        """Which adapters have any of it."""
        return sorted({position for holders in self.tensors.values() for position in holders})

    def held_by(self, position: int) -> list[str]:
        """Return the paths that an adapter has."""
        return [path for path, holders in self.tensors.items() if position in holders]


@dataclass
class Extras:
    """All extra tensors of a merge."""

    adapters: Sequence[Adapter]
    targets: frozenset[str]
    """Of the output."""
    entries: tuple[str, ...] = ()
    """Of all adapters' modules_to_save."""
    changed: set[str] = field(default_factory=set)
    """The targets, and the modules that they lie in."""
    groups: list[Group] = field(default_factory=list)
    biases: dict[str, dict[int, Holder]] = field(default_factory=dict)
    """What is added to deltas, by target."""
    copies: dict[str, list[int]] = field(default_factory=dict)
    """By full name: what is a copy of what stands elsewhere, and who has it."""

    def extra(self, holder: Holder) -> Extra:
        """Return where a tensor lies."""
        return self.adapters[holder.position].extra(holder.row)


def gather_extras(adapters: Sequence[Adapter], targets: frozenset[str]) -> Extras:
    """Bring the adapters' extra tensors together.

    Raises:
        ExtraTensorsError: one of them is of no known kind.
        CorruptFileError: two of an adapter are the same.
        IncompatibleError: the output could hold only one of two that exclude each other.
    """
    found = Extras(adapters, targets, saved_entries(adapters), above(targets))
    known: dict[int, ExtraName] = {}
    tensors: dict[tuple[str, bool, bool], dict[str, dict[int, Holder]]] = {}
    roots: dict[str, str | None] = {}
    for position, adapter in enumerate(adapters):
        for holder in _plain(found, position, known):
            name = holder.name
            if name.kind == LORA_BIAS:
                found.biases.setdefault(name.module, {})[position] = holder
                continue
            _check_target(found, holder)
            if name.module not in roots:
                roots[name.module] = find_root(name.module, found.entries, found.changed)
            tokens = name.kind == TOKENS
            root = None if tokens else roots[name.module]
            key = (root or name.module, root is not None, tokens)
            holders = tensors.setdefault(key, {}).setdefault(name.path, {})
            if position in holders:
                raise CorruptFileError(
                    "stands twice", path=adapter.path, tensor=found.extra(holder).key
                )
            holders[position] = holder
    for (module, rooted, _), paths in sorted(tensors.items()):
        found.groups.append(
            Group(module, _kind(paths, rooted=rooted), rooted, dict(sorted(paths.items())))
        )
    _check_tokens(found)
    return found


def _plain(found: Extras, position: int, known: dict[int, ExtraName]) -> list[Holder]:
    """Return an adapter's tensors without the copies of what stands elsewhere.

    Where biases are trained, PEFT also saves those of its wrappers' inner modules under their own
    names, beside what it saves of the wrapped module.
    """
    adapter = found.adapters[position]
    numbers = adapter.extra_columns.name.tolist()
    for number in numbers:
        if number not in known:
            known[number] = read_name(adapter.table.names[number])
    direct = {known[n].path for n in numbers if known[n].kind == MODULE and not known[n].wrapped}
    kept = []
    for row, number in enumerate(numbers):
        name = known[number]
        if name.kind == UNKNOWN:
            raise ExtraTensorsError(
                f"{adapter.table.names[number]} is no tensor that PEFT saves beside LoRA factors, "
                "so nothing is known of how to merge it; choose --extras drop to leave all extra "
                "tensors out",
                path=adapter.path,
                names=adapter.extras,
            )
        if name.kind == COPY or (name.wrapped and name.path in direct):
            found.copies.setdefault(adapter.table.names[number], []).append(position)
        else:
            kept.append(Holder(position, row, name))
    return kept


def _check_target(found: Extras, holder: Holder) -> None:
    """Refuse a whole weight, or trained tokens, of a module that others change by LoRA.

    A weight that LoRA's own module brings is what its delta was trained on.
    """
    name = holder.name
    if name.module not in found.targets or name.kind == BASE or name.parameter == "bias":
        return
    raise IncompatibleError(
        f"{name.module} is trained as a whole in {found.adapters[holder.position].path} "
        f"({found.extra(holder).key}), and by LoRA in another adapter; no adapter can hold both. "
        "Choose --extras drop, or leave one of them out (--exclude)",
        target=name.module,
        paths=(found.adapters[holder.position].path,),
    )


def _check_tokens(found: Extras) -> None:
    whole = {group.module for group in found.groups if group.kind != TOKENS}
    for group in found.groups:
        if group.kind == TOKENS and group.module in whole:
            paths = tuple(found.adapters[position].path for position in group.positions)
            raise IncompatibleError(
                f"{group.module} is trained token by token in {paths[0]}, and as a whole in "
                "another adapter; no adapter can hold both. Choose --extras drop",
                target=group.module,
                paths=paths,
            )


def _kind(paths: Mapping[str, Mapping[int, Holder]], *, rooted: bool) -> str:
    names = [holder.name for holders in paths.values() for holder in holders.values()]
    if any(name.kind == TOKENS for name in names):
        return TOKENS
    if all(name.parameter == "bias" for name in names):
        return BIAS
    return BASE if not rooted and all(name.kind == BASE for name in names) else MODULE
