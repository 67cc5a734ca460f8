"""Adapters in several files, named by adapter_model.safetensors.index.json.

streammerge writes them and PEFT does not read them.
"""

from __future__ import annotations

import json
from pathlib import Path

from streammerge.errors import CorruptFileError, shorten
from streammerge.files import check_inside, read_whole
from streammerge.readers.header import MAX_NAME, Header, read_header

MAX_INDEX_BYTES = 100_000_000
"""As large as a header may be, for it holds the same names."""

MAX_SHARDS = 2**16 - 1
"""A column of a manifest counts them in 16 bits."""


def read_shards(index: Path) -> list[Header]:
    """Read the headers of all shards that an index names, and check that it tells the truth."""
    try:
        weight_map = json.loads(read_whole(index, MAX_INDEX_BYTES))["weight_map"]
        names = sorted(set(weight_map.values()))
        plain = all(map(_is_plain, names))
    except OSError as error:
        raise CorruptFileError(f"cannot be read ({error.strerror})", path=str(index)) from error
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
    for name in names:
        check_inside(index.with_name(name))
    headers = [read_header(index.with_name(name)) for name in names]
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
    return headers


def _is_plain(name: str) -> bool:
    """Whether a name can be that of a file in the same directory."""
    return 0 < len(name) <= 255 and Path(name).name == name and name.isprintable()
