"""The output's adapter_config.json: a plain LoRA of scaling 1 that PEFT loads without a warning."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from streammerge.adapter import Adapter, AdapterConfig
from streammerge.patterns import pattern_lookup
from streammerge.planner.extra_config import HeadConfig
from streammerge.planner.extra_names import TASK_HEADS

_FINER = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""Config keys by which an adapter has fewer targets than its target_modules match."""

MAX_BRANCHES = 2000
"""Targets that are written as one regular expression at most."""


def output_config(
    adapters: Sequence[Adapter],
    ranks: Mapping[str, int],
    heads: HeadConfig,
    *,
    selected: bool,
    base_model: str | None,
) -> tuple[dict[str, Any], list[str]]:
    """Return the config for targets of these output ranks, and notices about what it settles.

    Args:
        adapters: the sources.
        ranks: each target's rank in the output.
        heads: what the output holds beside LoRA factors.
        selected: whether the recipe leaves targets out.
        base_model: what it is to name as the base; the sources' first when None.
    """
    configs = [a.config for a in adapters if a.config is not None]
    task_type, notices = _task_type([c.task_type for c in configs], heads.tasks)
    fields = rank_fields(ranks)
    config: dict[str, Any] = {
        "alpha_pattern": fields["alpha_pattern"],
        "auto_mapping": _agreed([_mapping(c.raw.get("auto_mapping")) for c in configs]),
        "base_model_name_or_path": base_model
        or next((c.base_model for c in configs if c.base_model), None),
        "bias": heads.bias,
        "fan_in_fan_out": any(c.fan_in_fan_out for c in configs),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": fields["lora_alpha"],
        "lora_bias": heads.lora_bias,
        "lora_dropout": 0.0,
        "modules_to_save": list(heads.modules_to_save) or None,
        "peft_type": "LORA",
        "r": fields["r"],
        "rank_pattern": fields["rank_pattern"],
        "revision": _agreed([_text(c.raw.get("revision")) for c in configs]),
        "target_modules": _target_modules(configs, sorted(ranks), selected=selected),
        "task_type": task_type,
        "use_dora": False,
        "use_rslora": False,
    }
    if heads.trainable_token_indices is not None:
        config["trainable_token_indices"] = heads.trainable_token_indices
    if heads.ensure_weight_tying:
        config["ensure_weight_tying"] = True
    return config, notices


def _target_modules(
    configs: Sequence[AdapterConfig], targets: list[str], *, selected: bool
) -> list[str] | str:
    """Return target_modules that match these targets and no other module of the base.

    PEFT takes an entry of a list for any module whose path ends in it behind a dot, and a string
    for a regular expression on whole paths. A list of paths is exact where the sources' were
    lists: a module that ends in one of these paths would have been matched, and be in the files.
    Where a source, or the recipe, chose more finely only a string is exact; PEFT tries its branches
    one by one, so that a very long one would take it too long.
    """
    finely = selected or any(
        isinstance(c.raw.get("target_modules"), str) or any(c.raw.get(key) for key in _FINER)
        for c in configs
    )
    if finely and len(targets) <= MAX_BRANCHES:
        return "|".join(re.escape(target) for target in targets)
    return targets


def rank_fields(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return the fields of a LoraConfig by which targets of these ranks have a scaling of 1."""
    rank = usual_rank(ranks)
    pattern = rank_pattern(ranks, rank)
    return {"alpha_pattern": pattern, "lora_alpha": rank, "r": rank, "rank_pattern": pattern}


def rank_pattern(ranks: Mapping[str, int], rank: int) -> dict[str, int]:
    """Return PEFT's rank_pattern for targets that differ from `rank`.

    PEFT takes the first entry that matches a path or an ending of it behind a dot. So longer
    paths stand first, and a target whose ending is another's entry has an entry of its own. The
    paths are written as PEFT writes them, dots and all, as long as no dot that stands for any
    character makes one match another target.
    """
    listed = {target for target, r in ranks.items() if r != rank}
    listed |= {target for target in ranks if _ends_in(target, listed)}
    ordered = sorted(listed, key=lambda target: (-len(target), target))
    plain = {target: ranks[target] for target in ordered}
    if all(re.fullmatch(r"[\w.-]+", target) for target in ordered):
        look_up = pattern_lookup(plain, rank)
        if all(look_up(target) == r for target, r in ranks.items()):
            return plain
    return {re.escape(target): r for target, r in plain.items()}


def _ends_in(target: str, listed: set[str]) -> bool:
    parts = target.split(".")
    return any(".".join(parts[i:]) in listed for i in range(1, len(parts)))


def usual_rank(ranks: Mapping[str, int]) -> int:
    """Return the rank that most targets have, the larger one of equals."""
    counts = Counter(ranks.values())
    return max(counts, key=lambda rank: (counts[rank], rank))


def _agreed(values: Sequence[Any]) -> Any:
    return values[0] if values and all(value == values[0] for value in values) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _mapping(value: Any) -> dict[str, str | None] | None:
    """Return an auto_mapping as PEFT writes it; others may not be writable as JSON again."""
    if not isinstance(value, dict) or not all(isinstance(v, str | None) for v in value.values()):
        return None
    return value


def _task_type(
    types: Sequence[str | None], with_heads: Sequence[str]
) -> tuple[str | None, list[str]]:
    task_type = next((name for name in types if name), None)
    if task_type in TASK_HEADS and task_type not in with_heads:
        notice = (
            f"task_type {task_type} is left out of the output's config: PEFT would look for a "
            "trained head, and the output holds none that it could load"
        )
        return None, [notice]
    return task_type, []
