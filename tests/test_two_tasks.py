"""Two adapters trained on two tasks become one that does both.

A small Llama learns to repeat its input. One adapter then learns to move every letter on by seven,
another to mirror every digit; each leaves the other kind as it is. On text of both kinds the base
does neither task, each adapter does its own, and the merged one has to do both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import streammerge

LETTERS, DIGITS = 26, 10
"""Tokens 0 to 25 are letters, 26 to 35 are digits."""
RANK = 16
SEED = 11

Task = Callable[[torch.Tensor], torch.Tensor]


def repeat(text: torch.Tensor) -> torch.Tensor:
    return text


def move_letters(text: torch.Tensor) -> torch.Tensor:
    return torch.where(text < LETTERS, (text + 7) % LETTERS, text)


def mirror_digits(text: torch.Tensor) -> torch.Tensor:
    return torch.where(text >= LETTERS, LETTERS + DIGITS - 1 - (text - LETTERS), text)


@dataclass(frozen=True)
class Score:
    """The share of letters that are moved and of digits that are mirrored."""

    letters: float
    digits: float


@dataclass(frozen=True)
class Trained:
    base: LlamaForCausalLM
    letters: Path
    digits: Path

    def loaded(self, adapter: Path) -> PeftModel:
        return PeftModel.from_pretrained(copy.deepcopy(self.base), adapter).eval()


def draw_text(generator: torch.Generator, count: int) -> torch.Tensor:
    shape = (count, 8)
    letters = torch.randint(LETTERS, shape, generator=generator)
    digits = torch.randint(LETTERS, LETTERS + DIGITS, shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.5, letters, digits)


def train(model: nn.Module, task: Task, steps: int, learning_rate: float) -> None:
    generator = torch.Generator().manual_seed(SEED)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        text = draw_text(generator, 32)
        logits = model(input_ids=text).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), task(text).flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def train_adapter(base: nn.Module, task: Task, folder: Path) -> Path:
    # One seed for both: they start from the same A, without which adding factors makes no sense.
    torch.manual_seed(SEED)
    modules = ["v_proj", "o_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=modules)
    model = get_peft_model(copy.deepcopy(base), config)
    train(model, task, steps=150, learning_rate=2e-3)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def score(model: nn.Module) -> Score:
    text = draw_text(torch.Generator().manual_seed(SEED + 1), 200)
    said = model(input_ids=text).logits.argmax(-1)
    letters, digits = text < LETTERS, text >= LETTERS
    return Score(
        letters=(said == move_letters(text))[letters].double().mean().item(),
        digits=(said == mirror_digits(text))[digits].double().mean().item(),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    # On one thread, training adds up in one order on any number of cores.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=LETTERS + DIGITS,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=False,
    )
    torch.manual_seed(SEED)
    base = LlamaForCausalLM(config)
    train(base, repeat, steps=100, learning_rate=5e-3)
    folder = tmp_path_factory.mktemp("trained")
    yield Trained(
        base,
        letters=train_adapter(base, move_letters, folder / "letters"),
        digits=train_adapter(base, mirror_digits, folder / "digits"),
    )
    torch.set_num_threads(threads)


def test_each_adapter_does_its_own_task_only(trained: Trained) -> None:
    assert score(trained.base) == Score(letters=0.0, digits=0.0)
    letters, digits = score(trained.loaded(trained.letters)), score(trained.loaded(trained.digits))
    assert letters.letters > 0.99
    assert letters.digits < 0.01
    assert digits.digits > 0.99
    assert digits.letters < 0.01


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("cat", {"weights": [1.0, 1.0]}),
        ("svd", {"weights": [1.0, 1.0]}),
        ("ties_svd", {"weights": [1.0, 1.0], "density": 0.5}),
        # Of the product (B1 + B2)(A1 + A2) with A1 near A2, half is the sum of the two deltas.
        ("linear", {"weights": [0.5, 0.5]}),
    ],
)
def test_the_merged_adapter_does_both(
    trained: Trained, method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    streammerge.merge([trained.letters, trained.digits], merged, method=method, **options)
    found = score(trained.loaded(merged))
    assert found.letters > 0.75, found
    assert found.digits > 0.75, found
