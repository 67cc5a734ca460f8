"""The exact truncation of a sum of products, in memory: thin QR of both stacks, SVD of the core."""

from __future__ import annotations

import time

import torch

from benchmarks.processes import Figures, Job, answer, stages
from benchmarks.sides.plain import Loaded, load, save

KEY = "base_model.model.{}.lora_{}.weight"


def truncated(b: torch.Tensor, a: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best B (m × rank) and A (rank × n) for the product of b (m × k) and a (k × n)."""
    left, left_core = torch.linalg.qr(b)
    right, right_core = torch.linalg.qr(a.mT)
    u, s, vh = torch.linalg.svd(left_core @ right_core.mT, full_matrices=False)
    return left @ (u[:, :rank] * s[:rank]), vh[:rank] @ right.mT


def stacks(loaded: Loaded, target: str) -> tuple[torch.Tensor, torch.Tensor]:
    """One target's B's side by side and A's, scaled, one below the other; float32."""
    b, a = (KEY.format(target, side) for side in "BA")
    scaled = [x[a].float() * s for x, s in zip(loaded.tensors, loaded.scales, strict=True)]
    return torch.cat([x[b].float() for x in loaded.tensors], dim=1), torch.cat(scaled)


def measure(job: Job, _: str) -> Figures:
    """Load everything, truncate to the inputs' rank, save."""
    began = time.perf_counter()
    loaded = load(job.adapters)
    read = time.perf_counter()
    merged = {}
    for target in job.targets:
        pair = truncated(*stacks(loaded, target), loaded.config["r"])
        for side, factor in zip("BA", pair, strict=True):
            merged[KEY.format(target, side)] = factor.to(torch.bfloat16).contiguous()
    done = time.perf_counter()
    save(merged, loaded.config, job.output)
    return stages(began, read, done, time.perf_counter(), job.output)


if __name__ == "__main__":
    answer(measure)
