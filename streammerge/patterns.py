"""`rank_pattern` and `alpha_pattern` by PEFT's rule, in linear time for plain module paths.

PEFT (`get_pattern_key`): the first entry, in order, of which `(.*\\.)?(entry)$` matches the
module's path; where none does, the entry that is the path itself, character by character. An
adapter of 45,000 targets may have as many entries, so those that are plain paths are looked up
instead of being tried one after another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from streammerge.regular import compile_matcher

Value = TypeVar("Value", int, float)

_PLAIN = re.compile(r"\^?(?:[\w-]|\\?\.)+\$?")


def compile_entry(entry: str) -> Callable[[str], bool]:
    """Return the function that says whether an entry matches a module's path.

    Raises:
        re.error: it is no regular expression, or one that could take for ever.
    """
    return compile_matcher(rf"(.*\.)?({entry})$")


def pattern_lookup(pattern: Mapping[str, Value], default: Value) -> Callable[[str], Value]:
    """Return the function from a module's path to its value under `pattern`."""
    if not pattern:
        return lambda _path: default
    plain, anchored = _Paths(), _Paths()
    regexes: list[tuple[int, Callable[[str], bool]]] = []
    values = list(pattern.values())
    for position, entry in enumerate(pattern):
        if _PLAIN.fullmatch(entry):
            (anchored if entry.startswith("^") else plain).add(entry.strip("^$"), position)
        else:
            regexes.append((position, compile_entry(entry)))

    def look_up(path: str) -> Value:
        found = [place for ending in _endings(path) for place in plain.find(ending)]
        found.extend(anchored.find(path))
        best = min(found, default=len(values))
        for position, matches in regexes:
            if position > best:
                break
            if matches(path):
                return values[position]
        return values[best] if best < len(values) else pattern.get(path, default)

    return look_up


class _Paths:
    """Plain paths as PEFT reads them: a dot that is not escaped stands for any character.

    They are grouped by length and places of such dots. A candidate is masked at these places and
    looked up, once for each group of its length; module paths fall into few groups.
    """

    def __init__(self) -> None:
        self._groups: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}

    def add(self, entry: str, position: int) -> None:
        """Enter a path; of equal ones the first counts."""
        pieces = re.findall(r"\\\.|.", entry)
        dots = tuple(i for i, piece in enumerate(pieces) if piece == ".")
        masked = "".join(piece[-1] for piece in pieces)
        group = self._groups.setdefault(len(pieces), {}).setdefault(dots, {})
        group.setdefault(masked, position)

    def find(self, path: str) -> Iterator[int]:
        """Yield the positions of entries that match all of `path`."""
        for dots, group in self._groups.get(len(path), {}).items():
            characters = list(path)
            for place in dots:
                characters[place] = "."
            masked = "".join(characters)
            if masked in group:
                yield group[masked]


def _endings(path: str) -> Iterator[str]:
    """Yield `path` and every ending of it that begins behind a dot."""
    yield path
    position = path.find(".")
    while position >= 0:
        yield path[position + 1 :]
        position = path.find(".", position + 1)
