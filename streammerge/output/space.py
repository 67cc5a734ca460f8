"""Room on the disks that a run writes to."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from streammerge.errors import DiskSpaceError, RecipeError

_MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")


def check_space(needs: Sequence[tuple[str, int]]) -> None:
    """Check that directories' disks, or those of the nearest ones above them, have room.

    Args:
        needs: directories, and bytes that each will take; those on one disk take them together.

    Raises:
        DiskSpaceError: there is no room.
    """
    together: Counter[int] = Counter()
    for directory, needed_bytes in needs:
        place = _nearest(Path(directory))
        disk = place.stat().st_dev
        together[disk] += needed_bytes
        free = shutil.disk_usage(place).free
        if together[disk] > free:
            raise DiskSpaceError(path=directory, needed_bytes=together[disk], free_bytes=free)


def allocated_bytes(directory: Path) -> int:
    """Return what a directory's files take on the disk; nothing where it is not there."""
    try:
        return sum(path.lstat().st_blocks * 512 for path in directory.rglob("*"))
    except OSError:
        return 0


def find_scratch(
    asked: str | os.PathLike[str] | None, output: str | os.PathLike[str] | None
) -> str | None:
    """Return the directory for tiles that do not fit into memory, None to do without.

    Args:
        asked: a directory on a disk, "none", or None for the place where the output will lie.
        output: the output's path, where there is one.

    Raises:
        RecipeError: the directory asked for is none, or lies in memory and would count against it.
    """
    if asked is not None and os.fspath(asked) == "none":
        return None
    if asked is None:
        if output is None:
            return None
        # Missing parents are made before the work starts; what is above them tells the disk.
        beside = Path(output).resolve().parent
        return None if _kind(_nearest(beside)) in _MEMORY_FILE_SYSTEMS else str(beside)
    place = Path(asked).resolve()
    if not place.is_dir():
        raise RecipeError(f"scratch: {place}: no such directory", option="scratch")
    if _kind(place) in _MEMORY_FILE_SYSTEMS:
        raise RecipeError(
            f"scratch: {place} is on a {_kind(place)}, which is memory; choose a directory on a "
            "disk, or none",
            option="scratch",
        )
    return str(place)


def _nearest(place: Path) -> Path:
    """Return a directory that exists: this one, or the nearest above it."""
    while not place.is_dir():
        place = place.parent
    return place


def _kind(place: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """Return the kind of the file system that a path lies on."""
    best, kind = -1, ""
    for line in mounts.read_text().splitlines():
        _, point, name, *_ = line.split()
        point = point.encode().decode("unicode_escape")
        if place.is_relative_to(point) and len(point) >= best:
            best, kind = len(point), name
    return kind
