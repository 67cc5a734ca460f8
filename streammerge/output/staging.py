"""A merge's private directory beside the output, and the rename that makes it the output.

Whoever holds the lock file in it owns the staging directory. The lock goes with the process, so a
directory that a killed run left behind is taken over by the next merge into the same output, and
never while its process lives.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

from streammerge.errors import (
    OutputBusyError,
    OutputExistsError,
    StorageError,
    StreammergeError,
)

LOCK_NAME = ".lock"
MARK_NAME = "streammerge.json"
"""Every output holds it; only a directory that does may be overwritten."""


def check_output(output: Path, *, overwrite: bool) -> None:
    """Check that `output` may be written.

    Raises:
        OutputExistsError: something lies there that may not be replaced.
    """
    if not output.exists() and not output.is_symlink():
        return
    if output.is_dir() and not output.is_symlink():
        if not any(output.iterdir()):
            return
        if overwrite and (output / MARK_NAME).is_file():
            return
        if overwrite:
            raise OutputExistsError(
                f"{output}: exists and is not an output of streammerge, so it is not "
                "overwritten; remove it yourself or choose another name"
            )
    raise OutputExistsError(
        f"{output}: exists; choose another name"
        + (" or, if it is an earlier merge, --overwrite" if output.is_dir() else "")
    )


def staging_path(output: Path) -> Path:
    """Return where a merge into `output` keeps its files until it is done."""
    resolved = output.resolve()
    return resolved.with_name(f".{resolved.name}.streammerge")


class Staging:
    """The staging directory, held from `__enter__` until it is published or removed."""

    def __init__(self, output: Path, *, overwrite: bool = False) -> None:
        self.output = output.resolve()
        self.path = staging_path(output)
        self._overwrite = overwrite
        self._aside = self.output.with_name(f".{self.output.name}.streammerge-old")
        self._lock = -1
        self._published = False

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _lock_directory(self.path, self.output)
            check_output(self.output, overwrite=self._overwrite)
            shutil.rmtree(self._aside, ignore_errors=True)
            _empty(self.path)
        except OSError as error:
            self.__exit__(None, None, None)
            if isinstance(error, StreammergeError):
                raise
            raise StorageError(f"cannot be made ({error.strerror})", path=str(self.path)) from error
        except StreammergeError:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lock < 0:
            return
        if not self._published:
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
        self._lock = -1

    def publish(self) -> None:
        """Make the staging directory the output, in one rename, or one exchange with an earlier.

        The lock goes along, so that nobody takes the finished directory for an abandoned one.

        Raises:
            OutputExistsError: something has appeared at the output's name.
            StorageError: the system refused.
        """
        check_output(self.output, overwrite=self._overwrite)
        try:
            sync_directory(self.path)
            if self.output.exists() and any(self.output.iterdir()):
                self.path.rename(self._aside)
                _exchange(self._aside, self.output)
            else:
                self.path.rename(self.output)
            self._published = True
            (self.output / LOCK_NAME).unlink()
            sync_directory(self.output.parent)
        except OSError as error:
            raise StorageError(
                f"cannot be published ({error.strerror})", path=str(self.output)
            ) from error
        shutil.rmtree(self._aside, ignore_errors=True)


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""fcntl.h and renameat2(2)."""


def _exchange(new: Path, old: Path) -> None:
    """Have two directories change names at once, so that neither name is ever without one."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        names = (os.fsencode(new), os.fsencode(old))
        if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    # This file system cannot exchange names: for a moment the old output has another one.
    between = old.with_name(new.name + "-between")
    old.rename(between)
    new.rename(old)
    between.rename(new)


def _lock_directory(path: Path, output: Path) -> int:
    """Make the directory if need be and return the descriptor that holds its lock."""
    while True:
        path.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(lock)
                raise OutputBusyError(
                    f"{output}: another merge is writing to it (it holds {path / LOCK_NAME})"
                ) from error
            # The holder may have published or removed the directory between open and lock.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat((path / LOCK_NAME).stat(), os.fstat(lock)):
                    return lock
            os.close(lock)


def _empty(path: Path) -> None:
    for child in path.iterdir():
        if child.name == LOCK_NAME:
            continue
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
