"""In which format the output is written, and what of its configs stands in its header."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from streammerge.adapter import DIFFUSERS, IMAGE_DIALECTS, PEFT, Adapter
from streammerge.errors import IncompatibleError, RecipeError
from streammerge.planner.output_config import rank_fields
from streammerge.recipe import Recipe

_COMPONENT = re.compile(r"(unet|text_encoder(?:_[23])?|transformer(?:_2)?)\.(.+)")


def output_format(adapters: Sequence[Adapter], recipe: Recipe, targets: Sequence[str]) -> str:
    """Return the format of the output: as asked, or that of the inputs.

    Raises:
        IncompatibleError: some inputs are of image models and others are not.
        RecipeError: the targets, or the recipe, do not go with the format.
    """
    chosen = recipe.format if recipe.format != "auto" else _format_of(adapters)
    if chosen != DIFFUSERS:
        return PEFT
    lost = next((target for target in targets if not _COMPONENT.fullmatch(target)), None)
    if lost is not None:
        raise RecipeError(
            f"format diffusers names the component of a pipeline (unet., text_encoder., "
            f"transformer.) before each module, and {lost} has none",
            option="format",
        )
    if recipe.max_shard_bytes is not None:
        raise RecipeError(
            "format diffusers is one file, which nothing that reads it looks for in shards; leave "
            "max_shard_size out, or choose format peft",
            option="max_shard_size",
        )
    return DIFFUSERS


def check_image_extras(chosen: str, tensors: Sequence[str]) -> None:
    """Check that an output for diffusers holds LoRA factors alone, as its loader demands.

    Raises:
        RecipeError: it would hold others.
    """
    if chosen == DIFFUSERS and tensors:
        raise RecipeError(
            f"format diffusers holds LoRA factors alone, and {tensors[0]} is none; leave it out "
            "with --extras drop, or choose --format peft",
            option="extras",
        )


def _format_of(adapters: Sequence[Adapter]) -> str:
    images = [a.path for a in adapters if a.dialect in IMAGE_DIALECTS]
    others = [a.path for a in adapters if a.dialect not in IMAGE_DIALECTS]
    if images and others:
        raise IncompatibleError(
            f"{images[0]} is an adapter of an image model, and {others[0]} is not: they have no "
            "target in common. If they are meant to be in one file, choose its format (--format)",
            target=None,
            paths=(images[0], others[0]),
        )
    return DIFFUSERS if images else PEFT


def image_config(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return diffusers' configs for targets of these output ranks: fields of PEFT's LoraConfig,
    each behind the name of its component, such that every scaling is 1.

    https://github.com/huggingface/diffusers/blob/main/src/diffusers/loaders/lora_base.py
    """
    components: dict[str, dict[str, int]] = {}
    for target, rank in ranks.items():
        match = _COMPONENT.fullmatch(target)
        assert match is not None, "the targets are checked"
        components.setdefault(match[1], {})[match[2]] = rank
    return {
        f"{component}.{field}": value
        for component, inner in sorted(components.items())
        for field, value in _fields(inner).items()
    }


def _fields(ranks: Mapping[str, int]) -> dict[str, Any]:
    return {
        **rank_fields(ranks),
        "bias": "none",
        "lora_bias": False,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "target_modules": sorted(ranks),
        "use_dora": False,
        "use_rslora": False,
    }
