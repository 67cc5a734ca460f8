"""The model that is adapted: a transformer of two blocks, and a fixed head for each task."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 48
HEADS = 4
BLOCKS = 2
PATCH = 2
ADAPTED = ["query", "key", "value", "out", "up", "down"]
"""The matrices in each block that adapters change."""
SHARPNESS = 10.0
"""Logits are cosines times this."""


class Block(nn.Module):
    """Attention and a perceptron, each after a norm and beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention = nn.LayerNorm(WIDTH)
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.before_perceptron = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens (n × tokens × width) of the same shape."""
        normed = self.before_attention(tokens)
        split = (
            project(normed).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        attended = functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        tokens = tokens + self.out(attended)
        return tokens + self.down(functional.gelu(self.up(self.before_perceptron(tokens))))


class Encoder(nn.Module):
    """Pictures of 8 × 8 to features, by way of one token for each 2 × 2 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, WIDTH, PATCH, stride=PATCH)
        self.places = nn.Parameter(0.02 * torch.randn(16, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, pictures: Tensor) -> Tensor:
        """Return features (n × width) of pictures (n × 8 × 8)."""
        tokens = self.embed(pictures.unsqueeze(1)).flatten(2).transpose(1, 2)
        return self.norm(self.blocks(tokens + self.places).mean(dim=1))


def directions(features: Tensor) -> Tensor:
    """Return features at length 1, of which only the direction counts."""
    return functional.normalize(features, dim=-1)


@torch.no_grad()
def make_head(base: Encoder, pictures: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return a task's head (classes × width): the mean direction of each class in the base.

    It is to the base what the embedded class names are in CLIP: a classifier that the base brings
    along, fixed while the adapter is trained, and the same before and after a merge.
    """
    found = directions(base(pictures))
    return directions(torch.stack([found[labels == label].mean(dim=0) for label in range(classes)]))


def classify(encoder: nn.Module, head: Tensor, pictures: Tensor) -> Tensor:
    """Return logits (n × classes)."""
    return SHARPNESS * directions(encoder(pictures)) @ head.T
