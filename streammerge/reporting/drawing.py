"""Drawings for the page: SVG as text, with every name escaped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

import numpy as np
import numpy.typing as npt

from streammerge.errors import printable
from streammerge.reporting.colours import STEPS, Scale

Values = npt.NDArray[np.float64]

MAX_TOLD = 2500
"""Cells that are elements of their own, with a text to hover over; more are one path a colour."""

MAX_NUMBERED = 10
"""Rows of a matrix whose numbers are written into the cells."""

LABEL = 26
"""Characters of a label; the whole name is in its hover text."""

GLYPH = 6.4
"""Width of a character at the size of labels."""


def safe(text: object) -> str:
    """Return text for HTML: names come out of files."""
    return escape(printable(text))


def short(text: str, length: int = LABEL) -> str:
    """Return a name with its middle left out, where it is long."""
    if len(text) <= length:
        return text
    return f"{text[: length // 3]}…{text[-(length - length // 3 - 1) :]}"


def heatmap(
    values: Values,
    scale: Scale,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    described: str,
    size: tuple[float, float],
    told: Callable[[int, int], str],
    numbers: bool = False,
) -> str:
    """Return a heatmap.

    Args:
        values: rows × columns; NaN is drawn as nothing.
        scale: of the colours.
        rows: their labels; none are drawn where rows are too low for text.
        columns: their labels; as many are drawn as there is room for.
        described: what it shows, for those who do not see it.
        size: width and height of a cell.
        told: a cell's hover text.
        numbers: whether cells hold their values.
    """
    width, height = size
    labelled = height >= 11
    left = 8 + GLYPH * max((len(short(row)) for row in rows), default=0) if labelled else 2.0
    top = 20.0
    down, across = values.shape
    parts = [_open(described, left + across * width + 2, top + down * height + 2)]
    parts += _column_labels(columns, left, width)
    if labelled:
        parts += [
            f'<text class="lab" text-anchor="end" x="{left - 6:.1f}" '
            f'y="{top + (place + 0.5) * height + 4:.1f}">{safe(short(row))}'
            f"<title>{safe(row)}</title></text>"
            for place, row in enumerate(rows)
        ]
    parts.append(
        f'<rect class="frame" x="{left}" y="{top}" width="{across * width}" '
        f'height="{down * height}"/>'
    )
    if down * across <= MAX_TOLD:
        parts += _told_cells(values, scale, (left, top), size, told)
    else:
        parts += _path_cells(values, scale, (left, top), size)
        parts += [
            f'<rect class="row" x="{left:g}" y="{top + i * height:g}" '
            f'width="{across * width:g}" height="{height:g}"><title>{safe(row)}</title></rect>'
            for i, row in enumerate(rows)
        ]
    if numbers:
        parts += [
            f'<text class="num {"inv" if _is_strong(scale, value) else ""}" '
            f'x="{left + (j + 0.5) * width:.1f}" y="{top + (i + 0.5) * height + 4:.1f}">'
            f"{value:.2f}</text>"
            for (i, j), value in np.ndenumerate(values)
            if np.isfinite(value)
        ]
    return "".join([*parts, "</svg>"])


def _open(described: str, width: float, height: float) -> str:
    return (
        f'<svg role="img" aria-label="{safe(described)}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}">'
    )


def _column_labels(columns: Sequence[str], left: float, width: float) -> list[str]:
    if not columns:
        return []
    longest = max(len(short(column, 8)) for column in columns)
    step = max(1, int(-(-(longest * GLYPH + 6) // width)))
    return [
        f'<text class="lab" text-anchor="middle" x="{left + (place + 0.5) * width:.1f}" '
        f'y="14">{safe(short(column, 8))}</text>'
        for place, column in enumerate(columns)
        if place % step == 0
    ]


def _told_cells(
    values: Values,
    scale: Scale,
    origin: tuple[float, float],
    size: tuple[float, float],
    told: Callable[[int, int], str],
) -> list[str]:
    gap = 1 if min(size) > 5 else 0
    cells = []
    for (i, j), value in np.ndenumerate(values):
        step = scale.step(float(value))
        if step is not None:
            x, y = origin[0] + j * size[0], origin[1] + i * size[1]
            cells.append(
                f'<rect class="c {scale.name}{step}" x="{x:g}" y="{y:g}" '
                f'width="{size[0] - gap:g}" height="{size[1] - gap:g}">'
                f"<title>{safe(told(i, j))}</title></rect>"
            )
    return cells


def _path_cells(
    values: Values,
    scale: Scale,
    origin: tuple[float, float],
    size: tuple[float, float],
) -> list[str]:
    """Return one path a colour; equal neighbours in a row are one stroke."""
    strokes: list[list[str]] = [[] for _ in range(STEPS)]
    for i, row in enumerate(values):
        steps = [scale.step(float(value)) for value in row]
        j = 0
        while j < len(steps):
            end = j + 1
            while end < len(steps) and steps[end] == steps[j]:
                end += 1
            step = steps[j]
            if step is not None:
                strokes[step].append(f"M{j} {i}.5h{end - j}")
            j = end
    place = f"translate({origin[0]:g} {origin[1]:g}) scale({size[0]:g} {size[1]:g})"
    drawn = [
        f'<path class="{scale.name}{step}" d="{"".join(found)}"/>'
        for step, found in enumerate(strokes)
        if found
    ]
    return [f'<g class="px" transform="{place}">', *drawn, "</g>"]


def legend(scale: Scale, words: tuple[str, str, str]) -> str:
    """Return a scale's colours with its two limits, and words for its ends and its middle."""
    width, step = 260, 260 / STEPS
    bars = "".join(
        f'<rect class="c {scale.name}{n}" x="{10 + n * step:.1f}" y="2" width="{step + 0.3:.1f}" '
        'height="10"/>'
        for n in range(STEPS)
    )
    low, middle, high = (
        f"{value:.0%}" if scale.percent else f"{value:g}"
        for value in (scale.low, (scale.low + scale.high) / 2, scale.high)
    )
    labels = "".join(
        f'<text class="lab" text-anchor="{anchor}" x="{x}" y="27">{safe(text)}</text>'
        for anchor, x, text in (
            ("start", 10, f"{low} {words[0]}"),
            ("middle", 10 + width / 2, f"{middle} {words[1]}".strip()),
            ("end", 10 + width, f"{high} {words[2]}"),
        )
    )
    return (
        f'<svg class="legend" role="img" aria-label="scale from {low} to {high}" '
        f'viewBox="0 0 280 32" width="280" height="32">{bars}{labels}</svg>'
    )


def bars(rows: Sequence[tuple[str, float, str, str]], highest: float) -> str:
    """Return horizontal bars.

    Args:
        rows: label, value, the value as text, class.
        highest: what the full width stands for.
    """
    left = 8 + GLYPH * max(len(short(label)) for label, *_ in rows)
    height, room = 24, 420
    parts = [_open("bars", left + room + 90, len(rows) * height + 4)]
    for place, (label, value, text, name) in enumerate(rows):
        y = place * height
        length = max(1.0, room * value / highest) if highest else 1.0
        parts.append(
            f'<text class="lab" text-anchor="end" x="{left - 6:.0f}" y="{y + 16}">'
            f"{safe(short(label))}</text>"
            f'<rect class="bar {name}" x="{left:.0f}" y="{y + 4}" width="{length:.1f}" '
            f'height="16" rx="2"/>'
            f'<text class="lab" x="{left + length + 6:.0f}" y="{y + 16}">{safe(text)}</text>'
        )
    return "".join([*parts, "</svg>"])


def _is_strong(scale: Scale, value: float) -> bool:
    """Whether a value's colour is so strong that text on it takes the ground's colour."""
    middle = (scale.low + scale.high) / 2 if scale.low < 0 else scale.low
    return abs(value - middle) > 0.55 * (scale.high - middle)
