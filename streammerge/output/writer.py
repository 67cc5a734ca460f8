"""Output files: allocated whole, header first, regions written in any order.

A file is a valid safetensors file from the start; a region is zeros until it is written. What is
written goes to the disk at once, behind the computing, so that little is left to wait for at the
end.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from io import FileIO
from pathlib import Path
from types import TracebackType

import xxhash

from streammerge.adapter import PLAIN_METADATA
from streammerge.errors import StorageError
from streammerge.output.header import render_header
from streammerge.plans import OutputFile, Region

READ_BYTES = 1024**2
"""So much is read back at once."""

BEHIND_BYTES = 4 * 1024**2
"""So much is written before the system is asked to begin to bring it to the disk."""

_SYNC_FILE_RANGE_WRITE = 2
"""sync_file_range(2): begin, do not wait."""


def headers(
    files: Sequence[OutputFile],
    regions: Sequence[Region],
    metadata: Mapping[str, str] = PLAIN_METADATA,
) -> list[bytes]:
    """Return each file's header."""
    grouped: list[list[Region]] = [[] for _ in files]
    for region in regions:
        grouped[region.file].append(region)
    return [render_header(group, metadata) for group in grouped]


def allocate(
    directory: Path,
    files: Sequence[OutputFile],
    regions: Sequence[Region],
    metadata: Mapping[str, str] = PLAIN_METADATA,
) -> tuple[int, ...]:
    """Make all files at their full size with their headers; return where their data begin.

    Raises:
        StorageError: there is no room, or the file system refused.
    """
    rendered = headers(files, regions, metadata)
    for file, header in zip(files, rendered, strict=True):
        allocate_file(directory / file.name, header, file.data_bytes)
    return tuple(len(header) for header in rendered)


def allocate_file(path: Path, header: bytes, data_bytes: int) -> None:
    """Make a file at its full size with its header.

    Raises:
        StorageError: there is no room, or the file system refused.
    """
    try:
        with path.open("xb") as stream:
            os.posix_fallocate(stream.fileno(), 0, len(header) + data_bytes)
            stream.write(header)
    except OSError as error:
        raise StorageError(
            f"{len(header) + data_bytes} bytes cannot be allocated ({error.strerror})",
            path=str(path),
        ) from error


def reopen(
    directory: Path,
    files: Sequence[OutputFile],
    regions: Sequence[Region],
    metadata: Mapping[str, str] = PLAIN_METADATA,
) -> tuple[int, ...] | None:
    """Return where the data of files begin that `allocate` has made before; None if it has not.

    What else lies in the directory, made at the end of a run or by workers, is removed; all of it
    where the files are not those.
    """
    rendered = headers(files, regions, metadata)
    whole = all(
        _is_allocated(directory / file.name, header, file.data_bytes)
        for file, header in zip(files, rendered, strict=True)
    )
    clear(directory, {file.name for file in files} if whole else set())
    return tuple(len(header) for header in rendered) if whole else None


def clear(directory: Path, known: Collection[str] = ()) -> None:
    """Remove all that lies in a directory but what has a known name."""
    for path in directory.iterdir():
        if path.name in known:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _is_allocated(path: Path, header: bytes, data_bytes: int) -> bool:
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            return size == len(header) + data_bytes and stream.read(len(header)) == header
    except OSError:
        return False


class RegionWriter:
    """Writes one region from its start to its end, with a checksum that rides along."""

    def __init__(self, path: Path, data_start: int, region: Region) -> None:
        self._path = path
        self._region = region
        self._next = self._start = data_start + region.offset
        self._end = self._start + region.nbytes
        self._behind = self._next
        self._hash = xxhash.xxh3_128()

    def __enter__(self) -> RegionWriter:
        try:
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(
                f"cannot be opened ({error.strerror})", path=str(self._path)
            ) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._write_behind()
        os.close(self._descriptor)
        if kind is None and self._next != self._end:
            raise AssertionError(f"{self._region.name}: {self._end - self._next} bytes are missing")

    def shorten(self, nbytes: int) -> None:
        """Have the region end after so many bytes of those that were planned at most."""
        if not self._next <= self._start + nbytes <= self._end:
            raise AssertionError(f"{self._region.name}: {nbytes} bytes are none of its lengths")
        self._end = self._start + nbytes

    def append(self, data: memoryview) -> None:
        """Write the region's next bytes.

        Raises:
            StorageError: the file system refused.
        """
        data = data.cast("B")
        if self._next + len(data) > self._end:
            raise AssertionError(f"{self._region.name}: more bytes than its region holds")
        self._hash.update(data)
        while data:
            try:
                written = os.pwrite(self._descriptor, data, self._next)
            except OSError as error:
                raise StorageError(
                    f"{self._region.name} cannot be written ({error.strerror})",
                    path=str(self._path),
                ) from error
            self._next += written
            data = data[written:]
        if self._next - self._behind >= BEHIND_BYTES:
            self._write_behind()

    def _write_behind(self) -> None:
        """Have the system begin to bring what is new to the disk; errors come up at the fsync."""
        begin = _sync_file_range()
        if begin is not None:
            length = ctypes.c_int64(self._next - self._behind)
            begin(self._descriptor, ctypes.c_int64(self._behind), length, _SYNC_FILE_RANGE_WRITE)
        self._behind = self._next

    @property
    def name(self) -> str:
        """The tensor's full name."""
        return self._region.name

    @property
    def checksum(self) -> str:
        """xxh3-128 of what was written, in hexadecimal."""
        return self._hash.hexdigest()


@cache
def _sync_file_range() -> Callable[..., int] | None:
    """Return Linux's sync_file_range; None elsewhere, where only the fsync at the end is left."""
    return getattr(ctypes.CDLL(None), "sync_file_range", None)


class RegionReader:
    """Reads regions of output files back: in one buffer, with one file open at a time."""

    def __init__(self, directory: Path, names: Sequence[str], starts: Sequence[int]) -> None:
        """Make it.

        Args:
            directory: of the files.
            names: of the files.
            starts: where each one's data begin.
        """
        self.directory = directory
        """Of the files."""
        self._names = names
        self._starts = starts
        # A map, for it begins at a page: the system copies elsewhere at a quarter of the speed.
        self._room = memoryview(mmap.mmap(-1, READ_BYTES))
        self._file = -1
        self._last: FileIO
        self._open = ExitStack()

    def __enter__(self) -> RegionReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def pieces(self, region: Region) -> Iterator[memoryview]:
        """Yield a region's bytes, a piece at a time; each holds until the next one.

        Raises:
            StorageError: it cannot be read, or the file ends inside it.
        """
        path = self.directory / self._names[region.file]
        try:
            stream = self._stream(region.file, path)
            stream.seek(self._starts[region.file] + region.offset)
            left = region.nbytes
            while left:
                read = stream.readinto(self._room[: min(left, READ_BYTES)])
                if not read:
                    raise StorageError(f"ends inside {region.name}", path=str(path))
                yield self._room[:read]
                left -= read
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise StorageError(
                f"{region.name} cannot be read back ({error.strerror})", path=str(path)
            ) from error

    def checksum(self, region: Region) -> str:
        """Return xxh3-128 of a region, in hexadecimal.

        Raises:
            StorageError: it cannot be read, or the file ends inside it.
        """
        digest = xxhash.xxh3_128()
        for data in self.pieces(region):
            digest.update(data)
        return digest.hexdigest()

    def _stream(self, file: int, path: Path) -> FileIO:
        if file != self._file:
            self._open.close()
            self._file = -1
            self._last = self._open.enter_context(path.open("rb", buffering=0))
            self._file = file
        return self._last


def write_file(path: Path, data: bytes) -> None:
    """Write a small file and make it durable.

    Raises:
        StorageError: the file system refused.
    """
    try:
        with path.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise StorageError(f"cannot be written ({error.strerror})", path=str(path)) from error


def forget(path: Path) -> None:
    """Have the system read a file from the disk again, and not from its memory.

    After a write to the disk that failed, what is in memory counts as written.

    Raises:
        StorageError: the file system refused.
    """
    sync_file(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make a file's bytes durable.

    Raises:
        StorageError: the file system refused.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StorageError(f"cannot be made durable ({error.strerror})", path=str(path)) from error
