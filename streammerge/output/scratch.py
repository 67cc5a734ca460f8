"""Tiles on scratch disk: one nameless file for a task, gone with it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from streammerge.errors import StorageError


class ScratchFile:
    """A file without a name, written and read at offsets; the system frees it with the process."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        try:
            self._descriptor, path = tempfile.mkstemp(prefix=".streammerge-", dir=directory)
            Path(path).unlink()
        except OSError as error:
            raise StorageError(
                f"no scratch file can be made ({error.strerror})", path=directory
            ) from error

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of `data` at `offset`.

        Raises:
            StorageError: the file system refused.
        """
        while data:
            try:
                written = os.pwrite(self._descriptor, data, offset)
            except OSError as error:
                raise StorageError(
                    f"scratch cannot be written ({error.strerror})", path=self._directory
                ) from error
            data, offset = data[written:], offset + written

    def read(self, into: memoryview, offset: int) -> None:
        """Fill `into` from `offset`.

        Raises:
            StorageError: the file system refused, or the file is shorter.
        """
        while into:
            try:
                read = os.preadv(self._descriptor, [into], offset)
            except OSError as error:
                raise StorageError(
                    f"scratch cannot be read ({error.strerror})", path=self._directory
                ) from error
            if read == 0:
                raise StorageError("scratch ends too soon", path=self._directory)
            into, offset = into[read:], offset + read

    def close(self) -> None:
        """Free the file."""
        os.close(self._descriptor)
