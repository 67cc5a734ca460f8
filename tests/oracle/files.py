"""Adapter directories written by hand, where a test needs no PEFT to make them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from oracle.restated import Matrix, Source


def random_source(
    seed: int, m: int, n: int, rank: int, *, scaling: float = 1.0, decay: float = 1.0
) -> Source:
    """Normal factors that float32 holds exactly; component j is smaller by decay**j."""
    generator = np.random.default_rng(seed)
    shrink = decay ** np.arange(rank)
    a = generator.standard_normal((rank, n)) * shrink[:, None]
    b = generator.standard_normal((m, rank)) / np.sqrt(rank)
    return Source(_as_float32(a), _as_float32(b), scaling)


def _as_float32(x: Matrix) -> Matrix:
    return x.astype(np.float32).astype(np.float64)


def write_adapter(
    directory: Path,
    targets: Mapping[str, Source],
    *,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """Write Linear targets as PEFT would; their scalings go into `alpha_pattern`."""
    ranks = {name: source.a.shape[0] for name, source in targets.items()}
    rank = max(ranks.values())
    full_config = {
        "peft_type": "LORA",
        "target_modules": sorted(targets),
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": ranks,
        "alpha_pattern": {name: s.scaling * ranks[name] for name, s in targets.items()},
        **config,
    }
    tensors = {}
    for name, source in targets.items():
        for letter, factor in (("A", source.a), ("B", source.b)):
            key = f"base_model.model.{name}.lora_{letter}.weight"
            tensors[key] = torch.from_numpy(np.ascontiguousarray(factor)).to(dtype)
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps(full_config))
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory
