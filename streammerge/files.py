"""Files by others, opened with care: a pipe would be waited for, and a device never end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from streammerge.errors import CorruptFileError


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        OSError: it cannot be opened, or is something else.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_whole(path: Path, limit: int) -> bytes:
    """Read a small file.

    Raises:
        OSError: it cannot be read, or has more than `limit` bytes.
    """
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"it has {size} bytes, and {limit} are the limit", str(path))
        return stream.read(limit)


def check_inside(path: Path) -> None:
    """Check that a file lies in its directory, and is not a link to somewhere else.

    The Hub's cache is the exception: its snapshots are links to the blobs of the same repository.

    Raises:
        CorruptFileError: it is one.
    """
    try:
        if not path.is_symlink():
            return
        real, home = path.resolve(), path.parent.resolve()
    except (OSError, RuntimeError):
        return  # it cannot be opened either: a loop of links, or a name that is none
    blobs = real.parent
    if real.is_relative_to(home) or (
        blobs.name == "blobs" and blobs.with_name("snapshots") in home.parents
    ):
        return
    raise CorruptFileError(
        f"is a link to {real}, out of the adapter's directory; copy the file, or name the "
        "directory that it lies in",
        path=str(path),
    )
