"""Which tensors of an adapter's files are the two factors of a target, and whether they fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from streammerge.adapter import DTYPES
from streammerge.errors import CorruptFileError, UnsupportedAdapterError
from streammerge.readers.header import Entry, Header

MAX_SIDE = 2**31 - 1
"""No side of a factor is longer."""

Place = tuple[Header, int, Entry]
"""A tensor, the header that it stands in, and that file's number."""


Side = Literal["a", "b"]


class Name(NamedTuple):
    """What the name of a factor says."""

    target: str
    side: Side
    prefix: str = ""
    """What stands before the target."""
    embedding: bool = False


@dataclass(slots=True)
class Factors:
    """Where the two factors of a target lie, as far as they are found."""

    prefix: str
    embedding: bool
    a: Place | None = None
    b: Place | None = None
    rows: tuple[int, int] | None = None
    """Which rows of B are the target's; all of them when None."""

    def both(self) -> tuple[Place, Place]:
        """Return the two places of a pair that was checked."""
        assert self.a is not None, "pairs are checked"
        assert self.b is not None, "pairs are checked"
        return self.a, self.b


def pair_up(
    places: Iterable[Place], name_of: Callable[[str], Name | None]
) -> tuple[dict[str, Factors], list[Place]]:
    """Sort tensors into the factors of each target, and the rest.

    Args:
        places: all tensors.
        name_of: from a tensor's name to what it says; None where it is no factor's.

    Raises:
        CorruptFileError: a factor stands twice or alone, or two of them make no delta.
        UnsupportedAdapterError: a factor of a dtype or kind that is not merged.
    """
    pairs: dict[str, Factors] = {}
    extras: list[Place] = []
    for place in places:
        name = name_of(place[2].name)
        if name is None:
            extras.append(place)
            continue
        pair = pairs.get(name.target)
        if pair is None:
            pair = pairs[name.target] = Factors(name.prefix, name.embedding)
        _enter(pair, name, place)
    for pair in pairs.values():
        _check_pair(pair)
    return pairs, extras


def _enter(pair: Factors, name: Name, place: Place) -> None:
    """Enter a factor into the pair of its target."""
    why = ""
    if pair.prefix != name.prefix:
        why = f"{name.target} stands under two prefixes, {pair.prefix!r} and {name.prefix!r}"
    elif getattr(pair, name.side) is not None:
        why = f"{name.target} has two {name.side.upper()} factors"
    elif pair.embedding != name.embedding:
        why = f"is paired with {(pair.a or pair.b or place)[2].name}"
    if why:
        raise CorruptFileError(why, path=place[0].file.path, tensor=place[2].name)
    setattr(pair, name.side, place)


def _check_pair(pair: Factors) -> None:
    """Check that a target has both factors, and that their shapes make one delta."""
    if pair.a is None or pair.b is None:
        found = pair.a or pair.b
        assert found is not None, "a pair is made for a factor"
        header, _, entry = found
        raise CorruptFileError(
            f"has no {'A' if pair.a is None else 'B'} factor beside it",
            path=header.file.path,
            tensor=entry.name,
        )
    (header, _, a), (_, _, b) = pair.both()
    for entry in (a, b):
        if entry.dtype not in DTYPES:
            raise UnsupportedAdapterError(
                f"its dtype is {entry.dtype}; factors must be one of {', '.join(DTYPES)}",
                path=header.file.path,
                tensor=entry.name,
                variant=entry.dtype,
            )
    _check_shapes(header, a, b, embedding=pair.embedding)


def _check_shapes(header: Header, a: Entry, b: Entry, *, embedding: bool) -> None:
    dimensions = (2,) if embedding else (2, 3, 4, 5)
    if len(a.shape) not in dimensions or len(b.shape) != len(a.shape) or 0 in a.shape + b.shape:
        raise CorruptFileError(
            f"shapes {list(a.shape)} of A and {list(b.shape)} of B make no delta",
            path=header.file.path,
            tensor=a.name,
        )
    if any(size != 1 for size in b.shape[2:]):
        raise CorruptFileError(
            f"shape {list(b.shape)}: the B of a convolution must be 1×1",
            path=header.file.path,
            tensor=b.name,
        )
    if max(a.shape + b.shape) > MAX_SIDE:
        raise CorruptFileError(
            f"shapes {list(a.shape)} of A and {list(b.shape)} of B are of no layer",
            path=header.file.path,
            tensor=a.name,
        )
    rank = a.shape[0]
    if b.shape[1] == rank:
        return
    if len(a.shape) > 2 and rank % b.shape[1] == 0:
        raise UnsupportedAdapterError(
            f"has {b.shape[1]} columns for a rank of {rank}: a grouped convolution "
            f"({rank // b.shape[1]} groups); these are not merged",
            path=header.file.path,
            tensor=b.name,
            variant="grouped convolution",
        )
    raise CorruptFileError(
        f"shape {list(b.shape)}: B must have as many columns as A has rows ({rank}, in {a.name})",
        path=header.file.path,
        tensor=b.name,
    )
