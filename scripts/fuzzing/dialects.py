"""Adapters of kohya, diffusers and mlx-lm and files of torch.save, sound and with things wrong."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

import numpy as np
import torch

from dialects import METADATA, Pair, diffusers, kohya, mlx, pairs
from fuzzing.directories import Directory, File
from fuzzing.odd import NUMBERS, REGEXES, odd_name, odd_text, odd_value
from making import CONFIG, Tensor, decode, encode, frame

IMAGE = "pytorch_lora_weights.safetensors"
MLX = "adapters.safetensors"
BIN = "adapter_model.bin"

Tensors = dict[str, Tensor]

LANGUAGE = {"model.layers.0.self_attn.q_proj": (6, 5, 2), "model.embed_tokens": (4, 9, 2)}
PLAIN = b'{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}'

STEMS = (
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "lora_unet_double_blocks_0_img_attn_qkv",
    "lora_unet_single_blocks_7_linear1",
    "lora_unet_joint_blocks_3_context_block_adaLN_modulation_1",
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
    "lora_unet_" + "to_q_" * 200,
    "lora_unet_" + "0_" * 400 + "x",
    "lora_unet_unet_mid_block_attentions_0_proj_in",
    "lora_unet_input_blocks_99999999999999999999_1_proj_in",
    "lora_unet_input_blocks_\u0664_1_proj_in",
    "lora_transformer_norm_out_linear",
    "lora_unet_",
    "lora_te_text_model_encoder_layers_0_mlp_fc1",
)
ENDINGS = (
    ".lora_down.weight",
    ".lora_up.weight",
    "_lora_down.weight",
    ".alpha",
    ".lora_mid.weight",
    ".dora_scale",
    ".lokr_w1",
    ".lora_A.weight",
    ".lora.down.weight",
    ".lora_linear_layer.up.weight",
    ".processor.to_q_lora.down.weight",
    ".to_out_lora.up.weight",
    ".lora_a",
    ".lora_magnitude_vector",
    "",
)
MODULES = (
    "unet.mid_block.x",
    "text_encoder_2.y",
    "transformer.z.to_q",
    "down_blocks.0",
    "lost",
    "",
)
SHAPES = ((), (1,), (0,), (2, 2), (2, 5), (24, 2), (3, 3, 3), (2, 2, 3, 3), (2, 2, 1, 1), (1,) * 6)


def safetensors(tensors: Tensors, metadata: dict[str, Any] | None = None) -> File:
    """A file of these tensors and this metadata."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"} | (metadata or {})}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + len(tensor.data)
        fields[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    data = b"".join(tensor.data for tensor in tensors.values())
    return File(frame(json.dumps(fields).encode(errors="replace"), data))


@cache
def sound() -> dict[str, Directory]:
    """One small adapter in each layout."""
    made, language = pairs(), pairs(LANGUAGE)
    config = {"model": "b", "lora_parameters": {"rank": 2, "scale": 3.0, "alpha": 16}}
    return {
        "kohya": {IMAGE: safetensors(kohya(made))},
        "diffusers": {IMAGE: safetensors(diffusers(made), {METADATA: json.dumps(CONFIGS)})},
        "mlx": {MLX: safetensors(mlx(language)), CONFIG: File(json.dumps(config).encode())},
        "bin": {BIN: File(torch_file(language)), CONFIG: File(PLAIN)},
    }


CONFIGS: dict[str, Any] = {
    f"{component}.{field}": value
    for component in ("unet", "text_encoder", "text_encoder_2")
    for field, value in {
        "r": 4,
        "lora_alpha": 4,
        "rank_pattern": {"proj": 2, "proj_in": 3},
        "alpha_pattern": {"proj": 2, "proj_in": 3},
        "use_rslora": False,
    }.items()
}


def torch_file(made: dict[str, Pair]) -> bytes:
    """A file of torch.save with PEFT's names."""
    tensors = {
        f"base_model.model.{n}": torch.from_numpy(decode(t)).float()
        for n, t in diffusers(made).items()
    }
    stream = io.BytesIO()
    torch.save(tensors, stream)
    return stream.getvalue()


def _odd_tensor(random: Random) -> Tensor:
    shape = random.choice(SHAPES)
    value = random.choice((1.0, 2.0, 0.0, -1.0, 1e300, float("nan"), float("inf")))
    dtype = random.choice(("F32", "F64", "F16", "BF16"))
    with np.errstate(over="ignore"):
        return encode(np.full(shape, value), dtype)


def _spoil(random: Random, tensors: Tensors) -> None:
    """Add, drop, rename or change some tensors."""
    for _ in range(random.choice((0, 1, 1, 2, 5))):
        name = random.choice(sorted(tensors))
        match random.randrange(5):
            case 0 if len(tensors) > 1:
                del tensors[name]
            case 1:
                tensors[name] = _odd_tensor(random)
            case 2:
                new = random.choice((*STEMS, *MODULES, odd_name(random))) + random.choice(ENDINGS)
                tensors[new] = tensors.pop(name)
            case 3:
                stem = random.choice((*STEMS, *MODULES))
                for ending in (".lora_down.weight", ".lora_up.weight", ".alpha"):
                    tensors[stem + ending] = _odd_tensor(random)
            case _:
                tensors[name + random.choice(ENDINGS)] = _odd_tensor(random)


def odd_image(random: Random) -> Directory:
    """kohya's or diffusers' layout, with odd tensors and odd metadata."""
    metadata: dict[str, Any] = {}
    tensors = kohya(pairs()) if random.random() < 0.5 else diffusers(pairs())
    _spoil(random, tensors)
    if random.random() < 0.6:
        configs = json.loads(json.dumps(CONFIGS))
        for _ in range(random.choice((0, 1, 2))):
            key = random.choice(sorted(configs))
            configs[key] = random.choice(
                (odd_value(random), random.choice(NUMBERS), {random.choice(REGEXES): 4})
            )
        text = json.dumps(configs) if random.random() < 0.8 else odd_text(random)
        metadata[METADATA] = random.choice((text, text, text, odd_value(random)))
    pieces: Directory = {IMAGE: safetensors(tensors, metadata)}
    if random.random() < 0.2:
        pieces = {**pieces, CONFIG: File(PLAIN)}
    return pieces


def odd_mlx(random: Random) -> Directory:
    """mlx-lm's layout, with odd tensors and an odd config."""
    tensors = mlx(pairs(LANGUAGE))
    _spoil(random, tensors)
    config: dict[str, Any] = {"lora_parameters": {"rank": 2, "scale": 10.0, "dropout": 0.0}}
    for _ in range(random.choice((0, 1, 2))):
        inside = random.random() < 0.7 and isinstance(config["lora_parameters"], dict)
        where = config["lora_parameters"] if inside else config
        key = random.choice(
            ("rank", "scale", "alpha", "lora_parameters", "fine_tune_type", "model")
        )
        where[key] = random.choice((odd_value(random), random.choice(NUMBERS)))
        config.setdefault("lora_parameters", {})
    text = json.dumps(config).encode(errors="replace")
    return {MLX: safetensors(tensors), CONFIG: File(text)}


def odd_torch_file(random: Random) -> Directory:
    """A file of torch.save: records changed, its list changed, its pickle changed."""
    data = torch_file(pairs(LANGUAGE))
    way = random.randrange(4)
    if way < 2:
        data = _other_records(random, data)
    if way in (1, 2):
        changed = bytearray(data)
        listed = changed.rfind(b"PK\x05\x06")
        first = changed.find(b"PK\x01\x02")
        for _ in range(random.choice((1, 1, 2, 4))):
            at = random.randrange(first, max(first + 1, listed + 22 - 4))
            changed[at : at + 4] = struct.pack(
                "<I", random.choice((0, 1, 2**31, 2**32 - 1, listed))
            )
        data = bytes(changed)
    if way == 3:
        changed = bytearray(data)
        for _ in range(random.choice((1, 2, 8))):
            at = random.randrange(min(len(changed), 900))
            changed[at] = random.choice((random.randrange(256), ord("."), ord("R"), ord("(")))
        data = bytes(changed)
    return {BIN: File(data), CONFIG: File(PLAIN)}


def _other_records(random: Random, data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    for _ in range(random.choice((1, 1, 2))):
        name = random.choice(sorted(records))
        text = bytearray(records[name])
        match random.randrange(5):
            case 0:
                del records[name]
            case 1:
                records[name] = bytes(text[: random.randrange(len(text) + 1)])
            case 2:
                records[name] = bytes(text + random.randbytes(random.choice((1, 4, 64))))
            case 3:
                records[random.choice((name + "x", "archive/data/0", "data.pkl"))] = bytes(text)
            case _:
                pickle = next((n for n in records if n.endswith("data.pkl")), name)
                text = bytearray(records[pickle])
                if text:
                    text[random.randrange(len(text))] = random.randrange(256)
                records[pickle] = bytes(text)
        if not records:
            break
    stream = io.BytesIO()
    way = zipfile.ZIP_DEFLATED if random.random() < 0.05 else zipfile.ZIP_STORED
    with zipfile.ZipFile(stream, "w", way) as archive:
        for name, record in records.items():
            archive.writestr(name, record)
    return stream.getvalue()


GENERATORS: tuple[tuple[int, Callable[[Random], Directory]], ...] = (
    (14, odd_image),
    (8, odd_mlx),
    (10, odd_torch_file),
)
"""Each with its share."""
