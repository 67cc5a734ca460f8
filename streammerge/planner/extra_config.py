"""What the output's config says of tensors that are not LoRA factors, so that PEFT loads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streammerge.adapter import Adapter
from streammerge.errors import CorruptFileError, IncompatibleError, shorten
from streammerge.planner.extra_groups import Extras, Group
from streammerge.planner.extra_names import BIAS, MODULE, TASK_HEADS, TOKENS

MAX_TOKENS = 2**24
"""Indices of trained tokens."""


@dataclass(frozen=True)
class HeadConfig:
    """Config keys that belong to extra tensors; as they are, of an output without any."""

    modules_to_save: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    """The task types with a head of their own whose head is there."""
    bias: str = "none"
    lora_bias: bool = False
    trainable_token_indices: Any = None
    ensure_weight_tying: bool = False


NO_HEADS = HeadConfig()


def head_config(
    found: Extras, taken: Mapping[str, Sequence[int]], *, lora_bias: bool
) -> HeadConfig:
    """Return the config keys of what is written.

    PEFT fails where its config names a module that the file does not have; and a module that LoRA
    changes, or that holds one, it cannot wrap. What the config does not name it loads into the
    base model's module of that name.

    Args:
        found: all extra tensors, of which all but copies are written.
        taken: by module, the positions of the adapters that it is made from.
        lora_bias: whether targets have biases.

    Raises:
        IncompatibleError: the adapters' trained tokens are not the same ones.
        CorruptFileError: a config does not say which tokens were trained.
    """
    rooted = [g.module for g in found.groups if g.rooted and g.kind == MODULE]
    entries = tuple(e for e in found.entries if _can_wrap(e, rooted, found))
    tasks = tuple(
        task
        for task, heads in TASK_HEADS.items()
        if any(root.endswith(heads) for root in rooted)
        and not any(path.endswith(heads) for path in found.changed)
    )
    tokens = [group for group in found.groups if group.kind == TOKENS]
    named = [found.adapters[p] for group in found.groups for p in taken[group.module]]
    return HeadConfig(
        modules_to_save=entries,
        tasks=tasks,
        bias=_bias(
            [found.adapters[p] for g in found.groups if g.kind == BIAS for p in taken[g.module]]
        ),
        lora_bias=lora_bias,
        trainable_token_indices=_tokens(found, tokens, taken) if tokens else None,
        ensure_weight_tying=any(
            a.config is not None and a.config.raw.get("ensure_weight_tying") is True for a in named
        ),
    )


def _can_wrap(entry: str, rooted: Sequence[str], found: Extras) -> bool:
    """Whether PEFT finds all that it wraps for an entry of modules_to_save."""
    return any(root.endswith(entry) for root in rooted) and not any(
        path.endswith(entry) for path in found.changed
    )


def _bias(adapters: Sequence[Adapter]) -> str:
    # A list, for what stands there may be anything that JSON holds.
    said = [adapter.config.raw.get("bias") for adapter in adapters if adapter.config is not None]
    return next((word for word in ("all", "lora_only") if word in said), "none")


def _tokens(found: Extras, groups: Sequence[Group], taken: Mapping[str, Sequence[int]]) -> Any:
    """Return which tokens were trained, of the one adapter or of all that agree."""
    positions = sorted({p for group in groups for p in taken[group.module]})
    said = [_indices(found.adapters[position]) for position in positions]
    for position, indices in zip(positions, said, strict=True):
        whole = all(position in taken[group.module] for group in groups)
        if indices != said[0] or not whole:
            raise IncompatibleError(
                f"{groups[0].module}: the trained tokens of {found.adapters[positions[0]].path} "
                f"and {found.adapters[position].path} are not the same ones "
                "(trainable_token_indices); choose --extras drop, or first where one adapter has "
                "them all",
                target=groups[0].module,
                paths=tuple(found.adapters[p].path for p in (positions[0], position)),
            )
    return said[0]


def _indices(adapter: Adapter) -> Any:
    """Return a config's trainable_token_indices: a list, or lists by module.

    Raises:
        CorruptFileError: it is neither.
    """
    raw = adapter.config.raw.get("trainable_token_indices") if adapter.config else None
    lists: list[Any] = list(raw.values()) if isinstance(raw, dict) else [raw]
    if not all(isinstance(one, list) and len(one) <= MAX_TOKENS for one in lists) or not all(
        type(index) is int and 0 <= index < 2**31 for one in lists for index in one
    ):
        raise CorruptFileError(
            "holds trained tokens, but the config's trainable_token_indices does not say which "
            f"({shorten(raw)[:80]})",
            path=adapter.path,
        )
    return raw
