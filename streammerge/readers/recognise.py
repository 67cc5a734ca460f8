"""Known formats that are not PEFT LoRA directories, told by their tensors' names."""

from __future__ import annotations

import re
from collections.abc import Iterable

_FORMATS = (
    (re.compile(r"\.lokr_(w1|w2|t2)"), "LoKr"),
    (re.compile(r"\.hada_(w1|w2|t1|t2)"), "LoHa"),
    (re.compile(r"\.ia3_l"), "IA3"),
    (re.compile(r"\.oft_|\.boft_"), "OFT"),
    (re.compile(r"\.vera_lambda"), "VeRA"),
    (re.compile(r"\.lora_E$"), "AdaLoRA"),
    (re.compile(r"(^|\.)prompt_embeddings$|^prefix_"), "prompt or prefix tuning"),
    (re.compile(r"\.lora_[ab]$"), "MLX"),
    (re.compile(r"^lora_(unet|te\d?|transformer)_"), "kohya"),
    (re.compile(r"\.lora(_linear_layer)?\.(down|up)\.weight$"), "diffusers"),
    (re.compile(r"^(unet|transformer|text_encoder(_\d)?)\..*\.lora_[AB]\.weight$"), "diffusers"),
    (re.compile(r"\.lora_(A|B|embedding_A|embedding_B)\.[^.]+\.weight$"), "raw PEFT state dict"),
    (re.compile(r"\.lora_(A|B)\.weight$"), "LoRA without PEFT's base_model.model. prefix"),
)


def recognise(names: Iterable[str]) -> str | None:
    """Return the name of the format that these tensors belong to, None if it is not known."""
    names = list(names)
    for pattern, format_name in _FORMATS:
        if any(pattern.search(name) for name in names):
            return format_name
    return None
