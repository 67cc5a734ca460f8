"""Iso-CTS (arXiv 2502.04959): directions of the sum and of each adapter alone, with one value."""

from __future__ import annotations

import torch

from streammerge.rules.spectrum import Spectrum, T, count_nonzero


def iso_cts(spectrum: Spectrum[T]) -> T:
    """Return s̄·polar(U)·polar(V)ᵀ over R directions, with s̄ the mean of their values.

    N·k of them are the adapters' own, the leading k of each less what lies in the common columns;
    the others are the leading ones of Σ w_i·Δ_i. k is about (1 - `common`)·R/N, and 1 at least
    where R is above N; with no more than that all are common, as in `iso_c`.
    """
    count, rank = spectrum.count, spectrum.rank
    own = round((rank - int(rank * spectrum.parameters["common"])) / count)
    own = min(max(1, own), (rank - 1) // count)
    shared = spectrum.truncate(rank - count * own)
    there = count_nonzero(shared.s)
    u, s, v = shared.u[:, :there], shared.s[:there], shared.v[:, :there]
    if own:
        of_each = spectrum.stacked(own, u)
        u, s, v = (
            torch.cat([common, mine], dim=-1)
            for common, mine in zip((u, s, v), of_each, strict=True)
        )
    mean = s.sum() / max(1, len(s))
    # Of directions that several have polar leaves fewer, so this is no SVD yet.
    return spectrum.product(spectrum.polar(u).mul_(mean), spectrum.polar(v).mT)
