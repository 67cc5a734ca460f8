"""Writes three adapters of TinyLlama's shape, as PEFT writes them: make_demo_adapters.py FOLDER.

The numbers are random (the same at each run): a part that the three share, and a part of each
one's own, so that ties has signs to agree and to disagree about.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

NAMES = ("poems", "recipes", "letters")
LAYERS, HIDDEN, KEY_VALUE, VOCABULARY = 22, 2048, 256, 32_000
RANK, ALPHA = 4, 8

CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "r": RANK,
    "lora_alpha": ALPHA,
    "lora_dropout": 0.05,
    "target_modules": ["embed_tokens", "q_proj", "v_proj"],
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_rslora": False,
    "use_dora": False,
}


def factor_shapes() -> Iterator[tuple[str, tuple[int, int]]]:
    """Each factor's key and shape: A is r x inputs, B is outputs x r."""
    prefix = "base_model.model.model"
    yield f"{prefix}.embed_tokens.lora_embedding_A", (RANK, VOCABULARY)
    yield f"{prefix}.embed_tokens.lora_embedding_B", (HIDDEN, RANK)
    for layer in range(LAYERS):
        for module, outputs in (("q_proj", HIDDEN), ("v_proj", KEY_VALUE)):
            target = f"{prefix}.layers.{layer}.self_attn.{module}"
            yield f"{target}.lora_A.weight", (RANK, HIDDEN)
            yield f"{target}.lora_B.weight", (outputs, RANK)


def draw(seed: int, shape: tuple[int, int]) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return values * np.float32(0.02)


def main(folder: Path) -> None:
    keys = list(factor_shapes())
    for position, name in enumerate(NAMES, start=1):
        tensors = {
            key: draw(index, shape) + draw(1000 * position + index, shape)
            for index, (key, shape) in enumerate(keys)
        }
        adapter = folder / name
        adapter.mkdir(parents=True, exist_ok=True)
        (adapter / "adapter_config.json").write_text(json.dumps(CONFIG, indent=2))
        save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        size = sum(tensor.nbytes for tensor in tensors.values())
        print(f"{adapter}: {len(tensors)} tensors, rank {RANK}, {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
