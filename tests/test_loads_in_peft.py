"""What streammerge writes, PEFT loads without a warning and runs as the files say.

Small transformers models of several kinds, built from their configs; adapters made and saved by
PEFT. The expected outputs come from the base weights plus the deltas read from the merged files,
in float64, with nothing of PEFT's layers or streammerge's arithmetic in between.
"""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

import streammerge
from oracle import peft_oracle
from oracle.restated import DELTA_METHODS, METHODS, Matrix, uses_density

VOCABULARY = 61
WEIGHTS = (1.0, -0.5, 0.3)
DENSITY = 0.6


class Volumes(nn.Module):
    """Convolutions in one and in three dimensions, one of them with a kernel of one."""

    def __init__(self) -> None:
        super().__init__()
        self.over_depth = nn.Conv3d(2, 6, (2, 1, 3))
        self.over_length = nn.Conv1d(6, 8, 3, stride=2)
        self.mix = nn.Conv1d(8, 5, 1)

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        return self.mix(self.over_length(torch.relu(self.over_depth(volume).flatten(2))).relu())


class SameEndings(nn.Module):
    """A module `proj`, and another whose path ends in it."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 7)
        self.inner = nn.ModuleDict({"proj": nn.Linear(7, 5)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner["proj"](self.proj(x).relu())


@dataclass(frozen=True)
class Example:
    """A model, what goes in, and which modules each of three adapters changes."""

    make: Callable[[], nn.Module]
    inputs: Mapping[str, tuple[int, ...]]
    """Shape of each input: ids if the name says so, else real numbers."""
    targets: tuple[list[str] | str, list[str] | str, list[str] | str]
    more: Mapping[str, Any] = field(default_factory=dict)


def gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def t5() -> nn.Module:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def resnet() -> nn.Module:
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return ResNetForImageClassification(config)


EXAMPLES = {
    "gpt2": Example(
        gpt2,
        {"input_ids": (2, 9)},
        (["c_attn", "wpe"], ["c_attn", "attn.c_proj"], ["c_fc", "mlp.c_proj", "c_attn"]),
        {"fan_in_fan_out": True},
    ),
    "llama": Example(
        llama,
        {"input_ids": (2, 9)},
        (["q_proj", "v_proj", "embed_tokens"], ["q_proj", "down_proj"], ["embed_tokens", "k_proj"]),
    ),
    "bert": Example(  # the classifier is 3 x 16, less than the adapters' rank
        bert,
        {"input_ids": (2, 9)},
        (["query", "classifier"], ["query", "value", "classifier"], ["dense"]),
    ),
    "t5": Example(
        t5,
        {"input_ids": (2, 9), "decoder_input_ids": (2, 5)},
        (["q", "v"], ["q", "wo"], ["SelfAttention.k", "wi"]),
    ),
    "resnet": Example(
        resnet,
        {"pixel_values": (2, 3, 16, 16)},
        (["convolution"], ["convolution", "classifier.1"], ["shortcut.convolution"]),
    ),
    "volumes": Example(
        Volumes,
        {"volume": (2, 2, 4, 3, 7)},
        (["over_depth", "over_length"], ["over_length", "mix"], ["mix", "over_depth"]),
    ),
}

# One rank everywhere, as the factor-space methods ask, and different scalings.
EQUAL_RANKS = ({"r": 4, "lora_alpha": 8}, {"r": 4, "lora_alpha": 4}, {"r": 4, "lora_alpha": 6.5})
UNEQUAL_RANKS = (
    {"r": 4, "lora_alpha": 8},
    {"r": 6, "lora_alpha": 4, "use_rslora": True},
    {"r": 2, "lora_alpha": 3},
)


def make_base(example: Example) -> nn.Module:
    torch.manual_seed(0)
    return example.make().eval()


def make_inputs(example: Example) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randint(VOCABULARY, shape, generator=generator)
        if name.endswith("ids")
        else torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in example.inputs.items()
    }


def outputs(model: nn.Module, example: Example) -> torch.Tensor:
    """What the model says of the inputs, in float64."""
    with torch.no_grad():
        found = model.double().eval()(**make_inputs(example))
    return found if isinstance(found, torch.Tensor) else found.logits


def save_sources(folder: Path, example: Example, ranks: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Three adapters made and saved by PEFT, every factor filled."""
    sources = []
    for position, (targets, rank) in enumerate(zip(example.targets, ranks, strict=True)):
        config = LoraConfig(target_modules=targets, **rank, **example.more)
        model = get_peft_model(make_base(example), config)
        generator = torch.Generator().manual_seed(position)
        for layer in peft_oracle.lora_layers(model).values():
            for factor in peft_oracle.factors_of(layer, "default"):
                factor.copy_(0.3 * torch.randn(factor.shape, generator=generator))
        sources.append(folder / f"source{position}")
        model.save_pretrained(sources[-1], save_embedding_layers=False)
    return sources


@pytest.fixture(scope="module")
def equal_ranks(request: pytest.FixtureRequest, tmp_path_factory: Any) -> list[Path]:
    return save_sources(tmp_path_factory.mktemp("equal"), EXAMPLES[request.param], EQUAL_RANKS)


@pytest.fixture(scope="module")
def unequal_ranks(request: pytest.FixtureRequest, tmp_path_factory: Any) -> list[Path]:
    return save_sources(tmp_path_factory.mktemp("unequal"), EXAMPLES[request.param], UNEQUAL_RANKS)


def load(example: Example, adapter: Path) -> PeftModel:
    """The base with one adapter on it; a warning on the way is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # PEFT 0.21 reads it of every model of transformers 5, whatever the adapter.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        return PeftModel.from_pretrained(make_base(example), adapter)


def with_deltas(base: nn.Module, deltas: Mapping[str, Matrix]) -> nn.Module:
    """The base with a matrix m x n added to each named module's weight, in float64."""
    changed = copy.deepcopy(base).double()
    for name, delta in deltas.items():
        module = changed.get_submodule(name)
        transposed = isinstance(module, nn.Embedding | Conv1D)
        oriented = torch.from_numpy(delta.T if transposed else delta)
        module.weight.data += oriented.reshape(module.weight.shape)
    return changed


def check(example: Example, adapter: Path) -> torch.Tensor:
    """Load an adapter, hold its outputs against the files by hand, return them."""
    model = load(example, adapter)
    written = load_file(adapter / "adapter_model.safetensors")
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert loaded.keys() == written.keys()
    assert all(torch.equal(loaded[key], written[key]) for key in written)

    deltas = {t: saved.delta for t, saved in peft_oracle.read_adapter(adapter).items()}
    expected = outputs(with_deltas(make_base(example), deltas), example)
    found = outputs(model, example)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert (found - outputs(make_base(example), example)).abs().max() > 1e-3
    return found


def merge(method: str, sources: Sequence[Path], output: Path, **options: Any) -> Path:
    if uses_density(method):
        options["density"] = DENSITY
    # The sources differ in their targets on purpose; nothing else is worth a notice.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* are not in all adapters")
        streammerge.merge(sources, output, method=method, weights=WEIGHTS, **options)
    return output


def each(names: Sequence[str] = tuple(EXAMPLES)) -> list[Any]:
    return [pytest.param(name, name, id=name) for name in names]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "equal_ranks"), each(), indirect=["equal_ranks"])
def test_every_method_loads(
    name: str, equal_ranks: list[Path], method: str, tmp_path: Path
) -> None:
    check(EXAMPLES[name], merge(method, equal_ranks, tmp_path / "merged"))


@pytest.mark.parametrize("method", ["cat", *DELTA_METHODS])
@pytest.mark.parametrize(("name", "unequal_ranks"), each(), indirect=["unequal_ranks"])
def test_adapters_of_unequal_ranks_load(
    name: str, unequal_ranks: list[Path], method: str, tmp_path: Path
) -> None:
    check(EXAMPLES[name], merge(method, unequal_ranks, tmp_path / "merged"))


@pytest.mark.parametrize("method", ["svd", "ties_svd"])
@pytest.mark.parametrize(("name", "unequal_ranks"), each(), indirect=["unequal_ranks"])
def test_ranks_that_a_policy_chose_load(
    name: str, unequal_ranks: list[Path], method: str, tmp_path: Path
) -> None:
    merged = merge(method, unequal_ranks, tmp_path / "merged", rank="error:0.4,max:11")
    check(EXAMPLES[name], merged)
    config = json.loads((merged / "adapter_config.json").read_text())
    targets = peft_oracle.read_adapter(merged)
    ranks = {config["rank_pattern"].get(target, config["r"]) for target in targets}
    assert len(ranks) > 1
    assert config["alpha_pattern"] == config["rank_pattern"]


@pytest.mark.parametrize(("name", "unequal_ranks"), each(), indirect=["unequal_ranks"])
def test_an_adapter_that_was_compressed_to_its_own_ranks_loads(
    name: str, unequal_ranks: list[Path], tmp_path: Path
) -> None:
    """With a number above all of its ranks: it is as large as before, and does the same."""
    example = EXAMPLES[name]
    for source in unequal_ranks:
        out = tmp_path / source.name
        streammerge.compress(source, out, rank=64)
        expected = outputs(load(example, source), example)
        torch.testing.assert_close(check(example, out), expected, rtol=1e-4, atol=1e-5)
        sizes = [
            sum(t.numel() for t in load_file(path / "adapter_model.safetensors").values())
            for path in (source, out)
        ]
        assert sizes[1] <= sizes[0]


@pytest.mark.parametrize(("method", "rank"), [("cat", None), ("svd", 12)])
@pytest.mark.parametrize(("name", "unequal_ranks"), each(), indirect=["unequal_ranks"])
def test_the_exact_methods_run_as_the_weighted_sum_of_the_sources(
    name: str, unequal_ranks: list[Path], method: str, rank: int | None, tmp_path: Path
) -> None:
    example = EXAMPLES[name]
    options = {"rank": rank} if rank else {}
    found = check(example, merge(method, unequal_ranks, tmp_path / "merged", **options))
    total: dict[str, Matrix] = {}
    for weight, source in zip(WEIGHTS, unequal_ranks, strict=True):
        for target, saved in peft_oracle.read_adapter(source).items():
            total[target] = total.get(target, 0) + weight * saved.delta
    expected = outputs(with_deltas(make_base(example), total), example)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["cat", "linear", "ties", "magnitude_prune"])
@pytest.mark.parametrize(("name", "equal_ranks"), each(), indirect=["equal_ranks"])
def test_the_outputs_are_those_of_peft_s_own_merge(
    name: str, equal_ranks: list[Path], method: str, tmp_path: Path
) -> None:
    example = EXAMPLES[name]
    theirs = check(example, merge_with_peft(example, equal_ranks, method, tmp_path / "peft"))
    ours = check(example, merge(method, equal_ranks, tmp_path / "merged"))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", ["proj", r"inner\.proj"])
def test_only_the_targets_are_matched(targets: str, tmp_path: Path) -> None:
    """A list entry of `target_modules` matches endings too; a string has to match all of a path."""
    example = Example(SameEndings, {"x": (2, 6)}, (targets, targets, targets))
    sources = save_sources(tmp_path, example, EQUAL_RANKS)
    check(example, merge("cat", sources, tmp_path / "merged"))


def merge_with_peft(example: Example, sources: Sequence[Path], method: str, folder: Path) -> Path:
    """The same merge by `add_weighted_adapter`, saved by PEFT."""
    names = [source.name for source in sources]
    model = PeftModel.from_pretrained(make_base(example), sources[0], adapter_name=names[0])
    for source, name in zip(sources[1:], names[1:], strict=True):
        model.load_adapter(source, adapter_name=name)
    density = DENSITY if uses_density(method) else None
    model.add_weighted_adapter(
        names, list(WEIGHTS), "merged", combination_type=method, density=density
    )
    model.save_pretrained(folder, selected_adapters=["merged"], save_embedding_layers=False)
    return folder / "merged"


@pytest.mark.parametrize(("name", "equal_ranks"), each(["gpt2"]), indirect=["equal_ranks"])
class TestTheCheckItself:
    """That `check` would notice."""

    def test_a_missing_factor(self, name: str, equal_ranks: list[Path], tmp_path: Path) -> None:
        broken = self.rewritten(equal_ranks[0], tmp_path, lambda tensors: tensors.popitem())
        with pytest.raises(UserWarning, match="missing adapter keys"):
            check(EXAMPLES[name], broken)

    def test_a_factor_that_peft_would_ignore(
        self, name: str, equal_ranks: list[Path], tmp_path: Path
    ) -> None:
        def add(tensors: dict[str, torch.Tensor]) -> None:
            tensors["base_model.model.lm_head.lora_A.weight"] = torch.ones(4, 16)

        broken = self.rewritten(equal_ranks[0], tmp_path, add)
        with pytest.raises(AssertionError):
            check(EXAMPLES[name], broken)

    def test_a_scaling_that_the_config_does_not_say(
        self, name: str, equal_ranks: list[Path], tmp_path: Path
    ) -> None:
        example = EXAMPLES[name]
        path = Path(shutil.copytree(equal_ranks[0], tmp_path / "rescaled"))
        config = json.loads((path / "adapter_config.json").read_text())
        config["lora_alpha"] *= 2
        (path / "adapter_config.json").write_text(json.dumps(config))
        assert not torch.allclose(check(example, path), check(example, equal_ranks[0]))

    @staticmethod
    def rewritten(source: Path, folder: Path, change: Callable[[Any], Any]) -> Path:
        path = Path(shutil.copytree(source, folder / "rewritten"))
        tensors = load_file(path / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, path / "adapter_model.safetensors")
        return path
