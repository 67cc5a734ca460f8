"""Random bits that depend on what they are for, and on nothing else.

A keyed counter hash (SplitMix64's finaliser; Steele, Lea and Flood 2014) in integer tensor
operations: element i of a stream is mix(key + (i + 1)·gamma), its upper 32 bits. A DARE mask is a
pure function of (seed, adapter's position, target, tensor, flat index): the same for any tile,
worker, device or resume.
"""

from __future__ import annotations

import torch
import xxhash

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def stream_key(seed: int, position: int, target: str, tensor: str) -> int:
    """Return the 64-bit key of a stream.

    Args:
        seed: of the run.
        position: the adapter's place in the list of adapters.
        target: the module's path.
        tensor: "A", "B" or "delta".
    """
    return xxhash.xxh3_64_intdigest(f"{position}\0{target}\0{tensor}".encode(), seed=seed)


def random_bits(
    key: int, start: int, count: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Return elements start … start + count - 1 of a stream: int64 in [0, 2**32)."""
    bits = torch.arange(start + 1, start + count + 1, dtype=torch.int64, device=device)
    # int64 arithmetic wraps around, which is what the hash wants; only shifts need care, for
    # they copy the sign bit in.
    bits.mul_(_signed(_GAMMA)).add_(_signed(key))
    shifted = torch.empty_like(bits)
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        _shift_right(bits, shift, out=shifted)
        bits.bitwise_xor_(shifted).mul_(_signed(factor))
    _shift_right(bits, 31, out=shifted)
    return _shift_right(bits.bitwise_xor_(shifted), 32, out=shifted)


def keep_limit(density: float) -> int:
    """Return the limit below which an element's bits keep it with probability `density`."""
    return round(density * 2**32)


def _shift_right(bits: torch.Tensor, by: int, *, out: torch.Tensor) -> torch.Tensor:
    torch.bitwise_right_shift(bits, by, out=out)
    return out.bitwise_and_((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    """Return a 64-bit pattern as the signed integer that has it."""
    return value - 2**64 if value >= 2**63 else value
