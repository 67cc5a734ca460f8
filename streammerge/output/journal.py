"""The journal of a run: what it is, then a line for every finished target.

A line that was being written when the process died has a wrong checksum and does not count. Nothing
is made durable here: after a crash of the machine the regions are read back anyway, and those whose
lines or bytes did not reach the disk are made again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from streammerge.errors import StorageError

_DIGEST = 32
"""Characters of a checksum."""


@dataclass(frozen=True)
class Unfinished:
    """What an earlier run has left."""

    identity: dict[str, Any]
    """What it was, as it said when it began."""
    entries: tuple[dict[str, Any], ...]
    """Of its finished targets."""


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
            lines = list(_sound_lines(self.path))
        except OSError:
            return None
        if len(lines) < 2:
            return None
        self.entries = len(lines) - 1
        return Unfinished(lines[0], tuple(lines[1:]))

    def begin(self, identity: dict[str, Any], entries: Iterable[dict[str, Any]]) -> None:
        """Write a new journal in the place of the earlier one, with what is taken over of it.

        Raises:
            StorageError: the file system refused.
        """
        lines = [_line(value) for value in (identity, *entries)]
        fresh = self.path.with_name(self.path.name + "-new")
        try:
            fresh.write_bytes(b"".join(lines))
            fresh.replace(self.path)
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(f"cannot be written ({error.strerror})", path=str(fresh)) from error
        self.entries = len(lines) - 1

    def append(self, entry: dict[str, Any]) -> None:
        """Write the line of a finished target.

        Raises:
            StorageError: the file system refused.
        """
        line = _line(entry)
        try:
            written = os.write(self._descriptor, line)
        except OSError as error:
            raise StorageError(
                f"cannot be written ({error.strerror})", path=str(self.path)
            ) from error
        if written != len(line):
            raise StorageError("a line was cut short; is the disk full?", path=str(self.path))
        self.entries += 1

    def close(self) -> None:
        """Close the file; it stays."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def remove(self) -> None:
        """Close and remove the file."""
        self.close()
        self.path.unlink(missing_ok=True)


def _line(value: dict[str, Any]) -> bytes:
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    return xxhash.xxh3_128_hexdigest(text).encode() + b" " + text + b"\n"


def _sound_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines up to the first that is not as it was written."""
    with path.open("rb") as stream:
        for line in stream:
            digest, text = line[:_DIGEST], line[_DIGEST + 1 : -1]
            if not line.endswith(b"\n") or xxhash.xxh3_128_hexdigest(text).encode() != digest:
                return
            yield json.loads(text)
