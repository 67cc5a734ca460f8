"""Which format an adapter is of, by its tensors' names; and the known ones that are refused."""

from __future__ import annotations

import re
from collections.abc import Collection

from streammerge.adapter import DIFFUSERS, KOHYA, MLX, PEFT, Dialect
from streammerge.errors import CorruptFileError, UnsupportedAdapterError

_OTHERS = (
    (re.compile(r"\.lokr_(w1|w2|t2)"), "LoKr"),
    (re.compile(r"\.hada_(w1|w2|t1|t2)"), "LoHa"),
    (re.compile(r"\.ia3_l|\.on_input$"), "IA3"),
    (re.compile(r"\.oft_|\.boft_"), "OFT"),
    (re.compile(r"\.vera_lambda"), "VeRA"),
    (re.compile(r"\.lora_E$"), "AdaLoRA"),
    (re.compile(r"(^|\.)prompt_embeddings$|^prefix_"), "prompt or prefix tuning"),
    (
        re.compile(r"[._]lora_mid\.weight$"),
        "LoCon",
    ),  # a Tucker core, for kernels of more than one element
    (re.compile(r"^diffusion_model\..*lora_"), "ComfyUI"),
)
"""Adapters that are no pairs of two factors, or are named as no reader knows it."""

_WORDS = re.compile(
    r"lokr_|hada_|\.ia3_l|\.on_input|oft_|vera_lambda|lora_E|prompt_embeddings|prefix_|lora_mid|"
    r"diffusion_model|lora_magnitude|dora_scale|\.base_layer\.lora_"
)
"""One of them is in every name that is refused."""

_RAW = re.compile(r"\.lora_(A|B|embedding_A|embedding_B)\.[^.]+\.weight$")
"""What PEFT holds in memory; its files do not name the adapter."""

_DORA = (".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".dora_scale", "_dora_scale")

_KOHYA = re.compile(r"lora_(unet|te\d?|transformer)_")
_FACTOR = re.compile(r"\.lora_(A|B)\.weight$|\.lora_embedding_[AB]$")
_OLD_DIFFUSERS = re.compile(
    r"(\.lora[._]|\.lora_linear_layer\.|\.to_(q|k|v|out)_lora\.)(down|up)\.weight$"
)
_OF_A_PIPELINE = re.compile(
    r"(unet|text_encoder(_[23])?)\.|(down_blocks|mid_block|up_blocks)\.|"
    r"(transformer(_2)?\.)?(single_)?transformer_blocks\.|transformer(_2)?\..*\.to_(q|k|v|out\.0)\."
)
"""How the names of factors begin that diffusers writes; a language model may have a `transformer`
too, but no such blocks in it."""


def recognise(names: Collection[str], config: Dialect | None, path: str) -> Dialect:
    """Return the dialect that tensors of these names are in.

    Args:
        names: of all tensors.
        config: the dialect of the config beside them, None where there is none.
        path: of the adapter, for messages.

    Raises:
        UnsupportedAdapterError: it is known, and not merged.
        CorruptFileError: they are of no LoRA adapter, or not of the one that the config is of.
    """
    # All at once: 90,000 names take long one by one, and most adapters have no such word in them.
    for name in names if _WORDS.search("\n".join(names)) else ():
        _refuse_other(name, path)
        _refuse_variant(path, name)
    found = _dialect(names, peft=config == PEFT)
    raw = next(filter(_RAW.search, names), None) if found is None else None
    if raw is not None:
        raise _unsupported("raw PEFT state dict", path, raw)
    if found is None:
        raise CorruptFileError("holds no LoRA tensors", path=path)
    if config is not None and config != found and MLX in (config, found):
        raise CorruptFileError(
            f"its tensors are in the layout of {found}, but its adapter_config.json is of {config}",
            path=path,
        )
    return found


def _dialect(names: Collection[str], *, peft: bool) -> Dialect | None:
    if any(name.endswith((".lora_a", ".lora_b")) for name in names):
        return MLX
    if any(map(_KOHYA.match, names)):
        return KOHYA
    if any(map(_OLD_DIFFUSERS.search, names)):
        return DIFFUSERS
    factors = [name for name in names if _FACTOR.search(name)]
    if not peft and any(map(_OF_A_PIPELINE.match, factors)):
        return DIFFUSERS
    return PEFT if factors else None


def _refuse_other(name: str, path: str) -> None:
    for pattern, known in _OTHERS:
        if pattern.search(name):
            raise _unsupported(known, path, name)


def _unsupported(known: str, path: str, name: str) -> UnsupportedAdapterError:
    return UnsupportedAdapterError(
        f"is in the layout of {known}, which is not merged", path=path, tensor=name, variant=known
    )


def _refuse_variant(path: str, name: str) -> None:
    if name.endswith(_DORA):
        raise UnsupportedAdapterError(
            "is a DoRA magnitude; DoRA adapters are not merged, for a sum of them is no LoRA",
            path=path,
            tensor=name,
            variant="DoRA",
        )
    if ".base_layer.lora_" in name:
        raise UnsupportedAdapterError(
            "is a factor inside another LoRA layer, as target_parameters makes them; such "
            "adapters are not merged",
            path=path,
            tensor=name,
            variant="LoRA on parameters (target_parameters)",
        )
