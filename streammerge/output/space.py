"""Room on the disks that a run writes to."""

from __future__ import annotations

import shutil
from pathlib import Path

from streammerge.errors import DiskSpaceError, RecipeError

_MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")


def check_space(directory: str, needed_bytes: int) -> None:
    """Check that a directory's disk, or that of the nearest one above it, has room.

    Raises:
        DiskSpaceError: it has not.
    """
    place = Path(directory)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed_bytes > free:
        raise DiskSpaceError(path=directory, needed_bytes=needed_bytes, free_bytes=free)


def check_scratch(directory: str, mounts: str = "/proc/mounts") -> str:
    """Check that scratch is a directory on a disk, and return its path.

    Raises:
        RecipeError: it is not; files on a tmpfs lie in memory and would count against it.
    """
    place = Path(directory).resolve()
    if not place.is_dir():
        raise RecipeError(f"scratch: {directory}: no such directory", option="scratch")
    kind = _file_system(place, Path(mounts).read_text())
    if kind in _MEMORY_FILE_SYSTEMS:
        raise RecipeError(
            f"scratch: {directory} is on a {kind}, which is memory; choose a directory on a disk, "
            "or leave scratch out",
            option="scratch",
        )
    return str(place)


def _file_system(place: Path, mounts: str) -> str:
    """Return the kind of the file system that a path lies on."""
    best, kind = -1, ""
    for line in mounts.splitlines():
        _, point, name, *_ = line.split()
        point = point.encode().decode("unicode_escape")
        if place.is_relative_to(point) and len(point) >= best:
            best, kind = len(point), name
    return kind
