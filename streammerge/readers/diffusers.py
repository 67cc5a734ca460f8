"""diffusers' adapters: one file for the components of a pipeline, in several spellings.

A target begins with its component, `unet.`, `text_encoder.`, `text_encoder_2.`, `transformer.`.
Modules without one are the UNet's or the transformer's, as the loaders of these models take them.
The scaling is what the header's `lora_adapter_metadata` says; without it alpha/r where tensors
named `.alpha` lie beside the factors, and otherwise 1.
https://github.com/huggingface/diffusers/blob/main/src/diffusers/loaders/lora_base.py
https://github.com/huggingface/diffusers/blob/main/src/diffusers/utils/state_dict_utils.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from streammerge.adapter import DIFFUSERS, METADATA_KEY
from streammerge.errors import CorruptFileError, UnsupportedAdapterError
from streammerge.readers.alphas import read_alphas, split_alphas
from streammerge.readers.config import make_config
from streammerge.readers.contents import (
    Content,
    Scale,
    Source,
    columns_of,
    extras_of,
    keys_of,
)
from streammerge.readers.pairs import Factors, Name, Place, Side, pair_up
from streammerge.readers.peft import scale_by

_KEY = re.compile(
    r"(.+?)(?:\.lora_(A|B|down|up)|\.lora(?:_linear_layer)?\.(down|up)|_lora\.(down|up))\.weight"
)
_ALPHA_OF = re.compile(r"(.*?)(?:\.lora|\.lora_linear_layer|(_lora))?", re.DOTALL)
_COMPONENT = re.compile(r"(unet|text_encoder(?:_[23])?|transformer(?:_2)?)\.(.+)")

_BARE = {
    "unet": re.compile(
        r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)(\.|$)"
    ),
    "transformer": re.compile(
        r"((single_)?transformer_blocks|x_embedder|context_embedder|time_text_embed|norm_out|"
        r"proj_out)(\.|$)"
    ),
}
"""How modules begin that stand without their component."""

_OLD_OUT = {"to_out": "to_out.0"}
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
"""What the attention's modules are that the first format named by their role, in a UNet and in a
text encoder."""

MAX_METADATA = 2**24
"""Characters of a header's metadata that are parsed."""


def read_diffusers(source: Source) -> Content:
    """Return the content of an adapter in one of diffusers' layouts.

    Raises:
        CorruptFileError, UnsupportedAdapterError: it cannot be used.
    """
    path = Path(source.headers[0].file.path)
    pairs, extras = pair_up(source.places, lambda name: _name(path, name))
    alphas, rest = split_alphas(extras)
    scale = _scale(source, path, pairs, {_alpha_of(path, name): p for name, p in alphas.items()})
    notices: tuple[str, ...] = ()
    if source.config is not None:
        notices = ("adapter_config.json is not looked at: the tensors are in diffusers' layout",)
    return Content(
        columns_of(pairs, source.table, scale),
        DIFFUSERS,
        extras_of(rest, source.table),
        keys=keys_of(pairs),
        notices=notices,
        from_headers=not alphas,
    )


def _name(path: Path, name: str) -> Name | None:
    match = _KEY.fullmatch(name.replace(".processor.", "."))
    if match is None:
        return None
    module, plain, spelled, old = match.groups()
    side: Side = "a" if (plain or spelled or old) in ("A", "down") else "b"
    return Name(_target(path, module, old=old is not None), side)


def _alpha_of(path: Path, name: str) -> str:
    """Return the target of an alpha, which may be named by the module or by the LoRA in it."""
    match = _ALPHA_OF.fullmatch(name.replace(".processor.", "."))
    assert match is not None, "it matches any text"
    return _target(path, match[1], old=match[2] is not None)


def _target(path: Path, module: str, *, old: bool) -> str:
    """Return the target of a module as it is named in a file."""
    if _COMPONENT.fullmatch(module) is None:
        for component, beginnings in _BARE.items():
            if beginnings.match(module):
                module = f"{component}.{module}"
                break
        else:
            raise UnsupportedAdapterError(
                "does not say which component of a pipeline it belongs to (unet., text_encoder., "
                "transformer.)",
                path=str(path),
                tensor=module,
                variant="diffusers without a component",
            )
    if old:
        whole, _, last = module.rpartition(".")
        of_text = module.startswith("text_encoder")
        module = f"{whole}.{(_OLD_TEXT if of_text else _OLD_OUT).get(last, last)}"
    return module


def _scale(
    source: Source, path: Path, pairs: Mapping[str, Factors], alphas: Mapping[str, Place]
) -> Callable[[str], Scale]:
    """Return what decides a target's scaling: the metadata, the alphas, or nothing, which is 1."""
    metadata = next((m for h in source.headers if (m := h.metadata.get(METADATA_KEY))), None)
    if metadata is not None:
        if alphas:
            raise CorruptFileError(
                f"holds alphas, and {METADATA_KEY} in its header says them too", path=str(path)
            )
        return _by_metadata(path, metadata)
    ranks = {target: pair.both()[0][2].shape[0] for target, pair in pairs.items()}
    if not alphas:
        return lambda target: Scale(ranks[target], ranks[target])
    if alphas.keys() != ranks.keys():
        odd = min(alphas.keys() ^ ranks.keys())
        raise CorruptFileError(
            f"holds an alpha for some modules only, or for others ({odd}); their scaling is in "
            "doubt",
            path=str(path),
        )
    numbers = read_alphas(alphas)
    return lambda target: Scale(ranks[target], numbers[target])


def _by_metadata(path: Path, text: str) -> Callable[[str], Scale]:
    """Return what a header's configs, one for each component, say of a target."""
    scales = {
        component: scale_by(make_config(path, {"peft_type": "LORA"} | fields), path)
        for component, fields in _configs(path, text).items()
    }
    # A LoraConfig of no arguments, as diffusers makes one where a component is not in it.
    default = scale_by(make_config(path, {"peft_type": "LORA"}), path)

    def scale(target: str) -> Scale:
        match = _COMPONENT.fullmatch(target)
        assert match is not None, "every target has a component"
        return scales.get(match[1], default)(match[2])

    return scale


def _configs(path: Path, text: str) -> dict[str, dict[str, Any]]:
    try:
        if len(text) > MAX_METADATA:
            raise ValueError(f"{len(text)} characters, and {MAX_METADATA} are the limit")
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(
            f"{METADATA_KEY} in its header is not JSON ({error})", path=str(path)
        ) from error
    if not isinstance(fields, dict):
        raise CorruptFileError(f"{METADATA_KEY} in its header is no JSON object", path=str(path))
    configs: dict[str, dict[str, Any]] = {}
    for name, value in fields.items():
        component, _, field = name.partition(".")
        configs.setdefault(component, {})[field] = value
    return configs
