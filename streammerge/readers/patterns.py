"""`rank_pattern` and `alpha_pattern` by PEFT's rule, in linear time for plain module paths.

PEFT (get_pattern_key): the first entry, in order, of which `(.*\\.)?(entry)$` matches the module's
path. A plain path matches as a whole or behind a dot, so it is looked up among the path's endings
instead of being tried on each of the targets; an adapter of 45,000 targets may have as many
entries.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

Value = TypeVar("Value", int, float)

_PLAIN = re.compile(r"\^?(?:[\w-]|\\?\.)+\$?")


def pattern_lookup(pattern: Mapping[str, Value], default: Value) -> Callable[[str], Value]:
    """Return the function from a module's path to its value under `pattern`."""
    plain: dict[str, tuple[int, Value]] = {}
    anchored: dict[str, tuple[int, Value]] = {}
    regexes: list[tuple[int, re.Pattern[str], Value]] = []
    for position, (entry, value) in enumerate(pattern.items()):
        if _PLAIN.fullmatch(entry):
            path = entry.removeprefix("^").removesuffix("$").replace("\\.", ".")
            table = anchored if entry.startswith("^") else plain
            table.setdefault(path, (position, value))
        else:
            regexes.append((position, re.compile(rf"(.*\.)?({entry})$"), value))

    def look_up(path: str) -> Value:
        found = [plain[ending] for ending in _endings(path) if ending in plain]
        found += [anchored[path]] if path in anchored else []
        best = min(found, default=(len(pattern), default))
        for position, regex, value in regexes:
            if position > best[0]:
                break
            if regex.match(path):
                return value
        return best[1]

    return look_up


def _endings(path: str) -> Iterator[str]:
    """Yield `path` and every ending of it that begins behind a dot."""
    yield path
    position = path.find(".")
    while position >= 0:
        yield path[position + 1 :]
        position = path.find(".", position + 1)
