"""The heatmaps of a report as data: the page draws them, and so do the plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from streammerge.publishing.public import last_part
from streammerge.reporting.colours import COSINE, HALF, SHARE, Scale
from streammerge.reporting.drawing import Values
from streammerge.reporting.grid import make_grid
from streammerge.reporting.material import Material
from streammerge.reporting.order import clustered

MAX_SIDE = 240
"""Rows of a matrix that are drawn; of more adapters neighbours are averaged."""


@dataclass(frozen=True)
class Figure:
    """One heatmap."""

    name: str
    """Of its file, where it is one."""
    title: str
    values: Values
    scale: Scale
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    words: tuple[str, str, str]
    """What the scale's low end, middle and high end mean."""
    reading: str
    """How it is read, and what it does not say."""
    square: bool
    """Whether rows and columns are the same adapters."""


def labels(material: Material) -> list[str]:
    """Return what each adapter is called: its number, and the last part of its path."""
    return [
        f"{position + 1} {last_part(str(entry['path']))}"
        for position, entry in enumerate(material.record["inputs"])
    ]


def matrices(material: Material) -> list[Figure]:
    """Return what adapters are to one another, two and two; nothing where fewer than two are."""
    agreement = material.agreement
    if agreement is None or len(material.compared) < 2:
        return []
    order = clustered(agreement.cosine[:-1, :-1])
    names = labels(material)
    rows = [names[material.compared[place]] for place in order]
    shown, rows, columns = _binned(rows, order)
    return [
        Figure(
            name,
            title,
            shown(values),
            scale,
            tuple(rows),
            tuple(columns),
            words,
            reading,
            square=True,
        )
        for name, title, values, scale, words, reading in (
            ("cosine", "Cosine of the deltas", agreement.cosine, COSINE, _COSINE_WORDS, _COSINE),
            ("signs", "Sign conflict", agreement.conflict, SHARE, _SIGN_WORDS, _SIGNS),
            ("columns", "Overlap of column spaces", agreement.columns, SHARE, _OVERLAP, _COLUMNS),
            ("rows", "Overlap of row spaces", agreement.rows, SHARE, _OVERLAP, _ROWS),
        )
    ]


_COSINE_WORDS = ("opposed", "unrelated", "alike")
_SIGN_WORDS = ("same", "by chance", "opposed")
_OVERLAP = ("apart", "", "the same")

_COSINE = (
    "⟨Δᵢ, Δⱼ⟩ / (‖Δᵢ‖·‖Δⱼ‖) over all compared targets as one vector, in the order of a clustering: "
    "blocks beside the diagonal are families. It does not say whether two adapters do the same "
    "task: deltas that are unrelated as vectors may do so, and targets of large norm count most."
)
_SIGNS = (
    "Of sampled elements that are zero in neither, the share whose signs differ. Half is what two "
    "unrelated deltas have. It counts small elements as much as large ones."
)
_COLUMNS = (
    "The mean squared cosine of the principal angles between the column spaces of Δᵢ and Δⱼ (what "
    "they write to), averaged over targets. Two random spaces have about max(rᵢ, rⱼ)/m. It does "
    "not say whether they write the same there."
)
_ROWS = (
    "The same of the row spaces (what they read from). Two random spaces have about max(rᵢ, rⱼ)/n."
)


def _binned(
    rows: list[str], order: Sequence[int]
) -> tuple[Callable[[Values], Values], list[str], list[str]]:
    """Return what brings a matrix into order, and the labels; neighbours are averaged if many."""
    step = -(-len(order) // MAX_SIDE)
    starts = range(0, len(order), step)

    def shown(matrix: Values) -> Values:
        ordered = matrix[np.ix_(order, order)]
        if step == 1:
            return ordered
        cut = list(starts)
        counts = np.diff([*cut, len(order)])
        sums = np.add.reduceat(np.add.reduceat(np.nan_to_num(ordered), cut, 0), cut, 1)
        return np.asarray(sums / np.outer(counts, counts))

    if step > 1:
        rows = [f"{rows[s]} … {rows[min(s + step, len(rows)) - 1]}" for s in starts]
    columns = [row.split(" ", 1)[0] for row in rows]
    return shown, rows, columns


def by_module(material: Material) -> list[Figure]:
    """Return layers × kinds of modules: what was kept, what was lost, and how adapters agree."""
    modules = material.record["modules"]
    grid = make_grid(list(modules))
    kept = {target: facts.get("kept_energy") for target, facts in modules.items()}
    error = {target: facts.get("relative_error") for target, facts in modules.items()}
    shown = []
    if any(value is not None for value in kept.values()):
        shown += [
            ("kept", "Energy kept", kept, SHARE, _ALL, _KEPT),
            ("error", "Relative error", error, SHARE, _ALL, _ERROR),
        ]
    for name, title, field, scale, words, reading in (
        ("agreement", "Agreement", "cosine", COSINE, _COSINE_WORDS, _AGREEMENT),
        ("merged", "Cosine with the merge", "with_merged", COSINE, _COSINE_WORDS, _MERGED),
        ("minority", "Mass in the minority", "minority", HALF, ("none", "", "half"), _MINORITY),
    ):
        found = material.agreement.targets if material.agreement else ()
        values = {target.target: getattr(target, field) for target in found}
        if any(map(math.isfinite, values.values())):
            shown.append((name, title, values, scale, words, reading))
    return [
        Figure(
            name,
            title,
            grid.mean(values),
            scale,
            grid.kinds,
            grid.columns,
            words,
            reading,
            square=False,
        )
        for name, title, values, scale, words, reading in shown
    ]


_ALL = ("none", "", "all")

_KEPT = (
    "The share of ‖M‖²_F of the merged matrix that the written pair of rank R keeps, on average "
    "where several targets share a cell. It does not say whether what was lost mattered."
)
_ERROR = (
    "‖M - B·A‖_F / ‖M‖_F of the pair as written, rounding to its dtype included: the square root "
    "of one minus the energy kept, where nothing else was lost."
)
_AGREEMENT = (
    "The mean cosine over all pairs of adapters that have the target. Near 0 they neither help nor "
    "hinder one another there; it hides single pairs, which the matrix above shows."
)
_MERGED = (
    "The mean cosine of the adapters with the merge: how much of each direction is left. Unrelated "
    "adapters of one norm have about 1/√N each after an equal sum, so a low value is no fault."
)
_MINORITY = (
    "The share of Σ|w·Δ| that pulls against the sum's sign, element by element on a sample: what "
    "cancels in a plain sum, and what TIES drops. 0 % where all agree, 50 % at most."
)
