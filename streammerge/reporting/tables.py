"""Tables of the page: every cell escaped, names broken where there is no room."""

from __future__ import annotations

import re
from collections.abc import Sequence

from streammerge.reporting.drawing import safe


def counted(name: str) -> list[tuple[int, str]]:
    """Return what sorts a name as people count: layer 2 before layer 10."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part[:18]) if place % 2 else 0, part) for place, part in enumerate(parts)]


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    names: Sequence[int],
    numbers: Sequence[int],
) -> str:
    """Return a table; names are broken where there is no room for them, numbers stand right."""
    classes = dict.fromkeys(names, " class=name") | dict.fromkeys(numbers, " class=n")

    def line(cells: Sequence[object], tag: str) -> str:
        shown = (
            f"<{tag}{classes.get(place, '')}>{safe(cell)}</{tag}>"
            for place, cell in enumerate(cells)
        )
        return f"<tr>{''.join(shown)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    head = line(heads, "th")
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'
