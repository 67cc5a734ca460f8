"""Values that may differ from target to target: by depth, or by name, as recipes of mergekit write
them.

A plain number holds for all targets. A list of numbers is a gradient over depth: its values are
spaced evenly from the first layer to the last, with straight lines between them. A list of
{filter, value} holds for targets in whose name the filter is found, the first that fits; an entry
without a filter, or with "*", fits all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streammerge.errors import RecipeError

EVERY = "*"
"""A filter that fits every name."""

MAX_ENTRIES = 100_000
"""Numbers and filters of one schedule."""


@dataclass(frozen=True)
class Choice:
    """Values for the targets in whose name a filter is found."""

    filter: str | None
    """None fits all."""
    values: tuple[float, ...]
    """One, or a gradient over depth."""

    def fits(self, target: str) -> bool:
        """Whether it holds for a target."""
        return self.filter is None or self.filter in target

    def at(self, depth: float) -> float:
        """Return its value at a depth in [0, 1]."""
        place = depth * (len(self.values) - 1)
        low = math.floor(place)
        high = min(low + 1, len(self.values) - 1)
        share = place - low
        return (1 - share) * self.values[low] + share * self.values[high]


Schedule = tuple[Choice, ...]
Value = float | Schedule
"""A number for all targets, or what says it of each."""


def make_value(given: Any, *, option: str) -> Value:
    """Return what a number, a gradient or a list of {filter, value} means.

    Raises:
        RecipeError: it is none of these.
    """
    if not isinstance(given, Iterable) or isinstance(given, str | bytes | Mapping):
        return _number(given, option)
    entries = list(given)
    if not entries or len(entries) > MAX_ENTRIES:
        raise RecipeError(
            f"{option}: a list needs 1 to {MAX_ENTRIES} entries, not {len(entries)}", option=option
        )
    if any(isinstance(entry, Mapping) for entry in entries):
        return tuple(_choice(entry, option) for entry in entries)
    values = tuple(_number(entry, option) for entry in entries)
    return values[0] if len(values) == 1 else (Choice(None, values),)


def as_json(value: Value) -> Any:
    """Return a value as JSON can hold it; `make_value` takes it back."""
    if not isinstance(value, tuple):
        return value
    if len(value) == 1 and value[0].filter is None and len(value[0].values) > 1:
        return list(value[0].values)
    return [
        {
            **({} if choice.filter is None else {"filter": choice.filter}),
            "value": choice.values[0] if len(choice.values) == 1 else list(choice.values),
        }
        for choice in value
    ]


def numbers(value: Value) -> Iterator[float]:
    """Yield every number in a value; what it gives lies between them."""
    if isinstance(value, tuple):
        for choice in value:
            yield from choice.values
    else:
        yield value


def scaled(value: Value, factor: float) -> Value:
    """Return a value that is `factor` times as large everywhere."""
    if not isinstance(value, tuple):
        return value * factor
    return tuple(Choice(c.filter, tuple(v * factor for v in c.values)) for c in value)


def otherwise(value: Value, fallback: Value) -> Value:
    """Return a value that is another one where it fits no target."""
    if not isinstance(value, tuple) or value[-1].filter is None:
        return value
    rest = fallback if isinstance(fallback, tuple) else (Choice(None, (fallback,)),)
    return (*value, *rest)


def value_at(value: Value, target: str, depth: float, *, option: str) -> float:
    """Return the number that holds for a target.

    Raises:
        RecipeError: none does.
    """
    if not isinstance(value, tuple):
        return value
    for choice in value:
        if choice.fits(target):
            return choice.at(depth)
    raise RecipeError(
        f"{option}: no filter fits {target}; end the list with an entry without a filter, "
        "which holds for all others",
        option=option,
    )


def depths(targets: Sequence[str]) -> list[float]:
    """Return how deep in its stack each target lies, from 0 in the first layer to 1 in the last.

    A stack is what layers are numbered in: `model.layers`, or `encoder.block` and `decoder.block`,
    each with a first and a last of its own. What lies in no layer is at 0 if it embeds, else at 1.
    """
    places = [_LAYER.match(target) for target in targets]
    last: dict[str, int] = {}
    for place in places:
        if place is not None:
            last[place["stack"]] = max(last.get(place["stack"], 0), int(place["layer"]))
    return [
        _outside(target) if place is None else int(place["layer"]) / max(1, last[place["stack"]])
        for target, place in zip(targets, places, strict=True)
    ]


_LAYER = re.compile(r"(?P<stack>.*?)\.(?P<layer>\d{1,9})(\.|$)")
_EMBEDS = re.compile(r"embed|(^|\.)w[tp]e(\.|$)")


def _outside(target: str) -> float:
    return 0.0 if _EMBEDS.search(target) else 1.0


def _choice(entry: Any, option: str) -> Choice:
    unknown = set(entry) - {"filter", "value"} if isinstance(entry, Mapping) else {"a number"}
    if unknown or "value" not in entry:
        raise RecipeError(
            f"{option}: an entry has a value and may have a filter, and nothing else: {entry!r}",
            option=option,
        )
    name = entry.get("filter")
    if name is not None and not isinstance(name, str):
        raise RecipeError(f"{option}: a filter is a text, not {name!r}", option=option)
    given = entry["value"]
    if isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping):
        values = tuple(_number(number, option) for number in given)
    else:
        values = (_number(given, option),)
    if not 0 < len(values) <= MAX_ENTRIES:
        raise RecipeError(f"{option}: a value has 1 to {MAX_ENTRIES} numbers", option=option)
    return Choice(None if name == EVERY else name, values)


def _number(given: Any, option: str) -> float:
    try:
        if isinstance(given, str | bytes | bool):
            raise TypeError
        return float(given)
    except (TypeError, ValueError, OverflowError) as error:
        raise RecipeError(f"{option}: not a number: {given!r}", option=option) from error
