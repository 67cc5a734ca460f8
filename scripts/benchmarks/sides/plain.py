"""Adapters as plain scripts have them: wholly in memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Loaded:
    """Adapters of one kind, each with the scaling alpha/r."""

    tensors: list[Tensors]
    scales: list[float]
    config: dict[str, Any]


def load(paths: Sequence[str]) -> Loaded:
    """Read every byte of some adapters."""
    configs = [json.loads((Path(path) / "adapter_config.json").read_text()) for path in paths]
    return Loaded(
        tensors=[load_file(Path(path) / "adapter_model.safetensors") for path in paths],
        scales=[config["lora_alpha"] / config["r"] for config in configs],
        config=configs[0],
    )


def save(merged: Tensors, config: dict[str, Any], output: str) -> None:
    """Write an adapter with the scaling 1."""
    rank = next(len(tensor) for key, tensor in merged.items() if "lora_A" in key)
    Path(output).mkdir(parents=True, exist_ok=True)
    save_file(merged, Path(output) / "adapter_model.safetensors", metadata={"format": "pt"})
    text = json.dumps(config | {"r": rank, "lora_alpha": rank})
    (Path(output) / "adapter_config.json").write_text(text)
