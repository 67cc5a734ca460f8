"""Rules on coordinates of the deltas, in bases of what all adapters span: core, knots and ctm."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

import torch

from streammerge.kernels.bases import Basis, Roots, left_basis, square_root
from streammerge.kernels.shared import shared_bases
from streammerge.lowrank import Truncation, tall_product
from streammerge.planner.routes import whole_side
from streammerge.spaces.core import core_columns, core_rows
from streammerge.spaces.delta import delta_sample, delta_tile
from streammerge.spaces.knots import knots_factor
from streammerge.tiling import row_tiles, sample_size
from streammerge.worker.deltas import MergedTensors, Spans, merge_tensors
from streammerge.worker.sums import stack
from streammerge.worker.work import Work


def merge_in_left_basis(work: Work) -> Truncation:
    """Return the triples of what a rule makes of S·Vᵀ, one for each source, brought back by U."""
    left, seen = _in_left_basis(work)
    if seen is None:
        return _nothing(work, left)
    triples = _merge(work, seen)
    return _seen_in(replace(triples, u=tall_product(left.vectors, triples.u)), left)


def _in_left_basis(work: Work) -> tuple[Basis, Coordinates | None]:
    """Return U and the sources' coordinates in it; None where all deltas are zero."""
    sources = work.sources

    held = list(work.each(lambda i: sources.a[i].whole(), range(work.task.factors)))

    def a(i: int) -> torch.Tensor:
        return held[i] if i < len(held) else sources.a[i].whole()

    def root(i: int) -> torch.Tensor:
        return square_root(a(i), sources.scalings[i], map)

    left, b = _basis(work, "B", knots_factor, list(work.each(root, range(len(sources)))))
    work.end_phase()
    if not left.vectors.shape[1]:
        return left, None
    height = min(work.task.m, sum(_ranks(work)))
    return left, Coordinates(work, "knots", b, a, (height, work.task.n))


def merge_in_both_bases(work: Work) -> Truncation:
    """Return the triples of what a rule makes of the cores, in bases of all B's and all A's."""
    return _merge_cores(work, *_in_both_bases(work))


def merge_in_shared_bases(work: Work) -> Truncation:
    """Return the triples of what a rule makes of the cores, in two bases of the output's rank."""
    return _merge_cores(work, *_in_shared_bases(work))


def _merge_cores(work: Work, left: Basis, right: Basis, seen: Coordinates | None) -> Truncation:
    """Return the triples of what a rule makes of the deltas' coordinates in two bases."""
    if seen is None:
        return _nothing(work, left, right)
    triples = _merge(work, seen)
    u, v = tall_product(left.vectors, triples.u), tall_product(right.vectors, triples.v)
    return _seen_in(replace(triples, u=u, v=v), left, right)


def _in_both_bases(work: Work) -> tuple[Basis, Basis, Coordinates | None]:
    """Return both bases and the sources' cores; None where all B's, or all A's, are zero."""
    total = sum(_ranks(work))
    left, b = _basis(work, "B", core_columns)
    right, turned = _basis(work, "A", core_columns)
    a = [x.mT.contiguous() for x in turned]
    del turned
    work.end_phase()
    planned = min(work.task.m, total), min(work.task.n, total)
    return left, right, _cores(work, "core", b, a, planned)


def _in_shared_bases(work: Work) -> tuple[Basis, Basis, Coordinates | None]:
    """Return both bases and the sources' cores in them; None where there are none."""
    everyone, rank = range(len(work.sources)), work.task.rank
    left, right = shared_bases(
        stack(work, everyone, "B", scaled=False),
        stack(work, everyone, "A"),
        _ranks(work),
        work.sources.scalings,
        rank=rank,
        beta=work.job.plan.parameters["beta"],
        each=work.each,
        check=work.job.check,
    )
    work.end_phase()
    b = list(work.each(lambda b: core_columns(b.whole(), left.vectors), work.sources.b))
    a = list(work.each(lambda a: core_rows(a.whole(), right.vectors), work.sources.a))
    return left, right, _cores(work, "ctm", b, a, (rank, rank))


def _cores(
    work: Work,
    name: str,
    b: list[torch.Tensor],
    a: list[torch.Tensor],
    planned: tuple[int, int],
) -> Coordinates | None:
    """Return what a rule sees; None where one of the bases has no directions.

    Args:
        work: the target.
        name: by which random bits are drawn.
        b: coordinates of the B's, k × r each.
        a: of the A's, r × l each.
        planned: how many directions the bases have at most.
    """
    if not len(b[0]) or not a[0].shape[1]:
        return None
    return Coordinates(work, name, b, lambda i: a[i], planned)


def coordinates_of(work: Work) -> Coordinates | None:
    """Return what a rule sees of a target in bases; None where there is nothing but zeros."""
    bases: dict[str, Callable[[Work], tuple[*tuple[Basis, ...], Coordinates | None]]] = {
        "left_basis": _in_left_basis,
        "both_bases": _in_both_bases,
        "shared_bases": _in_shared_bases,
    }
    *_, seen = bases[work.task.route](work)
    return seen


def _ranks(work: Work) -> list[int]:
    return [reader.matrix_shape[0] for reader in work.sources.a]


def _basis(
    work: Work,
    side: str,
    project: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    roots: Roots | None = None,
) -> tuple[Basis, list[torch.Tensor]]:
    """Return a basis of all B's, or of all turned A's, and the coordinates of each in it."""
    basis, reduced = left_basis(*_stacked(work, side), roots, work.each)
    return basis, reduced.project(project, work.each)


def _stacked(work: Work, side: str) -> tuple[torch.Tensor, list[int]]:
    """Return the B's side by side, or the turned A's, as they are; and how wide each is."""
    stacked = stack(work, range(len(work.sources)), side, scaled=False)
    return stacked if side == "B" else stacked.mT, _ranks(work)


def _nothing(work: Work, *bases: Basis) -> Truncation:
    """Return the triples of a sum of zeros."""
    task, new = work.task, work.sources.a[0].new_empty
    zeros = Truncation(
        u=new((task.m, task.rank)).zero_(),
        s=new((task.rank,)).zero_().double(),
        v=new((task.n, task.rank)).zero_(),
        energy=0.0,
        lost=0.0,
    )
    return _seen_in(zeros, *bases)


def _seen_in(triples: Truncation, *bases: Basis) -> Truncation:
    """Return triples with what is known of the bases in which their rule saw coordinates."""
    return replace(
        triples,
        directions=tuple(basis.vectors.shape[1] for basis in bases),
        gap=min(basis.gap for basis in bases),
        unsettled=max(basis.unsettled for basis in bases),
    )


def _merge(work: Work, seen: Coordinates) -> Truncation:
    """Return the triples of the merged coordinates.

    How many there are is known only now: bases have as many directions as the factors span. What
    was planned for an iteration is formed as a whole where it turns out to have a short side.
    """
    with closing(MergedTensors(work, seen)) as merged:
        small = min(merged.shape)
        whole = small <= whole_side(work.task.rank)
        passes = 0 if whole else min(work.task.passes, small // work.task.block)
        return merge_tensors(work, merged, passes)


class Coordinates:
    """Tiles and samples of the deltas' coordinates, from those of their factors."""

    def __init__(
        self,
        work: Work,
        name: str,
        b: list[torch.Tensor],
        a: Callable[[int], torch.Tensor],
        planned: tuple[int, int],
    ) -> None:
        """Make it.

        Args:
            work: the target.
            name: by which random bits are drawn.
            b: coordinates of the B's, k × r each.
            a: returns A, or its coordinates, of source i.
            planned: how many rows and columns there are at most; tiles are cut by these.
        """
        height, self.width = len(b[0]), a(0).shape[1]
        self.name = name
        self.rows: Spans = [
            (start, min(stop, height)) for start, stop in row_tiles(*planned) if start < height
        ]
        """Each tile's range of rows."""
        self._job = work.job
        self._scalings = work.sources.scalings
        self._b = b
        self._a = a

    def fill(self, i: int, t: int, buffer: torch.Tensor) -> torch.Tensor:
        """Put tile t of source i's coordinates into a buffer and return it, flat."""
        self._job.check()
        start, stop = self.rows[t]
        out = buffer[: (stop - start) * self.width]
        shaped = out.view(stop - start, self.width)
        delta_tile(self._b[i][start:stop], self._a(i), self._scalings[i], out=shaped)
        return out

    def sample(self, i: int) -> torch.Tensor:
        """Return some of source i's coordinates, spread over all of it."""
        count = sample_size(len(self._b[i]) * self.width)
        return delta_sample(self._b[i], self._a(i), self._scalings[i], count)
