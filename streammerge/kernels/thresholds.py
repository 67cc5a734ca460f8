"""The threshold of magnitude pruning over all tiles of a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from streammerge.kernels.each import Over, accumulate
from streammerge.select import (
    Bracket,
    DigitCounter,
    Search,
    Sieve,
    Sifted,
    bracket_sample,
    digits,
    equal_places,
    found_value,
    keep_largest_,
    narrow,
    settle_digit,
)

BRACKETS = 4
"""Passes with a bracket, after which digits are counted."""

DEVIATIONS = 4
"""A bracket's margin, in standard deviations of a sample's guess."""

PANEL_GATHERED = 1 << 16
"""Elements that a panel gathers at most; where a bracket holds more, digits are counted."""


@dataclass(frozen=True)
class Threshold:
    """Where a tensor is cut: above a value all is kept, of its equals those of the lowest index."""

    value: float
    last: int | None = None
    """The tile in which the last of the equals that are kept lies: tiles before it keep all,
    those behind it none; None where all are kept everywhere."""
    equals: int = 0
    """How many that tile keeps."""

    def prune_(self, x: torch.Tensor, t: int) -> torch.Tensor:
        """Set what tile `t` loses to zero, in place, and return it."""
        if self.last is None or t < self.last:
            return keep_largest_(x, self.value, equals=None)
        return keep_largest_(x, self.value, equals=self.equals if t == self.last else 0)

    def mask_(self, x: torch.Tensor, t: int) -> torch.Tensor:
        """Set the elements of tile `t`, none negative, to 1 where they are kept and to 0 elsewhere,
        in place; return it."""
        if math.isinf(self.value):
            return x.zero_()
        if self.last is None or t < self.last:
            return x.ge_(self.value)
        kept = equal_places(x, self.value)[: self.equals if t == self.last else 0]
        x.gt_(self.value)
        x[kept] = 1.0
        return x


@dataclass(frozen=True)
class Band:
    """Two cuts: what lies above the first is dropped, and what lies below the second."""

    outliers: Threshold
    kept: Threshold

    def prune_(self, x: torch.Tensor, t: int, buffer: torch.Tensor) -> torch.Tensor:
        """Set what tile `t` loses to zero, in place, and return it; the buffer is of its size."""
        outliers = self.outliers.prune_(buffer.copy_(x), t)
        # An element less itself, or less zero: nothing is rounded.
        return self.kept.prune_(x, t).sub_(outliers)


Cut = Threshold | Band


@dataclass(frozen=True)
class Quota:
    """What a cut through several tensors leaves to one of them."""

    value: float
    """Above it all is kept; infinite to keep none, negative to keep all."""
    equals: int | None = None
    """How many of those equal to it are kept, the lowest flat index first; all when None."""


@dataclass(frozen=True)
class Tiled:
    """A tensor that is made tile by tile."""

    spans: Sequence[tuple[int, int]]
    """Each tile's range of flat indices, in order."""
    tiles: Callable[[range], Iterator[torch.Tensor]]
    """Yields the tiles of a range, flat; each holds its values until the next one."""


@dataclass(frozen=True)
class Stream(Tiled):
    """A tensor of which there is also a sample."""

    sample: Callable[[], torch.Tensor]
    """Returns some elements that stand for all, or all where they are few."""

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return self.spans[-1][1]

    @property
    def largest_tile(self) -> int:
        """Elements of the largest tile."""
        return max(stop - start for start, stop in self.spans)


def find_threshold(stream: Stream, density: float, over: Over) -> Threshold:
    """Find the cut that keeps the int(density·numel) largest magnitudes of a tensor.

    Of magnitudes equal to the threshold those with the lowest flat index are kept, so that their
    number is exact whatever the tiles.

    Args:
        stream: the tensor.
        density: share of elements kept.
        over: the stream's panels.

    Raises:
        FloatingPointError: the threshold is infinite, or no number.
    """
    return find_cut(stream, int(density * stream.numel), over)


def find_band(stream: Stream, gamma: float, density: float, over: Over) -> Band:
    """Find the two cuts between which lie the int(density·numel) largest magnitudes of a tensor
    but for the int(gamma·numel) largest of all; arguments as in `find_threshold`."""
    outliers = int(gamma * stream.numel)
    kept = outliers + int(density * stream.numel)
    return Band(find_cut(stream, outliers, over), find_cut(stream, kept, over))


def find_cut(stream: Stream, keep: int, over: Over, *, zeros: bool = False) -> Threshold:
    """Find the cut that keeps so many of the largest magnitudes; `find_threshold` says how.

    Whether an element of zero is kept is told only with `zeros`: as a value it is zero either way.
    """
    if keep <= 0:
        return Threshold(math.inf)
    if keep >= stream.numel:
        return Threshold(-1.0)
    found = _sift(stream, keep, over) or _count_digits(stream, keep, over, zeros=zeros)
    if not math.isfinite(found.value):
        raise FloatingPointError("a tensor overflows: its threshold is not finite")
    return Threshold(0.0) if found.value == 0.0 and not zeros else found


def place_cut(quotas: Sequence[Quota], over: Over) -> Cut:
    """Return where a tensor is cut whose threshold was found over others too.

    Args:
        quotas: what it keeps above one value; or those of the outliers and of what is kept.
        over: the tensor's panels.
    """
    cuts = [_place(quota, over) for quota in quotas]
    return cuts[0] if len(cuts) == 1 else Band(*cuts)


def _place(quota: Quota, over: Over) -> Threshold:
    value, kept = quota.value, quota.equals
    if kept is None or math.isinf(value) or value <= 0.0:
        return Threshold(value)
    if kept == 0:
        return Threshold(value, last=-1)
    equals = [count for counts in over(count_equals, value) for count in counts]
    return _cut_equals(value, equals, kept)


def _sift(stream: Stream, keep: int, over: Over) -> Threshold | None:
    """Look for the threshold with brackets; None where they do not close on it."""
    sample = stream.sample().abs().cpu().view(-1).numpy()
    whole, share = len(sample) == stream.numel, keep / stream.numel
    margin = 1 / len(sample) if whole else DEVIATIONS * math.sqrt(share * (1 - share) / len(sample))
    bracket: Bracket | None = bracket_sample(sample, share, stream.numel, margin=margin)
    for _ in range(BRACKETS):
        assert bracket is not None
        panels_found = list(over(sift_panel, bracket))
        if None in panels_found:
            return None
        found = [part for tiles in panels_found if tiles for part in tiles]
        place = keep - sum(part.above for part in found)
        inside = sum(part.inside for part in found)
        if 0 < place <= inside:
            if bracket.stride == 1:
                return _settle(found, place)
            bracket = narrow(found, bracket, place)
            if bracket is None:
                return None
        else:
            margin *= 8
            bracket = _beyond(
                bracket,
                bracket_sample(sample, share, stream.numel, margin=margin),
                higher=place <= 0,
            )
    return None


def _beyond(missed: Bracket, wider: Bracket, *, higher: bool) -> Bracket:
    """Return what a wider bracket has on the side on which another one missed."""
    if higher:
        return Bracket(missed.high, max(wider.high, missed.high), wider.stride)
    return Bracket(min(wider.low, missed.low), missed.low, wider.stride)


def sift_panel(stream: Stream, panel: range, bracket: Bracket) -> list[Sifted] | None:
    """Sift the tiles of a panel; None where it finds too much to gather."""
    sieve: Sieve | None = None
    found, gathered = [], 0
    for tile in stream.tiles(panel):
        sieve = sieve or Sieve(bracket, stream.largest_tile, tile.dtype, tile.device)
        found.append(sieve.sift(tile))
        gathered += len(found[-1].gathered)
        if gathered > PANEL_GATHERED:
            return None
    return found


def _settle(found: Sequence[Sifted], place: int) -> Threshold:
    """Return the threshold at a place among the elements inside, all of which were gathered."""
    ordered = np.sort(np.concatenate([part.gathered for part in found]))
    value = ordered[len(ordered) - place]
    larger = len(ordered) - int(np.searchsorted(ordered, value, side="right"))
    equals = [int(np.count_nonzero(part.gathered == value)) for part in found]
    return _cut_equals(float(value), equals, place - larger)


def _count_digits(stream: Stream, keep: int, over: Over, *, zeros: bool) -> Threshold:
    """Find the threshold digit by digit, which takes a pass for each and one for the equals."""
    dtype = next(stream.tiles(range(1))).dtype
    search = Search(remaining=keep)
    while search.settled < digits(dtype):
        search = settle_digit(search, accumulate(over(count_panel, search)))
    value = found_value(search, dtype)
    decided = search.remaining == search.occurrences or not math.isfinite(value)
    if decided or (value == 0.0 and not zeros):
        return Threshold(value)
    equals = [count for counts in over(count_equals, value) for count in counts]
    return _cut_equals(value, equals, search.remaining)


def count_panel(stream: Tiled, panel: range, search: Search) -> torch.Tensor:
    """Count the next digit of a search over the tiles of a panel."""
    counter: DigitCounter | None = None
    for tile in stream.tiles(panel):
        counter = counter or DigitCounter(search, tile.dtype, tile.device)
        counter.add(tile)
    assert counter is not None, "a panel has a tile"
    return counter.counts


def count_equals(stream: Tiled, panel: range, value: float) -> list[int]:
    """Return how many magnitudes of each tile of a panel equal a value."""
    return [len(equal_places(x, value)) for x in stream.tiles(panel)]


def _cut_equals(value: float, equals: Sequence[int], kept: int) -> Threshold:
    """Return the threshold at a value of which each tile holds some and so many are kept."""
    for t, count in enumerate(equals):
        if kept <= count:
            behind = any(equals[t + 1 :])
            return Threshold(value, t, kept) if kept < count or behind else Threshold(value)
        kept -= count
    raise AssertionError("more equals are kept than there are")
