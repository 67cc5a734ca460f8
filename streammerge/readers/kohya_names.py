"""Module paths out of kohya's names, which have underscores where the paths have dots.

A name is cut into words that keep their underscores; one that these words do not make up is not
restored. Models that kohya's scripts train in their first authors' code have other names for the
same modules than diffusers, and some are three or four of them in one.
https://github.com/kohya-ss/sd-scripts/blob/main/library/sdxl_model_util.py
https://github.com/kohya-ss/sd-scripts/blob/main/networks/convert_flux_lora.py
https://github.com/huggingface/diffusers/blob/main/scripts/convert_sd3_to_diffusers.py
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Module:
    """A module's path, and which of the rows of the one that it is trained in are its own."""

    path: str
    first: int = 0
    rows: int | None = None
    """So many shares of the rows, from share `first` on; all rows when None."""


@dataclass(frozen=True)
class Restored:
    """What a name stands for."""

    modules: tuple[Module, ...]
    height: int | None = None
    """Rows in widths of the input that the layer must have, in as many shares; any when None."""


_UNET = (
    "down_blocks mid_block up_blocks resnets attentions downsamplers upsamplers conv conv1 conv2 "
    "conv_in conv_out conv_shortcut time_emb_proj time_embedding add_embedding linear_1 linear_2 "
    "proj_in proj_out transformer_blocks attn1 attn2 to_q to_k to_v to_out ff net proj"
)
_TEXT = (
    "text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 text_projection"
)
_TRANSFORMER = (
    "transformer_blocks single_transformer_blocks attn attn2 to_q to_k to_v to_out to_add_out "
    "add_q_proj add_k_proj add_v_proj ff ff_context net proj proj_mlp proj_out norm norm1 "
    "norm1_context norm_out linear linear_1 linear_2 x_embedder context_embedder time_text_embed "
    "timestep_embedder text_embedder guidance_embedder"
)


def _pattern(words: str) -> re.Pattern[str]:
    longest_first = sorted(words.split(), key=len, reverse=True)
    return re.compile(rf"({'|'.join(longest_first)}|[0-9]{{1,4}})(?:_|$)")


_WORDS = {
    "unet": _pattern(_UNET),
    "text_encoder": _pattern(_TEXT),
    "text_encoder_2": _pattern(_TEXT),
    "transformer": _pattern(_TRANSFORMER),
}

_COMPONENTS = {
    "te": "text_encoder",
    "te1": "text_encoder",
    "te2": "text_encoder_2",
    "transformer": "transformer",
}

_RESNET = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}

_BLOCKS = 4
"""Of the most that a UNet has on either side."""

_WHOLE_NAMES = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
    **{f"input_blocks_{3 * i + 3}_0_op": f"down_blocks.{i}.downsamplers.0.conv" for i in range(3)},
    # Behind the attentions, where the block has some.
    **{
        f"output_blocks_{3 * i + 2}_{place}_conv": f"up_blocks.{i}.upsamplers.0.conv"
        for i in range(3)
        for place in (1, 2)
    },
}
_RESNETS = {
    "middle_block_0": "mid_block.resnets.0",
    "middle_block_2": "mid_block.resnets.1",
    **{
        f"input_blocks_{3 * i + j + 1}_0": f"down_blocks.{i}.resnets.{j}"
        for i in range(_BLOCKS)
        for j in range(2)
    },
    **{
        f"output_blocks_{3 * i + j}_0": f"up_blocks.{i}.resnets.{j}"
        for i in range(_BLOCKS)
        for j in range(3)
    },
}
_ATTENTIONS = {
    "middle_block_1": "mid_block.attentions.0",
    **{
        f"{home.removesuffix('_0')}_1": path.replace("resnets", "attentions")
        for home, path in _RESNETS.items()
        if not home.startswith("middle")
    },
}
"""What the first authors called modules of a UNet, and diffusers calls otherwise."""

_IN_A_BLOCK = re.compile(r"((?:input_blocks|output_blocks)_[0-9]+_[0-9]+|middle_block_[0-9]+)_(.+)")

_SELF, _ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")

_DOUBLE = {
    "img_attn_proj": "attn.to_out.0",
    "img_mlp_0": "ff.net.0.proj",
    "img_mlp_2": "ff.net.2",
    "img_mod_lin": "norm1.linear",
    "txt_attn_proj": "attn.to_add_out",
    "txt_mlp_0": "ff_context.net.0.proj",
    "txt_mlp_2": "ff_context.net.2",
    "txt_mod_lin": "norm1_context.linear",
}
_DOUBLE_THREE = {"img_attn_qkv": ("attn", _SELF), "txt_attn_qkv": ("attn", _ADDED)}
_SINGLE = {"linear2": "proj_out", "modulation_lin": "norm.linear"}
_JOINT = {
    "x_block_attn_proj": "attn.to_out.0",
    "x_block_attn2_proj": "attn2.to_out.0",
    "x_block_mlp_fc1": "ff.net.0.proj",
    "x_block_mlp_fc2": "ff.net.2",
    "x_block_adaLN_modulation_1": "norm1.linear",
    "context_block_attn_proj": "attn.to_add_out",
    "context_block_mlp_fc1": "ff_context.net.0.proj",
    "context_block_mlp_fc2": "ff_context.net.2",
}
_JOINT_THREE = {
    "x_block_attn_qkv": ("attn", _SELF),
    "x_block_attn2_qkv": ("attn2", _SELF),
    "context_block_attn_qkv": ("attn", _ADDED),
}
_JOINT_NORM = "context_block_adaLN_modulation_1"
"""In the last block its halves are the other way round, and there it has two of them, not six."""

_FLUX_OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer_linear": "proj_out",
}
_OF_A_TRANSFORMER = re.compile(r"(double_blocks|single_blocks|joint_blocks)_([0-9]{1,3})_(.+)")


def restore(part: str, name: str) -> Restored | None:
    """Return what a name stands for; None where that is in doubt.

    Args:
        part: "unet", "te", "te1", "te2" or "transformer", of the name's beginning.
        name: what follows it.
    """
    if part != "unet":
        component = _COMPONENTS.get(part)
        return _whole(component, _words(component, name)) if component else None
    name = name.removeprefix("unet_")
    block = _OF_A_TRANSFORMER.fullmatch(name)
    if block is not None:
        return _of_a_block(*block.groups())
    if name in _FLUX_OUTSIDE:
        return _whole("transformer", _FLUX_OUTSIDE[name])
    return _whole("unet", _first_authors(name) or _words("unet", name))


def _whole(component: str, path: str | None) -> Restored | None:
    return None if path is None else Restored((Module(f"{component}.{path}"),))


def _words(component: str, name: str) -> str | None:
    """Return a path whose words are joined by underscores in `name`."""
    words, end, pattern = [], 0, _WORDS[component]
    while match := pattern.match(name, end):
        words.append(match[1])
        end = match.end()
    whole = 0 < end == len(name) and not name.endswith("_")
    return ".".join(words) if whole else None


def _first_authors(name: str) -> str | None:
    """Return diffusers' path of a UNet's module that is named as its first authors named it."""
    if name in _WHOLE_NAMES:
        return _WHOLE_NAMES[name]
    block = _IN_A_BLOCK.fullmatch(name)
    if block is None:
        return None
    home, rest = block.groups()
    if home in _RESNETS and rest in _RESNET:
        return f"{_RESNETS[home]}.{_RESNET[rest]}"
    if home in _ATTENTIONS and rest.startswith(("proj_in", "proj_out", "transformer_blocks")):
        return _joined(_ATTENTIONS[home], _words("unet", rest))
    return None


def _joined(home: str, rest: str | None) -> str | None:
    return None if rest is None else f"{home}.{rest}"


def _of_a_block(kind: str, number: str, rest: str) -> Restored | None:
    """Return what a name in one of Flux's or Stable Diffusion 3's blocks stands for."""
    if kind == "single_blocks":
        home = f"transformer.single_transformer_blocks.{number}"
        if rest == "linear1":
            three = (Module(f"{home}.attn.{name}", i, 1) for i, name in enumerate(_SELF))
            return Restored((*three, Module(f"{home}.proj_mlp", 3, 4)), 7)
        return _whole(home, _SINGLE.get(rest))
    plain, three_in_one = (
        (_DOUBLE, _DOUBLE_THREE) if kind == "double_blocks" else (_JOINT, _JOINT_THREE)
    )
    home = f"transformer.transformer_blocks.{number}"
    if rest in three_in_one:
        place, names = three_in_one[rest]
        modules = (Module(f"{home}.{place}.{name}", i, 1) for i, name in enumerate(names))
        return Restored(tuple(modules), 3)
    if kind == "joint_blocks" and rest == _JOINT_NORM:
        return Restored((Module(f"{home}.norm1_context.linear"),), 6)
    return _whole(home, plain.get(rest))
