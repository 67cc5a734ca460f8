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

    def entries(self) -> Iterator[dict[str, Any]]:
        """Yield those of its finished targets; there may be too many to hold."""
        return itertools.islice(_sound_lines(self.path), 1, None)


class Journal:
    """One run's journal; written from `begin` on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = 0
        """How many finished targets it holds, as far as this process knows."""
        self._descriptor = -1

    def read(self) -> Unfinished | None:
        """Return what an earlier run has left; None where there is nothing to go on from."""
        try:
            lines = _sound_lines(self.path)
            identity = next(lines, None)
            self.entries = sum(1 for _ in lines)
        except OSError:
            return None
        return Unfinished(self.path, identity, self.entries) if identity and self.entries else None

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
        line = _line(entry)
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
        except OSError as error:
            raise StorageError(
                f"cannot be written ({error.strerror})", path=str(self.path)
            ) from error
        self.entries += 1

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
