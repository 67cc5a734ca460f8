"""Adapter directories as data: what a case is made of, and how it comes to lie on a disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class File:
    """A regular file that begins with these bytes; what is missing up to `size` are zeros.

    The zeros take no disk, so that a header may promise as much as it likes.
    """

    head: bytes
    size: int | None = None

    @property
    def length(self) -> int:
        """How long it is."""
        return len(self.head) if self.size is None else min(max(0, self.size), LARGEST)


LARGEST = 2**43
"""Larger files are refused by some file systems."""


@dataclass(frozen=True)
class Link:
    """A symbolic link."""

    to: str


@dataclass(frozen=True)
class Pipe:
    """A named pipe that nobody writes to."""


@dataclass(frozen=True)
class Folder:
    """A directory where a file is expected."""


Piece = File | Link | Pipe | Folder
Directory = Mapping[str, Piece]
"""What lies in an adapter's directory, by name."""


def write_directory(place: Path, pieces: Directory) -> None:
    """Make a directory of just these pieces; what lay there is gone."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for name, piece in pieces.items():
        _write(place / name, piece)


def _write(path: Path, piece: Piece) -> None:
    match piece:
        case File(head):
            with path.open("wb") as stream:
                stream.write(head[: piece.length])
                stream.truncate(piece.length)
        case Link(to):
            path.symlink_to(to)
        case Pipe():
            os.mkfifo(path)
        case Folder():
            path.mkdir()


def with_header(text: bytes, data_bytes: int) -> File:
    """A safetensors file with this header, whatever it says, and so many bytes of zeros."""
    return File(len(text).to_bytes(8, "little") + text, 8 + len(text) + data_bytes)


def header_of(file: File) -> bytes:
    """The header of a sound safetensors file."""
    return file.head[8 : 8 + int.from_bytes(file.head[:8], "little")]
