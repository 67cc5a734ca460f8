"""The singular values of an adapter's deltas, one target after another."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import torch

from streammerge.adapter import Adapter
from streammerge.allocator import steady_allocator
from streammerge.errors import NonFiniteError
from streammerge.kernels import spectra
from streammerge.readers.windows import OpenFiles, Window, mapped
from streammerge.rules.spectrum import count_nonzero
from streammerge.tiling import factor_rows
from streammerge.worker.factors import FactorReader
from streammerge.worker.job import one_thread_each

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Spectrum:
    """What the singular values of one target's delta say, before its scaling."""

    target: str
    """The module's path."""
    rank: int
    """Of the factors."""
    norm: float
    """‖B·A‖_F; NaN where a factor holds NaN or infinity, as all that follows is then."""
    largest: float
    """‖B·A‖_2."""
    effective_rank: float
    """exp of the entropy of σ²/Σσ²: over how many directions the energy is spread."""
    stable_rank: float
    """‖B·A‖²_F/‖B·A‖²_2."""
    numerical_rank: int
    """Singular values above 1e-6 of the largest; 0 where the delta is zero."""
    problem: str | None = None
    """The tensor and the value, where one is no number."""


def spectra_of(adapter: Adapter) -> Iterator[Spectrum]:
    """Yield each target's spectrum, in the order of the rows.

    Memory: A of one target in float32, and tiles.

    Raises:
        InputChangedError, InputUnreadableError: a file is not the one whose header was read.
    """
    steady_allocator()
    with one_thread_each(), torch.inference_mode(), closing(OpenFiles()) as files:
        window = mapped(files)
        for row in range(len(adapter)):
            target, rank = adapter.target(row), int(adapter.columns.rank[row])
            try:
                s = _singular_values(adapter, row, window)
            except NonFiniteError as error:
                nothing = (math.nan,) * 4
                problem = f"{error.tensor} holds {error.value}"
                yield Spectrum(target, rank, *nothing, numerical_rank=0, problem=problem)
                continue
            yield Spectrum(
                target=target,
                rank=rank,
                norm=float(s.square().sum().sqrt()),
                largest=float(s[0]),
                effective_rank=spectra.effective_rank(s),
                stable_rank=spectra.stable_rank(s),
                numerical_rank=count_nonzero(s),
            )


def _singular_values(adapter: Adapter, row: int, window: Window) -> torch.Tensor:
    # float32 holds every stored value exactly but float64's, whose digits nobody looks at here.
    a, b = (
        FactorReader(window, adapter.factor(row, side), torch.float32, _CPU, None, hashed=False)
        for side in "AB"
    )
    whole = a.whole()
    r_a = spectra.triangle(
        whole[:, start:stop].mT.double() for start, stop in factor_rows(whole.shape[1], len(whole))
    )
    r_b = spectra.triangle(b.rows(*tile).double() for tile in factor_rows(*b.matrix_shape))
    values: torch.Tensor = torch.linalg.svdvals(r_b @ r_a.mT)
    return values
