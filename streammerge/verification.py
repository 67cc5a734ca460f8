"""The check of an output from its files alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from streammerge.adapter import NameTable
from streammerge.errors import MissingFileError, VerificationError
from streammerge.output.record import check_record
from streammerge.output.staging import MARK_NAME
from streammerge.planner.scaling import scalings
from streammerge.readers import read_adapter


@dataclass(frozen=True)
class Verification:
    """What was checked of an output, all of it found right."""

    path: Path
    """The output's directory."""
    targets: int
    """How many modules it changes."""
    tensors: int
    """How many factors it holds, two for each target."""
    checksums: bool
    """Whether there was a record with checksums; without one only headers, shapes and config
    were checked."""


def verify(path: str | os.PathLike[str]) -> Verification:
    """Check an output from its files alone: every checksum, and shapes against the config.

    An adapter without a streammerge.json is checked as far as headers and config go.

    Args:
        path: the output's directory.

    Raises:
        VerificationError: something is not as it was written.
        AdapterError: it cannot be read at all.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise MissingFileError("no such directory", path=str(directory))
    recorded = (directory / MARK_NAME).is_file()
    if recorded:
        problems = check_record(directory)
        if problems:
            raise VerificationError(path=str(directory), problems=tuple(problems))
    manifest = read_adapter(str(directory), NameTable())
    scalings(manifest, None)
    tensors = 2 * len(manifest) + len(manifest.extra_columns)
    return Verification(directory, len(manifest), tensors, recorded)
