"""Alphas that lie as tensors of one number beside the factors."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from streammerge.errors import CorruptFileError
from streammerge.files import open_regular
from streammerge.hub import Ranges, Span
from streammerge.readers.pairs import Place
from streammerge.readers.remote import refused_by_hub

_CODES = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h"}


def read_alphas(places: Mapping[str, Place]) -> dict[str, float]:
    """Return the number in each tensor, by the name that it is given here.

    Raises:
        CorruptFileError: one holds no number that can be an alpha, or cannot be read.
    """
    alphas: dict[str, float] = {}
    for path, mine in _by_file(places).items():
        if mine[0][1][0].file.etag is not None:
            alphas |= _fetched(mine)
            continue
        try:
            with open_regular(Path(path)) as stream:
                for name, place in mine:
                    _check(place)
                    stream.seek(place[2].offset)
                    alphas[name] = _decoded(place, stream.read(place[2].nbytes))
        except OSError as error:
            raise CorruptFileError(f"cannot be read ({error.strerror})", path=path) from error
    return alphas


def _fetched(places: Sequence[tuple[str, Place]]) -> dict[str, float]:
    """Return the numbers in tensors of a file on the Hub."""
    for _, place in places:
        _check(place)
    spans = [Span(header.file, entry.offset, entry.nbytes) for _, (header, _, entry) in places]
    with refused_by_hub(spans[0].file.path):
        blocks = Ranges().fetch(spans)
    return {
        name: _decoded(place, block.tobytes())
        for (name, place), block in zip(places, blocks, strict=True)
    }


def _by_file(places: Mapping[str, Place]) -> dict[str, list[tuple[str, Place]]]:
    files: dict[str, list[tuple[str, Place]]] = {}
    for name, place in places.items():
        files.setdefault(place[0].file.path, []).append((name, place))
    return files


def _check(place: Place) -> None:
    header, _, entry = place
    if math.prod(entry.shape) != 1 or entry.dtype not in (*_CODES, "BF16"):
        raise CorruptFileError(
            f"an alpha of shape {list(entry.shape)} and dtype {entry.dtype}; it must be one number",
            path=header.file.path,
            tensor=entry.name,
        )


def _decoded(place: Place, data: bytes) -> float:
    header, _, entry = place
    try:
        if entry.dtype == "BF16":
            (value,) = struct.unpack("<f", b"\0\0" + data)
        else:
            (value,) = struct.unpack(_CODES[entry.dtype], data)
    except struct.error as error:
        raise CorruptFileError(
            "its data end before they should", path=header.file.path, tensor=entry.name
        ) from error
    # Of 0 some say that it is 0, and kohya's scripts that it is the rank.
    if not math.isfinite(value) or value == 0:
        raise CorruptFileError(
            f"the alpha is {value:g}; it must be a finite number other than 0",
            path=header.file.path,
            tensor=entry.name,
        )
    return float(value)


def split_alphas(extras: Iterable[Place]) -> tuple[dict[str, Place], list[Place]]:
    """Return the alphas among other tensors by the modules that they name, and the rest."""
    alphas, rest = {}, []
    for place in extras:
        if place[2].name.endswith(".alpha"):
            alphas[place[2].name.removesuffix(".alpha")] = place
        else:
            rest.append(place)
    return alphas, rest
