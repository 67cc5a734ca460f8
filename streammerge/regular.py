"""Regular expressions out of files by others, matched in a time that is bounded.

Python's `re` tries one way after another, and an entry of a config can make that take for ever on
a module's path: `(a+)+c`, or `.*.*.*.*c`. An expression that leaves many ways is matched here over
sets of places, all ways at once. It matches what `re` says it does; what sets of places cannot say
(references to groups, atomic groups, flags for a part) is refused.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable
from re import _constants as sre  # type: ignore[attr-defined]  # re shows no other parsed form
from re import _parser  # type: ignore[attr-defined]
from typing import Any

FEW_WAYS = 3 * 10**6
"""So many ways to match a text are tried one after another."""

LONG = 128
"""Characters of a text that is taken for a long one."""

MAX_DEPTH = 40
"""Groups in groups."""

MAX_STEPS = 10**7
"""Places that are gone through at most for all texts of an expression: some ten seconds."""

Places = frozenset[int]
Nodes = Iterable[tuple[Any, Any]]
"""A parsed expression: what follows one another, each with its arguments."""

_REPEATS = (sre.MAX_REPEAT, sre.MIN_REPEAT)
_ASSERTIONS = (sre.ASSERT, sre.ASSERT_NOT)
_CHARACTERS = (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN)


def compile_matcher(expression: str) -> Callable[[str], bool]:
    """Return the function that says whether a text matches from its start, as `re.match` does.

    It raises `re.error` when its texts have taken MAX_STEPS.

    Raises:
        re.error: not a regular expression, or one that cannot be matched in bounded time.
    """
    meter = Meter()
    try:
        with warnings.catch_warnings():
            # About sets that may be meant otherwise; PEFT takes them as they are.
            warnings.simplefilter("ignore")
            nodes = _parser.parse(expression)
            ways = _ways(nodes, 0)
            regex = re.compile(expression) if ways <= FEW_WAYS else None
    except (OverflowError, RecursionError) as error:
        raise re.error(str(error)) from error

    def matches(text: str) -> bool:
        if regex is not None and len(text) <= LONG:
            return regex.match(text) is not None
        return bool(_Walk(text, meter).after_all(nodes, frozenset((0,))))

    return matches


def _ways(nodes: Nodes, depth: int) -> float:
    """Return in how many ways a text of LONG characters is matched at most; check what is used."""
    if depth > MAX_DEPTH:
        raise re.error("it is nested too deep")
    ways = 1.0
    for kind, argument in nodes:
        if kind is sre.BRANCH:
            ways *= sum(_ways(branch, depth + 1) for branch in argument[1])
        elif kind is sre.SUBPATTERN:
            if argument[1] or argument[2]:
                raise re.error("flags for a part of it are not supported")
            ways *= _ways(argument[3], depth + 1)
        elif kind in _REPEATS:
            inner, most = _ways(argument[2], depth + 1), min(LONG, int(argument[1]))
            ways *= (
                most + 1
                if _is_character(argument[2]) or (most == 1 and inner == 1)
                else _power(1 + inner, most)
            )
        elif kind in _ASSERTIONS:
            ways *= _ways(argument[1], depth + 1)
        elif kind not in (*_CHARACTERS, sre.AT):
            raise re.error(f"{str(kind).lower()} is not supported")
    return ways


def _is_character(nodes: Any) -> bool:
    return len(nodes) == 1 and nodes[0][0] in _CHARACTERS


def _power(ways: float, times: int) -> float:
    try:
        return ways**times
    except OverflowError:
        return math.inf


class Meter:
    """Counts the steps that an expression takes."""

    def __init__(self) -> None:
        self._left = MAX_STEPS

    def spend(self, steps: int) -> None:
        """Take some.

        Raises:
            re.error: there are no more.
        """
        self._left -= steps
        if self._left < 0:
            raise re.error("it takes too long on the names that it is matched with")


class _Walk:
    """One text, and where its parts may end, each found once."""

    def __init__(self, text: str, meter: Meter) -> None:
        self._text = text
        self._meter = meter
        self._known: dict[tuple[int, int], Places] = {}

    def after_all(self, nodes: Nodes, places: Places) -> Places:
        """Return where a sequence may end that begins at one of these places."""
        for node in nodes:
            if not places:
                break
            found = [self._after(node, place) for place in places]
            self._meter.spend(sum(map(len, found), len(found)))
            places = frozenset().union(*found)
        return places

    def _after(self, node: tuple[Any, Any], place: int) -> Places:
        # A parsed expression lives as long as the walk, so that its parts are known by their ids.
        key = id(node), place
        if key not in self._known:
            self._known[key] = self._find(node[0], node[1], place)
        return self._known[key]

    def _find(self, kind: Any, argument: Any, place: int) -> Places:
        here = frozenset((place,))
        if kind in _CHARACTERS:
            found = place < len(self._text) and _is_one(kind, argument, self._text[place])
            return frozenset((place + 1,)) if found else frozenset()
        if kind is sre.AT:
            return here if self._is_at(argument, place) else frozenset()
        if kind is sre.BRANCH:
            return frozenset().union(*(self.after_all(nodes, here) for nodes in argument[1]))
        if kind is sre.SUBPATTERN:
            return self.after_all(argument[3], here)
        if kind in _REPEATS:
            least, most, nodes = argument
            repeat = self._run if _is_character(nodes) else self._repeat
            return repeat(least, int(most), nodes, place)
        direction, nodes = argument
        if direction > 0:
            found = bool(self.after_all(nodes, here))
        else:
            found = any(place in self.after_all(nodes, frozenset((s,))) for s in range(place + 1))
        return here if found == (kind is sre.ASSERT) else frozenset()

    def _run(self, least: int, most: int, nodes: Any, place: int) -> Places:
        """Return where so many repetitions of one character may end."""
        ((kind, argument),) = nodes
        end, last = place, min(len(self._text), place + most)
        while end < last and _is_one(kind, argument, self._text[end]):
            end += 1
        return frozenset(range(place + least, end + 1))

    def _repeat(self, least: int, most: int, nodes: Nodes, place: int) -> Places:
        """Return where so many repetitions may end; each round is one more of them."""
        places: Places = frozenset((place,))
        ends: Places = places if least == 0 else frozenset()
        for times in range(1, most + 1):
            before, places = places, self.after_all(nodes, places)
            if not places or (times > least and places <= ends):
                break
            if times >= least:
                ends |= places
            elif places == before:
                # Nothing moves any more, whatever is still asked for.
                return places
        return ends

    def _is_at(self, where: Any, place: int) -> bool:
        text, end = self._text, len(self._text)
        if where in (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING):
            return place == 0
        if where is sre.AT_END:
            return place == end or (place == end - 1 and text[place] == "\n")
        if where is sre.AT_END_STRING:
            return place == end
        before, after = (
            0 <= i < end and _is_in(sre.CATEGORY_WORD, text[i]) for i in (place - 1, place)
        )
        return (before != after) == (where is sre.AT_BOUNDARY)


def _is_one(kind: Any, argument: Any, character: str) -> bool:
    if kind is sre.ANY:
        return character != "\n"
    if kind is not sre.IN:
        return bool(ord(character) == argument) == (kind is sre.LITERAL)
    negated: bool = argument[0][0] is sre.NEGATE
    return negated != any(_is_of(item, character) for item in argument[negated:])


def _is_of(item: tuple[Any, Any], character: str) -> bool:
    """Return whether a character is of one item of a set."""
    kind, argument = item
    if kind is sre.RANGE:
        return bool(argument[0] <= ord(character) <= argument[1])
    if kind is sre.LITERAL:
        return bool(ord(character) == argument)
    return _is_in(argument, character)


def _is_in(category: Any, character: str) -> bool:
    if category in (sre.CATEGORY_DIGIT, sre.CATEGORY_NOT_DIGIT):
        return character.isdecimal() == (category is sre.CATEGORY_DIGIT)
    if category in (sre.CATEGORY_SPACE, sre.CATEGORY_NOT_SPACE):
        return character.isspace() == (category is sre.CATEGORY_SPACE)
    return (character.isalnum() or character == "_") == (category is sre.CATEGORY_WORD)
