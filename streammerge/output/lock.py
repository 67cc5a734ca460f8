"""The lock that keeps two merges out of one output: it goes with the process that holds it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from streammerge.errors import OutputBusyError, StorageError


def take_lock(path: Path, output: Path) -> int:
    """Make the lock file if need be and return the descriptor that holds its lock.

    Args:
        path: of the lock file.
        output: what it is for, for the message.

    Raises:
        OutputBusyError: another process holds it.
        StorageError: the system cannot lock it.
    """
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise OutputBusyError(
                f"{output}: another merge is writing to it (it holds {path})"
            ) from error
        except OSError as error:
            os.close(lock)
            raise StorageError(f"cannot be locked ({error.strerror})", path=str(path)) from error
        except BaseException:
            os.close(lock)
            raise
        # The holder may have removed the file between open and lock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(lock)):
                return lock
        os.close(lock)
