"""The report as one HTML page: nothing is loaded, nothing is run, every name is escaped."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any, TypeGuard

import numpy as np

from streammerge.budget import format_size
from streammerge.reporting import colours
from streammerge.reporting.drawing import MAX_NUMBERED, bars, heatmap, legend, safe
from streammerge.reporting.figures import Figure, by_module, labels, matrices
from streammerge.reporting.grid import OUTSIDE
from streammerge.reporting.material import Material
from streammerge.reporting.tables import counted, table

LISTED = 200
"""Rows of a table of targets; the record has them all."""

MAX_INPUTS = 2000
"""Rows of the table of adapters."""

PAIRS = 10
"""Pairs of adapters that are listed as most alike, and as most opposed."""

MATRIX_WIDTH = 400.0

SHORTFALLS = {
    "rank_reached": "keep less at the largest rank allowed than the rank policy asks for",
    "converged": "did not reach the tolerance of the truncated SVD in the planned passes",
    "basis_unique": "have bases with singular values that are as good as equal, so that rounding "
    "decided between their directions",
    "settled": "had an iteration that had not come to rest when its steps were used up",
}
"""What it means where a field of a target's facts is false."""


def render(material: Material) -> str:
    """Return the page."""
    return "".join(_parts(material))


def _parts(material: Material) -> Iterator[str]:
    title = safe(f"Merge of {len(labels(material))} adapters by {_recipe(material)['method']}")
    style = resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    yield (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{title}</title><style>{style}{colours.css()}</style></head><body><main>"
    )
    yield f'<header><h1>{title}</h1><p class="sub">{safe(material.output.name)}</p>'
    yield from _cards(material)
    yield (
        '<nav><a href="#agreement">Agreement</a><a href="#modules">Modules</a>'
        '<a href="#inputs">Inputs</a><a href="#cost">Time and memory</a>'
        '<a href="#origin">Origin</a></nav></header>'
    )
    yield from _missing(material)
    yield from _agreement(material)
    yield from _modules(material)
    yield from _inputs(material)
    yield from _cost(material)
    yield from _origin(material)
    yield "</main></body></html>\n"


def _recipe(material: Material) -> dict[str, Any]:
    recipe: dict[str, Any] = material.record["recipe"]
    return recipe


def _cards(material: Material) -> Iterator[str]:
    modules = material.record["modules"]
    ranks = sorted({int(facts["rank"]) for facts in modules.values()})
    kept = [f["kept_energy"] for f in modules.values() if _is_number(f.get("kept_energy"))]
    cards = [
        (f"{len(labels(material)):,}", "adapters"),
        (f"{len(modules):,}", "targets"),
        (str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}", "output rank"),
    ]
    if kept:
        cards.append((f"{float(np.median(kept)):.1%}", "energy kept, median target"))
    found = material.agreement
    if found is not None and len(material.compared) > 1:
        pairs = found.cosine[:-1, :-1][np.triu_indices(len(material.compared), 1)]
        cards.append((f"{np.nanmean(pairs):+.3f}", "mean cosine of two adapters"))
        minority = [t.minority for t in found.targets if math.isfinite(t.minority)]
        if minority:
            cards.append((f"{np.mean(minority):.1%}", "mass in the minority"))
    seconds, peak = material.timings.get("total_seconds"), _memory(material).get("peak_bytes")
    if _is_number(seconds):
        cards.append((_duration(float(seconds)), "time"))
    if _is_number(peak):
        cards.append((format_size(int(peak)), "peak memory"))
    shown = "".join(f"<li><b>{safe(value)}</b><span>{what}</span></li>" for value, what in cards)
    yield f'<ul class="cards">{shown}</ul>'


def _missing(material: Material) -> Iterator[str]:
    names = labels(material)
    notes = [
        f"Adapter {safe(names[one.position])} is not compared: {safe(one.why)}."
        for one in material.missing[:20]
    ]
    if len(material.missing) > 20:
        notes.append(f"… and {len(material.missing) - 20} more adapters are not compared.")
    total = len(material.record["modules"])
    if material.agreement is not None and not material.checked:
        count = len(material.agreement.targets)
        notes.append(
            f"Adapters are compared in {count:,} of {total:,} targets, chosen by a checksum of "
            "their names, and inputs were checked by their sizes alone; --all-targets compares all "
            "and checks every byte."
        )
    if not material.timings:
        notes.append("There is no streammerge-timings.json: time and memory are not known.")
    if notes:
        items = "".join(f"<li>{note}</li>" for note in notes)
        yield f'<div class="note"><strong>What this page lacks</strong><ul>{items}</ul></div>'


def _agreement(material: Material) -> Iterator[str]:
    yield '<h2 id="agreement">How the adapters agree</h2>'
    figures = matrices(material)
    if not figures:
        yield "<p>Fewer than two adapters could be compared, so there is nothing to show.</p>"
        return
    yield (
        "<p>Each row and column is one adapter. All of it comes from the factors alone, in "
        "float64; weights play no part.</p>"
    )
    yield '<div class="pair">'
    for figure in figures:
        yield _drawn(figure)
    yield "</div>"
    yield from _extremes(material)


def _extremes(material: Material) -> Iterator[str]:
    """Yield the pairs that are most alike and most opposed, where not all can be seen at once."""
    found, count = material.agreement, len(material.compared)
    if found is None or count <= MAX_NUMBERED:
        return
    names = labels(material)
    first, second = np.triu_indices(count, 1)
    cosine = found.cosine[first, second]
    known = np.flatnonzero(np.isfinite(cosine))
    order = known[np.argsort(-cosine[known], kind="stable")]
    ends = {"Most alike": order[:PAIRS], "Most opposed": order[::-1][:PAIRS]}
    yield '<div class="pair">'
    for title, chosen in ends.items():
        rows = [
            (
                names[material.compared[first[place]]],
                names[material.compared[second[place]]],
                _signed(float(cosine[place])),
                _percent(float(found.conflict[first[place], second[place]])),
            )
            for place in chosen
        ]
        heads = ("adapter", "and", "cosine", "sign conflict")
        shown = table(heads, rows, names=(0, 1), numbers=(2, 3))
        yield f"<section><h3>{title}</h3>{shown}</section>"
    yield "</div>"


def _modules(material: Material) -> Iterator[str]:
    yield '<h2 id="modules">Module by module</h2>'
    figures = by_module(material)
    outside = any(OUTSIDE in figure.columns for figure in figures)
    yield (
        f"<p>Kinds of modules down, layers across{'; – is what lies in none' if outside else ''}."
        "</p>"
    )
    if not any(figure.name == "kept" for figure in figures):
        yield (
            "<p>Nothing was truncated, or the rule worked on the factors, where there is no merged "
            "matrix to compare with: so there is no energy kept or lost to show.</p>"
        )
    yield from _shortfalls(material)
    for figure in figures:
        yield _drawn(figure)
    yield from _worst(material)


def _shortfalls(material: Material) -> Iterator[str]:
    """Yield how many targets are not all that was aimed at, and why."""
    modules = material.record["modules"]
    notes = []
    for field, meaning in SHORTFALLS.items():
        short = [target for target, facts in modules.items() if facts.get(field) is False]
        if short:
            notes.append(f"{len(short):,} {meaning} (such as {safe(short[0])})")
    if notes:
        items = "".join(f"<li>{note}</li>" for note in notes)
        title = f"<strong>Of {len(modules):,} targets</strong>"
        yield f'<div class="note">{title}<ul>{items}</ul></div>'


def _worst(material: Material) -> Iterator[str]:
    """Yield the table of the targets that lost most, or of the first where nothing was measured."""
    modules = material.record["modules"]
    agreed = {t.target: t for t in material.agreement.targets} if material.agreement else {}

    def lost(target: str) -> float:
        error = modules[target].get("relative_error")
        return float(error) if _is_number(error) else -1.0

    order = sorted(modules, key=lambda target: (-lost(target), counted(target)))
    rows = []
    for target in order[:LISTED]:
        facts, found = modules[target], agreed.get(target)
        rows.append(
            (
                target,
                f"{facts['m']}×{facts['n']}",
                facts["rank"],
                facts.get("adapters", "–"),
                _percent(facts.get("kept_energy")),
                _percent(facts.get("relative_error")),
                _signed(found.cosine) if found else "–",
                _percent(found.minority) if found else "–",
            )
        )
    heads = ("target", "shape", "rank", "adapters", "kept", "error", "cosine", "minority")
    measured = lost(order[0]) >= 0
    yield f"<h3>Targets{', those that lost most first' if measured else ''}</h3>"
    yield table(heads, rows, names=(0,), numbers=range(1, len(heads)))
    if len(order) > LISTED:
        yield f'<p class="read">… and {len(order) - LISTED:,} more, in streammerge.json.</p>'


def _inputs(material: Material) -> Iterator[str]:
    yield '<h2 id="inputs">What was merged</h2>'
    names, found = labels(material), material.agreement
    place = {position: n for n, position in enumerate(material.compared)}
    norms = _norms(material)
    weights = _recipe(material)["weights"]
    rows = []
    for position, entry in list(enumerate(material.record["inputs"]))[:MAX_INPUTS]:
        at = place.get(position)
        weight = weights[position]
        rows.append(
            (
                names[position],
                f"{weight:g}" if _is_number(weight) else "varies",
                entry.get("targets_used", "–"),
                format_size(sum(int(size) for size in entry.get("files", {}).values())),
                "–" if at is None else f"{norms[at]:.4g}",
                "–" if at is None or found is None else _signed(float(found.cosine[at, -1])),
                entry.get("xxh3", "–"),
                entry["path"],
            )
        )
    heads = ("adapter", "weight", "targets", "size", "norm", "cosine with merge", "xxh3", "path")
    yield table(heads, rows, names=(0,), numbers=range(1, 6))
    yield (
        '<p class="read">The norm is ‖Δ‖_F over the compared targets, with the scaling and without '
        "the weight: an adapter that is much longer than the others decides a merge of equal "
        "weights. A cosine with the merge near 0 means that little of an adapter's direction is "
        "left; it does not say how well the merge does its task.</p>"
    )


def _norms(material: Material) -> list[float]:
    if material.agreement is None:
        return []
    found = np.array([target.norms for target in material.agreement.targets])
    return [float(norm) for norm in np.sqrt(np.nansum(found**2, axis=0))]


def _cost(material: Material) -> Iterator[str]:
    yield '<h2 id="cost">Time and memory</h2>'
    memory = {k: float(v) for k, v in _memory(material).items() if _is_number(v)}
    if "allowed_bytes" not in memory:
        memory = {}
    rows = [
        (label, memory[key], format_size(int(memory[key])), "main" if key == "peak_bytes" else "")
        for key, label in (
            ("reserved_bytes", "reserved"),
            ("projected_bytes", "projected"),
            ("peak_bytes", "measured peak"),
            ("allowed_bytes", "allowed"),
        )
        if key in memory
    ]
    if rows:
        yield _memory_bars(rows)
    seconds = _seconds(material)
    if seconds:
        order = sorted(seconds, key=lambda target: (-seconds[target], counted(target)))
        total = sum(seconds.values()) or 1.0
        yield "<h3>Targets, the slowest first</h3>"
        yield table(
            ("target", "seconds", "share"),
            [(t, f"{seconds[t]:.3f}", f"{seconds[t] / total:.1%}") for t in order[:LISTED]],
            names=(0,),
            numbers=(1, 2),
        )
        yield (
            '<p class="read">Seconds of the tasks, which may have run side by side, so that they '
            "add up to more than the time of the run.</p>"
        )
    if not rows and not seconds:
        yield "<p>Not known: the file of timings is not there, or of an earlier version.</p>"


def _memory_bars(rows: Sequence[tuple[str, float, str, str]]) -> str:
    held = [row for row in rows if row[0] != "allowed"]
    highest = max((value for _, value, _, _ in held), default=0.0)
    limit = rows[-1]
    # A machine's whole memory beside a small merge would leave nothing to see of it.
    shown = rows if limit[1] <= 4 * highest else held
    drawing = bars(shown, max(value for _, value, _, _ in shown))
    return (
        f'<figure><h3>Memory of the process</h3><div class="plot">{drawing}</div>'
        f'<p class="read">{safe(limit[2])} were allowed. Projected is what the plan promised to '
        "stay within, reserved the part of it that the process itself takes; the peak is the most "
        "that the process has ever held (VmHWM), before the merge too where it was called from "
        "Python. Of a cluster's workers it is not known.</p></figure>"
    )


def _origin(material: Material) -> Iterator[str]:
    record = material.record
    yield '<h2 id="origin">How it was made</h2>'
    fingerprint = record.get("fingerprint")
    facts: list[tuple[str, object]] = [
        ("method", _recipe(material)["method"]),
        ("rule, space", f"{record.get('rule')}, {record.get('space')}"),
        ("output dtype", record.get("dtype")),
        ("streammerge", record.get("streammerge")),
    ]
    if record.get("rule_origin"):
        facts.append(("rule of", record["rule_origin"]))
    if isinstance(fingerprint, dict):
        facts += [
            (str(name), value if isinstance(value, str) else json.dumps(value))
            for name, value in fingerprint.items()
        ]
    files = record.get("files") or []
    facts += [
        (str(file["name"]), f"{format_size(int(file['bytes']))}, header {file['header_xxh3']}")
        for file in files[:20]
    ]
    facts += [(str(name), f"xxh3 {digest}") for name, digest in record["other_files"].items()]
    rows = "".join(f'<tr><th>{safe(n)}</th><td class="w">{safe(v)}</td></tr>' for n, v in facts)
    yield f'<div class="scroll"><table class="facts"><tbody>{rows}</tbody></table></div>'
    recipe = {k: v for k, v in _recipe(material).items() if k not in ("adapters", "weights")}
    text = "\n".join(safe(line) for line in json.dumps(recipe, indent=1).splitlines())
    yield (
        "<details><summary>The rest of the recipe</summary>"
        f'<div class="scroll"><pre>{text}</pre></div></details>'
        '<p class="read">Checksums are xxh3-128. With the same recipe, inputs and fingerprint the '
        "output has the same bytes; streammerge verify checks them.</p>"
    )


def _drawn(figure: Figure) -> str:
    down, across = figure.values.shape
    if figure.square:
        side = min(44.0, max(1.5, MATRIX_WIDTH / down))
        size = (side, side)
    else:
        size = (min(38.0, max(5.0, 840.0 / across)), 20.0)

    def told(i: int, j: int) -> str:
        where = (figure.rows[i], figure.rows[j] if figure.square else f"layer {figure.columns[j]}")
        return f"{where[0]} · {where[1]}: {figure.scale.text(float(figure.values[i, j]))}"

    drawing = heatmap(
        figure.values,
        figure.scale,
        rows=figure.rows,
        columns=figure.columns,
        described=figure.title,
        size=size,
        told=told,
        numbers=figure.square and down <= MAX_NUMBERED,
    )
    return (
        f"<figure><h3>{safe(figure.title)}</h3>{legend(figure.scale, figure.words)}"
        f'<div class="plot">{drawing}</div><p class="read">{safe(figure.reading)}</p></figure>'
    )


def _memory(material: Material) -> dict[str, Any]:
    memory = material.timings.get("memory")
    return memory if isinstance(memory, dict) else {}


def _seconds(material: Material) -> dict[str, float]:
    seconds = material.timings.get("target_seconds")
    if not isinstance(seconds, dict):
        return {}
    return {str(name): float(value) for name, value in seconds.items() if _is_number(value)}


def _is_number(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float) and math.isfinite(value)


def _percent(value: Any) -> str:
    return f"{value:.2%}" if _is_number(value) else "–"


def _signed(value: float) -> str:
    # Adding zero takes the sign off a zero.
    return f"{round(value, 3) + 0.0:+.3f}" if math.isfinite(value) else "–"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
