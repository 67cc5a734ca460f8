"""The base model's pretraining, adapters by PEFT, and how much a model gets right."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from quality.data import Examples, Task
from quality.model import ADAPTED, WIDTH, Encoder, classify, make_head

DIGITS = 10
BATCH = 32
RATE = 3e-3
ADAPTER_RATE = 5e-3


@dataclass(frozen=True)
class Steps:
    """How long is trained."""

    base: int
    adapter: int


FULL = Steps(base=600, adapter=100)


@dataclass(frozen=True)
class Bench:
    """A pretrained base, and the tasks with their heads."""

    base: Encoder
    tasks: tuple[Task, ...]
    heads: tuple[Tensor, ...]

    def accuracies(self, encoder: nn.Module, part: str) -> list[float]:
        """Return the share that is right in each task; `part` is "validation" or "test"."""
        return [
            _accuracy(encoder, head, getattr(task, part))
            for task, head in zip(self.tasks, self.heads, strict=True)
        ]

    def load(self, adapter: Path) -> nn.Module:
        """Return the base with an adapter that lies on disk, loaded and folded in by PEFT."""
        model = PeftModel.from_pretrained(copy.deepcopy(self.base), adapter)
        return model.merge_and_unload().eval()


def make_bench(pretraining: Examples, tasks: Iterable[Task], seed: int, steps: Steps) -> Bench:
    """Pretrain a base on upright digits, and take the heads from it."""
    torch.manual_seed(seed)
    base, head = Encoder(), nn.Linear(WIDTH, DIGITS)
    draws = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        pictures, labels = _batch(pretraining, draws)
        return functional.cross_entropy(head(base(pictures)), labels)

    _descend([*base.parameters(), *head.parameters()], loss, RATE, steps.base)
    base.requires_grad_(requires_grad=False).eval()
    tasks = tuple(tasks)
    heads = (make_head(base, t.training.pictures, t.training.labels, t.classes) for t in tasks)
    return Bench(base, tasks, tuple(heads))


def train_adapter(
    bench: Bench, numbers: Sequence[int], folder: Path, *, rank: int, seed: int, steps: int
) -> Path:
    """Train a LoRA adapter on the tasks of these numbers, in turn, and save it as PEFT does.

    The seed decides the first values of its A's and the order of the examples.
    """
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=ADAPTED)
    model = get_peft_model(copy.deepcopy(bench.base), config)
    draws = torch.Generator().manual_seed(seed)
    step = 0

    def loss() -> Tensor:
        nonlocal step
        number = numbers[step % len(numbers)]
        step += 1
        pictures, labels = _batch(bench.tasks[number].training, draws)
        return functional.cross_entropy(classify(model, bench.heads[number], pictures), labels)

    trained = [each for each in model.parameters() if each.requires_grad]
    _descend(trained, loss, ADAPTER_RATE, steps * len(numbers))
    model.save_pretrained(folder)
    return folder


def _batch(examples: Examples, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    chosen = torch.randint(len(examples.labels), (BATCH,), generator=draws)
    return examples.pictures[chosen], examples.labels[chosen]


def _descend(
    parameters: Sequence[nn.Parameter], loss: Callable[[], Tensor], rate: float, steps: int
) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def _accuracy(encoder: nn.Module, head: Tensor, examples: Examples) -> float:
    found = classify(encoder, head, examples.pictures).argmax(dim=1)
    return (found == examples.labels).float().mean().item()
