"""Safetensors headers, taken for hostile until they are checked.

Format: 8 bytes of little-endian length, that many bytes of JSON, then the data. Each tensor names
its dtype, shape and [start, stop) in the data; together they cover it without holes.
https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from streammerge.adapter import DTYPE_BITS, TensorFile
from streammerge.errors import CorruptFileError, MissingFileError, shorten
from streammerge.files import open_regular

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""

MAX_QUOTES, MAX_BRACKETS = 8_000_000, 3_000_000
"""Of a header, which is some half a million tensors: what it takes in memory is bounded by them."""

MAX_DIMENSIONS = 16

MAX_NAME = 1024
"""Characters of a tensor's name; what is done with a path may take their square."""

MAX_NUMBER = 2**63 - 1
"""No size and no offset in a file is larger."""

_LFS_MAGIC = b"version https://git-lfs.github.com/spec/"


class Entry(NamedTuple):
    """One tensor of a file; `offset` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def item_bytes(self) -> int:
        """Bytes of a number, at least one: its offset should be a multiple of them."""
        return max(1, DTYPE_BITS[self.dtype] // 8)


@dataclass(frozen=True)
class Header:
    """A checked header."""

    file: TensorFile
    metadata: dict[str, str]
    entries: tuple[Entry, ...]


class HeaderText(NamedTuple):
    """A header as it stands in a file."""

    file: TensorFile
    text: bytes


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        MissingFileError: there is no such file.
        CorruptFileError: not a safetensors file, truncated, or at odds with itself.
    """
    return parse_header(read_text(path))


def read_text(path: Path) -> HeaderText:
    """Read the header of a safetensors file; of it only its length is checked.

    Raises:
        MissingFileError: there is no such file.
        CorruptFileError: not a safetensors file, or truncated inside its header.
    """
    try:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            length = header_length(path, file.read(8), status.st_size)
            text = file.read(length)
    except FileNotFoundError as error:
        raise MissingFileError("no such file", path=str(path)) from error
    except OSError as error:
        raise CorruptFileError(f"cannot be read ({error.strerror})", path=str(path)) from error
    described = TensorFile(str(path), status.st_size, status.st_mtime_ns, status.st_ino)
    return HeaderText(described, text)


def parse_header(header: HeaderText) -> Header:
    """Check a header.

    Raises:
        CorruptFileError: it is at odds with itself or with the size of its file.
    """
    path = Path(header.file.path)
    fields = _parse(path, header.text)
    metadata = _metadata(path, fields.pop("__metadata__", None))
    start = 8 + len(header.text)
    entries = tuple(_entries(path, fields, start))
    _check_coverage(path, entries, start, header.file.size)
    return Header(header.file, metadata, entries)


def header_length(path: Path, head: bytes, size: int) -> int:
    """Return the length of the text after a file's first 8 bytes; `path` is for messages."""
    if _LFS_MAGIC.startswith(head) and head:
        raise CorruptFileError(
            "is a git-lfs pointer, not the weights; run `git lfs pull` where it was cloned",
            path=str(path),
        )
    if size < 8:
        raise CorruptFileError(
            f"is {size} bytes long, too short for a safetensors file", path=str(path)
        )
    length = int.from_bytes(head, "little")
    if length > MAX_HEADER_BYTES:
        raise CorruptFileError(
            "does not begin with a safetensors header (its length field says "
            f"{length} bytes, the format allows {MAX_HEADER_BYTES})",
            path=str(path),
        )
    if 8 + length > size:
        raise CorruptFileError(
            f"is truncated inside its header: {size} bytes, the header alone ends at {8 + length}",
            path=str(path),
        )
    return length


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    if text.count(b'"') > MAX_QUOTES or text.count(b"[") + text.count(b"{") > MAX_BRACKETS:
        raise CorruptFileError("its header holds more than any adapter has", path=str(path))
    try:
        fields = json.loads(text)
        if not _plainly_unique(text, fields):
            fields = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"its header is not JSON ({error})", path=str(path)) from error
    if not isinstance(fields, dict):
        raise CorruptFileError("its header is not a JSON object", path=str(path))
    return fields


def _plainly_unique(text: bytes, fields: Any) -> bool:
    """Whether it can be seen without a second look that no key stands twice.

    Every key ends in a quote and a colon, and without a backslash nothing else does; a key that
    stands twice is lost when it is read, so that there are more of them than keys were read. The
    second look takes half a second for 90,000 tensors.
    """
    try:
        keys = len(fields) + sum(map(len, fields.values()))
    except (AttributeError, TypeError):
        return False
    plain = b"\\" not in text and not re.search(rb'"\s+:', text)
    return plain and text.count(b'":') == keys


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object, refusing keys that stand twice: readers differ on which one counts."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {shorten(twice)} stands twice")
    return fields


def _metadata(path: Path, metadata: Any) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CorruptFileError("its header's __metadata__ is not a map of strings", path=str(path))
    return metadata


def _entries(path: Path, fields: dict[str, Any], start: int) -> Iterator[Entry]:
    for name, facts in fields.items():
        if len(name) > MAX_NAME:
            raise CorruptFileError(
                f"its header names a tensor by {len(name)} characters ({shorten(name)}), and "
                f"{MAX_NAME} are the limit",
                path=str(path),
            )
        try:
            dtype, shape, (low, high) = facts["dtype"], facts["shape"], facts["data_offsets"]
            numbers = (*shape, low, high)
            sound = (
                set(map(type, numbers)) == {int}
                and min(numbers) >= 0
                and max(numbers) <= MAX_NUMBER
                and type(dtype) is str
                and len(shape) <= MAX_DIMENSIONS
            )
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise CorruptFileError(
                "its header entry lacks a sound dtype, shape or data_offsets",
                path=str(path),
                tensor=name,
            )
        if not _is_text(name):
            raise CorruptFileError("its header names a tensor by what is no text", path=str(path))
        if dtype not in DTYPE_BITS:
            raise CorruptFileError(f"unknown dtype {shorten(dtype)}", path=str(path), tensor=name)
        if DTYPE_BITS[dtype] * math.prod(shape) != (high - low) * 8:
            raise CorruptFileError(
                f"dtype {dtype} and shape {shape} do not take the {high - low} bytes that its "
                "data_offsets span",
                path=str(path),
                tensor=name,
            )
        yield Entry(name, dtype, tuple(shape), start + low, high - low)


def _is_text(name: str) -> bool:
    """Whether a name can be written again; JSON may hold half a surrogate pair."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_coverage(path: Path, entries: tuple[Entry, ...], start: int, size: int) -> None:
    """Check that the tensors cover the data one after another, and that the file has it all."""
    end = start
    for entry in sorted(entries, key=itemgetter(3, 4)):
        if entry.offset != end:
            raise CorruptFileError(
                f"its data begins at byte {entry.offset}, but the tensor before it ends at {end}",
                path=str(path),
                tensor=entry.name,
            )
        end += entry.nbytes
    if end > size:
        raise CorruptFileError(
            f"is truncated: {size} bytes, its header promises {end}; download it again",
            path=str(path),
        )
    if end < size:
        raise CorruptFileError(
            f"holds {size - end} bytes that no tensor claims; its header promises {end} bytes",
            path=str(path),
        )
