"""A merge's private directory beside the output, and the rename that makes it the output.

Whoever holds the lock beside them owns both names. The lock goes with the process, so what a
killed run left behind is taken over by the next merge into the same output, and never while its
process lives.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
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

MARK_NAME = "streammerge.json"
"""Every output holds it; only a directory that does may be overwritten."""


OWN_FILES = re.compile(
    r"adapter_config\.json|adapter_model(-\d+-of-\d+)?\.safetensors|"
    r"adapter_model\.safetensors\.index\.json|streammerge(-timings)?\.json"
)
"""What streammerge writes into an output, and so may remove with it."""


def check_output(output: Path, *, overwrite: bool) -> None:
    """Check that `output` may be written.

    Raises:
        OutputExistsError: something lies there that may not be replaced.
    """
    if output.is_symlink():
        raise OutputExistsError(
            f"{output}: exists as a symbolic link; give the name that it points to, or another name"
        )
    if not output.exists():
        return
    if output.is_dir() and output.is_mount():
        raise OutputExistsError(
            f"{output}: exists as a mount point, which cannot be replaced; choose a name in it"
        )
    found = sorted(child.name for child in output.iterdir()) if output.is_dir() else None
    if found == []:
        return
    if not overwrite or found is None:
        hint = " or, if it is an earlier merge, --overwrite" if found else ""
        raise OutputExistsError(f"{output}: exists; choose another name{hint}")
    others = [name for name in found if not OWN_FILES.fullmatch(name)]
    if MARK_NAME not in found or others:
        what = f"holds {others[0]}, which is not streammerge's" if others else f"has no {MARK_NAME}"
        raise OutputExistsError(
            f"{output}: exists and {what}, so it is not overwritten; remove it yourself or choose "
            "another name"
        )


def staging_path(output: Path) -> Path:
    """Return where a merge into `output` keeps its files until it is done."""
    resolved = output.resolve()
    return resolved.with_name(f".{resolved.name}.streammerge")


def lock_path(output: Path) -> Path:
    """Return the file whose lock a merge into `output` holds."""
    staging = staging_path(output)
    return staging.with_name(staging.name + ".lock")


class Staging:
    """The staging directory, held from `__enter__` until it is published or removed."""

    def __init__(self, output: Path, *, overwrite: bool = False) -> None:
        self.output = output.resolve()
        self.path = staging_path(output)
        self._overwrite = overwrite
        self._aside = self.output.with_name(f".{self.output.name}.streammerge-old")
        self._lock = -1

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _take_lock(lock_path(self.output), self.output)
            check_output(self.output, overwrite=self._overwrite)
            for left in (self._aside, self.path):
                shutil.rmtree(left, ignore_errors=True)
            self.path.mkdir()
        except BaseException as error:
            # An interrupt too, or what was made would stay.
            self.__exit__(None, None, None)
            if isinstance(error, OSError) and not isinstance(error, StreammergeError):
                raise StorageError(
                    f"cannot be made ({error.strerror})", path=str(self.path)
                ) from error
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
        for left in (self._aside, self.path):
            shutil.rmtree(left, ignore_errors=True)
        # Removed while it is held: who has opened it meanwhile finds that it is another file.
        lock_path(self.output).unlink(missing_ok=True)
        os.close(self._lock)
        self._lock = -1

    def publish(self) -> None:
        """Make the staging directory the output, in one rename, or one exchange with an earlier.

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
            sync_directory(self.output.parent)
        except OSError as error:
            raise StorageError(
                f"cannot be published ({error.strerror})", path=str(self.output)
            ) from error


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


def _take_lock(path: Path, output: Path) -> int:
    """Make the lock file if need be and return the descriptor that holds its lock."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise OutputBusyError(
                f"{output}: another merge is writing to it (it holds {path})"
            ) from error
        # The holder may have removed the file between open and lock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(lock)):
                return lock
        os.close(lock)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
