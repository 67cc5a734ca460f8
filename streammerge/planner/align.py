"""Which adapters meet in which target, and whether their factors fit together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from streammerge.adapter import Adapter, NameTable
from streammerge.errors import IncompatibleError, RecipeError


@dataclass(frozen=True)
class Group:
    """One target and the manifest rows that take part in it, as ranges of the alignment."""

    target: str
    first: int
    last: int


@dataclass(frozen=True)
class Alignment:
    """All selected rows of all adapters, ordered by target's name, then by adapter."""

    adapter: npt.NDArray[np.int32]
    row: npt.NDArray[np.int32]
    groups: tuple[Group, ...]


def align(adapters: Sequence[Adapter], include: str | None, exclude: str | None) -> Alignment:
    """Group the rows of all adapters by target.

    A target that only some adapters have is merged from those that have it, with their own
    weights, as PEFT does.

    Raises:
        RecipeError: include and exclude leave no target.
    """
    table = adapters[0].table
    name = np.concatenate([a.columns.name for a in adapters])
    adapter = np.concatenate([np.full(len(a), i, np.int32) for i, a in enumerate(adapters)])
    row = np.concatenate([np.arange(len(a), dtype=np.int32) for a in adapters])
    place = _places(table, include, exclude)[name]
    kept = np.flatnonzero(place >= 0)
    if len(kept) == 0:
        raise RecipeError("include and exclude leave no target to merge", option="include")
    order = kept[np.lexsort((adapter[kept], place[kept]))]
    name, place = name[order], place[order]
    starts = np.flatnonzero(np.r_[True, place[1:] != place[:-1]])
    ends = np.r_[starts[1:], len(order)]
    groups = tuple(
        Group(table.names[name[first]], int(first), int(last))
        for first, last in zip(starts, ends, strict=True)
    )
    return Alignment(adapter[order], row[order], groups)


def _places(table: NameTable, include: str | None, exclude: str | None) -> npt.NDArray[np.int64]:
    """Return each name's place in the order of names, -1 for those left out."""
    place = np.full(len(table), -1, np.int64)
    order = sorted(range(len(table)), key=table.names.__getitem__)
    place[order] = np.arange(len(table))
    for pattern, leaves_out in ((include, False), (exclude, True)):
        if pattern is not None:
            found = re.compile(pattern).search
            for number, name in enumerate(table.names):
                if bool(found(name)) == leaves_out:
                    place[number] = -1
    return place


def check_shapes(adapters: Sequence[Adapter], alignment: Alignment, *, equal_ranks: bool) -> None:
    """Check that all rows of a target have one kind and shape, and one rank where it is needed.

    Raises:
        IncompatibleError: they do not; it names the target and two of the adapters.
    """
    # One pass over columns: compare every row with the row before it in the same group.
    inner = gather(adapters, alignment, "inner")
    facts = [gather(adapters, alignment, column) for column in ("kind", "m")]
    same_group = np.ones(len(alignment.row), bool)
    same_group[[group.first for group in alignment.groups]] = False
    differs = np.any([_step(fact) for fact in facts], axis=0) | _step(inner)
    if equal_ranks:
        rank = gather(adapters, alignment, "rank")
        _refuse_ranks(adapters, alignment, np.flatnonzero(_step(rank) & same_group & ~differs))
    _refuse_shapes(adapters, alignment, np.flatnonzero(differs & same_group))


def gather(adapters: Sequence[Adapter], alignment: Alignment, column: str) -> npt.NDArray[np.int64]:
    """Return one column of the manifests for every row of the alignment."""
    values = np.concatenate([getattr(a.columns, column) for a in adapters])
    starts = np.cumsum([0] + [len(a) for a in adapters[:-1]])
    return np.asarray(values[starts[alignment.adapter] + alignment.row], np.int64)


def _step(fact: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Return where `fact` differs from the row before."""
    differs = fact[1:] != fact[:-1]
    if differs.ndim > 1:
        differs = differs.any(axis=1)
    return np.concatenate([np.zeros(1, np.bool_), differs])


def _refuse_shapes(
    adapters: Sequence[Adapter], alignment: Alignment, wrong: npt.NDArray[np.int64]
) -> None:
    for position in wrong[:1]:
        target, (left, right) = _two(adapters, alignment, int(position))
        shapes = [
            " and ".join(str(list(a.factor(r, side).shape)) for side in "AB")
            for a, r in (left, right)
        ]
        raise IncompatibleError(
            f"{target}: the adapters do not fit the same model: A and B are {shapes[0]} in "
            f"{left[0].path}, but {shapes[1]} in {right[0].path}",
            target=target,
            paths=(left[0].path, right[0].path),
        )


def _refuse_ranks(
    adapters: Sequence[Adapter], alignment: Alignment, wrong: npt.NDArray[np.int64]
) -> None:
    for position in wrong[:1]:
        target, (left, right) = _two(adapters, alignment, int(position))
        ranks = [int(a.columns.rank[r]) for a, r in (left, right)]
        raise IncompatibleError(
            f"{target}: rank {ranks[0]} in {left[0].path}, but {ranks[1]} in {right[0].path}; a "
            "rule on the factors needs equal ranks. The _svd form of the method (space delta) "
            "takes any ranks, and so do svd and cat",
            target=target,
            paths=(left[0].path, right[0].path),
        )


def _two(
    adapters: Sequence[Adapter], alignment: Alignment, position: int
) -> tuple[str, tuple[tuple[Adapter, int], tuple[Adapter, int]]]:
    left, right = (
        (adapters[alignment.adapter[p]], int(alignment.row[p])) for p in (position - 1, position)
    )
    return left[0].target(left[1]), (left, right)
