"""A small card of HTML, as notebooks show a value: facts, and a table of a few rows."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from streammerge.errors import printable

LONGEST = 120
"""Characters of a cell that are shown; a name out of a file may be of any length."""


def card(
    title: str,
    facts: Sequence[tuple[str, str]],
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    more: int,
    of: str = "targets",
) -> str:
    """Return HTML of bounded size in which all text is escaped; it brings no style of its own.

    Args:
        title: what the value is.
        facts: names and values.
        header: of the table.
        rows: of the table, a few.
        more: how many others there are.
        of: what the rows are.
    """
    listed = "".join(_row([name, value], "td") for name, value in facts)
    shown = "".join(_row(row, "td") for row in rows)
    rest = f"<p>… and {more:,} more</p>" if more > 0 else ""
    table = f"<table><thead>{_row(header, 'th')}</thead><tbody>{shown}</tbody></table>"
    return (
        f"<div><strong>{_safe(title)}</strong><table><tbody>{listed}</tbody></table>"
        f"<details><summary>{_safe(of)}</summary>{table}{rest}</details></div>"
    )


def _row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{_safe(cell)}</{tag}>" for cell in cells) + "</tr>"


def _safe(text: str) -> str:
    shown = printable(text)
    if len(shown) > LONGEST:
        half = LONGEST // 2
        shown = f"{shown[:half]}…{shown[-half:]}"
    return escape(shown)
