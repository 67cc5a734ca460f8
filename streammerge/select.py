"""Exact order statistics of magnitudes by counting digits, without a sort.

The bits of a non-negative float, read as an integer, are ordered as the float is. The k-th largest
is found digit by digit, 16 bits at a time from the top: count how often each digit occurs among
the elements whose higher digits are already settled, and walk down the counts. Counts need O(1)
memory, take any chunking and add across workers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

DIGIT_BITS = 16
DIGITS = 1 << DIGIT_BITS

CHUNK = 1 << 15
"""Elements that are counted at once: small enough for the buffers to stay in cache."""

_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}
_BITS = {torch.float32: 32, torch.float64: 64}


@dataclass(frozen=True)
class Cut:
    """Which elements are kept: all above `value`, and of those equal to it the first `equals`."""

    value: float
    equals: int


KEEP_NONE = Cut(float("inf"), 0)
KEEP_ALL = Cut(-1.0, 0)


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


def keep_largest_(x: torch.Tensor, cut: Cut, *, all_equals: bool) -> torch.Tensor:
    """Set the elements of `x` below the cut to zero, in place, and return it.

    Args:
        x: a contiguous tile.
        cut: where it falls on this tile; among equals the lowest flat index is kept.
        all_equals: whether every element equal to the cut's value is kept.
    """
    if cut.value < 0:
        return x
    if cut.value == float("inf"):
        return x.zero_()
    if all_equals:
        # hardshrink keeps what is strictly larger; the next smaller number lets the equals in.
        below = torch.nextafter(torch.tensor(cut.value, dtype=x.dtype), x.new_zeros(()).cpu())
        return _shrink_(x, float(below))
    equal = (x.abs() == cut.value).view(-1).nonzero().view(-1)[: cut.equals]
    kept = x.view(-1)[equal]
    _shrink_(x, cut.value).view(-1)[equal] = kept
    return x


def _shrink_(x: torch.Tensor, limit: float) -> torch.Tensor:
    torch.ops.aten.hardshrink.out(x, limit, out=x)
    return x
