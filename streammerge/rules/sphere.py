"""Means on the sphere, in the coordinates of the deltas; shared by the rules that turn.

A point of the sphere is Σ a_i·u_i of the deltas u_i at length 1, and is held as a; all inner
products come from their cosines.
"""

from __future__ import annotations

import torch

from streammerge.rules.inner import BLUR, Inner

NEAR = 1e-12
"""A step below this is none."""


def facing(inner: Inner) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return which way each direction faces, their shares, and their cosines as they face.

    A negative weight is that of the opposite direction: -1 and 2 of u and v are 1 and 2 of -u and
    v.
    """
    weights = torch.tensor(list(inner.weights), dtype=torch.float64)
    signs = torch.where(weights < 0, -1.0, 1.0).double()
    shares = weights.abs() / weights.abs().sum()
    return signs, shares, inner.cosines * torch.outer(signs, signs)


def step(point: torch.Tensor, shares: torch.Tensor, cosines: torch.Tensor) -> torch.Tensor:
    """Return where the mean of the directions, as they are seen from a point, leads from there.

    Each u_i is laid out in the tangent plane at the point (the logarithm), the mean of these is
    taken by the shares, and followed along the sphere (the exponential).

    Args:
        point: coordinates of a vector of length 1; zeros, where there is none, stay zeros.
        shares: of the directions; those of directions that are zero count for nothing.
        cosines: of the directions, N × N, float64.
    """
    if not bool(point.any()):
        return point
    toward = (cosines @ point).clamp(-1.0, 1.0)
    angles = torch.arccos(toward)
    sines = torch.sin(angles)
    # Right across from the point a direction leads nowhere; near it an angle is its sine.
    alike = torch.where(toward > 0, 1.0, 0.0)
    stretch = torch.where(sines > BLUR, angles / sines.clamp_min(BLUR), alike) * shares
    tangent = stretch - (stretch @ toward) * point
    length = float((tangent @ cosines @ tangent).clamp_min(0.0).sqrt())
    if length <= NEAR:
        return point
    angle = torch.tensor(length, dtype=torch.float64)
    return at_length_one(torch.cos(angle) * point + torch.sin(angle) / length * tangent, cosines)


def at_length_one(point: torch.Tensor, cosines: torch.Tensor) -> torch.Tensor:
    """Return coordinates of the direction of a vector; zeros where it has none.

    Args:
        point: coordinates of a vector that is 1 long at most.
        cosines: of the directions.
    """
    length = float((point @ cosines @ point).clamp_min(0.0).sqrt())
    return point / length if length > BLUR else torch.zeros_like(point)
