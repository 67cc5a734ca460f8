"""What one would write in a hurry: every file into memory, plain torch, one file out."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.processes import Figures, Job, answer, sync_seconds
from benchmarks.sides.plain import load, save

Tensors = list[torch.Tensor]


def merge_files(paths: tuple[str, ...], output: str, method: str, density: float | None) -> None:
    """Merge adapters that have the same rank, weighted 1 each."""
    loaded = load(paths)
    roots = [scale**0.5 for scale in loaded.scales]
    merged = {}
    for key in loaded.tensors[0]:
        tensors = [adapter[key].float() for adapter in loaded.tensors]
        if method == "cat":
            made = cat(tensors, loaded.scales, is_a="lora_A" in key)
        else:
            made = RULES[method](tensors, roots, density=density)
        merged[key] = made.to(torch.bfloat16)
    save(merged, loaded.config, output)


def cat(tensors: Tensors, scales: list[float], *, is_a: bool) -> torch.Tensor:
    """The A's, scaled, one below the other; the B's side by side."""
    if is_a:
        return torch.cat([x * scale for x, scale in zip(tensors, scales, strict=True)])
    return torch.cat(tensors, dim=1)


def linear(tensors: Tensors, weights: list[float], density: float | None = None) -> torch.Tensor:
    """The weighted sum."""
    del density
    return sum(x * weight for x, weight in zip(tensors, weights, strict=True))


def trim(x: torch.Tensor, density: float) -> torch.Tensor:
    """Keep the largest."""
    kept = x.abs().flatten().topk(int(density * x.numel())).indices
    return torch.zeros_like(x).flatten().scatter_(0, kept, x.flatten()[kept]).view_as(x)


def drop(x: torch.Tensor, density: float) -> torch.Tensor:
    """Keep some at random, larger by as much."""
    return x * torch.empty_like(x).bernoulli_(density) / density


def elect(tensors: Tensors, weights: list[float]) -> torch.Tensor:
    """The mean of those that have the elected sign."""
    stacked = torch.stack(tensors)
    sign = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    agree = stacked.sign() == sign
    scaled = stacked * torch.tensor(weights)[:, None, None]
    return (scaled * agree).sum(0) / agree.sum(0).clamp(min=1)


def pruned(
    prune: Callable[[torch.Tensor, float], torch.Tensor],
    combine: Callable[[Tensors, list[float]], torch.Tensor],
    tensors: Tensors,
    weights: list[float],
    *,
    density: float,
) -> torch.Tensor:
    """Prune each, then combine them."""
    return combine([prune(x, density) for x in tensors], weights)


RULES = {
    "linear": linear,
    "ties": partial(pruned, trim, elect),
    "magnitude_prune": partial(pruned, trim, linear),
    "dare_ties": partial(pruned, drop, elect),
}


def measure(job: Job, _: str) -> Figures:
    """Time the whole of it; its parts overlap in nothing."""
    began = time.perf_counter()
    merge_files(job.adapters, job.output, job.method, job.density)
    whole = time.perf_counter() - began
    return {"whole_seconds": whole, "sync_seconds": sync_seconds(job.output)}


if __name__ == "__main__":
    answer(measure)
