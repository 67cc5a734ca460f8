"""Input bytes, a window at a time: mapped read-only, or read into a buffer.

Files are opened late and only a few are kept open, so that any number of adapters runs under a
small `ulimit -n`.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from streammerge.adapter import TensorFile
from streammerge.errors import InputChangedError, InputUnreadableError
from streammerge.hub import Span

MAX_OPEN_FILES = 64

Bytes = npt.NDArray[np.uint8]
Window = Callable[[TensorFile, int, int], Bytes]
"""From a file, an offset and a number of bytes to these bytes, read-only; the thread's next window
may take their place."""

PAGE_BYTES = mmap.PAGESIZE


class OpenFiles:
    """A few open descriptors, safe to use from several threads."""

    def __init__(self, max_open: int = MAX_OPEN_FILES) -> None:
        self._max_open = max_open
        self._open: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def descriptor(self, file: TensorFile) -> Iterator[int]:
        """Lend a descriptor of `file`, which stays open as long as the block lasts.

        Raises:
            InputChangedError: the file is gone, or not the one whose header was read.
            InputUnreadableError: it cannot be opened.
        """
        with self._lock:
            # A copy, for another thread may close the original at any time.
            descriptor = os.dup(self._find(file))
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])

    def check(self, files: Iterable[TensorFile]) -> None:
        """Check that files are still those whose headers were read.

        Raises:
            InputChangedError: one is not.
        """
        for file in files:
            # What was read of a file on the Hub is held, and its commit says what it is.
            if file.etag is None:
                with self._lock:
                    self._find(file)

    def _find(self, file: TensorFile) -> int:
        if file.path in self._open:
            self._open.move_to_end(file.path)
        else:
            if len(self._open) >= self._max_open:
                os.close(self._open.popitem(last=False)[1])
            self._open[file.path] = _open(file)
        # Each time, for it may be written to while it is open.
        _check_unchanged(self._open[file.path], file)
        return self._open[file.path]


def mapped(files: OpenFiles) -> Window:
    """Return windows that are mapped; their pages go back when the last view of one is dropped."""

    def window(file: TensorFile, offset: int, nbytes: int) -> Bytes:
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        length = offset - start + nbytes
        with files.descriptor(file) as descriptor:
            try:
                view = mmap.mmap(descriptor, length, access=mmap.ACCESS_READ, offset=start)
            except (OSError, ValueError) as error:
                raise InputUnreadableError(f"cannot be mapped ({error})", path=file.path) from error
        return np.frombuffer(view, np.uint8, nbytes, offset - start)

    return window


def pread(files: OpenFiles) -> Window:
    """Return windows that are read into memory of their own, the smaller ones into a buffer that
    serves the next one of the same thread too.

    For network file systems, for limits on the address space, and for inputs that may be
    truncated under the run, which no map survives.
    """
    kept = threading.local()

    def window(file: TensorFile, offset: int, nbytes: int) -> Bytes:
        if nbytes > REUSED_BYTES:
            read = _aligned(nbytes)
        else:
            if not hasattr(kept, "buffer"):
                kept.buffer = _aligned(REUSED_BYTES)
            read = kept.buffer[:nbytes]
        with files.descriptor(file) as descriptor:
            _fill(descriptor, file, memoryview(read.data), offset)
        return read

    return window


def read_span(files: OpenFiles, span: Span) -> Bytes:
    """Return bytes of a file, read into memory of their own.

    Raises:
        InputChangedError: the file is not the one whose header was read.
        InputUnreadableError: it cannot be read.
    """
    read = _aligned(span.nbytes)
    with files.descriptor(span.file) as descriptor:
        _fill(descriptor, span.file, memoryview(read.data), span.offset)
    return read


def held(spans: Sequence[Span], blocks: Sequence[Bytes], others: Window) -> Window:
    """Return windows into bytes that are here already, and those of `others` for the rest.

    Args:
        spans: which bytes they are.
        blocks: the bytes of each.
        others: for files of which no span is here.
    """
    by_file: dict[str, list[tuple[int, Bytes]]] = {}
    for span, block in zip(spans, blocks, strict=True):
        by_file.setdefault(span.file.path, []).append((span.offset, block))

    def window(file: TensorFile, offset: int, nbytes: int) -> Bytes:
        for start, block in by_file.get(file.path, ()):
            if start <= offset and offset + nbytes <= start + len(block):
                return block[offset - start : offset - start + nbytes]
        return others(file, offset, nbytes)

    return window


REUSED_BYTES = 1024**2
"""Size of the buffer that each thread keeps for what it reads."""


def _aligned(nbytes: int) -> Bytes:
    """Return memory that begins at a page: the system copies to other places at a quarter of the
    speed."""
    whole = np.empty(nbytes + PAGE_BYTES, np.uint8)
    start = -whole.ctypes.data % PAGE_BYTES
    return whole[start : start + nbytes]


def _fill(descriptor: int, file: TensorFile, into: memoryview, offset: int) -> None:
    while into:
        try:
            read = os.preadv(descriptor, [into], offset)
        except OSError as error:
            raise InputUnreadableError(
                f"cannot be read ({error.strerror})", path=file.path
            ) from error
        if read == 0:
            raise InputChangedError("has become shorter during the run", path=file.path)
        into, offset = into[read:], offset + read


def _open(file: TensorFile) -> int:
    try:
        # A pipe may have taken its place, and would be waited for.
        return os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise InputChangedError("is not there any more", path=file.path) from error
    except OSError as error:
        raise InputUnreadableError(
            f"cannot be opened any more ({error.strerror})", path=file.path
        ) from error


def _check_unchanged(descriptor: int, file: TensorFile) -> None:
    status = os.fstat(descriptor)
    if (status.st_size, status.st_mtime_ns, status.st_ino) != (
        file.size,
        file.mtime_ns,
        file.inode,
    ):
        raise InputChangedError(
            "has changed since its header was read; put it back, or start the merge again",
            path=file.path,
        )
