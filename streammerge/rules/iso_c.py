"""Iso-C (arXiv 2502.04959): the sum, with one singular value for all of its directions."""

from __future__ import annotations

import torch

from streammerge.rules.spectrum import Spectrum, T


def iso_c(spectrum: Spectrum[T]) -> T:
    """Return s̄·U·Vᵀ of the leading triples of Σ w_i·Δ_i, with s̄ their mean value.

    Directions in which the sum is zero are none of them.
    """
    leading = spectrum.truncate(spectrum.rank)
    there = leading.s > 0
    mean = leading.s.sum() / there.sum().clamp_min(1)
    return spectrum.whole(leading.u, torch.where(there, mean, 0.0), leading.v)
