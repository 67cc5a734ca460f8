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
    """Elements that share the settled digits; only counted once all are."""


def digits(dtype: torch.dtype) -> int:
    """Return how many digits a magnitude of `dtype` has."""
    return _BITS[dtype] // DIGIT_BITS


def magnitude_bits(x: torch.Tensor) -> torch.Tensor:
    """Return the bits of |x| as integers, flat; ordered as |x| is."""
    return x.abs().view(_INTEGER[x.dtype]).flatten()


def count_digit(x: torch.Tensor, search: Search) -> torch.Tensor:
    """Count the next digit among the elements of `x` that share the settled digits: int64."""
    bits = magnitude_bits(x)
    shift = _BITS[x.dtype] - DIGIT_BITS * (search.settled + 1)
    if search.settled:
        bits = bits[(bits >> (shift + DIGIT_BITS)) == search.prefix]
    digit = (bits >> shift) & (DIGITS - 1)
    return torch.bincount(digit, minlength=DIGITS)


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


def keep_largest(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    """Return `x` with zeros where the cut falls; among equals the lowest flat index is kept."""
    if cut == KEEP_ALL:
        return x
    magnitude = x.abs()
    keep = magnitude > cut.value
    if cut.equals:
        equal = (magnitude == cut.value).flatten()
        places = equal.nonzero().flatten()[: cut.equals]
        keep.view(-1)[places] = True
    return torch.where(keep, x, 0.0)
