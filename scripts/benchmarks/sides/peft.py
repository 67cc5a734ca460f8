"""PEFT: load every adapter onto a base model, `add_weighted_adapter`, save the result.

The base model has the targets and nothing else. Making it is not counted, and its weights are
never touched, so they take no memory either.
"""

from __future__ import annotations

import time

import torch
from peft import PeftModel
from torch import nn

from benchmarks.processes import Figures, Job, answer, stages
from oracle.peft_oracle import Net


def measure(job: Job, _: str) -> Figures:
    """Merge with PEFT's default arguments, on all cores."""
    base = Net(
        {
            name: nn.Linear(n, m, bias=False, device="meta", dtype=torch.bfloat16)
            for name, (m, n) in job.targets.items()
        }
    ).to_empty(device="cpu")
    names = [f"a{i}" for i in range(len(job.adapters))]
    began = time.perf_counter()
    model = PeftModel.from_pretrained(base, job.adapters[0], adapter_name=names[0])
    for name, path in zip(names[1:], job.adapters[1:], strict=True):
        model.load_adapter(path, adapter_name=name)
    loaded = time.perf_counter()
    given = {} if job.density is None else {"density": job.density}
    model.add_weighted_adapter(
        names, [1.0] * len(names), "merged", combination_type=job.method, **given
    )
    merged = time.perf_counter()
    model.save_pretrained(job.output, selected_adapters=["merged"])
    return stages(began, loaded, merged, time.perf_counter(), job.output)


if __name__ == "__main__":
    answer(measure)
