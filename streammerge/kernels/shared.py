"""Two bases that all deltas share: the Tucker-2 decomposition of N matrices, from their factors.

With what is looked for held as B·X and Aᵀ·Y for the factors side by side, a delta is never formed,
nor is anything larger than the factors and their Gram matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from streammerge.kernels.bases import Basis, signs_of, smallest_gap
from streammerge.kernels.each import Each
from streammerge.kernels.grams import gram, multiply

SWEEPS = 200
"""At most. Half of the modules of published adapters settle within 54; where the next directions
keep nearly as much as those that are kept it takes more."""

SETTLED = 1e-10
"""Columns that a sweep turns by less than this have settled."""

NULL = 1e-12
"""Squared singular values below this share of Σ c_t²·‖Δ_t‖² are rounding; so are eigenvalues of the
products of columns of length 1, below this share of the largest."""


@dataclass(frozen=True)
class Found:
    """A basis on its way: stack·x with orthonormal columns."""

    x: torch.Tensor
    """k × columns."""
    image: torch.Tensor
    """squares·x: every product with what is large is made once."""


@dataclass(frozen=True)
class Side:
    """The factors of one side and their products with one another."""

    stack: torch.Tensor
    """B's, or turned A's, side by side: l × k."""
    squares: torch.Tensor
    """Their Gram matrix, k × k, float64."""
    ranks: Sequence[int]
    """How many columns each source has of them."""
    counts: torch.Tensor
    """c_t·s_t of each column, float64."""
    nothing: float
    """Squared singular values up to this are rounding."""


def shared_bases(
    b: torch.Tensor,
    a: torch.Tensor,
    ranks: Sequence[int],
    scalings: Sequence[float],
    *,
    rank: int,
    beta: float,
    each: Each,
    check: Callable[[], None] = lambda: None,
) -> tuple[Basis, Basis]:
    """Return U (m × rank) and V (n × rank) in which N deltas keep the most, all at once.

    They maximise Σ c_t²·‖Uᵀ·Δ_t·V‖² (He et al. 2026, arXiv 2606.03723: HOSVD, then HOOI; De
    Lathauwer, De Moor and Vandewalle 2000). c_t brings each delta from its norm towards the mean
    norm: ‖Δ_t‖ counts as beta·‖Δ_t‖ + (1 - beta)·mean. A half-sweep is one step of orthogonal
    iteration, at rest where the SVD that HOOI takes there is; and it is that SVD where a basis has
    fewer columns than it may have, for a step finds none again that was lost.

    In the end each basis is turned to the left singular vectors of all deltas as the other basis
    sees them, with one order and sign. What has not settled after SWEEPS is returned as it is, and
    says so.

    Args:
        b: B's side by side, m × k, without scalings.
        a: A's one below the other, k × n.
        ranks: of the sources.
        scalings: of the sources.
        rank: of the bases; fewer columns where the deltas span fewer.
        beta: see above.
        each: goes over blocks.
        check: called before each sweep; ends it by raising.

    Raises:
        FloatingPointError: a norm is not finite.
    """
    squares = [gram(x, each) for x in (b, a.mT)]
    counts, energy = _importance(squares, ranks, scalings, beta)
    left, right = (
        Side(stack, products, ranks, counts, NULL * energy)
        for stack, products in zip((b, a.mT), squares, strict=True)
    )
    u = _leading(left, _blocks(right), rank)
    v = _leading(right, _blocks(left), rank)
    most = u.x.shape[1], v.x.shape[1]
    moved = 0.0
    for _ in range(SWEEPS if all(most) else 0):
        check()
        u_next = _turned(left, right, u, v, most[0])
        v_next = _turned(right, left, v, u_next, most[1])
        moved = max(_distance(left, u, u_next), _distance(right, v, v_next))
        u, v = u_next, v_next
        if moved <= SETTLED:
            break
    unsettled = moved if moved > SETTLED else 0.0
    return (
        _basis(left, right, (u, v), each, unsettled=unsettled),
        _basis(right, left, (v, u), each, unsettled=unsettled),
    )


def _importance(
    squares: Sequence[torch.Tensor], ranks: Sequence[int], scalings: Sequence[float], beta: float
) -> tuple[torch.Tensor, float]:
    """Return c_t·s_t for every column, of each source as often as its rank says, float64; and
    Σ c_t²·‖Δ_t‖²."""
    met = squares[0] * squares[1]
    norms = torch.stack(
        [
            torch.split(rows, list(ranks), dim=1)[t].sum().clamp_min(0.0).sqrt()
            for t, rows in enumerate(torch.split(met, list(ranks)))
        ]
    )
    scaling = torch.tensor(list(scalings), dtype=torch.float64, device=norms.device)
    norms = norms * scaling.abs()
    if not bool(torch.isfinite(norms).all()):
        raise FloatingPointError("deltas overflow: their norm is not finite")
    wanted = beta * norms + (1 - beta) * norms.mean()
    weights = torch.where(norms > 0, wanted / norms, 0.0) * scaling
    each = torch.repeat_interleave(weights, torch.tensor(list(ranks), device=norms.device))
    return each, float(torch.where(norms > 0, wanted, 0.0).square().sum())


def _blocks(other: Side) -> list[torch.Tensor]:
    """Return c_t²·A_t·A_tᵀ of each source."""
    ranks = list(other.ranks)
    rows = enumerate(torch.split(other.squares, ranks))
    counts = torch.split(other.counts, ranks)
    return [
        torch.outer(counts[t], counts[t]) * torch.split(part, ranks, dim=1)[t] for t, part in rows
    ]


def _leading(side: Side, blocks: Sequence[torch.Tensor], rank: int) -> Found:
    """Return X with side.stack·X the leading left singular vectors of what lies side by side.

    [c_1·Δ_1 … c_N·Δ_N], as a whole or as the other basis sees it, has those of stack·L, L the roots
    of the blocks.

    Args:
        side: of the factors.
        blocks: for [c_t·Δ_t] = [B_t·Y_t] each Y_t·Y_tᵀ.
        rank: how many vectors; fewer where there are no more.
    """
    ranks = list(side.ranks)
    roots = [_root(block) for block in blocks]
    squares = side.squares.clone()
    for rows, root in zip(torch.split(squares, ranks), roots, strict=True):
        rows.copy_(root.mT @ rows)
    for rows, root in zip(torch.split(squares, ranks, dim=1), roots, strict=True):
        rows.copy_(rows @ root)
    vectors: torch.Tensor
    values, vectors = torch.linalg.eigh(squares)
    del squares
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    kept = int(torch.count_nonzero(values > side.nothing))
    chosen = vectors[:, :kept] / values[:kept].sqrt()
    parts = torch.split(chosen, ranks)
    x = torch.cat([root @ rows for root, rows in zip(roots, parts, strict=True)])
    return Found(x, side.squares @ x)


def _root(block: torch.Tensor) -> torch.Tensor:
    """Return L with L·Lᵀ = block, which is positive semidefinite."""
    values, vectors = torch.linalg.eigh(block)
    root: torch.Tensor = vectors * values.clamp_min(0.0).sqrt()
    return root


def _seen(other: Side, found: Found) -> Sequence[torch.Tensor]:
    """Return c_t·A_t·V of each source, r_t × columns; V is what was found of the other side."""
    return torch.split(other.counts[:, None] * found.image, list(other.ranks))


def _turned(side: Side, other: Side, found: Found, seen: Found, most: int) -> Found:
    """Return a basis after one step of orthogonal iteration on all deltas as the other one sees
    them; or where it has fewer columns than `most`, the leading singular vectors of these.

    P = [c_1·Δ_1·V …] = stack·E with E in blocks, and P·Pᵀ·U = stack·(E·Eᵀ·squares·x). U is turned
    to its singular vectors first, so that each column is as long afterwards as its own value says:
    at length one columns of small values are as good as those of large ones.
    """
    parts, ranks = _seen(other, seen), list(side.ranks)
    values, vectors = _values(parts, torch.split(found.image, ranks))
    there = values > side.nothing
    if found.x.shape[1] == most and bool(there.all()):
        image = found.image @ (vectors / values)
        pairs = zip(parts, torch.split(image, ranks), strict=True)
        turned = _orthonormal(side, torch.cat([e @ (e.mT @ part) for e, part in pairs]))
        if turned.x.shape[1] == most:
            return turned
    return _leading(side, [e @ e.mT for e in parts], most)


def _values(
    parts: Sequence[torch.Tensor], images: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the squared singular values of P as a basis sees it, falling, and their vectors."""
    squares = images[0].new_zeros(images[0].shape[1], images[0].shape[1])
    for e, image in zip(parts, images, strict=True):
        met = e.mT @ image
        squares.addmm_(met.mT, met)
    values, vectors = torch.linalg.eigh((squares + squares.mT) / 2)
    return values.flip(0), vectors.flip(1)


def _orthonormal(side: Side, x: torch.Tensor) -> Found:
    """Return x·T for which the columns of stack·x·T are orthonormal; as many as are apart."""
    image = side.squares @ x
    inside = x.mT @ image
    lengths = inside.diagonal().clamp_min(0.0).sqrt()
    scale = torch.where(lengths > 0, 1 / lengths, 0.0)
    inside = inside * torch.outer(scale, scale)
    vectors: torch.Tensor
    values, vectors = torch.linalg.eigh((inside + inside.mT) / 2)
    apart = values > NULL * values[-1:].clamp_min(0.0)
    turn = scale[:, None] * (vectors[:, apart] / values[apart].sqrt())
    return Found(x @ turn, image @ turn)


def _distance(side: Side, first: Found, second: Found) -> float:
    """Return the norm of the sines of the angles between two spaces; 1 of unequal ones."""
    if first.x.shape != second.x.shape:
        return 1.0
    rest = second.x - first.x @ (first.x.mT @ second.image)
    # Not from the images: where columns of factors are nearly alike their differences are rounding.
    return math.sqrt(max(0.0, float((rest * (side.squares @ rest)).sum())))


def _basis(
    side: Side,
    other: Side,
    found: tuple[Found, Found],
    each: Each,
    *,
    unsettled: float,
) -> Basis:
    """Return the basis of stack·x, turned to the singular vectors of what the other one sees."""
    own, seen = found
    if not own.x.shape[1]:
        return Basis(side.stack.new_empty(len(side.stack), 0), 1.0)
    values, vectors = _values(_seen(other, seen), torch.split(own.image, list(side.ranks)))
    values = values.clamp_min(0.0).sqrt()
    columns = multiply(side.stack, own.x @ vectors, each)
    return Basis(columns.mul_(signs_of(columns)), smallest_gap(values), unsettled)
