"""The journal of a run: what it is, then a line for every finished target.

A line that was being written when the process died has a wrong checksum and does not count. Nothing
is made durable here: after a crash of the machine the regions are read back anyway, and those whose
lines or bytes did not reach the disk are made again.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from streammerge.errors import StorageError

_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)

_PUBLISHED = "published"

_DIGEST = 32
"""Characters of a checksum."""


@dataclass(frozen=True)
class Unfinished:
    """What an earlier run has left."""

    path: Path
    """Of its journal."""
    identity: dict[str, Any]
    """What it was, as it said when it began."""
    done: int
    """How many targets it has finished."""
    published: str | None
    """The checksum of what it was about to publish, if it came so far."""

    def entries(self) -> Iterator[dict[str, Any]]:
        """Yield those of its finished targets; there may be too many to hold."""
        lines = itertools.islice(_sound_lines(self.path), 1, None)
        return (line for line in lines if _PUBLISHED not in line)


class Journal:
    """One run's journal; written from `begin` on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = 0
        """How many finished targets it holds, as far as this process knows."""
        self._descriptor = -1

    def read(self) -> Unfinished | None:
        """Return what an earlier run has left; None where there is nothing to go on from.

        Raises:
            StorageError: there is a journal, and it cannot be read.
        """
        try:
            lines = _sound_lines(self.path)
            identity, published, self.entries = next(lines, None), None, 0
            for line in lines:
                published = line.get(_PUBLISHED)
                self.entries += published is None
            spoilt = identity is None and self.path.stat().st_size > 0
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"cannot be read ({error.strerror})", path=str(self.path)) from error
        if spoilt:
            raise StorageError("is spoilt", path=str(self.path))
        if not identity or not self.entries:
            return None
        return Unfinished(self.path, identity, self.entries, published)

    def begin(self, identity: dict[str, Any], entries: Iterable[dict[str, Any]]) -> None:
        """Write a new journal in the place of the earlier one, with what is taken over of it.

        Raises:
            StorageError: the file system refused.
        """
        fresh = self.path.with_name(self.path.name + "-new")
        taken = 0
        try:
            with fresh.open("wb") as stream:
                stream.write(_line(identity))
                for entry in entries:
                    stream.write(_line(entry))
                    taken += 1
            fresh.replace(self.path)
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(f"cannot be written ({error.strerror})", path=str(fresh)) from error
        self.entries = taken

    def append(self, entry: dict[str, Any]) -> None:
        """Write the line of a finished target.

        Raises:
            StorageError: the file system refused.
        """
        self._write(entry)
        self.entries += 1

    def publish(self, checksum: str | None) -> None:
        """Write, durably, that what has this checksum is about to get the output's name.

        Raises:
            StorageError: the file system refused.
        """
        if self._descriptor < 0:
            return  # nothing was begun
        self._write({_PUBLISHED: checksum})
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise StorageError(
                f"cannot be made durable ({error.strerror})", path=str(self.path)
            ) from error

    def _write(self, value: dict[str, Any]) -> None:
        line = _line(value)
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
        except OSError as error:
            raise StorageError(
                f"cannot be written ({error.strerror})", path=str(self.path)
            ) from error

    def close(self) -> None:
        """Close the file; it stays."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def remove(self) -> None:
        """Close and remove the file."""
        self.close()
        self.path.with_name(self.path.name + "-new").unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


def _line(value: dict[str, Any]) -> bytes:
    text = _ENCODER.encode(value).encode()
    return xxhash.xxh3_128_hexdigest(text).encode() + b" " + text + b"\n"


def _sound_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines up to the first that is not as it was written."""
    with path.open("rb") as stream:
        for line in stream:
            digest, text = line[:_DIGEST], line[_DIGEST + 1 : -1]
            if not line.endswith(b"\n") or xxhash.xxh3_128_hexdigest(text).encode() != digest:
                return
            yield json.loads(text)
