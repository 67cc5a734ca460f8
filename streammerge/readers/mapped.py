"""Input bytes, mapped read-only, a window at a time.

A window's pages go back to the system when the last view of it is dropped. Files are opened late
and only a few are kept open, so that any number of adapters runs under a small `ulimit -n`.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from streammerge.adapter import TensorFile
from streammerge.errors import InputChangedError

MAX_OPEN_FILES = 64


class MappedFiles:
    """Read-only windows into files, safe to use from several threads."""

    def __init__(self, max_open: int = MAX_OPEN_FILES) -> None:
        self._max_open = max_open
        self._open: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def window(self, file: TensorFile, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """Return `nbytes` of `file` from `offset` on, as read-only bytes.

        Raises:
            InputChangedError: the file is gone, or not the one whose header was read.
        """
        if nbytes == 0:
            return np.empty(0, np.uint8)
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        # The descriptor may be closed by another thread once the lock is free; a map outlives it.
        with self._lock:
            descriptor = self._descriptor(file)
            view = mmap.mmap(
                descriptor, offset - start + nbytes, access=mmap.ACCESS_READ, offset=start
            )
        return np.frombuffer(view, np.uint8, nbytes, offset - start)

    def close(self) -> None:
        """Close all files; windows that are still held stay valid."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])

    def _descriptor(self, file: TensorFile) -> int:
        if file.path in self._open:
            self._open.move_to_end(file.path)
            return self._open[file.path]
        descriptor = _open_unchanged(file)
        self._open[file.path] = descriptor
        if len(self._open) > self._max_open:
            os.close(self._open.popitem(last=False)[1])
        return descriptor


def _open_unchanged(file: TensorFile) -> int:
    try:
        descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise InputChangedError(
            f"cannot be opened any more ({error.strerror})", path=file.path
        ) from error
    status = os.fstat(descriptor)
    if (status.st_size, status.st_mtime_ns, status.st_ino) != (
        file.size,
        file.mtime_ns,
        file.inode,
    ):
        os.close(descriptor)
        raise InputChangedError(
            "has changed since its header was read; start the merge again", path=file.path
        )
    return descriptor
