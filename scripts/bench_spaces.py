"""Core and KnOTS space: against the dense route as published, and 200 adapters inside a budget.

    scripts/bench-spaces [FOLDER]

Takes some minutes on two cores, and 60 MB of disk in FOLDER for the adapters. One thread each.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

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
REPEATS = 5


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


def against_dense(folder: Path, side: int = 1024, count: int = 8, rank: int = 16) -> None:
    """Print seconds of the dense route and of ours, and how far the results are apart."""
    sources = [random_source(i, side, side, rank, scaling=1 + i / 8) for i in range(count)]
    paths = [write_adapter(folder / f"{i}", {"up": source}) for i, source in enumerate(sources)]
    for space, dense in (("knots", dense_knots), ("core", dense_core)):
        merged, seconds = dense(sources)
        best = restated.best_rank(merged, rank)
        for compute in ("float64", "float32"):
            times = []
            for repeat in range(REPEATS):
                out = folder / f"{space}-{compute}-{repeat}"
                streammerge.merge(
                    paths,
                    out,
                    method="ties",
                    space=space,
                    density=DENSITY,
                    compute_dtype=compute,
                    dtype="float64",
                    workers=1,
                    on_event=events.ignore,
                )
                timings = json.loads((out / "streammerge-timings.json").read_text())
                times.append(timings["target_seconds"]["up"])
            error = relative_error(read_adapter(out)["up"].delta, best)
            print(
                f"{space:<6} {compute}: dense SVD {seconds:.2f} s, whole merge {min(times):.4f} s, "
                f"{seconds / min(times):.0f} times; apart by {error:.1e}"
            )


def many(folder: Path, count: int = 200, side: int = 4096, rank: int = 16) -> None:
    """Print what a merge of many adapters takes under a hard cap of 1 GiB."""
    layers = {"up": linear(side, side, rank)}
    paths = [
        str(write_random(folder / f"many{i:03d}", layers, seed=i, dtype="BF16"))
        for i in range(count)
    ]
    for space in ("knots", "core"):
        began = time.perf_counter()
        arguments = ["merge", *paths, "-o", str(folder / f"of-many-{space}"), "--method=ties"]
        arguments += [f"--density={DENSITY}", f"--space={space}", "--max-memory=1GiB"]
        done = run_cli([*arguments, "--workers=1"], cap_bytes=1024 * MIB)
        seconds = time.perf_counter() - began
        peak = done.peak_bytes / MIB
        print(
            f"{space:<6} {count} adapters of rank {rank}, {side} x {side}: exit "
            f"{done.returncode}, {seconds:.0f} s, peak {peak:.0f} MiB ({done.capped_by})"
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
