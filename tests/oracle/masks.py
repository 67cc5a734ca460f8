"""What streammerge draws at random, for the oracles to use the same."""

from __future__ import annotations

import math

from oracle.cases import MaskMaker
from oracle.restated import Mask, Matrix
from streammerge.draw import keep_limit, random_bits, stream_key


def stream_masks(density: float, seed: int = 0) -> MaskMaker:
    """Masks of a merge under this seed."""

    def make(position: int, target: str, tensor: str, shape: tuple[int, int]) -> Mask:
        key = stream_key(seed, position, target, tensor)
        bits = random_bits(key, 0, math.prod(shape))
        kept: Mask = (bits < keep_limit(density)).numpy().reshape(shape)
        return kept

    return make


def draws(position: int, target: str, tensor: str, shape: tuple[int, ...], seed: int = 0) -> Matrix:
    """The numbers in [0, 1) that decide whether elements are kept."""
    bits = random_bits(stream_key(seed, position, target, tensor), 0, math.prod(shape))
    drawn: Matrix = bits.numpy().reshape(shape) / 2.0**32
    return drawn
