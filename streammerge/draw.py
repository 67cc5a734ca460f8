"""Random bits that depend on what they are for, and on nothing else.

A keyed counter hash (SplitMix64's finaliser; Steele, Lea and Flood 2014) in integer tensor
operations: element i of a stream is mix(key + (i + 1)·gamma), its upper 32 bits. A DARE mask is a
pure function of (seed, adapter's position, target, tensor, flat index): the same for any tile,
worker, device or resume.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import xxhash

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB

CHUNK = 1 << 14
"""Elements that are drawn at once: small enough for the buffers to stay in cache."""


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
    bits = torch.empty(count, dtype=torch.int64, device=device)
    steps = _steps(min(CHUNK, count), bits.device)
    for offset, part in _parts(bits):
        _fill_bits(part, key, start + offset, steps)
    return bits


def random_mask(key: int, start: int, density: float, *, out: torch.Tensor) -> torch.Tensor:
    """Set `out`, which is contiguous, to 1 where a stream keeps an element and to 0 elsewhere.

    Args:
        key: of the stream.
        start: flat index of the first element.
        density: probability to keep.
        out: floating-point.
    """
    limit = keep_limit(density)
    steps = _steps(min(CHUNK, out.numel()), out.device)
    bits = torch.empty_like(steps)
    for offset, part in _parts(out.view(-1)):
        torch.lt(_fill_bits(bits[: len(part)], key, start + offset, steps), limit, out=part)
    return out


def keep_limit(density: float) -> int:
    """Return the limit below which an element's bits keep it with probability `density`."""
    return round(density * 2**32)


def _parts(whole: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield a flat tensor in chunks that stay in cache, with their offsets."""
    for number, part in enumerate(torch.split(whole, CHUNK)):
        yield number * CHUNK, part


def _fill_bits(bits: torch.Tensor, key: int, start: int, steps: torch.Tensor) -> torch.Tensor:
    """Set `bits` (int64) to the stream's elements from `start` on, and return it."""
    # int64 arithmetic wraps around, which is what the hash wants; only shifts need care, for
    # they copy the sign bit in.
    first = (key + (start + 1) * _GAMMA) % 2**64
    torch.add(steps[: len(bits)], _signed(first), out=bits)
    shifted = torch.empty_like(bits)
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        bits.bitwise_xor_(_shift_right(bits, shift, out=shifted)).mul_(_signed(factor))
    bits.bitwise_xor_(_shift_right(bits, 31, out=shifted))
    return bits.copy_(_shift_right(bits, 32, out=shifted))


def _steps(count: int, device: torch.device) -> torch.Tensor:
    """Return i·gamma for i = 0 … count - 1."""
    return torch.arange(count, dtype=torch.int64, device=device).mul_(_signed(_GAMMA))


def _shift_right(bits: torch.Tensor, by: int, *, out: torch.Tensor) -> torch.Tensor:
    torch.bitwise_right_shift(bits, by, out=out)
    return out.bitwise_and_((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    """Return a 64-bit pattern as the signed integer that has it."""
    return value - 2**64 if value >= 2**63 else value
