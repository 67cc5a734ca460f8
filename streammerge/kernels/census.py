"""Thresholds through all of an adapter's tensors at once, by adding up what is counted in each.

No two of the tensors need be in memory, or in one process. The search goes digit by digit, as in
`select`: a pass over all targets counts one digit of every element, the counts are added, and the
digit is settled. A last pass counts the equals of each tensor, where not all of them are kept.
What a search knows is a few numbers, so it can be written down between two passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from streammerge.kernels.thresholds import Quota
from streammerge.select import DIGITS, Search, digits, found_value, settle_digit

TENSORS = 2
"""Tensors of an adapter in a target, at most: A and B where a rule sees factors."""

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Standing:
    """How far the search for one threshold of an adapter has come."""

    adapter: int
    """Its position."""
    shares: tuple[float, ...]
    """Above the threshold lie Σ int(share·elements) of the largest."""
    search: Search = field(default_factory=lambda: Search(remaining=0))
    elements: int | None = None
    """Of all of the adapter's tensors; None before they were counted."""
    last: int | None = None
    """The tensor in which the last of the equals that are kept lies: those before it keep all of
    theirs, those behind it none; None where all are kept everywhere, or it is not known yet."""
    equals: int = 0
    """How many that tensor keeps."""

    @property
    def keep(self) -> int:
        """How many elements are kept."""
        assert self.elements is not None, "they have been counted"
        return sum(int(share * self.elements) for share in self.shares)

    def is_done(self, dtype: torch.dtype) -> bool:
        """Whether all is known."""
        if self.elements is None:
            return False
        if not 0 < self.keep < self.elements:
            return True
        if self.search.settled < digits(dtype):
            return False
        # An element equal to a threshold of zero is zero, kept or not.
        all_kept = self.search.remaining == self.search.occurrences
        return all_kept or self.search.prefix == 0 or self.last is not None

    def value(self, dtype: torch.dtype) -> float:
        """Return the threshold; infinite where none is kept, negative where all are."""
        if self.keep <= 0:
            return math.inf
        return -1.0 if self.keep == self.elements else found_value(self.search, dtype)

    def quota(self, tensor: int, dtype: torch.dtype) -> Quota:
        """Return what is left to one of the adapter's tensors, by its number."""
        value = self.value(dtype)
        if self.last is None or tensor < self.last:
            return Quota(value)
        return Quota(value, self.equals if tensor == self.last else 0)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it; `from_dict` takes it back."""
        return {**vars(self), "search": vars(self.search)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Standing:
        """Return the standing that `to_dict` gave."""
        made = {"shares": tuple(fields["shares"]), "search": Search(**fields["search"])}
        return cls(**{**fields, **made})


@dataclass(frozen=True)
class Question:
    """What a pass counts: of each adapter, the next digit of some searches, or where all digits
    are settled, the equals in each tensor."""

    searches: Mapping[int, tuple[Search, ...]]
    """By the adapter's position."""


class Tally:
    """What was counted for a question, in one target or in several."""

    def __init__(self, question: Question, targets: int, dtype: torch.dtype) -> None:
        """Make it.

        Args:
            question: what is counted.
            targets: how many there are.
            dtype: of the elements.
        """
        self._question = question
        self._targets = targets
        self._dtype = dtype
        self._counts: dict[tuple[int, int], Counts] = {}

    def of(self, adapter: int, place: int) -> Counts:
        """Return the counts of an adapter's search, to be read or added to: one for each digit,
        or for each tensor, two to a target."""
        search = self._question.searches[adapter][place]
        size = TENSORS * self._targets if self._counts_equals(search) else DIGITS
        return self._counts.setdefault((adapter, place), np.zeros(size, np.int64))

    def add(self, other: Tally, targets: Sequence[int]) -> None:
        """Add what was counted in some targets, of which these are the numbers here."""
        for (adapter, place), counts in other._counts.items():
            mine = self.of(adapter, place)
            if self._counts_equals(self._question.searches[adapter][place]):
                mine.reshape(-1, TENSORS)[list(targets)] += counts.reshape(-1, TENSORS)
            else:
                mine += counts

    def packed(self) -> list[tuple[int, int, Counts, Counts]]:
        """Return what is not zero: adapter, search, places and counts there."""
        found = ((key, counts.nonzero()[0]) for key, counts in self._counts.items())
        return [(*key, places, self._counts[key][places]) for key, places in found]

    def unpack(self, parts: Sequence[tuple[int, int, Counts, Counts]]) -> Tally:
        """Take what `packed` gave of a tally for the same question and targets; return it."""
        for adapter, search, places, counts in parts:
            self.of(adapter, search)[places] += counts
        return self

    def _counts_equals(self, search: Search) -> bool:
        return search.settled == digits(self._dtype)


def take_census(
    standings: Sequence[Standing],
    at_once: int,
    dtype: torch.dtype,
    count: Callable[[Question], Tally],
) -> Iterator[list[Standing]]:
    """Yield, after every pass, how far the searches have come that it was made for.

    Args:
        standings: all searches, as far as they have come.
        at_once: adapters that a pass counts, at most.
        dtype: of the elements.
        count: makes a pass over all targets.
    """
    found = sorted({one.adapter for one in standings if not one.is_done(dtype)})
    for start in range(0, len(found), at_once):
        group = set(found[start : start + at_once])
        searched = [one for one in standings if one.adapter in group]
        while waiting := [one for one in searched if not one.is_done(dtype)]:
            question = Question(
                {
                    adapter: tuple(one.search for one in waiting if one.adapter == adapter)
                    for adapter in sorted({one.adapter for one in waiting})
                }
            )
            # No name for what was counted, or it would be held through the next pass.
            searched = list(_advanced(waiting, count(question), dtype))
            yield searched


def _advanced(waiting: Sequence[Standing], tally: Tally, dtype: torch.dtype) -> Iterator[Standing]:
    places: dict[int, int] = {}
    for one in waiting:
        place = places.setdefault(one.adapter, 0)
        places[one.adapter] += 1
        yield _advance(one, tally.of(one.adapter, place), dtype)


def _advance(one: Standing, counts: Counts, dtype: torch.dtype) -> Standing:
    """Return how far a search has come with what a pass has counted for it."""
    if one.search.settled == digits(dtype):
        return _place_equals(one, counts)
    if one.elements is None:
        one = replace(one, elements=int(counts.sum()))
        one = replace(one, search=Search(remaining=one.keep))
        if one.is_done(dtype):
            return one
    return replace(one, search=settle_digit(one.search, torch.from_numpy(counts)))


def _place_equals(one: Standing, counts: Counts) -> Standing:
    """Find the tensor in which the last of the equals lies that are kept."""
    reached = counts.cumsum()
    last = int(np.searchsorted(reached, one.search.remaining))
    kept = one.search.remaining - (int(reached[last - 1]) if last else 0)
    if kept == counts[last]:
        # All of this one's, so none of the next one's: no tensor need be counted again.
        return replace(one, last=last + 1, equals=0)
    return replace(one, last=last, equals=kept)


@dataclass(frozen=True)
class Cuts:
    """Where each adapter is cut, in all of its tensors together."""

    standings: Mapping[int, tuple[Standing, ...]]
    """By the adapter's position: one, or that of the outliers and that of what is kept."""
    targets: Mapping[str, int]
    """Each target's place in their order."""
    dtype: torch.dtype

    @classmethod
    def of(cls, standings: Sequence[Standing], targets: Sequence[str], dtype: torch.dtype) -> Cuts:
        """Return the cuts that were found."""
        by_adapter: dict[int, tuple[Standing, ...]] = {}
        for one in standings:
            by_adapter[one.adapter] = (*by_adapter.get(one.adapter, ()), one)
        return cls(by_adapter, {target: i for i, target in enumerate(targets)}, dtype)

    def quotas(self, target: str, adapters: Sequence[int], tensor: int) -> list[tuple[Quota, ...]]:
        """Return what each adapter keeps of its tensor in a target: 0 the only one, or A, 1 B."""
        number = TENSORS * self.targets[target] + tensor
        return [
            tuple(one.quota(number, self.dtype) for one in self.standings[adapter])
            for adapter in adapters
        ]

    def take(self, targets: Sequence[str]) -> Cuts:
        """Return what is needed for some targets."""
        return replace(self, targets={target: self.targets[target] for target in targets})
