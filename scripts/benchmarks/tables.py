"""The figures as markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from benchmarks.growth import exponents
from benchmarks.processes import Figures

MIB = 1024**2


def report(figures: Figures) -> str:
    """Return all tables for which there are figures."""
    rows, rate = figures["workloads"], figures["machine"]["gemm_flops_a_second"]
    parts = [
        ("Against peers", _table(PEERS, _peer_rows(rows))),
        ("Against the machine", _table(FLOORS, _floor_rows(rows, rate))),
        ("Residual against the best", _table(QUALITY, _quality_rows(rows))),
        ("Exponents of growth", _table(GROWTH, _growth_rows(figures["growth"]))),
        *((f"Profile of {row['name']}", _profile(row)) for row in rows if "profile" in row),
    ]
    machine = ", ".join(f"{key} {_number(value)}" for key, value in figures["machine"].items())
    return "\n\n".join([machine, *(f"## {title}\n\n{text}" for title, text in parts if text)])


PEERS = (
    "workload | process s | whole s | merge s | peak MiB | peer | process s | whole s | merge s "
    "| sync s | peak MiB | × process | × whole | × merge | peak ÷"
)


def _peer_rows(rows: Iterable[Figures]) -> Iterator[list[Any]]:
    for row in rows:
        ours, cli = row["sides"]["ours"], row["sides"]["cli"]
        mine = [cli["process_seconds"], ours["whole_seconds"], ours["merge_seconds"]]
        for name in ("peft", "script", "core"):
            if name not in row["sides"]:
                continue
            peer = row["sides"][name]
            theirs = [peer.get(f"{part}_seconds") for part in ("process", "whole", "merge")]
            yield [
                row["name"],
                *mine,
                round(cli["peak_bytes"] / MIB),
                name,
                *theirs,
                peer["sync_seconds"],
                round(peer["peak_bytes"] / MIB),
                *(_ratio(their, my) for their, my in zip(theirs, mine, strict=True)),
                _ratio(peer["peak_bytes"], cli["peak_bytes"]),
            ]


FLOORS = (
    "workload | route | read MB | written MB | disk floor s | whole ÷ floor | unavoidable GFLOP "
    "| GEMM floor s | merge ÷ floor"
)


def _floor_rows(rows: Iterable[Figures], rate: float) -> Iterator[list[Any]]:
    for row in rows:
        ours, disk = row["sides"]["ours"], row["sides"]["disk"]
        floor = row["unavoidable_flops"] / rate
        yield [
            row["name"],
            ", ".join(ours["routes"]) + ("" if ours["converged"] else " (not converged)"),
            row["read_bytes"] / 1e6,
            row["write_bytes"] / 1e6,
            disk["whole_seconds"],
            _ratio(ours["whole_seconds"], disk["whole_seconds"]),
            row["unavoidable_flops"] / 1e9,
            floor,
            _ratio(ours["merge_seconds"], floor),
        ]


QUALITY = (
    "workload | best residual ÷ ‖M‖ | residual ÷ best - 1 | as streammerge estimates it "
    "| elements decided otherwise in float64 | ‖difference‖ ÷ ‖M‖"
)


def _quality_rows(rows: Iterable[Figures]) -> Iterator[list[Any]]:
    for row in rows:
        if "quality" in row:
            found = row["quality"]
            yield [
                row["name"],
                found["optimal"] / found["norm"],
                f"{found['excess']:.1e}",
                f"{found['estimated_excess']:.1e}",
                found.get("decided_otherwise"),
                found.get("relative_difference"),
            ]


GROWTH = (
    "method | against | whole seconds | merge seconds | planned flops | bytes read | bytes written "
    "| no faster than flops or bytes | PEFT's whole seconds"
)
MARGIN = 0.1


def _growth_rows(rows: Sequence[Figures]) -> Iterator[list[Any]]:
    for powers in exponents(rows):
        limit = max(powers[key] for key in ("flops", "read", "written")) + MARGIN
        within = max(powers["whole"], powers["merge"]) <= limit
        yield [
            powers["method"],
            powers["axis"],
            *(f"{powers[key]:.2f}" for key in ("whole", "merge", "flops", "read", "written")),
            "yes" if within else "no",
            None if powers["peft_whole"] is None else f"{powers['peft_whole']:.2f}",
        ]


def _profile(row: Figures) -> str:
    found = row["profile"]
    rows = [
        [
            top["function"].replace("|", r"\|"),
            top["calls"],
            top["seconds"],
            f"{top['seconds'] / found['total_seconds']:.0%}",
        ]
        for top in found["top"]
    ]
    return _table("function, by its own time | calls | seconds | share", rows)


def _table(heads: str, rows: Iterable[Sequence[Any]]) -> str:
    """Return a markdown table; nothing where there are no rows."""
    lines = [f"| {' | '.join(_number(cell) for cell in row)} |" for row in rows]
    if not lines:
        return ""
    columns = heads.count("|") + 1
    return "\n".join([f"| {heads} |", "|" + "---|" * columns, *lines])


def _ratio(above: float | None, below: float) -> float | None:
    return None if above is None else above / below


def _number(value: Any) -> str:
    """Three figures, without an exponent where there need be none."""
    if value is None:
        return "–"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if value != 0 and not 1e-4 <= abs(value) < 1e9:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
