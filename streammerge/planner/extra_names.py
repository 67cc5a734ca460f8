"""What the names of tensors say that are not LoRA factors, as PEFT writes them.

A module that is trained as a whole is saved under its own path; older and sharded saves leave the
name of PEFT's wrapper in it (`modules_to_save`). What LoRA wraps has `base_layer` in its path, so
that one and the same bias has two names, in an adapter that has LoRA on its module and in one that
has not.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from streammerge.adapter import PREFIX, Adapter
from streammerge.errors import CorruptFileError

MODULE, BIAS, BASE, TOKENS, LORA_BIAS, COPY, UNKNOWN = (
    "trained module",
    "bias",
    "base layer",
    "trained tokens",
    "LoRA bias",
    "copy of the base's values",
    "unknown",
)

TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""The modules that PEFT adds to modules_to_save of its own accord, by task_type."""

_USUAL_HEADS = ("classifier", "score", "qa_outputs")

MAX_ENTRIES = 1000
"""Entries of modules_to_save that differ, over all adapters."""

_NAME = re.compile(rf"(?:{re.escape(PREFIX)})+(.+)\.([^.]+)")
_WRAPPER, TOKEN_ADAPTER = "modules_to_save", "token_adapter"
"""PEFT's wrappers of modules that are trained as a whole, and token by token."""


@dataclass(frozen=True, slots=True)
class ExtraName:
    """What the name of a tensor says."""

    kind: str
    """As far as the name tells: of a plain one it is MODULE."""
    module: str
    """Its path in the base model."""
    parameter: str
    wrapped: bool = False
    """Whether PEFT's wrapper of trained modules stands in the name."""

    @property
    def path(self) -> str:
        """The parameter's path in the base model."""
        return f"{self.module}.{self.parameter}"


def read_name(name: str) -> ExtraName:
    """Return what the name of a tensor that is no factor says."""
    match = _NAME.fullmatch(name)
    parts, parameter = (match[1].split("."), match[2]) if match else ([], name)
    unknown = ExtraName(UNKNOWN, "", name)
    if parts[1:] and (parts[-1], parameter) == ("lora_B", "bias"):
        return ExtraName(LORA_BIAS, ".".join(parts[:-1]), parameter)
    if not parts or "" in parts or any(p.startswith("lora_") for p in (*parts, parameter)):
        return unknown
    if "original_module" in parts or parameter == "trainable_tokens_original":
        return ExtraName(COPY, ".".join(parts), parameter)
    if parts[1:] and (parts[-1], parameter) == (TOKEN_ADAPTER, "trainable_tokens_delta"):
        return ExtraName(TOKENS, ".".join(parts[:-1]), parameter)
    return _unwrapped(parts, parameter) or unknown


def _unwrapped(parts: list[str], parameter: str) -> ExtraName | None:
    """Return where a parameter lies in the base model, without what PEFT puts into its path."""
    wrapped = _WRAPPER in parts
    if wrapped:
        place = parts.index(_WRAPPER)
        # The adapter's name stands behind it, unless it was taken out.
        named = parts[place + 1 :][:1] == ["default"]
        parts = [*parts[:place], *parts[place + 1 + named :]]
    module = ".".join(part for part in parts if part != "base_layer")
    kind = BASE if "base_layer" in parts else MODULE
    return ExtraName(kind, module, parameter, wrapped) if module else None


def saved_entries(adapters: Iterable[Adapter]) -> tuple[str, ...]:
    """Return what the adapters' modules_to_save say, each once.

    Raises:
        CorruptFileError: they say more than any adapter does.
    """
    entries: dict[str, None] = {}
    for adapter in adapters:
        raw = adapter.config.raw.get("modules_to_save") if adapter.config else None
        listed = raw if isinstance(raw, list) else []
        entries.update(dict.fromkeys(entry for entry in listed if isinstance(entry, str) and entry))
        if len(entries) > MAX_ENTRIES:
            raise CorruptFileError(
                f"modules_to_save names more than {MAX_ENTRIES} modules", path=adapter.path
            )
    return tuple(entries)


def above(paths: Iterable[str]) -> set[str]:
    """Return these paths and all modules that they lie in."""
    found: set[str] = set()
    for path in paths:
        place = path
        while place and place not in found:
            found.add(place)
            place = place.rpartition(".")[0]
    return found


def find_root(module: str, entries: Collection[str], changed: Collection[str]) -> str | None:
    """Return the module that is saved as a whole and that this one lies in, or is; None if none.

    PEFT takes an entry of modules_to_save for every module whose path ends in it, also in the
    middle of a name.

    Args:
        module: its path.
        entries: of modules_to_save.
        changed: the output's targets and the modules that they lie in, which PEFT cannot wrap.
    """
    endings, parts = (*entries, *_USUAL_HEADS), module.split(".")
    for count in range(1, len(parts) + 1):
        path = ".".join(parts[:count])
        if path.endswith(endings):
            return None if path in changed else path
    return None


def grouped_by_kind(names: Iterable[str]) -> str:
    """Return for people which of these tensors are of which kind."""
    read = {name: read_name(name) for name in names}
    whole = {n.module for n in read.values() if n.parameter != "bias"}
    groups: dict[str, list[str]] = {}
    for name, said in read.items():
        alone = said.parameter == "bias" and said.module not in whole
        is_bias = alone and said.kind in (MODULE, BASE)
        groups.setdefault(BIAS if is_bias else said.kind, []).append(name)
    return "; ".join(
        f"{len(found)} of kind '{kind}' ({', '.join(found[:3])}{', …' if len(found) > 3 else ''})"
        for kind, found in groups.items()
    )
