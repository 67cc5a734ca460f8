"""Adapters on disk, made once and kept."""

from __future__ import annotations

import shutil
from pathlib import Path

from benchmarks.workloads import Inputs
from making import linear, write_adapter

WARM_UP = Inputs(adapters=2, rank=4, m=384, n=384, targets=2)
"""Small, but decomposed by iteration as large ones are, and more than one target."""


def make_inputs(inputs: Inputs, folder: Path) -> list[str]:
    """Write the adapters that are not there yet; return the paths of all, in order.

    More adapters of the same shape share the first ones' files.
    """
    shape = f"r{inputs.rank}-{inputs.m}x{inputs.n}-{inputs.targets}"
    paths = [folder / "inputs" / shape / f"adapter{i:04d}" for i in range(inputs.adapters)]
    layers = dict.fromkeys(inputs.names, linear(inputs.m, inputs.n, inputs.rank))
    modules = sorted({name.rpartition(".")[2] for name in layers})
    for seed, path in enumerate(paths):
        if path.is_dir():
            continue
        unfinished = path.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        write_adapter(
            unfinished,
            layers,
            seed=seed,
            dtype="BF16",
            task_type=None,
            base_model_name_or_path=None,
            target_modules=modules,
        )
        unfinished.rename(path)
    return [str(path) for path in paths]


def weight_files(adapters: list[str] | tuple[str, ...]) -> list[Path]:
    """The file of each adapter that holds its factors."""
    return [Path(path) / "adapter_model.safetensors" for path in adapters]


def cache(adapters: list[str]) -> None:
    """Read all inputs once, so that every side finds them in the page cache."""
    for path in weight_files(adapters):
        with path.open("rb", buffering=0) as stream:
            while stream.read(2**23):
                pass
