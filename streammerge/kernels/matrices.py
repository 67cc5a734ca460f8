"""Merged matrices as something to multiply with, or as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from streammerge.kernels.krylov import KrylovSpace
from streammerge.lowrank import Truncation, truncate_matrix

TileAt = Callable[[int], torch.Tensor]
Spans = Sequence[tuple[int, int]]


class TiledMatrix:
    """A matrix that is given as tiles of rows, h × n; one pass goes over them once."""

    def __init__(self, tile_at: TileAt, rows: Spans) -> None:
        self._tile_at = tile_at
        self._rows = rows
        self._energy: float | None = None

    def images(self, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return M·block and Mᵀ·M·block; the first pass also takes ‖M‖²."""
        image = block.new_empty(self._rows[-1][1], block.shape[1])
        back = torch.zeros_like(block)
        squares = 0.0
        for t, (top, bottom) in enumerate(self._rows):
            tile = self._tile_at(t)
            part = tile @ block
            back.addmm_(tile.mT, part)
            image[top:bottom] = part
            if self._energy is None:
                squares += squared_norm(tile)
        if not math.isfinite(squares):
            raise FloatingPointError("a merged matrix overflows: its norm is not finite")
        if self._energy is None:
            self._energy = squares
        return image, back

    def outside(self, space: KrylovSpace) -> float:
        """Return ‖M‖² - ‖T‖²; exact to rounding."""
        assert self._energy is not None, "a pass has been made"
        return max(0.0, self._energy - float(space.triangle.square().sum()))

    def distance(self, triples: Truncation) -> float:
        """Return ‖M - U·S·Vᵀ‖² by one more pass."""
        right = (triples.v * triples.s.to(triples.v.dtype)).mT
        return sum(
            squared_norm(torch.addmm(self._tile_at(t), triples.u[top:bottom], right, alpha=-1))
            for t, (top, bottom) in enumerate(self._rows)
        )


@dataclass(frozen=True)
class Addend:
    """One weighted product of factors, q·B·A, read by ranges of rows."""

    q: float
    a_rows: Callable[[int, int], torch.Tensor]
    a_tiles: Spans
    b_rows: Callable[[int, int], torch.Tensor]
    b_tiles: Spans


class FactorSum:
    """M = Σ q_i·B_i·A_i, from the factors alone, one adapter after another.

    A pass goes over all factors twice. What a basis misses is estimated with Gaussian probes g
    that ride along in the first pass: E‖M·(I - V·Vᵀ)·g‖² = ‖M·(I - V·Vᵀ)‖²_F. (Hutchinson's
    estimator on what the basis leaves, as in Meyer et al. 2021, arXiv 2010.09649.)
    """

    def __init__(self, addends: Sequence[Addend], m: int, probes: torch.Tensor) -> None:
        self._addends = addends
        self._m = m
        self._probes = probes
        self._probed: torch.Tensor | None = None

    def images(self, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return M·block and Mᵀ·M·block; the first pass also takes the probes' images."""
        width = block.shape[1]
        if self._probed is None:
            image = self._image(torch.cat([block, self._probes], dim=1))
            self._probed, image = (image[:, width:].clone(), image[:, :width].contiguous())
        else:
            image = self._image(block)
        return image, self._back(image)

    def outside(self, space: KrylovSpace) -> float:
        """Return the estimate from the probes."""
        assert self._probed is not None, "a pass has been made"
        inside = torch.cat([block.mT @ self._probes for block in space.explored])
        rest = self._probed - space.left.combine(space.triangle @ inside.double())
        return squared_norm(rest) / rest.shape[1]

    def distance(self, triples: Truncation) -> float:
        """Return the estimate from the probes, which cancels nothing."""
        assert self._probed is not None, "a pass has been made"
        inner = (triples.v.mT @ self._probes) * triples.s.to(triples.v.dtype)[:, None]
        return squared_norm(self._probed - triples.u @ inner) / self._probes.shape[1]

    def _image(self, block: torch.Tensor) -> torch.Tensor:
        image = block.new_zeros(self._m, block.shape[1])
        for addend in self._addends:
            inner = torch.cat([addend.a_rows(*rows) @ block for rows in addend.a_tiles])
            for top, bottom in addend.b_tiles:
                image[top:bottom].addmm_(addend.b_rows(top, bottom), inner, alpha=addend.q)
        return image

    def _back(self, image: torch.Tensor) -> torch.Tensor:
        back = image.new_zeros(self._probes.shape[0], image.shape[1])
        for addend in self._addends:
            inner: torch.Tensor | None = None
            for top, bottom in addend.b_tiles:
                part = addend.b_rows(top, bottom).mT @ image[top:bottom]
                inner = part if inner is None else inner.add_(part)
            assert inner is not None, "a factor has at least one tile"
            for top, bottom in addend.a_tiles:
                back.addmm_(addend.a_rows(top, bottom).mT, inner[top:bottom], alpha=addend.q)
        return back


def dense(tile_at: TileAt, rows: Spans, rank: int) -> Truncation:
    """Return the leading `rank` triples from the matrix as a whole; for one small side."""
    first = tile_at(0)
    matrix = first.new_empty(rows[-1][1], first.shape[1])
    for t, (top, bottom) in enumerate(rows):
        matrix[top:bottom] = tile_at(t) if t else first
    del first
    return truncate_matrix(matrix, rank)


def squared_norm(tile: torch.Tensor) -> float:
    """Return ‖tile‖²_F: short sums in the tile's dtype, added up in float64."""
    rows = torch.linalg.vector_norm(tile, dim=1)
    return float(rows.double().square().sum())
