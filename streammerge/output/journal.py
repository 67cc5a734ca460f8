"""The journal of a run: what it is, then a line for every finished target, and before them one for
every pass that has counted something of all.

A line that was being written when the process died has a wrong checksum and does not count. Nothing
is made durable here: after a crash of the machine the regions are read back anyway, and those whose
lines or bytes did not reach the disk are made again.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from streammerge.errors import StorageError

_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)

_PUBLISHED = "published"

_COUNTED = "counted"

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
        return (line for line in self._lines() if not {_PUBLISHED, _COUNTED} & line.keys())

    def counted(self) -> Iterator[list[dict[str, Any]]]:
        """Yield what was noted after each pass that counted something."""
        return (line[_COUNTED] for line in self._lines() if _COUNTED in line)

    def _lines(self) -> Iterator[dict[str, Any]]:
        return itertools.islice(_sound_lines(self.path), 1, None)


class Journal:
    """One run's journal; written from `begin` on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = 0
        """How many finished targets it holds, as far as this process knows."""
        self.passes = 0
        """How many passes over all targets it knows of."""
        self._descriptor = -1

    def read(self) -> Unfinished | None:
        """Return what an earlier run has left; None where there is nothing to go on from.

        Raises:
            StorageError: there is a journal, and it cannot be read.
        """
        try:
            lines = _sound_lines(self.path)
            identity, published, self.entries, self.passes = next(lines, None), None, 0, 0
            for line in lines:
                published = line.get(_PUBLISHED)
                self.passes += _COUNTED in line
                self.entries += published is None and _COUNTED not in line
            spoilt = identity is None and self.path.stat().st_size > 0
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"cannot be read ({error.strerror})", path=str(self.path)) from error
        if spoilt:
            raise StorageError("is spoilt", path=str(self.path))
        if not identity or not self.worth_keeping:
            return None
        return Unfinished(self.path, identity, self.entries, published)

    @property
    def worth_keeping(self) -> bool:
        """Whether there is something to go on from."""
        return self.entries > 0 or self.passes > 0

    def drop(self) -> None:
        """Know of nothing any more: what it speaks of is gone."""
        self.entries = self.passes = 0

    def begin(
        self,
        identity: dict[str, Any],
        entries: Iterable[dict[str, Any]],
        counted: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Write a new journal in the place of the earlier one, with what is taken over of it.

        Args:
            identity: what the run is.
            entries: of finished targets.
            counted: what was noted of passes, as one.

        Raises:
            StorageError: the file system refused.
        """
        fresh = self.path.with_name(self.path.name + "-new")
        taken = 0
        try:
            with fresh.open("wb") as stream:
                stream.write(_line(identity))
                if counted:
                    stream.write(_line({_COUNTED: list(counted)}))
                for entry in entries:
                    stream.write(_line(entry))
                    taken += 1
            fresh.replace(self.path)
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(f"cannot be written ({error.strerror})", path=str(fresh)) from error
        self.entries, self.passes = taken, int(bool(counted))

    def append(self, entry: dict[str, Any]) -> None:
        """Write the line of a finished target.

        Raises:
            StorageError: the file system refused.
        """
        self._write(entry)
        self.entries += 1

    def note(self, counted: Sequence[dict[str, Any]]) -> None:
        """Write the line of a pass that counted something of all targets.

        Raises:
            StorageError: the file system refused.
        """
        self._write({_COUNTED: list(counted)})
        self.passes += 1

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
