"""Adapters in several files, named by adapter_model.safetensors.index.json.

streammerge writes them and PEFT does not read them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from streammerge.adapter import WEIGHTS_NAME
from streammerge.errors import CorruptFileError, UnsupportedAdapterError, shorten
from streammerge.files import check_inside, read_whole
from streammerge.readers.find import find_files
from streammerge.readers.header import MAX_NAME, Header, read_header

MAX_INDEX_BYTES = 100_000_000
"""As large as a header may be, for it holds the same names."""

MAX_SHARDS = 2**16 - 1
"""A column of a manifest counts them in 16 bits."""


def read_headers(directory: Path) -> list[Header]:
    """Read the headers of all files that hold an adapter's tensors, in the order of their names.

    Raises:
        MissingFileError, CorruptFileError, UnsupportedAdapterError: there are none to be read.
    """
    found = find_files(str(directory))
    if found.index is not None:
        return read_shards(found.index)
    assert found.weights is not None, "one of the two is found"
    if found.weights.name != WEIGHTS_NAME:
        raise UnsupportedAdapterError(
            "is one file already, and of another format; --format of a merge writes PEFT's",
            path=str(found.weights),
            variant="one file",
        )
    return [read_header(found.weights)]


def read_shards(index: Path) -> list[Header]:
    """Read the headers of all shards that an index names, and check that it tells the truth."""
    try:
        text = read_whole(index, MAX_INDEX_BYTES)
    except OSError as error:
        raise CorruptFileError(f"cannot be read ({error.strerror})", path=str(index)) from error
    weight_map = parse_index(index, text)
    headers = [_read_shard(index.with_name(name)) for name in shard_names(weight_map)]
    check_shards(index, weight_map, headers)
    return headers


def _read_shard(path: Path) -> Header:
    check_inside(path)
    return read_header(path)


def parse_index(index: Path, text: bytes) -> dict[str, str]:
    """Return which file each tensor is in, as an index says; `index` is for messages."""
    try:
        weight_map: dict[str, str] = json.loads(text)["weight_map"]
        names = shard_names(weight_map)
        plain = all(map(_is_plain, names))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptFileError("is not a safetensors index", path=str(index)) from error
    if not plain or not names:
        raise CorruptFileError(
            "its weight_map must name files in the same directory, and nothing else",
            path=str(index),
        )
    if len(names) > MAX_SHARDS:
        raise CorruptFileError(
            f"names {len(names)} files; {MAX_SHARDS} are the limit", path=str(index)
        )
    return weight_map


def shard_names(weight_map: Mapping[str, str]) -> list[str]:
    """Return the files that an index names, sorted."""
    return sorted(set(weight_map.values()))


def check_shards(index: Path, weight_map: Mapping[str, str], headers: Sequence[Header]) -> None:
    """Check that the shards, in the order of their names, hold what the index says."""
    names = shard_names(weight_map)
    found = {
        entry.name: name for name, h in zip(names, headers, strict=True) for entry in h.entries
    }
    for tensor, name in weight_map.items():
        if found.get(tensor) != name:
            raise CorruptFileError(
                f"should be in {name}, and is not",
                path=str(index),
                tensor=tensor if len(tensor) <= MAX_NAME else shorten(tensor),
            )


def _is_plain(name: str) -> bool:
    """Whether a name can be that of a file in the same directory."""
    plain = 0 < len(name) <= 255 and name.isprintable() and "/" not in name
    return plain and name not in (".", "..")
