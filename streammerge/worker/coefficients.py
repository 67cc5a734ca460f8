"""Coefficient rules: what each delta is multiplied by, from their inner products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from streammerge.kernels.inner import Stacks, inner_products
from streammerge.rules import COEFFICIENTS, Inner
from streammerge.tiling import inner_groups
from streammerge.worker.sums import stack
from streammerge.worker.work import Work


def with_coefficients(work: Work) -> Work:
    """Return the work with the rule's coefficients for weights: their sum is the merge.

    Where all weights are 0 there are no shares to go by, and nothing is wanted: so are they.
    """
    sources = work.sources
    if not any(sources.weights):
        return replace(work, coefficients=[0.0] * len(sources))
    ranks = [reader.matrix_shape[0] for reader in sources.a]

    def stacks(group: range) -> Stacks:
        return stack(work, group, "B", scaled=False), stack(work, group, "A")

    groups = inner_groups(ranks, work.task.m + work.task.n)
    products = inner_products(groups, stacks, ranks, work.each)
    work.end_phase()
    scalings = torch.tensor(sources.scalings, dtype=torch.float64)
    products *= torch.outer(scalings, scalings)
    if not bool(torch.isfinite(products).all()):
        raise FloatingPointError("deltas overflow: their norm is not finite")
    found = COEFFICIENTS[work.job.plan.rule](Inner(products, sources.weights))
    return replace(work, coefficients=_checked(found.coefficients), unsettled=found.unsettled)


def _checked(found: torch.Tensor) -> Sequence[float]:
    coefficients: list[float] = found.tolist()
    if not bool(torch.isfinite(found).all()):
        raise FloatingPointError("coefficients overflow")
    return coefficients
