"""What a reader makes of headers: the columns of a manifest, and what goes with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from streammerge.adapter import (
    CONV,
    DTYPES,
    EMBEDDING,
    LINEAR,
    AdapterConfig,
    Columns,
    Dialect,
    ExtraColumns,
    NameTable,
)
from streammerge.readers.header import Header
from streammerge.readers.pairs import Factors, Place


class Scale(NamedTuple):
    """What decides a target's scaling: alpha over the rank to a power."""

    rank: int
    """As it is declared; 0 where it is not."""
    alpha: float
    """NaN where nothing says it."""
    power: float = 1.0


NO_SCALE = Scale(0, math.nan)
"""No rank is 0, so that the scaling of such a target is asked for."""


@dataclass(frozen=True)
class Content:
    """What an adapter's headers and config say of its tensors."""

    columns: Columns
    dialect: Dialect
    extras: ExtraColumns
    prefixes: tuple[str, ...] = ("",)
    keys: tuple[tuple[str, str], ...] | None = None
    notices: tuple[str, ...] = ()
    from_headers: bool = True
    """Whether nothing else was read, so that another adapter with the same has the same."""


@dataclass(frozen=True)
class Source:
    """What a reader is given."""

    path: str
    """Of the adapter, for messages."""
    config_path: Path
    """Of the config that counts, for messages."""
    headers: Sequence[Header]
    config: AdapterConfig | None
    table: NameTable

    @property
    def places(self) -> list[Place]:
        """All tensors, in the order of the headers."""
        return [(header, n, e) for n, header in enumerate(self.headers) for e in header.entries]


def extras_of(extras: Sequence[Place], table: NameTable) -> ExtraColumns:
    """Return where tensors lie that are no factors, in the order of their names."""
    return ExtraColumns.of_rows(
        (table.add(entry.name), file, entry.offset, entry.nbytes, entry.dtype, entry.shape)
        for _, file, entry in sorted(extras, key=lambda place: place[2].name)
    )


def keys_of(pairs: Mapping[str, Factors]) -> tuple[tuple[str, str], ...]:
    """Return the names of the factors, in the order of the columns."""
    both = (pairs[target].both() for target in sorted(pairs))
    return tuple((a.name, b.name) for (_, _, a), (_, _, b) in both)


def columns_of(
    pairs: Mapping[str, Factors],
    table: NameTable,
    scale: Callable[[str], Scale],
    prefixes: Sequence[str] = ("",),
) -> Columns:
    """Return one row for each target, in the order of their names.

    Args:
        pairs: checked, by target.
        table: where the targets' names are entered.
        scale: what decides a target's scaling.
        prefixes: those of the pairs.
    """
    return Columns.of_rows(_rows(pairs, table, scale, prefixes))


def _rows(
    pairs: Mapping[str, Factors],
    table: NameTable,
    scale: Callable[[str], Scale],
    prefixes: Sequence[str],
) -> Iterator[tuple[Any, ...]]:
    numbers = {prefix: number for number, prefix in enumerate(prefixes)}
    codes = {dtype: code for code, dtype in enumerate(DTYPES)}
    for target in sorted(pairs):
        pair = pairs[target]
        (_, a_file, a), (_, b_file, b) = pair.both()
        rank, *inner = a.shape
        first, stop = pair.rows or (0, b.shape[0])
        skipped = first * (b.nbytes // b.shape[0])
        yield (
            table.add(target),
            CONV if len(inner) > 1 else EMBEDDING if pair.embedding else LINEAR,
            rank,
            stop - first,
            math.prod(inner),
            (*inner, 0, 0, 0)[:4],
            *scale(target),
            numbers.get(pair.prefix, 0),
            a_file,
            a.offset,
            codes[a.dtype],
            b_file,
            b.offset + skipped,
            codes[b.dtype],
        )
