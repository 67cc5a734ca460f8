"""Tables of text: aligned, and made to fit a terminal of any width. Pure functions."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

GAP = "  "
NARROWEST = 8
"""Columns are not made narrower than that; a table that would need it becomes a list."""


def lay_out(rows: Sequence[Sequence[str]], header: Sequence[str], width: int | None) -> list[str]:
    """Return the lines of a table of at most `width` columns, of any where that is None.

    The widest columns give way first: what has spaces is wrapped, and where that is not enough
    names are cut in their middles.
    """
    lines = [header, *rows]
    wanted = [max(len(line[i]) for line in lines) for i in range(len(header))]
    if width is None:
        return [_line(line, wanted) for line in lines]
    room = width - len(GAP) * (len(header) - 1)
    given = _shrink(wanted, _floors(lines, wanted), room)
    if given is None:
        given = _shrink(wanted, [min(column, NARROWEST) for column in wanted], room)
    if given is None:
        return _as_list(rows, header, width)
    return [text for line in lines for text in _wrapped(line, given)]


def lay_out_facts(facts: Sequence[tuple[str, str]], width: int | None) -> list[str]:
    """Return a line for each name and value; long values go on below themselves."""
    start = max(len(name) for name, _ in facts) + len(GAP)
    if width is None or width < start + NARROWEST:
        return [f"{name:<{start}}{value}" for name, value in facts]
    lines = []
    for name, value in facts:
        parts = fit(value, width - start)
        lines += [f"{'' if i else name:<{start}}{part}" for i, part in enumerate(parts)]
    return lines


def fit(text: str, width: int) -> list[str]:
    """Return text in lines of at most `width`: between words, names cut in their middle."""
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]
    return [cut(line, width) for line in lines]


def cut(name: str, width: int) -> str:
    """Return a name with its middle left out where it is longer; ends tell modules apart best."""
    if len(name) <= width:
        return name
    head = min(3, max(0, width - 1) // 3)
    tail = max(0, width - 1 - head)
    return f"{name[:head]}…{name[len(name) - tail :]}"[:width]


def _shrink(wanted: Sequence[int], floors: Sequence[int], room: int) -> list[int] | None:
    """Return widths that fit into `room`, taken from the widest columns; None where none do."""
    if sum(floors) > room:
        return None
    given = list(wanted)
    for _ in range(sum(given) - room):
        widest = max(range(len(given)), key=lambda i: (given[i] > floors[i], given[i]))
        given[widest] -= 1
    return given


def _floors(lines: Sequence[Sequence[str]], wanted: Sequence[int]) -> list[int]:
    """Return the width of each column's longest word: below that names would be cut."""
    words = [
        max(len(word) for line in lines for word in (line[i].split() or [""]))
        for i, _ in enumerate(wanted)
    ]
    return [max(word, min(width, NARROWEST)) for word, width in zip(words, wanted, strict=True)]


def _wrapped(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    cells = [fit(cell, width) for cell, width in zip(line, widths, strict=True)]
    height = max(len(cell) for cell in cells)
    return [
        _line([cell[i] if i < len(cell) else "" for cell in cells], widths) for i in range(height)
    ]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    return GAP.join(padded).rstrip()


def _as_list(rows: Sequence[Sequence[str]], header: Sequence[str], width: int) -> list[str]:
    lines = []
    for first, *others in rows:
        facts = [(GAP + name, value) for name, value in zip(header[1:], others, strict=True)]
        lines += [cut(first, width), *lay_out_facts(facts, width)]
    return lines
