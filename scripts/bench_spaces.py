"""Rules in the span of the adapters: against the dense routes as published, and 200 adapters inside
a budget.

    scripts/bench-spaces [FOLDER]

Takes some minutes on two cores, and 220 MB of disk in FOLDER for adapters and outputs.
One thread each.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import streammerge
from capped import MIB, run_cli
from making import linear
from making import write_adapter as write_random
from oracle import restated
from oracle.files import random_source, write_adapter
from oracle.peft_oracle import read_adapter, relative_error
from oracle.restated import Matrix, Source
from streammerge import events

DENSITY = 0.3
MERGES, MODULES = 4, 16
"""How often, and of how many modules: one of 30 ms is often disturbed for as long as it takes."""

DENSE = 3
"""How often each dense route is taken."""


def dense_knots(sources: Sequence[Source]) -> tuple[Matrix, float]:
    """TIES in KnOTS space as the authors' code does it; return the matrix and its SVD's seconds.

    The deltas side by side, float64, torch.linalg.svd; what comes after it is not counted.
    """
    side_by_side = torch.from_numpy(np.hstack([source.delta for source in sources]))
    began = time.perf_counter()
    u, s, vt = torch.linalg.svd(side_by_side, full_matrices=False)
    seconds = time.perf_counter() - began
    kept = s > 1e-5
    blocks = np.split((s[kept, None] * vt[kept]).numpy(), len(sources), axis=1)
    merged = restated.apply_rule("ties", blocks, [1.0] * len(sources), density=DENSITY)
    return u[:, kept].numpy() @ merged, seconds


def dense_core(sources: Sequence[Source]) -> tuple[Matrix, float]:
    """TIES in core space from the factors; return the matrix and the seconds of its dense SVD.

    The bases come from the factors in the authors' code too. What is dense there is the result,
    and an adapter made of it takes its SVD.
    """
    merged = restated.merge_in("core", "ties", sources, [1.0] * len(sources), density=DENSITY)
    began = time.perf_counter()
    torch.linalg.svd(torch.from_numpy(merged), full_matrices=False)
    return merged, time.perf_counter() - began


def dense_tsv(sources: Sequence[Source]) -> tuple[Matrix, float]:
    """TSV-M with k = r as the authors' code does it: SVDs of each delta, and of what is stacked."""
    deltas = [torch.from_numpy(source.delta) for source in sources]
    began = time.perf_counter()
    parts = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    ranks = [len(source.a) for source in sources]
    u = torch.cat([part[0][:, :r] for part, r in zip(parts, ranks, strict=True)], 1)
    s = torch.cat([part[1][:r] for part, r in zip(parts, ranks, strict=True)])
    v = torch.cat([part[2][:r] for part, r in zip(parts, ranks, strict=True)])
    (p, _, q), (x, _, y) = (torch.linalg.svd(side, full_matrices=False) for side in (u, v))
    merged = p @ (q * s) @ x @ y
    return merged.numpy(), time.perf_counter() - began


def dense_iso(sources: Sequence[Source]) -> tuple[Matrix, float]:
    """Iso-C, restricted to the output's rank: the SVD of the sum."""
    total = torch.from_numpy(sum(source.delta for source in sources))
    rank = len(sources[0].a)
    began = time.perf_counter()
    u, s, v = torch.linalg.svd(total, full_matrices=False)
    merged = float(s[:rank].mean()) * u[:, :rank] @ v[:rank]
    return merged.numpy(), time.perf_counter() - began


TIES = {"method": "ties", "density": DENSITY}
CASES: dict[str, tuple[dict[str, Any], Callable[[Sequence[Source]], tuple[Matrix, float]]]] = {
    "knots": ({**TIES, "space": "knots"}, dense_knots),
    "core": ({**TIES, "space": "core"}, dense_core),
    "tsv": ({"method": "tsv"}, dense_tsv),
    "iso_c": ({"method": "iso_c"}, dense_iso),
}
"""What is merged how, and the dense route that the authors' code takes to it."""


def against_dense(folder: Path, side: int = 1024, count: int = 8, rank: int = 16) -> None:
    """Print seconds of the dense route and of ours, and how far the results are apart.

    Ours are those of a module in merges of many: the quickest, and the median. Of the dense route,
    taken of one module, the quickest counts.
    """
    modules = [
        [random_source(count * t + i, side, side, rank, scaling=1 + i / 8) for i in range(count)]
        for t in range(MODULES)
    ]
    names = [f"up{t}" for t in range(MODULES)]
    paths = [
        write_adapter(
            folder / f"{i}", {name: module[i] for name, module in zip(names, modules, strict=True)}
        )
        for i in range(count)
    ]
    for name, (options, dense) in CASES.items():
        runs = [dense(modules[0]) for _ in range(DENSE)]
        merged, seconds = runs[0][0], min(taken for _, taken in runs)
        best = restated.best_rank(merged, rank)
        for compute in ("float64", "float32"):
            times: list[float] = []
            for repeat in range(MERGES):
                out = folder / f"{name}-{compute}-{repeat}"
                streammerge.merge(
                    paths,
                    out,
                    compute_dtype=compute,
                    dtype="float64",
                    workers=1,
                    on_event=events.ignore,
                    **options,
                )
                timings = json.loads((out / "streammerge-timings.json").read_text())
                times += timings["target_seconds"].values()
            error = relative_error(read_adapter(out)[names[0]].delta, best)
            least, middle = min(times), sorted(times)[len(times) // 2]
            print(
                f"{name:<6} {compute}: dense SVDs {seconds:.2f} s, whole merge {least:.4f} s "
                f"(median {middle:.4f}), {seconds / least:.0f} ({seconds / middle:.0f}) times; "
                f"{names[0]} apart by {error:.1e}"
            )


MANY = {
    "knots": ["--method=ties", f"--density={DENSITY}", "--space=knots"],
    "core": ["--method=ties", f"--density={DENSITY}", "--space=core"],
    "ctm": ["--method=ctm"],
    "tsv": ["--method=tsv"],
    "iso_cts": ["--method=iso_cts"],
    "karcher": ["--method=karcher"],
}


def many(folder: Path, count: int = 200, side: int = 4096, rank: int = 16) -> None:
    """Print what a merge of many adapters takes under a hard cap of 1 GiB."""
    layers = {"up": linear(side, side, rank)}
    paths = [
        str(write_random(folder / f"many{i:03d}", layers, seed=i, dtype="BF16"))
        for i in range(count)
    ]
    for name, options in MANY.items():
        began = time.perf_counter()
        arguments = ["merge", *paths, "-o", str(folder / f"of-many-{name}"), *options]
        done = run_cli([*arguments, "--max-memory=1GiB", "--workers=1"], cap_bytes=1024 * MIB)
        seconds = time.perf_counter() - began
        peak = done.peak_bytes / MIB
        print(
            f"{name:<7} {count} adapters of rank {rank}, {side} x {side}: exit "
            f"{done.returncode}, {seconds:.0f} s, peak {peak:.0f} MiB ({done.capped_by})"
            + (f"\n{done.stderr}" if done.returncode else "")
        )


def main() -> None:
    """Run both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    given = parser.parse_args().folder
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=given) as folder:
        against_dense(Path(folder))
        many(Path(folder))


if __name__ == "__main__":
    main()
