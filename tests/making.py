"""Adapter directories made by hand: any names, shapes and dtypes, sound or spoilt.

Written without safetensors and torch, so that a test can also write what those refuse to write.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
INDEX = "adapter_model.safetensors.index.json"
CONFIG = "adapter_config.json"

_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I32": "<i4", "I8": "<i1"}


@dataclass(frozen=True)
class Tensor:
    """A tensor as a safetensors file holds it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class Layer:
    """The shapes of one target's factors in the file, and what follows its name there."""

    a: tuple[int, ...]
    b: tuple[int, ...]
    suffixes: tuple[str, str] = (".lora_A.weight", ".lora_B.weight")

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a[0]


def linear(m: int, n: int, rank: int) -> Layer:
    """A Linear or Conv1D layer of `n` inputs and `m` outputs."""
    return Layer((rank, n), (m, rank))


def embedding(m: int, vocabulary: int, rank: int) -> Layer:
    """An Embedding layer."""
    return Layer((rank, vocabulary), (m, rank), (".lora_embedding_A", ".lora_embedding_B"))


def convolution(m: int, inputs: int, kernel: tuple[int, ...], rank: int) -> Layer:
    """A Conv1d, Conv2d or Conv3d layer."""
    return Layer((rank, inputs, *kernel), (m, rank, *(1 for _ in kernel)))


def encode(values: np.ndarray, dtype: str = "F32") -> Tensor:
    """Round values to a dtype; bfloat16 to the nearest, of two equally near to the even one."""
    if dtype != "BF16":
        return Tensor(dtype, values.shape, values.astype(_NUMPY[dtype]).tobytes())
    bits = values.astype("<f4").view("<u4")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return Tensor(dtype, values.shape, rounded.astype("<u2").tobytes())


def decode(tensor: Tensor) -> np.ndarray:
    """The values of a tensor, in float64."""
    if tensor.dtype != "BF16":
        values = np.frombuffer(tensor.data, _NUMPY[tensor.dtype])
    else:
        bits = np.frombuffer(tensor.data, "<u2").astype("<u4") << 16
        values = bits.astype("<u4").view("<f4")
    return values.astype(np.float64).reshape(tensor.shape)


def put(tensor: Tensor, place: int, value: float) -> Tensor:
    """The tensor with one element replaced; `place` is its flat index."""
    item = encode(np.array([value]), tensor.dtype).data
    start = place * len(item)
    return replace(tensor, data=tensor.data[:start] + item + tensor.data[start + len(item) :])


def draw(
    generator: np.random.Generator,
    shape: tuple[int, ...],
    dtype: str = "F32",
    levels: int | None = None,
) -> Tensor:
    """Normal values, or whole numbers from -levels to levels, of which many are equal."""
    if levels is None:
        return encode(generator.standard_normal(shape), dtype)
    return encode(generator.integers(-levels, levels + 1, shape).astype(np.float64), dtype)


def make_factors(
    layers: Mapping[str, Layer],
    *,
    seed: int = 0,
    dtype: str = "F32",
    levels: int | None = None,
    prefix: str = PREFIX,
) -> dict[str, Tensor]:
    """Random factors of every layer, by their full names."""
    generator = np.random.default_rng(seed)
    return {
        prefix + target + suffix: draw(generator, shape, dtype, levels)
        for target, layer in layers.items()
        for suffix, shape in zip(layer.suffixes, (layer.a, layer.b), strict=True)
    }


def make_config(layers: Mapping[str, Layer], **more: Any) -> dict[str, Any]:
    """A config as PEFT writes it; ranks that differ from the usual one go into `rank_pattern`."""
    rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/base",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(layers),
        "rank_pattern": {t: layer.rank for t, layer in layers.items() if layer.rank != rank},
        "alpha_pattern": {},
        "use_rslora": False,
        "bias": "none",
        "init_lora_weights": True,
    } | more


def write_adapter(
    directory: Path,
    layers: Mapping[str, Layer],
    *,
    seed: int = 0,
    dtype: str = "F32",
    levels: int | None = None,
    prefix: str = PREFIX,
    extra: Mapping[str, Tensor] | None = None,
    **config: Any,
) -> Path:
    """Write an adapter with random factors; `extra` adds tensors or replaces factors."""
    factors = make_factors(layers, seed=seed, dtype=dtype, levels=levels, prefix=prefix)
    return write_files(directory, factors | dict(extra or {}), make_config(layers, **config))


def write_files(
    directory: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None
) -> Path:
    """Write an adapter of just these tensors; without a config when that is None."""
    directory.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (directory / CONFIG).write_text(json.dumps(config))
    (directory / WEIGHTS).write_bytes(render(tensors))
    return directory


def write_shards(
    directory: Path, shards: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any]
) -> Path:
    """Write an adapter as several files with an index."""
    directory.mkdir(parents=True)
    (directory / CONFIG).write_text(json.dumps(config))
    for name, tensors in shards.items():
        (directory / name).write_bytes(render(tensors))
    weight_map = {key: name for name, tensors in shards.items() for key in tensors}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def render(tensors: Mapping[str, Tensor], *, align: int = 8) -> bytes:
    """A safetensors file; with `align` of 1 its data begin where the header's text ends."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + len(tensor.data)
        fields[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(fields).encode()
    text += b" " * (-len(text) % align)
    return frame(text, b"".join(tensor.data for tensor in tensors.values()))


def frame(header: bytes, data: bytes = b"") -> bytes:
    """A file with this header, whatever it says."""
    return len(header).to_bytes(8, "little") + header + data


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file and directory below a folder, hidden ones too, with what the files hold."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
