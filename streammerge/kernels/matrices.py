"""Merged matrices as something to multiply with, or as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from streammerge.kernels.each import Each, Over, accumulate
from streammerge.kernels.krylov import KrylovSpace
from streammerge.kernels.tiles import TileAt
from streammerge.lowrank import Truncation, truncate_matrix
from streammerge.tiling import panels

Spans = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class RowTiles:
    """An m × n matrix, given as tiles of rows."""

    tile_at: TileAt
    rows: Spans
    """Each tile's range of rows."""
    new_buffer: Callable[[], torch.Tensor]
    """Returns a flat buffer that is large enough for every tile."""

    def of(self, panel: range) -> Iterator[tuple[tuple[int, int], torch.Tensor]]:
        """Yield the row ranges and tiles of a panel, h × n."""
        buffer = self.new_buffer()
        for t in panel:
            top, bottom = self.rows[t]
            yield (top, bottom), self.tile_at(t, buffer).view(bottom - top, -1)


class TiledMatrix:
    """An m × n matrix that is given as tiles of rows; one pass goes over them once."""

    def __init__(self, over: Over, height: int) -> None:
        """Make it.

        Args:
            over: the panels of its `RowTiles`.
            height: m.
        """
        self._over = over
        self._height = height
        self._energy: float | None = None

    def images(self, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return M·block and Mᵀ·M·block; the first pass also takes ‖M‖²."""
        first = self._energy is None
        image = block.new_empty(self._height, block.shape[1])
        back = block.new_zeros(block.shape[1], block.shape[0])
        top, energy = 0, 0.0
        for part, turned, squares in self._over(multiply_panel, block, first):
            image[top : top + len(part)] = part
            back += turned
            top, energy = top + len(part), energy + squares
        if first:
            if not math.isfinite(energy):
                raise FloatingPointError("a merged matrix overflows: its norm is not finite")
            self._energy = energy
        return image, back.mT.contiguous()

    def outside(self, space: KrylovSpace) -> float:
        """Return ‖M‖² - ‖T‖²; exact to rounding."""
        assert self._energy is not None, "a pass has been made"
        return max(0.0, self._energy - float(space.triangle.square().sum()))

    def distance(self, triples: Truncation) -> float:
        """Return ‖M - U·S·Vᵀ‖² by one more pass."""
        right = (triples.v * triples.s.to(triples.v.dtype)).mT.contiguous()
        return sum(self._over(measure_panel, triples.u, right))


def multiply_panel(
    matrix: RowTiles, panel: range, block: torch.Tensor, measured: bool
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return M·block and (Mᵀ·M·block)ᵀ of the rows of a panel, and their ‖M‖² if it is wanted."""
    # Turned, for a product of wide matrices takes half the time of one of tall ones.
    turned = block.new_zeros(block.shape[1], block.shape[0])
    parts, squares = [], 0.0
    for _, tile in matrix.of(panel):
        parts.append(tile @ block)
        turned.addmm_(parts[-1].mT, tile)
        if measured:
            squares += squared_norm(tile)
    return torch.cat(parts), turned, squares


def measure_panel(matrix: RowTiles, panel: range, u: torch.Tensor, right: torch.Tensor) -> float:
    """Return ‖M - U·right‖² of the rows of a panel."""
    return sum(
        squared_norm(torch.addmm(tile, u[top:bottom], right, alpha=-1))
        for (top, bottom), tile in matrix.of(panel)
    )


Stacks = Callable[[], tuple[torch.Tensor, torch.Tensor]]
"""Returns B's side by side, m × k, and A's one below the other, k × n, with their weights in B."""


class FactorSum:
    """M = Σ q_i·B_i·A_i, from the factors alone, one group of adapters after another.

    A pass goes over all factors twice. What a basis misses is estimated with Gaussian probes g
    that ride along in the first pass: E‖M·(I - V·Vᵀ)·g‖² = ‖M·(I - V·Vᵀ)‖²_F. (Hutchinson's
    estimator on what the basis leaves, as in Meyer et al. 2021, arXiv 2010.09649.)
    """

    def __init__(self, over: Over, probes: torch.Tensor) -> None:
        """Make it.

        Args:
            over: the panels of its groups of adapters, a `Stacks` each.
            probes: n × p, Gaussian.
        """
        self._over = over
        self._probes = probes
        self._probed: torch.Tensor | None = None

    def images(self, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return M·block and Mᵀ·M·block; the first pass also takes the probes' images."""
        width = block.shape[1]
        if self._probed is None:
            image = accumulate(self._over(image_panel, torch.cat([block, self._probes], dim=1)))
            self._probed, image = (image[:, width:].clone(), image[:, :width].contiguous())
        else:
            image = accumulate(self._over(image_panel, block))
        return image, accumulate(self._over(back_panel, image)).mT.contiguous()

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


def image_panel(groups: Sequence[Stacks], panel: range, block: torch.Tensor) -> torch.Tensor:
    """Return M·block of the groups of a panel."""

    def multiply(g: int) -> torch.Tensor:
        b, a = groups[g]()
        return b @ (a @ block)

    return accumulate(map(multiply, panel))


def back_panel(groups: Sequence[Stacks], panel: range, image: torch.Tensor) -> torch.Tensor:
    """Return (Mᵀ·image)ᵀ of the groups of a panel."""

    def multiply(g: int) -> torch.Tensor:
        b, a = groups[g]()
        # Turned, for a product of wide matrices takes half the time of one of tall ones.
        return (image.mT @ b) @ a

    return accumulate(map(multiply, panel))


def dense(matrix: torch.Tensor, tile_at: TileAt, rows: Spans, rank: int, each: Each) -> Truncation:
    """Return the leading `rank` triples of a matrix with a small side, from the whole of it.

    Args:
        matrix: m × n, where it is formed.
        tile_at: its tiles, flat.
        rows: each tile's range of rows.
        rank: triples wanted.
        each: goes over the panels of tiles.
    """

    def form(panel: range) -> None:
        for t in panel:
            top, bottom = rows[t]
            tile_at(t, matrix[top:bottom].view(-1))

    for _ in each(form, panels(len(rows))):
        pass
    return truncate_matrix(matrix, rank)


def squared_norm(tile: torch.Tensor) -> float:
    """Return ‖tile‖²_F: short sums in the tile's dtype, added up in float64."""
    rows = torch.linalg.vector_norm(tile, dim=1)
    return float(rows.double().square().sum())
