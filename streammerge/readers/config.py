"""adapter_config.json: what a merge needs from it, and which variants it rules out.

Real configs carry 15 to 40 keys, many unknown to any one version of PEFT; keys that change
nothing about the delta are kept in `raw` and otherwise ignored.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streammerge.adapter import MLX, AdapterConfig
from streammerge.errors import CorruptFileError, UnsupportedAdapterError, shorten
from streammerge.files import check_inside, read_whole
from streammerge.patterns import compile_entry

MAX_CONFIG_BYTES = 64 * 1024**2

_VARIANTS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "target_parameters": "LoRA on parameters (target_parameters)",
    "layer_replication": "layer replication",
}
"""Config keys that, when set, make more of an adapter than B·A·s."""

_BASE_CHANGING = ("pissa", "olora", "corda", "lora_ga")
"""Initialisations that also change the base weights: a file of them that was not converted is a
difference against another base. Converted files say true."""


def read_config(path: Path) -> AdapterConfig | None:
    """Read an adapter_config.json, PEFT's or MLX's; None where there is no such file.

    Raises:
        CorruptFileError: not JSON, or a field that decides the delta has no sound value.
        UnsupportedAdapterError: another PEFT type, or a variant of LoRA that is not merged.
    """
    check_inside(path)
    try:
        text = read_whole(path, MAX_CONFIG_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CorruptFileError(f"cannot be read ({error.strerror})", path=str(path)) from error
    return parse_config(path, text)


def parse_config(path: Path, text: bytes) -> AdapterConfig:
    """Parse the bytes of an adapter_config.json; `path` is for messages."""
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"is not JSON ({error})", path=str(path)) from error
    if not isinstance(raw, dict):
        raise CorruptFileError("is not a JSON object", path=str(path))
    if raw.get("peft_type") is None and ("lora_parameters" in raw or "lora_layers" in raw):
        return _mlx_config(path, raw)
    return make_config(path, raw)


def make_config(path: Path, raw: Mapping[str, Any]) -> AdapterConfig:
    """Return what PEFT's fields say; `path` is for messages.

    Raises:
        CorruptFileError: a field that decides the delta has no sound value.
        UnsupportedAdapterError: another PEFT type, or a variant of LoRA that is not merged.
    """
    _refuse_other_types(path, raw)
    _refuse_variants(path, raw)
    return AdapterConfig(
        rank=_rank(path, "r", raw.get("r", 8)),
        alpha=_number(path, "lora_alpha", raw.get("lora_alpha", 8)),
        use_rslora=bool(raw.get("use_rslora")),
        rank_pattern=_pattern(path, "rank_pattern", raw, _rank),
        alpha_pattern=_pattern(path, "alpha_pattern", raw, _number),
        fan_in_fan_out=bool(raw.get("fan_in_fan_out")),
        base_model=_text(raw.get("base_model_name_or_path")),
        task_type=_text(raw.get("task_type")),
        raw=raw,
    )


def _mlx_config(path: Path, raw: Mapping[str, Any]) -> AdapterConfig:
    """Return what mlx-lm's fields say: `scale` is the scaling itself.

    https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/tuner/lora.py
    """
    kind = raw.get("fine_tune_type", "lora")
    if raw.get("use_dora") or kind != "lora":
        variant = "DoRA" if raw.get("use_dora") or kind == "dora" else shorten(kind)[:40]
        raise UnsupportedAdapterError(
            f"was trained by mlx-lm as {variant}; only its LoRA adapters can be merged",
            path=str(path),
            variant=variant,
        )
    facts = raw.get("lora_parameters")
    if not isinstance(facts, dict) or "scale" not in facts:
        raise CorruptFileError("its lora_parameters do not say the scale", path=str(path))
    return AdapterConfig(
        rank=_rank(path, "lora_parameters.rank", facts.get("rank", raw.get("rank", 8))),
        alpha=_number(path, "lora_parameters.scale", facts["scale"]),
        base_model=_text(raw.get("model")),
        raw={"lora_parameters": facts},
        dialect=MLX,
    )


def _refuse_other_types(path: Path, raw: Mapping[str, Any]) -> None:
    kind = raw.get("peft_type")
    if kind is None:
        raise UnsupportedAdapterError(
            "has no peft_type, so it is not the config of a PEFT adapter",
            path=str(path),
            variant="unknown",
        )
    if kind != "LORA":
        raise UnsupportedAdapterError(
            f"peft_type is {shorten(kind)}; only LORA adapters can be merged",
            path=str(path),
            variant=kind if isinstance(kind, str) else shorten(kind),
        )


def _refuse_variants(path: Path, raw: Mapping[str, Any]) -> None:
    for key, variant in _VARIANTS.items():
        if raw.get(key):
            raise UnsupportedAdapterError(
                f"{key} is set: {variant} is more than B·A·scaling and is not merged",
                path=str(path),
                variant=variant,
            )
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING):
        raise UnsupportedAdapterError(
            f"init_lora_weights is {shorten(init)}: this file is a difference against a changed "
            "base. Convert it when saving (save_pretrained, "
            "path_initial_model_for_weight_conversion)",
            path=str(path),
            variant=init,
        )


def _pattern(path: Path, key: str, raw: Mapping[str, Any], check: Any) -> dict[str, Any]:
    entries = raw.get(key) or {}
    if not isinstance(entries, dict):
        raise CorruptFileError(f"{key} is not an object", path=str(path))
    for name in entries:
        try:
            compile_entry(name)
        except re.error as error:
            raise CorruptFileError(
                f"{key}: {shorten(name)} is no regular expression to match paths with ({error})",
                path=str(path),
            ) from error
    return {name: check(path, f"{key}[{shorten(name)}]", value) for name, value in entries.items()}


def _rank(path: Path, key: str, value: Any) -> int:
    if type(value) is not int or not 0 < value < 2**31:
        raise CorruptFileError(
            f"{key} must be a positive integer, not {shorten(value)[:40]}", path=str(path)
        )
    return value


def _number(path: Path, key: str, value: Any) -> float:
    try:
        number = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise CorruptFileError(
            f"{key} must be a finite number, not {shorten(value)[:40]}", path=str(path)
        )
    return number


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
