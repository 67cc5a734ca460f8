"""TSV-M (arXiv 2412.00081): the adapters' singular vectors side by side, made orthonormal."""

from __future__ import annotations

from streammerge.rules.spectrum import Spectrum, T


def tsv(spectrum: Spectrum[T]) -> T:
    """Return the best approximation of polar(U)·diag(s)·polar(V)ᵀ.

    U, s and V are all singular triples of all w_i·Δ_i, side by side; polar gives the orthonormal
    columns nearest to them.
    """
    u, s, v = spectrum.stacked(None, None)
    left = spectrum.polar(u).mul_(s)
    return spectrum.product(left, spectrum.polar(v).mT)
