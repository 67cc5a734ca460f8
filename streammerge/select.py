"""Exact order statistics of magnitudes in streams, without a sort of the whole.

The k-th largest of more elements than memory holds is found in passes (Munro and Paterson 1980). A
sample puts it into a bracket (Floyd and Rivest 1975); a pass counts what lies above the bracket
and gathers what lies inside. If the k-th is there it is found exactly; if the bracket holds too
much, or missed, the next one is drawn from what has been learnt.

A sample can mislead for ever, say with masses of equals. Behind it stands a way that cannot: the
bits of a non-negative float, read as an integer, are ordered as the float is, so digits of 16 bits
are counted from the top, each among the elements whose higher digits are already settled. Counts
need O(1) memory, take any chunking and add across workers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

DIGIT_BITS = 16
DIGITS = 1 << DIGIT_BITS

CHUNK = 1 << 15
"""Elements that are counted at once: small enough for the buffers to stay in cache."""

_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}
_BITS = {torch.float32: 32, torch.float64: 64}


@dataclass(frozen=True)
class Search:
    """The k-th largest magnitude, as far as it is known."""

    remaining: int
    """Its place, from the top, among the elements that share the settled digits."""
    prefix: int = 0
    """The settled digits."""
    settled: int = 0
    """How many digits are settled."""
    occurrences: int = 0
    """Elements that share the settled digits."""


def digits(dtype: torch.dtype) -> int:
    """Return how many digits a magnitude of `dtype` has."""
    return _BITS[dtype] // DIGIT_BITS


class DigitCounter:
    """Counts one digit over the elements that share the digits settled so far."""

    def __init__(self, search: Search, dtype: torch.dtype, device: torch.device) -> None:
        self._search = search
        self._shift = _BITS[dtype] - DIGIT_BITS * (search.settled + 1)
        self._integer = _INTEGER[dtype]
        # One bin more on each side takes the elements whose higher digits differ.
        self._bins = torch.zeros(DIGITS + 2, dtype=torch.int64, device=device)
        self._digit = torch.empty(CHUNK, dtype=self._integer, device=device)
        self._place = torch.empty(CHUNK, dtype=torch.int64, device=device)
        self._ones = torch.ones(CHUNK, dtype=torch.int64, device=device)

    def add(self, x: torch.Tensor) -> None:
        """Count the elements of a contiguous tensor."""
        sign = 1 << (_BITS[x.dtype] - 1)
        for bits in torch.split(x.view(self._integer).view(-1), CHUNK):
            digit, place = self._digit[: len(bits)], self._place[: len(bits)]
            torch.bitwise_and(bits, sign - 1, out=digit)
            digit.bitwise_right_shift_(self._shift).sub_(self._search.prefix << DIGIT_BITS)
            place.copy_(digit.clamp_(-1, DIGITS).add_(1))
            self._bins.scatter_add_(0, place, self._ones[: len(bits)])

    @property
    def counts(self) -> torch.Tensor:
        """How often each digit occurred: DIGITS int64 numbers."""
        return self._bins[1:-1]


def settle_digit(search: Search, counts: torch.Tensor) -> Search:
    """Return the search with one more digit settled, from the counts over all elements."""
    from_top = counts.flip(0).cumsum(0)
    # The first digit, from the top, at which as many elements are reached as are looked for.
    place = int(torch.searchsorted(from_top, search.remaining))
    digit = DIGITS - 1 - place
    above = int(from_top[place - 1]) if place else 0
    return Search(
        remaining=search.remaining - above,
        prefix=(search.prefix << DIGIT_BITS) | digit,
        settled=search.settled + 1,
        occurrences=int(counts[digit]),
    )


def found_value(search: Search, dtype: torch.dtype) -> float:
    """Return the magnitude whose digits are all settled."""
    bits = torch.tensor([search.prefix], dtype=_INTEGER[dtype])
    return float(bits.view(dtype)[0])


GATHERED = 1 << 19
"""Elements of a bracket that are to be gathered in a pass."""

Array = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Bracket:
    """Where the k-th largest is looked for: low <= |x| <= high."""

    low: float
    high: float
    stride: int = 1
    """Of the elements inside, every stride-th of a tile is gathered."""


@dataclass(frozen=True)
class Sifted:
    """What a pass with a bracket found in a tile."""

    above: int
    """Elements above the bracket."""
    inside: int
    """Elements in it."""
    gathered: Array
    """Of these."""


def bracket_sample(sample: Array, share: float, numel: int, *, margin: float) -> Bracket:
    """Return a bracket around the place that a share from the top has in a sample.

    Args:
        sample: magnitudes, falling or rising in no order.
        share: of the elements that are larger, in (0, 1).
        numel: elements of the whole tensor.
        margin: of the share, to both sides.
    """
    ordered = np.sort(sample)
    low, high = _around(ordered, share, margin)
    return Bracket(low, high, _stride(2 * margin * numel))


def narrow(found: Sequence[Sifted], bracket: Bracket, place: int) -> Bracket | None:
    """Return a bracket inside one that held too much to be gathered.

    Args:
        found: what the tiles hold of it.
        bracket: the one that held it.
        place: of what is looked for among the elements inside, from 1 on.

    Returns:
        None if there is none: all that was gathered is equal.
    """
    inside = sum(part.inside for part in found)
    ordered = np.sort(np.concatenate([part.gathered for part in found]))
    if not len(ordered) or ordered[0] == ordered[-1]:
        return None
    share, margin = place / inside, 5 * (0.25 / len(ordered)) ** 0.5
    low, high = _around(ordered, share, margin)
    return Bracket(max(low, bracket.low), min(high, bracket.high), _stride(2 * margin * inside))


def _around(ordered: Array, share: float, margin: float) -> tuple[float, float]:
    """Return what lies around a share from the top of a rising array; no bounds beyond its ends."""
    size = len(ordered)
    below, above = (
        size - 1 - math.ceil((share + margin) * size),
        size - math.floor((share - margin) * size),
    )
    low = float(ordered[below]) if below >= 0 else -1.0
    return low, float(ordered[above]) if above < size else math.inf


def _stride(expected: float) -> int:
    return max(1, math.ceil(expected / GATHERED))


class Sieve:
    """Sifts tiles with a bracket, in buffers that serve all of them."""

    def __init__(
        self, bracket: Bracket, size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Make buffers for tiles of up to `size` elements."""
        self._bracket = bracket
        self._magnitudes = torch.empty(size, dtype=dtype, device=device)
        self._above, self._inside = (
            torch.empty(size, dtype=torch.bool, device=device) for _ in range(2)
        )

    def sift(self, x: torch.Tensor) -> Sifted:
        """Return what a flat tile holds above and inside the bracket."""
        magnitudes = torch.abs(x, out=self._magnitudes[: len(x)])
        above, inside = self._above[: len(magnitudes)], self._inside[: len(magnitudes)]
        if magnitudes.device.type == "cpu":
            # numpy compares and looks for places five times as fast as torch does on the CPU.
            values, mask = magnitudes.numpy(), inside.numpy()
            np.greater(values, self._bracket.high, out=above.numpy())
            np.greater_equal(values, self._bracket.low, out=mask)
            higher = int(np.count_nonzero(above.numpy()))
            np.not_equal(mask, above.numpy(), out=mask)
            places = np.flatnonzero(mask)
            return Sifted(higher, len(places), values[places[:: self._bracket.stride]])
        torch.gt(magnitudes, self._bracket.high, out=above)
        torch.ge(magnitudes, self._bracket.low, out=inside).logical_xor_(above)
        picked = magnitudes[inside]
        taken = picked[:: self._bracket.stride].cpu().numpy()
        return Sifted(int(torch.count_nonzero(above)), len(picked), taken)


def keep_largest_(x: torch.Tensor, value: float, *, equals: int | None) -> torch.Tensor:
    """Set the elements of `x` whose magnitudes lie below a threshold to zero, in place.

    Args:
        x: a flat tile.
        value: the threshold; negative to keep all, infinite to keep none.
        equals: how many of those equal to it are kept, the lowest flat index first; all when None.

    Returns:
        `x`.
    """
    if value < 0:
        return x
    if math.isinf(value):
        return x.zero_()
    if equals == 0:
        return _shrink_(x, value)
    # hardshrink keeps what is strictly larger; the next smaller number lets the equals in.
    kind = np.float64 if x.dtype == torch.float64 else np.float32
    _shrink_(x, float(np.nextafter(kind(value), kind(0))))
    if equals is not None:
        x[equal_places(x, value)[equals:]] = 0.0
    return x


def equal_places(x: torch.Tensor, value: float) -> torch.Tensor:
    """Return where the magnitudes of a flat tile equal a value, as indices."""
    if x.device.type == "cpu":
        numbers = x.numpy()
        return torch.from_numpy(np.flatnonzero((numbers == value) | (numbers == -value)))
    return ((x == value) | (x == -value)).nonzero().view(-1)


def _shrink_(x: torch.Tensor, limit: float) -> torch.Tensor:
    torch.ops.aten.hardshrink.out(x, limit, out=x)
    return x
