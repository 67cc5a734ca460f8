"""Part files: what a worker of a cluster has written, until it is sealed into the output.

Two attempts at the same tasks never share a file, nor do two machines: a worker that was thought
dead may still write.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from streammerge.errors import StorageError, VerificationError
from streammerge.output.writer import RegionReader, RegionWriter
from streammerge.plans import Region


def make_part(directory: Path, nbytes: int) -> Path:
    """Make a part file of an attempt of its own, at its full size, and return its path.

    Raises:
        StorageError: there is no room, or the file system refused.
    """
    path = directory / f"{uuid.uuid4().hex}.part"
    try:
        with path.open("xb") as stream:
            os.posix_fallocate(stream.fileno(), 0, nbytes)
    except OSError as error:
        raise StorageError(
            f"{nbytes} bytes cannot be allocated ({error.strerror})", path=str(path)
        ) from error
    return path


def seal(
    part: Path, directory: Path, starts: Sequence[int], names: Sequence[str], moves: Sequence[Move]
) -> None:
    """Copy a part's regions to their places in the output, checked on the way, and remove it.

    Args:
        part: the file.
        directory: of the output's files.
        starts: where each of these files' data begin.
        names: of these files.
        moves: the part's regions: where each begins and belongs, and its checksum.

    Raises:
        StorageError: the file system refused.
        VerificationError: a region is not what was written.
    """
    with RegionReader(part.parent, (part.name,), (0,)) as reader:
        for offset, region, checksum in moves:
            source = replace(region, file=0, offset=offset)
            writer = RegionWriter(directory / names[region.file], starts[region.file], region)
            carry(reader, source, writer, checksum)
    try:
        part.unlink()
    except OSError as error:
        raise StorageError(f"cannot be removed ({error.strerror})", path=str(part)) from error


def carry(reader: RegionReader, source: Region, writer: RegionWriter, checksum: str) -> None:
    """Copy a region from where it was written first to its place, checked on the way.

    Raises:
        StorageError: the file system refused.
        VerificationError: the region is not what was written.
    """
    with writer:
        for data in reader.pieces(source):
            writer.append(data)
    if writer.checksum != checksum:
        problem = f"{source.name} does not read back as it was written"
        raise VerificationError(path=str(reader.directory), problems=(problem,))


Move = tuple[int, Region, str]
"""Where a region begins in a part; the region of the output; and the checksum of its bytes."""
