"""The zip archives that torch.save makes: where their records lie. Hostile until checked.

Every record is stored as it is, so that it is a range of the file's bytes.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from streammerge.errors import CorruptFileError, shorten

MAX_DIRECTORY_BYTES = 2**24
"""Of an archive's list of records, and of any one part of it that is read."""

MAX_RECORDS = 2**17

MAX_PICKLE_BYTES = 2**22
"""A tensor takes some 140 bytes of it."""

MAGIC = b"PK\x03\x04"
"""How such a file begins, and each record in it."""

_LOCAL_HEADER = 30
"""Bytes before a record's name and data; what lengths these have stands at its end."""


class _Bounded(io.RawIOBase):
    """A file of which only so much is read at once: zipfile takes a list of records whole."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream = stream
        self._size = size

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self._size - self.tell())
        wanted = left if size is None or size < 0 else min(size, left)
        if wanted > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"its list of records takes {wanted} bytes")
        return self._stream.read(wanted)


def read_records(path: Path, stream: BinaryIO, size: int) -> tuple[dict[int, int], bytes]:
    """Return the length of each record of tensor data by its place in the file, and the pickle.

    Args:
        path: of the file, for messages.
        stream: the file.
        size: its length.

    Raises:
        CorruptFileError: it is no archive of torch.save, or one at odds with itself.
    """
    places = _places(path, stream, size)
    roots = [name.removesuffix("/data.pkl") for name in places if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise CorruptFileError(
            f"its archive of {len(places)} records is not of one torch.save", path=str(path)
        )
    (root,) = roots
    order = places.get(f"{root}/byteorder")
    if order is not None and _read(stream, order, limit=64) != b"little":
        raise CorruptFileError("was saved on a machine of another byte order", path=str(path))
    pickle = places[f"{root}/data.pkl"]
    if pickle[1] > MAX_PICKLE_BYTES:
        raise CorruptFileError(
            f"its pickle has {pickle[1]} bytes, and {MAX_PICKLE_BYTES} are the limit",
            path=str(path),
        )
    data = dict(place for name, place in places.items() if name.startswith(f"{root}/data/"))
    return data, _read(stream, pickle, limit=MAX_PICKLE_BYTES)


def _places(path: Path, stream: BinaryIO, size: int) -> dict[str, tuple[int, int]]:
    """Return where each record lies, and its length, by its name."""
    try:
        with zipfile.ZipFile(_Bounded(stream, size)) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, EOFError) as error:
        raise CorruptFileError(f"is not a sound zip archive ({error})", path=str(path)) from error
    if len(infos) > MAX_RECORDS:
        raise CorruptFileError(
            f"has {len(infos)} records, and {MAX_RECORDS} are the limit", path=str(path)
        )
    places = {}
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise CorruptFileError(
                f"its record {shorten(info.filename)} is compressed", path=str(path)
            )
        places[info.filename] = (_data_start(path, stream, info), info.file_size)
    if len(places) != len(infos):
        raise CorruptFileError("has two records of one name", path=str(path))
    _check_apart(path, places, size)
    return places


def _data_start(path: Path, stream: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Return where a record's data begin: behind a header of its own, of some length."""
    stream.seek(info.header_offset)
    local = stream.read(_LOCAL_HEADER)
    if len(local) < _LOCAL_HEADER or not local.startswith(MAGIC):
        raise CorruptFileError(
            f"its record {shorten(info.filename)} is not where its list says", path=str(path)
        )
    lengths = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    return info.header_offset + _LOCAL_HEADER + lengths


def _check_apart(path: Path, places: Mapping[str, tuple[int, int]], size: int) -> None:
    end = 0
    for start, length in sorted(places.values()):
        if start < end or start + length > size:
            raise CorruptFileError(
                f"its records overlap or end behind its {size} bytes", path=str(path)
            )
        end = start + length


def _read(stream: BinaryIO, place: tuple[int, int], *, limit: int) -> bytes:
    stream.seek(place[0])
    return stream.read(min(place[1], limit))
