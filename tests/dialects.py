"""One adapter in the layouts of several tools, from the same pairs of factors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from making import Tensor, encode, frame
from streammerge.adapter import ITEM_BYTES, TORCH_NAMES, Adapter
from streammerge.planner.scaling import scalings

METADATA = "lora_adapter_metadata"

UNET = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (20, 12, 4),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0": (12, 20, 4),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj": (16, 12, 2),
    "unet.mid_block.attentions.0.proj_in": (8, 8, 3),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (10, 10, 4),
    "text_encoder_2.text_model.encoder.layers.11.mlp.fc1": (24, 10, 4),
}
"""m, n and rank by target."""


@dataclass(frozen=True)
class Pair:
    """A target's factors in their canonical orientation, and what they are scaled by."""

    b: np.ndarray
    a: np.ndarray
    scaling: float = 1.0

    @property
    def delta(self) -> np.ndarray:
        """In float64."""
        return self.b.astype(np.float64) @ self.a.astype(np.float64) * self.scaling


def pairs(
    shapes: Mapping[str, tuple[int, int, int]] = UNET, *, seed: int = 0, scaling: float = 1.0
) -> dict[str, Pair]:
    """Random factors of every target."""
    draw = np.random.default_rng(seed).standard_normal
    return {
        target: Pair(
            draw((m, rank)).astype(np.float32), draw((rank, n)).astype(np.float32), scaling
        )
        for target, (m, n, rank) in shapes.items()
    }


def kohya(made: Mapping[str, Pair], *, alphas: bool = True) -> dict[str, Tensor]:
    """As kohya's scripts write them; without alphas the scaling is 1."""
    tensors = {}
    for target, pair in made.items():
        component, _, path = target.partition(".")
        part = {"unet": "unet", "text_encoder": "te1", "text_encoder_2": "te2"}[component]
        stem = f"lora_{part}_{path.replace('.', '_')}"
        tensors[f"{stem}.lora_down.weight"] = encode(pair.a)
        tensors[f"{stem}.lora_up.weight"] = encode(pair.b)
        if alphas:
            tensors[f"{stem}.alpha"] = encode(np.array(pair.scaling * len(pair.a)))
    return tensors


def diffusers(made: Mapping[str, Pair], a: str = "lora_A", b: str = "lora_B") -> dict[str, Tensor]:
    """As diffusers writes them, in one of its spellings."""
    return {
        f"{target}.{name}.weight": encode(factor)
        for target, pair in made.items()
        for name, factor in ((a, pair.a), (b, pair.b))
    }


def mlx(made: Mapping[str, Pair]) -> dict[str, Tensor]:
    """As mlx-lm writes them."""
    tensors = {}
    for target, pair in made.items():
        tensors[f"{target}.lora_a"] = encode(np.ascontiguousarray(pair.a.T))
        tensors[f"{target}.lora_b"] = encode(np.ascontiguousarray(pair.b.T))
    return tensors


def write_file(path: Path, tensors: Mapping[str, Tensor], **metadata: Any) -> Path:
    """Write a safetensors file with this metadata in its header; what is no text as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"} | texts}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + len(tensor.data)
        fields[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    data = b"".join(tensor.data for tensor in tensors.values())
    path.write_bytes(frame(json.dumps(fields).encode(), data))
    return path


def write_mlx(directory: Path, made: Mapping[str, Pair], rank: int, scale: float) -> Path:
    """Write an adapter as mlx-lm does."""
    write_file(directory / "adapters.safetensors", mlx(made))
    config = {"model": "some/base", "lora_parameters": {"rank": rank, "scale": scale}}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def deltas(adapter: Adapter) -> dict[str, np.ndarray]:
    """Every target's delta, from the bytes that a manifest points at."""
    scaling = scalings(adapter, None)
    return {
        adapter.target(row): _factor(adapter, row, "B") @ _factor(adapter, row, "A") * scaling[row]
        for row in range(len(adapter))
    }


def _factor(adapter: Adapter, row: int, side: str) -> np.ndarray:
    factor = adapter.factor(row, side)
    size = ITEM_BYTES[TORCH_NAMES[factor.dtype]] * factor.elements
    data = Path(factor.file.path).read_bytes()[factor.offset : factor.offset + size]
    kind = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[factor.dtype]
    values = np.frombuffer(data, kind).astype(np.float64)
    if factor.turned:
        return values.reshape(factor.shape[::-1]).T
    return values.reshape(factor.shape[0], -1)


def agree(found: Mapping[str, np.ndarray], expected: Mapping[str, Pair], to: float = 1e-6) -> None:
    """Compare deltas, each with the largest of its elements for a measure."""
    assert found.keys() == expected.keys()
    for target, pair in expected.items():
        apart = np.abs(found[target] - pair.delta).max()
        assert apart <= to * np.abs(pair.delta).max(), target
