"""What the weights of an adapter say, from its factors alone."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import numpy as np

from streammerge import events
from streammerge.adapter import Adapter, NameTable
from streammerge.errors import UnknownScalingError
from streammerge.planner.scaling import scalings
from streammerge.preparation import bring
from streammerge.readers import read_adapter
from streammerge.worker import Spectrum, spectra_of


@dataclass(frozen=True)
class Measured:
    """An adapter and the singular values of its deltas, summed up target by target."""

    adapter: Adapter
    """As its headers say."""
    targets: tuple[Spectrum, ...]
    """Of each target, in the manifest's order; norms with the scaling, where it is known."""
    scaled: bool
    """Whether the scaling is known; where it is not, norms are those of B·A."""

    @property
    def norm(self) -> float:
        """‖Δ‖_F over all targets whose factors are finite."""
        return float(np.sqrt(np.nansum([spectrum.norm**2 for spectrum in self.targets])))

    def __repr__(self) -> str:
        return f"Measured({self.adapter.path!r}: {len(self.targets)} targets, norm {self.norm:.4g})"


def measure(path: str | os.PathLike[str]) -> Measured:
    """Return norms and ranks of an adapter's deltas, without forming a delta.

    Every factor is read once, one target after another; QRs of B and Aᵀ and the singular values of
    the r×r core between them, in float64. What lies on the Hub is downloaded into its cache first.

    Args:
        path: as for `open_adapter`.

    Raises:
        AdapterError: a subclass of it says why the adapter cannot be used.
        MergeFailedError: a file changed or could not be read meanwhile.
    """
    (adapter,) = bring(
        [read_adapter(os.fspath(path), NameTable())], events.ignore, check=lambda: None
    )
    try:
        factors, scaled = scalings(adapter, None), True
    except UnknownScalingError:
        factors, scaled = np.ones(len(adapter)), False
    return Measured(
        adapter,
        tuple(
            replace(found, norm=found.norm * abs(factor), largest=found.largest * abs(factor))
            for found, factor in zip(spectra_of(adapter), factors.tolist(), strict=True)
        ),
        scaled,
    )
