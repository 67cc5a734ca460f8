"""Iso-C (arXiv 2502.04959): the sum, with one singular value for all of its directions."""

from __future__ import annotations

from streammerge.rules.spectrum import Spectrum, T, count_nonzero


def iso_c(spectrum: Spectrum[T]) -> T:
    """Return s̄·U·Vᵀ of the leading triples of Σ w_i·Δ_i, with s̄ their mean value.

    Directions in which the sum is zero are none of them.
    """
    leading = spectrum.truncate(spectrum.rank)
    there = count_nonzero(leading.s)
    u, s, v = leading.u[:, :there], leading.s[:there], leading.v[:, :there]
    return spectrum.whole(u, s.mean().expand(there), v)
