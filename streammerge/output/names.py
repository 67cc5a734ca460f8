"""Names in directories: made durable, and exchanged so that neither is ever without a directory."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""fcntl.h and renameat2(2)."""


def exchange(new: Path, old: Path, between: Path) -> None:
    """Have two directories change names at once, so that neither name is ever without one.

    Args:
        new: the directory that is to get the name of the other.
        old: the other.
        between: a name that the other has for a moment, where the file system cannot exchange.

    Raises:
        OSError: the system refused.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        names = (os.fsencode(new), os.fsencode(old))
        if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    # This file system cannot exchange names: for a moment the old output has another one.
    old.rename(between)
    new.rename(old)


def make_directories(path: Path) -> None:
    """Make a directory and what is missing above it, and make their names durable.

    Raises:
        OSError: the system refused.
    """
    missing = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for place in missing:
        sync_directory(place.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable.

    Raises:
        OSError: the system refused.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
