"""How far a truncated result is from the best of its rank, before the output is rounded.

The merged matrix M is formed densely from the same files, and everything measured of it in
float64. Where elements are pruned or signs elected, M is the tests' restatement on float32 deltas,
as streammerge has them: in float64 a few elements would be decided otherwise. How many, and how
much of M that is, is measured too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import streammerge
from benchmarks.processes import Figures, Job, answer
from oracle import restated
from oracle.masks import stream_masks
from oracle.peft_oracle import SavedTarget, read_adapter

ROWS = 256
"""Of M, made at once."""

OTHERWISE = 1e-4
"""Of the largest element: what no rounding explains."""

Source = restated.Source
Prune = Callable[[int, Source], Any]


def measure(job: Job, _: str) -> Figures:
    """Merge into float32 and compare with the best."""
    options = {"method": job.method, "density": job.density, "dtype": "float32"}
    result = streammerge.merge(job.adapters, job.output, **options, on_event=lambda _: None)
    ((target, _shape),) = job.targets.items()
    saved = read_adapter(Path(job.output))[target]
    sources = [_source(read_adapter(Path(path))[target]) for path in job.adapters]
    m, figures = merged_matrix(job, target, sources)
    residual = float(np.linalg.norm(m - saved.delta))
    optimal = best_residual(m, saved.rank)
    return figures | {
        "residual": residual,
        "optimal": optimal,
        "excess": residual / optimal - 1,
        "estimated_excess": result.modules[0].excess,
        "norm": float(np.linalg.norm(m)),
    }


def best_residual(m: restated.Matrix, rank: int) -> float:
    """The distance from M to the nearest matrix of that rank, by the eigenvalues of M·Mᵀ."""
    short = torch.from_numpy(m if m.shape[0] <= m.shape[1] else np.ascontiguousarray(m.T))
    energies = torch.linalg.eigvalsh(short @ short.mT)
    return float(energies[:-rank].clamp(min=0).sum().sqrt())


def merged_matrix(job: Job, target: str, sources: list[Source]) -> tuple[restated.Matrix, Figures]:
    """M in float64, and what the precision of the deltas decides."""
    if job.method == "svd":
        b = np.hstack([source.b for source in sources])
        return b @ np.vstack([source.a * source.scaling for source in sources]), {}
    prune = pruner(job, target)
    single = np.empty(job.targets[target])
    square = largest = difference = 0.0
    otherwise = 0
    pairs = zip(
        merged_rows(job.method, [prune(i, _cast(s, np.float32)) for i, s in enumerate(sources)]),
        merged_rows(job.method, [prune(i, s) for i, s in enumerate(sources)]),
        strict=True,
    )
    top = 0
    for low, high in pairs:
        single[top : top + len(low)] = low
        top += len(low)
        gap = np.abs(low - high)
        largest = max(largest, float(np.abs(high).max()))
        otherwise += int((gap > OTHERWISE * largest).sum())
        difference += float((gap**2).sum())
        square += float((high**2).sum())
    return single, {
        "decided_otherwise": otherwise,
        "relative_difference": (difference / square) ** 0.5,
    }


def pruner(job: Job, target: str) -> Prune:
    """The function that makes an adapter's delta and prunes it, in the precision of its factors."""
    assert job.density is not None, "the methods with a rule have a density"
    density = job.density

    def by_mask(i: int, source: Source) -> Any:
        mask = stream_masks(density)(i, target, "delta", job.targets[target])
        return restated.prune_by_mask(source.delta, mask, density)

    def by_magnitude(_: int, source: Source) -> Any:
        delta = source.delta
        return restated.prune_by_magnitude(delta, density).astype(delta.dtype)

    return by_mask if restated.uses_masks(job.method) else by_magnitude


def merged_rows(method: str, pruned: list[Any]) -> Iterator[Any]:
    """Yield M, some rows at a time."""
    weights = [1.0] * len(pruned)
    for start in range(0, len(pruned[0]), ROWS):
        rows = [x[start : start + ROWS] for x in pruned]
        if restated.uses_majority_sign(method):
            yield restated.disjoint_mean(rows, weights, "total").astype(rows[0].dtype)
        else:
            yield restated.weighted_sum(rows, weights)


def _source(saved: SavedTarget) -> Source:
    return Source(saved.a, saved.b, saved.scaling)


def _cast(source: Source, dtype: type) -> Source:
    return Source(source.a.astype(dtype), source.b.astype(dtype), source.scaling)


if __name__ == "__main__":
    answer(measure)
