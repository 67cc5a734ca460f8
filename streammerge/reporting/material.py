"""What a report is made of: record, timings, and the inputs where they still lie unchanged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from streammerge.adapter import Adapter, NameTable
from streammerge.errors import AdapterError, CorruptFileError, RecipeError
from streammerge.output.record import read_record, read_timings
from streammerge.output.staging import MARK_NAME
from streammerge.planner.scaling import scalings
from streammerge.readers import read_adapter
from streammerge.recipe import Recipe
from streammerge.schedule import depths, value_at
from streammerge.worker.agreement import Agreement, Meeting, Member, agree, flops

WORK = 2e12
"""Operations that a comparison may take before it is done on some of the targets only: a minute or
a few."""


@dataclass(frozen=True)
class Missing:
    """One adapter that could not be compared."""

    position: int
    why: str


@dataclass(frozen=True)
class Material:
    """Everything that is known of a merge."""

    output: Path
    record: Mapping[str, Any]
    timings: Mapping[str, Any]
    """Empty where there is no such file."""
    compared: tuple[int, ...]
    """Positions of the adapters in `agreement`, which has the merge after them."""
    missing: tuple[Missing, ...]
    agreement: Agreement | None
    """None where fewer than one adapter is left."""
    checked: bool
    """Whether all bytes of the compared adapters are those that were merged; else their sizes."""


@dataclass(frozen=True)
class _Input:
    """An adapter whose files are where they were, and as large."""

    position: int
    member: Member
    rows: Mapping[str, int]
    """By target."""


def gather(output: Path, *, all_targets: bool, on_target: Callable[[int, int], None]) -> Material:
    """Return what is known of the merge in a directory.

    Raises:
        MissingFileError, CorruptFileError: it is not an output of streammerge.
        MergeFailedError: an input cannot be read any more.
    """
    record = read_record(output)
    try:
        recipe = Recipe.from_dict(record["recipe"])
        targets = {str(name): dict(facts) for name, facts in record["modules"].items()}
        inputs = [dict(entry) for entry in record["inputs"]]
        for facts in targets.values():
            int(facts["m"]), int(facts["n"]), int(facts["rank"])
        if len(inputs) != len(recipe.adapters):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError, RecipeError) as error:
        path = str(output / MARK_NAME)
        raise CorruptFileError("is not a record of a merge", path=path) from error
    timings = read_timings(output) or {}
    merged = read_adapter(str(output), NameTable())
    found, missing = [], []
    for position, entry in enumerate(inputs):
        try:
            found.append(_input(position, entry, recipe, targets))
        except AdapterError as error:
            missing.append(Missing(position, str(error)))
        except _Elsewhere as error:
            missing.append(Missing(position, str(error)))
    material = Material(output, record, timings, (), tuple(missing), None, checked=False)
    return _compare(material, found, merged, all_targets=all_targets, on_target=on_target)


class _Elsewhere(Exception):
    """An input that cannot be compared; the text says why."""


def _input(
    position: int, entry: Mapping[str, Any], recipe: Recipe, targets: Mapping[str, Any]
) -> _Input:
    if entry.get("commit"):
        raise _Elsewhere("lies on the Hub, and a report downloads nothing")
    path = str(entry["path"])
    adapter = read_adapter(path, NameTable())
    sizes = {Path(file.path).name: file.size for file in adapter.files}
    if sizes != entry.get("files"):
        raise _Elsewhere(f"{path}: its files are not as large as those that were merged")
    rows = {adapter.target(row): row for row in range(len(adapter))}
    rows = {target: row for target, row in rows.items() if target in targets}
    columns = adapter.columns
    for target, row in rows.items():
        if (columns.m[row], columns.n[row]) != (targets[target]["m"], targets[target]["n"]):
            raise _Elsewhere(f"{path}: {target} has another shape than when it was merged")
    weights = np.zeros(len(adapter))
    for (target, row), depth in zip(rows.items(), _depths(rows, targets), strict=True):
        weights[row] = value_at(recipe.weights[position], target, depth, option="weights")
    factors = scalings(adapter, recipe.scaling)
    return _Input(position, Member(adapter, factors, weights), rows)


def _depths(rows: Mapping[str, int], targets: Mapping[str, Any]) -> list[float]:
    """Return the depth of each row's target among all that were merged."""
    depth = dict(zip(targets, depths(list(targets)), strict=True))
    return [depth[target] for target in rows]


def _compare(
    material: Material,
    found: list[_Input],
    merged: Adapter,
    *,
    all_targets: bool,
    on_target: Callable[[int, int], None],
) -> Material:
    """Compare the inputs that were found; again without those that turn out to be others."""
    if not found:
        return material
    own = {merged.target(row): row for row in range(len(merged))}
    merge = Member(merged, scalings(merged, None), np.zeros(len(merged)))
    members = [*(one.member for one in found), merge]
    meetings = [
        Meeting(
            target,
            tuple(
                (place, rows[target])
                for place, rows in enumerate([*(one.rows for one in found), own])
                if target in rows
            ),
        )
        for target in sorted(own)
    ]
    chosen = meetings if all_targets else _affordable(meetings, members)
    done = iter(range(1, len(chosen) + 1))
    agreement = agree(members, chosen, lambda _: on_target(next(done), len(chosen)))
    whole = len(chosen) == len(meetings)
    if whole:
        changed = [
            one
            for one, (_, digest) in zip(found, agreement.checksums[:-1], strict=True)
            if digest != material.record["inputs"][one.position].get("xxh3")
        ]
        if changed:
            gone = tuple(Missing(one.position, _changed(one)) for one in changed)
            again = replace(
                material,
                missing=tuple(sorted((*material.missing, *gone), key=lambda one: one.position)),
            )
            left = [one for one in found if one not in changed]
            return _compare(again, left, merged, all_targets=all_targets, on_target=on_target)
    positions = tuple(one.position for one in found)
    return replace(material, compared=positions, agreement=agreement, checked=whole)


def _changed(one: _Input) -> str:
    return f"{one.member.adapter.path}: holds other values than when it was merged"


def _affordable(meetings: list[Meeting], members: list[Member]) -> list[Meeting]:
    """Return as many targets as a comparison within WORK takes; a checksum of the name decides
    which, so that no kind of module is preferred."""
    order = sorted(meetings, key=lambda meeting: xxhash.xxh3_64_intdigest(meeting.target.encode()))
    chosen: list[Meeting] = []
    work = 0.0
    for meeting in order:
        position, row = meeting.members[-1]
        columns = members[position].adapter.columns
        ranks = [int(members[p].adapter.columns.rank[r]) for p, r in meeting.members]
        work += flops(len(ranks), max(ranks), int(columns.m[row]), int(columns.n[row]))
        if chosen and work > WORK:
            break
        chosen.append(meeting)
    return sorted(chosen, key=lambda meeting: meeting.target)
