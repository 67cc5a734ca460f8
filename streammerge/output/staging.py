"""A merge's private directory beside the output, and the rename that makes it the output.

Whoever holds the lock file in it owns the staging directory. The lock goes with the process, so a
directory that a killed run left behind is taken over by the next merge into the same output, and
never while its process lives.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType

from streammerge.errors import OutputBusyError, OutputExistsError, StorageError

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

    def __init__(self, output: Path) -> None:
        self.output = output.resolve()
        self.path = staging_path(output)
        self._lock = -1

    def __enter__(self) -> Staging:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _lock_directory(self.path, self.output)
            _empty(self.path)
        except OSError as error:
            if isinstance(error, OutputBusyError):
                raise
            raise StorageError(f"cannot be made ({error.strerror})", path=str(self.path)) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.path.exists() and self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)

    def publish(self, *, overwrite: bool) -> None:
        """Make the staging directory the output, in one rename.

        With `overwrite` an earlier output is moved aside first and removed afterwards.

        Raises:
            OutputExistsError: something has appeared at the output's name.
            StorageError: the system refused.
        """
        check_output(self.output, overwrite=overwrite)
        aside = self.output.with_name(f".{self.output.name}.streammerge-old")
        try:
            (self.path / LOCK_NAME).unlink()
            sync_directory(self.path)
            if self.output.exists() and any(self.output.iterdir()):
                shutil.rmtree(aside, ignore_errors=True)
                self.output.rename(aside)
            self.path.rename(self.output)
            sync_directory(self.output.parent)
        except OSError as error:
            raise StorageError(
                f"cannot be published ({error.strerror})", path=str(self.output)
            ) from error
        shutil.rmtree(aside, ignore_errors=True)


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
