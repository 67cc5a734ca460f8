"""Heads, biases and trained tokens that streammerge writes, PEFT loads and runs as it should.

Small transformers models, built from their configs; adapters made and saved by PEFT, with all that
they train filled. What is expected of the merged adapter is the base model with the weighted deltas
of the sources added and the values set that the sources' files hold, in float64.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import streammerge
from streammerge import errors, events

VOCABULARY = 31
WEIGHTS = (2.0, 0.5)
PREFIX = "base_model.model."
FILE = "adapter_model.safetensors"

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 20,
    "initializer_range": 0.3,
}


def bert(kind: Any) -> Callable[[], nn.Module]:
    return lambda: kind(BertConfig(**SMALL, num_labels=2 if "Question" in kind.__name__ else 3))


def roberta() -> nn.Module:
    return RobertaForSequenceClassification(RobertaConfig(**SMALL, num_labels=3, pad_token_id=0))


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=1, tie_word_embeddings=False))


@dataclass(frozen=True)
class Example:
    """A model, and what both adapters train."""

    make: Callable[[], nn.Module]
    config: Mapping[str, Any]
    keys: Mapping[str, Any]
    """Of the merged config: as they have to be."""
    extras: int
    """How many extra tensors the merged file holds."""
    second: Mapping[str, Any] = field(default_factory=dict)
    """What the second adapter's config has otherwise."""
    also: str = "none"
    """A frozen parameter that is not the base's in the sources, such as new words' rows."""


ATTENTION = ["query", "value"]
EXAMPLES = {
    "a head that the task brings": Example(
        bert(BertForSequenceClassification),
        {"target_modules": ATTENTION, "task_type": "SEQ_CLS"},
        {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"], "bias": "none"},
        2,
    ),
    "a head of several layers": Example(
        roberta,
        {"target_modules": ATTENTION, "task_type": "SEQ_CLS"},
        {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"]},
        4,
    ),
    "a head of tokens": Example(
        bert(BertForTokenClassification),
        {"target_modules": ATTENTION, "task_type": "TOKEN_CLS"},
        {"task_type": "TOKEN_CLS", "modules_to_save": ["classifier"]},
        2,
    ),
    "a head of answers": Example(
        bert(BertForQuestionAnswering),
        {"target_modules": ATTENTION, "task_type": "QUESTION_ANS"},
        {"task_type": "QUESTION_ANS", "modules_to_save": ["qa_outputs"]},
        2,
    ),
    "modules by name, of a model without a task": Example(
        llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        {"task_type": None, "modules_to_save": ["lm_head", "embed_tokens"]},
        2,
    ),
    "all biases and a head": Example(
        roberta,
        {"target_modules": ATTENTION, "task_type": "SEQ_CLS", "bias": "all"},
        {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"], "bias": "all"},
        # 8 for each layer and one of the embeddings; the head's weights and biases
        21,
    ),
    "biases of what LoRA wraps, which differs": Example(
        bert(BertForSequenceClassification),
        {"target_modules": ["query"], "bias": "lora_only"},
        {"modules_to_save": None, "bias": "lora_only", "lora_bias": False},
        4,
        {"target_modules": ["query", "key"]},
    ),
    "trained tokens": Example(
        llama,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 7, 8]}},
        {"trainable_token_indices": {"embed_tokens": [3, 7, 8]}, "modules_to_save": None},
        1,
    ),
    "trained tokens by a list": Example(
        llama,
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]},
        {"trainable_token_indices": [3, 7]},
        1,
    ),
    "LoRA on an embedding, which is saved too": Example(
        llama,
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": None},
        1,
        also="embed_tokens.base_layer.weight",
    ),
}


def base_of(example: Example) -> nn.Module:
    torch.manual_seed(0)
    return example.make().eval()


def save_sources(folder: Path, example: Example) -> list[Path]:
    sources = []
    for position in range(2):
        more = example.second if position else {}
        model = get_peft_model(
            base_of(example), LoraConfig(r=3, lora_alpha=4.5, **(example.config | more))
        )
        generator = torch.Generator().manual_seed(position)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad or name.endswith(example.also):
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        sources.append(folder / f"source{position}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(sources[-1])
    return sources


def load(example: Example, adapter: Path) -> PeftModel:
    """The base with an adapter on it; a warning, as of a missing key, is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        model = PeftModel.from_pretrained(base_of(example), adapter)
        again = set_peft_model_state_dict(model, load_file(adapter / FILE))
    assert not again.unexpected_keys
    return model


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(1, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = model.double().eval()(input_ids=ids)
    parts = [out.start_logits, out.end_logits] if "start_logits" in out else [out.logits]
    return torch.cat([part.flatten() for part in parts])


def extras_of(source: Path) -> dict[str, torch.Tensor]:
    """What a file holds beside factors, by the parameter's path in the base."""
    found = {}
    for key, tensor in load_file(source / FILE).items():
        wrappers = r"\.base_layer|\.modules_to_save(\.default)?"
        path = re.sub(wrappers, "", key.removeprefix(PREFIX))
        if ".lora_" not in key and ".original_module." not in key:
            found[path] = tensor.double()
    return found


def expected_model(example: Example, sources: Sequence[Path], policy: str) -> nn.Module:
    model = copy.deepcopy(base_of(example)).double()
    values: dict[str, list[tuple[float, torch.Tensor]]] = {}
    for weight, source in zip(WEIGHTS, sources, strict=True):
        tensors = {k: t.double() for k, t in load_file(source / FILE).items()}
        scaling = 1.5
        for key, a in tensors.items():
            if ".lora_A." in key:
                b = tensors[key.replace("lora_A", "lora_B")]
                module = model.get_submodule(key.removeprefix(PREFIX).split(".lora_A")[0])
                module.weight.data += weight * scaling * (b @ a)
                bias = tensors.get(key.replace("lora_A.weight", "lora_B.bias"))
                if bias is not None:
                    module.bias.data += weight * scaling * bias
            elif "lora_embedding_A" in key:
                b = tensors[key.replace("embedding_A", "embedding_B")]
                module = model.get_submodule(key.removeprefix(PREFIX).split(".lora_")[0])
                path = f"{key.removeprefix(PREFIX).split('.lora_')[0]}.weight"
                values.setdefault(f"+{path}", []).append((weight * scaling, (b @ a).T))
        for path, tensor in extras_of(source).items():
            values.setdefault(path, []).append((weight, tensor))
    for path, held in values.items():
        if path.startswith("+"):
            continue
        whole = sum(weight for weight, _ in held)
        mean = sum(weight / whole * tensor for weight, tensor in held)
        put(model, path, held[0][1] if policy == "first" else mean, example)
    for path, held in values.items():
        if path.startswith("+"):
            model.get_parameter(path[1:]).data += sum(weight * tensor for weight, tensor in held)
    return model


def put(model: nn.Module, path: str, value: torch.Tensor, example: Example) -> None:
    module, _, tokens = path.partition(".token_adapter.")
    if not tokens:
        model.get_parameter(path).data.copy_(value)
        return
    said = example.config["trainable_token_indices"]
    indices = next(iter(said.values())) if isinstance(said, dict) else said
    model.get_parameter(f"{module}.weight").data[indices] = value


@pytest.mark.parametrize("policy", ["first", "mean"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_loads_and_runs(name: str, policy: str, tmp_path: Path) -> None:
    example = EXAMPLES[name]
    sources = save_sources(tmp_path, example)
    out = merged(sources, tmp_path / "out", policy)
    config = json.loads((out / "adapter_config.json").read_text())
    assert {key: config.get(key) for key in example.keys} == dict(example.keys)
    assert sum(".lora_" not in key for key in load_file(out / FILE)) == example.extras
    found = logits(load(example, out))
    expected = logits(expected_model(example, sources, policy))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    without = logits(load(example, merged(sources, tmp_path / "without", "drop")))
    assert (found - without).abs().max() > 1e-2, "extras that change nothing would show nothing"


def merged(sources: Sequence[Path], out: Path, policy: str, **options: Any) -> Path:
    given = {"method": "cat", "weights": WEIGHTS, "workers": 1} | options
    streammerge.merge(sources, out, extras=policy, on_event=events.ignore, **given)
    streammerge.verify(out)
    return out


def test_biases_of_deltas_are_summed_as_the_deltas_are(tmp_path: Path) -> None:
    """Not the first one's, and no mean: what lora_bias adds is scaled and weighted like B·A."""
    example = Example(
        bert(BertForSequenceClassification),
        {"target_modules": ["query", "dense"], "lora_bias": True},
        {},
        0,
    )
    sources = save_sources(tmp_path, example)
    outs = [merged(sources, tmp_path / policy, policy) for policy in ("first", "mean")]
    tensors = [load_file(out / FILE) for out in outs]
    assert all(torch.equal(tensor, tensors[1][key]) for key, tensor in tensors[0].items())
    assert json.loads((outs[0] / "adapter_config.json").read_text())["lora_bias"] is True
    found = logits(load(example, outs[0]))
    expected = logits(expected_model(example, sources, "first"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    without = logits(load(example, merged(sources, tmp_path / "without", "drop")))
    assert (found - without).abs().max() > 1e-2


def test_targets_without_a_bias_of_their_own_have_zeros(tmp_path: Path) -> None:
    make = bert(BertForSequenceClassification)
    sources = [
        save_sources(
            tmp_path / str(bias),
            Example(make, {"target_modules": [name], "lora_bias": bias}, {}, 0),
        )[0]
        for name, bias in (("query", True), ("value", False))
    ]
    example = Example(make, {}, {}, 0)
    out = merged(sources, tmp_path / "out", "mean")
    for key, tensor in load_file(out / FILE).items():
        if key.endswith("lora_B.bias"):
            assert tensor.any() == (".query." in key)
    found = logits(load(example, out))
    expected = logits(expected_model(example, sources, "first"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["linear", "ties", "ties_svd", "dare_linear_svd"])
def test_biases_of_deltas_are_refused_where_nothing_is_a_sum(method: str, tmp_path: Path) -> None:
    example = Example(
        bert(BertForSequenceClassification), {"target_modules": ["query"], "lora_bias": True}, {}, 0
    )
    sources = save_sources(tmp_path, example)
    density = {} if method == "linear" else {"density": 0.5}
    with pytest.raises(errors.ExtraTensorsError, match=r"lora_bias.*svd, cat.*--extras drop"):
        merged(sources, tmp_path / "out", "first", method=method, **density)


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("roberta-base/aguleon-agnews-biasall-ckpt1200 roberta-base/armishjaved-r7-a32", "first"),
        ("roberta-base/armishjaved-r7-a32 roberta-base/wx2327-r7-a16", "mean"),
        ("roberta-base/aguleon-agnews-biasall-ckpt1200 roberta-base/wx2327-r7-a16", "mean"),
    ],
)
def test_real_heads_load(name: str, policy: str, real_adapters: Path, tmp_path: Path) -> None:
    """Into a model of the right shape, on the meta device: only the keys are of interest."""
    sources = [real_adapters / path for path in name.split()]
    out = merged(sources, tmp_path / "out", policy, method="svd", rank=4)
    config = RobertaConfig(num_labels=4, vocab_size=50, max_position_embeddings=514)
    with torch.device("meta"):
        base = RobertaForSequenceClassification(config)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
            warnings.filterwarnings("ignore", ".*is a no-op")
            model = PeftModel.from_pretrained(base, out, torch_device="cpu", low_cpu_mem_usage=True)
    written = load_file(out / FILE)
    assert not set_peft_model_state_dict(model, written, low_cpu_mem_usage=True).unexpected_keys
    head = model.base_model.model.classifier.modules_to_save["default"].out_proj.weight
    assert torch.equal(head.cpu(), written[f"{PREFIX}classifier.out_proj.weight"])
