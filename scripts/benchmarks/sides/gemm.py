"""The rate of float32 matrix products on this machine, with all threads."""

from __future__ import annotations

import time

import torch

from benchmarks.processes import Figures, Job, answer

SIDE = 2048
TIMES = 15


def measure(_job: Job, _: str) -> Figures:
    """Multiply two square matrices several times; the fastest counts."""
    x, y, out = (torch.rand(SIDE, SIDE) for _ in range(3))
    torch.mm(x, y, out=out)
    seconds = []
    for _ in range(TIMES):
        began = time.perf_counter()
        torch.mm(x, y, out=out)
        seconds.append(time.perf_counter() - began)
    return {"flops_a_second": 2 * SIDE**3 / min(seconds)}


if __name__ == "__main__":
    answer(measure)
