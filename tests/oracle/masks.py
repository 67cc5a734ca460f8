"""DARE's masks as streammerge draws them, for the oracles to use the same ones."""

from __future__ import annotations

import math

from oracle.cases import MaskMaker
from oracle.restated import Mask
from streammerge.draw import keep_limit, random_bits, stream_key


def stream_masks(density: float, seed: int = 0) -> MaskMaker:
    """Masks of a merge under this seed."""

    def make(position: int, target: str, tensor: str, shape: tuple[int, int]) -> Mask:
        key = stream_key(seed, position, target, tensor)
        bits = random_bits(key, 0, math.prod(shape))
        kept: Mask = (bits < keep_limit(density)).numpy().reshape(shape)
        return kept

    return make
