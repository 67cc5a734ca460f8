"""PEFT as an oracle: adapters made and saved by it, merged by it, and what came out of each step.

Every matrix that leaves this file is float64 and in the orientation of B A: m x n, with a
convolution's input channels and kernel flattened into n.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.utils import merge_utils
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from oracle.restated import Mask, Matrix, Source

MERGED = "merged"


@dataclass(frozen=True)
class Kind:
    """A kind of layer that PEFT puts LoRA on, and the shape of its weight as m x n."""

    make: Callable[[], nn.Module]
    m: int
    n: int
    stored_transposed: bool = False
    """PEFT's delta is n x m, as the base weight is."""
    fan_in_fan_out: bool = False
    peft_has_svd: bool = True
    """Whether PEFT's `*_svd` types work on this kind."""


KINDS: dict[str, Kind] = {
    "linear": Kind(lambda: nn.Linear(14, 10), 10, 14),
    "gpt2_conv1d": Kind(
        lambda: Conv1D(10, 14), 10, 14, stored_transposed=True, fan_in_fan_out=True
    ),
    "embedding": Kind(lambda: nn.Embedding(17, 9), 9, 17, stored_transposed=True),
    "conv1d": Kind(lambda: nn.Conv1d(4, 9, 3), 9, 12, peft_has_svd=False),
    "conv2d": Kind(lambda: nn.Conv2d(3, 10, (3, 2)), 10, 18),
    "conv2d_1x1": Kind(lambda: nn.Conv2d(13, 10, 1), 10, 13),
    "conv3d": Kind(lambda: nn.Conv3d(2, 9, (2, 1, 3)), 9, 12, peft_has_svd=False),
    "conv3d_1x1x1": Kind(lambda: nn.Conv3d(12, 9, 1), 9, 12, peft_has_svd=False),
}


class Net(nn.Module):
    """Layers under dotted names, as a model has them; never run."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, layer in layers.items():
            *parents, leaf = name.split(".")
            owner: nn.Module = self
            for parent in parents:
                if not hasattr(owner, parent):
                    owner.add_module(parent, nn.Module())
                owner = getattr(owner, parent)
            owner.add_module(leaf, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


Layers = Callable[[], Mapping[str, nn.Module]]
"""Makes a fresh set of base layers; PEFT changes the ones it is given."""


def one_layer(kind: str, name: str = "block.layer") -> Layers:
    """A base of a single layer of this kind."""
    return lambda: {name: KINDS[kind].make()}


def linear_layers(**shapes: tuple[int, int]) -> Layers:
    """A base of Linear layers, each name (with __ for a dot) given as (m, n)."""
    return lambda: {name.replace("__", "."): nn.Linear(n, m) for name, (m, n) in shapes.items()}


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Each LoRA layer by its path in the base model, in PEFT's order."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def factors_of(layer: LoraLayer, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's own A and B tensors of one adapter."""
    if adapter in layer.lora_A:
        return layer.lora_A[adapter].weight.data, layer.lora_B[adapter].weight.data
    return layer.lora_embedding_A[adapter].data, layer.lora_embedding_B[adapter].data


def as_matrices(a: torch.Tensor, b: torch.Tensor) -> tuple[Matrix, Matrix]:
    """A as r x n and B as m x r, float64."""
    rank = a.shape[0]
    return a.double().reshape(rank, -1).numpy(), b.double().reshape(-1, rank).numpy()


def save_adapter(
    directory: Path, layers: Layers, *, seed: int, dtype: torch.dtype = torch.float32, **config: Any
) -> Path:
    """Make a LoRA adapter with PEFT, fill both factors with N(0, 1), save it with PEFT."""
    base = layers()
    config.setdefault("target_modules", list(base))
    model = get_peft_model(Net(base), LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        for factor in factors_of(layer, "default"):
            factor.copy_(torch.randn(factor.shape, generator=generator))
    model.to(dtype)
    model.save_pretrained(directory, save_embedding_layers=False)
    return directory


def load_adapters(layers: Layers, directories: Sequence[Path]) -> PeftModel:
    """The base with the saved adapters on it, named a0, a1, ..."""
    first, *others = directories
    model = PeftModel.from_pretrained(Net(layers()), str(first), adapter_name="a0")
    for index, directory in enumerate(others, start=1):
        model.load_adapter(str(directory), adapter_name=f"a{index}")
    return model


def sources(model: PeftModel, count: int) -> dict[str, list[Source | None]]:
    """Per target, each adapter's share as PEFT holds it, None where an adapter has none."""
    return {
        target: [_source(layer, f"a{index}") for index in range(count)]
        for target, layer in lora_layers(model).items()
    }


def _source(layer: LoraLayer, adapter: str) -> Source | None:
    if adapter not in layer.scaling:
        return None
    a, b = as_matrices(*factors_of(layer, adapter))
    return Source(a, b, float(layer.scaling[adapter]))


@dataclass(frozen=True)
class PeftMerge:
    """What PEFT made of each target."""

    factors: dict[str, tuple[Matrix, Matrix]]
    scaling: dict[str, float]
    untruncated: dict[str, Matrix]
    """The matrix given to the SVD; only of the `*_svd` types."""
    model: PeftModel

    def delta(self, target: str) -> Matrix:
        """B A, times the scaling under which PEFT runs it."""
        a, b = self.factors[target]
        return (b @ a) * self.scaling[target]


def merge(
    model: PeftModel,
    weights: Sequence[float],
    method: str,
    *,
    adapters: Sequence[str] | None = None,
    masks: Sequence[Mask] = (),
    **options: Any,
) -> PeftMerge:
    """Run `add_weighted_adapter`; `masks` replace its random ones, in its order of drawing."""
    names = list(adapters or (f"a{index}" for index in range(len(weights))))
    svd_inputs: list[torch.Tensor] = []
    with ExitStack() as stack:
        stack.enter_context(_spied_svd(svd_inputs))
        if masks:
            stack.enter_context(_given_masks(masks))
        model.add_weighted_adapter(names, list(weights), MERGED, combination_type=method, **options)
    layers = {t: layer for t, layer in lora_layers(model).items() if MERGED in layer.scaling}
    return PeftMerge(
        factors={t: as_matrices(*factors_of(layer, MERGED)) for t, layer in layers.items()},
        scaling={t: float(layer.scaling[MERGED]) for t, layer in layers.items()},
        untruncated={
            t: delta.double().numpy() for t, delta in zip(layers, svd_inputs, strict=False)
        },
        model=model,
    )


@contextmanager
def _spied_svd(seen: list[torch.Tensor]) -> Iterator[None]:
    svd = torch.linalg.svd

    def spy(matrix: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(matrix.detach().clone())
        return svd(matrix, *args, **kwargs)

    with mock.patch.object(torch.linalg, "svd", spy):
        yield


@contextmanager
def _given_masks(masks: Sequence[Mask]) -> Iterator[None]:
    left = iter(masks)

    def prune(tensor: torch.Tensor, density: float, rescale: bool) -> torch.Tensor:
        assert rescale
        keep = torch.from_numpy(next(left).copy()).reshape(tensor.shape)
        return tensor * keep / density

    with mock.patch.object(merge_utils, "random_pruning", prune):
        yield
    assert next(left, None) is None, "PEFT drew fewer masks than it was given"


def in_base_orientation(kind: str, mask: Mask) -> Mask:
    """A mask over B A as PEFT's delta lies, which is as the base weight lies."""
    return np.ascontiguousarray(mask.T) if KINDS[kind].stored_transposed else mask


@dataclass(frozen=True)
class SavedTarget:
    """One target of an adapter directory, as written."""

    a: Matrix
    b: Matrix
    scaling: float

    @property
    def delta(self) -> Matrix:
        """(B A) * scaling."""
        return (self.b @ self.a) * self.scaling

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return self.a.shape[0]


_FACTOR_KEY = re.compile(r"base_model\.model\.(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?$")


def read_adapter(directory: Path) -> dict[str, SavedTarget]:
    """Every target of an adapter directory, by rules of its own: no PEFT, no streammerge."""
    config = json.loads((directory / "adapter_config.json").read_text())
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(directory / "adapter_model.safetensors").items():
        found = _FACTOR_KEY.match(key)
        assert found, f"a key that is no LoRA factor: {key}"
        pairs.setdefault(found[1], {})[found[2]] = tensor
    return {
        target: SavedTarget(*as_matrices(pair["A"], pair["B"]), _scaling(config, target))
        for target, pair in pairs.items()
    }


def _scaling(config: Mapping[str, Any], target: str) -> float:
    rank = _of_pattern(config.get("rank_pattern"), target, config["r"])
    alpha = _of_pattern(config.get("alpha_pattern"), target, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_pattern(pattern: Mapping[str, float] | None, target: str, default: float) -> float:
    for key, value in (pattern or {}).items():
        if re.match(rf"(?:.*\.)?(?:{key})$", target):
            return value
    return default


def relative_error(found: Matrix, expected: Matrix) -> float:
    """Largest difference over the largest expected value."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def relative_distance(found: Matrix, expected: Matrix) -> float:
    """Frobenius distance over the Frobenius norm."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
