"""Random bits that depend on what they are for, and on nothing else.

A keyed counter hash in 32-bit integer tensor operations: element i of a stream is i plus half of
the stream's key, mixed by three rounds of xor-shift and multiply (Wellons 2018, "triple32"), with
the key's other half added after the first. A DARE mask is a pure function of (seed, adapter's
position, target, tensor, flat index): the same for any tile, worker, device or resume. Why 32-bit
operations: docs/decisions/masks.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
import xxhash

_ROUNDS = ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB))
"""Shift and factor of each round. What the original ends with, a shift by 14, is left out: it
changes the 18 low bits, and what is compared with a limit is decided by the high ones."""

CHUNK = 1 << 18
"""Elements that are drawn at once: calls are dear, and so are buffers beyond the cache."""

BLOCK = 1 << 32
"""Elements that 32 bits can count; each block of a stream has a key of its own."""


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
    drawer = Drawer(min(CHUNK, count), torch.device(device))
    # Drawn bits are signed numbers, half of them below zero.
    return torch.cat([part.long() for _, part in drawer.parts(key, start, count)]).add_(2**31)


def keep_limit(density: float) -> int:
    """Return the limit below which an element's bits keep it with probability `density`."""
    return round(density * 2**32)


def signed_limit(probability: npt.NDArray[np.float64]) -> npt.NDArray[np.int32]:
    """Return the last of the drawn bits, which are signed, that keep elements with probabilities
    above zero: the same bits as `keep_limit` keeps."""
    limits: npt.NDArray[np.float64] = np.rint(probability * 2.0**32).clip(1.0, None) - (2.0**31 + 1)
    return limits.astype(np.int32)


class Drawer:
    """Draws elements of streams, chunk by chunk, into buffers that serve all of them."""

    def __init__(self, size: int, device: torch.device) -> None:
        """Make buffers for chunks of `size` elements, CHUNK at most."""
        self._steps = torch.arange(min(size, CHUNK), dtype=torch.int32, device=device)
        self._bits, self._shifted = torch.empty_like(self._steps), torch.empty_like(self._steps)

    def mask(self, key: int, start: int, density: float, *, out: torch.Tensor) -> torch.Tensor:
        """Set `out`, which is contiguous, to 1 where a stream keeps an element, to 0 elsewhere.

        Args:
            key: of the stream.
            start: flat index of the first element.
            density: probability to keep, below 1.
            out: floating-point.
        """
        flat, limit = out.view(-1), keep_limit(density) - 2**31
        if limit == 2**31:  # more than int32 holds: so near 1 that nothing is dropped
            return out.fill_(1.0)
        for offset, bits in self.parts(key, start, len(flat)):
            torch.lt(bits, limit, out=flat[offset : offset + len(bits)])
        return out

    def mask_each(self, key: int, start: int, limits: torch.Tensor, *, out: torch.Tensor) -> None:
        """Set `out`, which is contiguous, to 1 where a stream keeps an element, to 0 elsewhere.

        Args:
            key: of the stream.
            start: flat index of the first element.
            limits: of each element, contiguous, as `signed_limit` gives them; int32.
            out: floating-point.
        """
        flat, flat_limits = out.view(-1), limits.view(-1)
        for offset, bits in self.parts(key, start, len(flat)):
            end = offset + len(bits)
            torch.le(bits, flat_limits[offset:end], out=flat[offset:end])

    def parts(self, key: int, start: int, count: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield a stream's elements, as int32, chunk by chunk, with their offsets from `start`."""
        offset = 0
        while offset < count:
            block, index = divmod(start + offset, BLOCK)
            size = min(len(self._steps), count - offset, BLOCK - index)
            block_key = xxhash.xxh3_64_intdigest(str(block).encode(), seed=key) if block else key
            yield offset, self._draw(block_key, index, size)
            offset += size

    def _draw(self, key: int, index: int, size: int) -> torch.Tensor:
        bits, shifted = self._bits[:size], self._shifted[:size]
        # int32 arithmetic wraps around, which is what the hash wants.
        torch.add(self._steps[:size], _signed((key + index) % BLOCK), out=bits)
        for number, (shift, factor) in enumerate(_ROUNDS):
            bits.bitwise_xor_(_shift_right(bits, shift, out=shifted)).mul_(_signed(factor))
            if number == 0:
                bits.add_(_signed(key >> 32))
        return bits


def _shift_right(bits: torch.Tensor, by: int, *, out: torch.Tensor) -> torch.Tensor:
    """Shift zeros in from the left; torch's own shift copies the sign bit."""
    torch.bitwise_right_shift(bits, by, out=out)
    return out.bitwise_and_((1 << (32 - by)) - 1)


def _signed(value: int) -> int:
    """Return a 32-bit pattern as the signed integer that has it."""
    return value - 2**32 if value >= 2**31 else value
