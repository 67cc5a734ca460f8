"""A sharded adapter made into one file: the same tensors, and a record that is true of that file.

PEFT, vLLM and others load no sharded adapter. Tensors are copied a piece at a time, in the order in
which they lie, so that the file is the one that the same merge would have written without shards.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from operator import attrgetter
from pathlib import Path
from typing import Any

import xxhash

from streammerge.adapter import INDEX_NAME, PLAIN_METADATA, WEIGHTS_NAME, TensorFile
from streammerge.errors import (
    CorruptFileError,
    InputUnreadableError,
    StorageError,
    VerificationError,
)
from streammerge.files import check_inside, open_regular
from streammerge.output.header import render_header
from streammerge.output.record import (
    FORMAT,
    TIMINGS_NAME,
    check_but_tensors,
    describe_file,
    describe_tensor,
    read_record,
    reading_record,
    render_record,
)
from streammerge.output.space import allocated_bytes, check_space
from streammerge.output.staging import MARK_NAME, Staging, check_output, staging_path
from streammerge.output.writer import (
    READ_BYTES,
    RegionReader,
    RegionWriter,
    allocate_file,
    sync_file,
    write_file,
)
from streammerge.plans import Region
from streammerge.readers.header import Entry, Header
from streammerge.readers.shards import read_headers
from streammerge.readers.windows import OpenFiles, Window, pread

MAX_CARRIED = 1000
"""Files beside the weights that are carried over."""

MAX_OPEN_FILES = 4
"""Shards are read one after another."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
"""What may be weights too: it would be loaded in the place of those that are meant."""

RECORD_BYTES = 1024
"""What a record has for a tensor and its target, at most but for odd names."""


@dataclass(frozen=True)
class Consolidation:
    """What became of a sharded adapter."""

    output: Path
    files: int
    """Of weights, that it was made of."""
    tensors: int
    write_bytes: int
    """Of tensors."""
    checksums: bool
    """Whether there was a record whose checksums they were compared with."""
    notices: tuple[str, ...]


@dataclass(frozen=True)
class _Source:
    """What a directory holds that is to be made into one with one file of weights."""

    directory: Path
    headers: tuple[Header, ...]
    places: tuple[tuple[Header, Entry], ...]
    """Of the tensors, in the order in which they are to lie."""
    record: dict[str, Any] | None
    carried: tuple[str, ...]
    """Names of the other files."""
    notices: tuple[str, ...]

    @property
    def data_bytes(self) -> int:
        return sum(entry.nbytes for _, entry in self.places)


def consolidate(
    path: str | os.PathLike[str], output: str | os.PathLike[str], *, overwrite: bool = False
) -> Consolidation:
    """Make one adapter_model.safetensors of an adapter in shards.

    A few MiB are held beside the headers, whatever the adapter's size. An adapter that is one file
    already is copied, and a notice says so.

    Args:
        path: the adapter's directory: shards and adapter_model.safetensors.index.json, written by
            streammerge or by anybody. Its other files are carried over, subdirectories are not.
        output: directory to make; it appears whole, or not at all.
        overwrite: replace an earlier output of streammerge, which may be `path` itself.

    Raises:
        RefusedError: a subclass of it says why before any work; nothing was written.
        VerificationError: a tensor or a file is not what the adapter's streammerge.json says.
        MergeFailedError: a subclass of it says what failed; nothing lies at the output's name.
    """
    place = Path(output)
    Staging(place).settle()
    check_output(place, overwrite=overwrite)
    source = _survey(Path(path))
    carried_bytes = sum((source.directory / name).stat().st_size for name in source.carried)
    needed = source.data_bytes + carried_bytes + RECORD_BYTES * len(source.places)
    free_again = allocated_bytes(staging_path(place))
    check_space([(str(place.resolve().parent), needed - free_again)])
    with Staging(place, overwrite=overwrite) as staging:
        # Nothing is gone on with; but a journal is what tells that something is to be cleared up.
        staging.journal.begin({"recipe": None, "consolidates": os.fspath(path)}, ())
        _write(source, staging.path)
        staging.publish()
    return Consolidation(
        output=place,
        files=len(source.headers),
        tensors=len(source.places),
        write_bytes=source.data_bytes,
        checksums=source.record is not None,
        notices=(*source.notices, *staging.left),
    )


def _survey(directory: Path) -> _Source:
    """Read headers and record, and check what can be checked without reading the tensors.

    Raises:
        AdapterError: a subclass of it says what is wrong.
        VerificationError: anything but a tensor is not what the record says.
    """
    headers = tuple(read_headers(directory))
    notices = []
    if (directory / WEIGHTS_NAME).exists():
        if (directory / INDEX_NAME).exists():
            raise CorruptFileError(
                f"holds both {WEIGHTS_NAME} and {INDEX_NAME}, so that it cannot be told which is "
                "the adapter; remove one",
                path=str(directory),
            )
        notices.append(f"{directory}: is one file already; it is copied as it is")
    _check_names(directory, headers)
    record = None
    if (directory / MARK_NAME).exists():
        record = read_record(directory)
        problems = check_but_tensors(directory, record)
        with reading_record(directory):
            found = {entry.name for header in headers for entry in header.entries}
            problems += [f"{name} is missing" for name in record["tensors"] if name not in found]
        if problems:
            raise VerificationError(path=str(directory), problems=tuple(problems))
    carried, left = _others(directory, {Path(header.file.path).name for header in headers})
    if left:
        notices.append(f"{directory}: {', '.join(left)}: not carried over")
    places = tuple(_arrange(headers))
    return _Source(directory, headers, places, record, tuple(carried), tuple(notices))


def _check_names(directory: Path, headers: Sequence[Header]) -> None:
    names = Counter(entry.name for header in headers for entry in header.entries)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise CorruptFileError("stands in two of its files", path=str(directory), tensor=min(twice))


def _arrange(headers: Sequence[Header]) -> list[tuple[Header, Entry]]:
    """Return the tensors in the order in which they lie; where one would then not begin at a
    multiple of its numbers' size, which no reader can map, the wider ones first."""
    places = [
        (header, entry)
        for header in headers
        for entry in sorted(header.entries, key=attrgetter("offset", "nbytes"))
    ]
    end = 0
    for _, entry in places:
        if end % entry.item_bytes:
            return sorted(places, key=lambda place: -place[1].item_bytes)
        end += entry.nbytes
    return places


def _others(directory: Path, weights: set[str]) -> tuple[list[str], list[str]]:
    """Return the names of the files beside the weights: those carried over, and those not.

    Raises:
        CorruptFileError: one is a link out of the directory, or there are too many.
    """
    ours = {*weights, INDEX_NAME, MARK_NAME}
    found = sorted(path.name for path in directory.iterdir() if path.name not in ours)
    carried = [
        name for name in found if (directory / name).is_file() and not name.endswith(_WEIGHTS)
    ]
    if len(carried) > MAX_CARRIED:
        raise CorruptFileError(
            f"holds {len(carried)} files beside the weights; {MAX_CARRIED} are the limit",
            path=str(directory),
        )
    for name in carried:
        check_inside(directory / name)
    return carried, [name for name in found if name not in carried]


def _write(source: _Source, directory: Path) -> None:
    """Write the one file, what is carried over and the record, each checked and durable."""
    regions = list(_regions(source.places))
    header = render_header(regions, _metadata(source.headers))
    path = directory / WEIGHTS_NAME
    allocate_file(path, header, source.data_bytes)
    checksums = _copy(source, path, len(header))
    sync_file(path)
    _read_back(directory, regions, len(header), checksums)
    carried = {name: _carry(source.directory / name, directory / name) for name in source.carried}
    carried.pop(TIMINGS_NAME, None)
    facts = {
        "files": [describe_file(WEIGHTS_NAME, header, source.data_bytes)],
        "other_files": carried,
        "tensors": {
            region.name: describe_tensor(region, checksums[region.name]) for region in regions
        },
    }
    write_file(directory / MARK_NAME, render_record(_record(source, facts)))


def _regions(places: Sequence[tuple[Header, Entry]]) -> Iterator[Region]:
    end = 0
    for _, entry in places:
        yield Region(entry.name, 0, end, entry.shape, entry.nbytes, entry.dtype)
        end += entry.nbytes


def _metadata(headers: Sequence[Header]) -> dict[str, str]:
    """Return what all files say of themselves, and the format that PEFT's files name."""
    first, *others = (header.metadata for header in headers)
    agreed = {
        key: value
        for key, value in sorted(first.items())
        if all(other.get(key) == value for other in others)
    }
    return {**PLAIN_METADATA, **agreed}


def _copy(source: _Source, path: Path, start: int) -> dict[str, str]:
    """Copy every tensor to its place, and return their checksums.

    Raises:
        VerificationError: one is not what the record says.
        InputChangedError, InputUnreadableError: a file of the source cannot be read, or is another.
        StorageError: the output cannot be written.
    """
    recorded = _recorded(source)
    checksums: dict[str, str] = {}
    problems = []
    files = OpenFiles(MAX_OPEN_FILES)
    window = pread(files)
    try:
        # One region for all of them: there may be tens of thousands of tensors of a few KiB.
        with RegionWriter(path, start, _whole(source.data_bytes)) as writer:
            for header, entry in source.places:
                digest = xxhash.xxh3_128()
                for piece in _pieces(window, header.file, entry):
                    digest.update(piece)
                    writer.append(piece)
                checksums[entry.name] = digest.hexdigest()
                if recorded is not None and recorded.get(entry.name) != digest.hexdigest():
                    problems.append(f"{Path(header.file.path).name}: {entry.name} was changed")
        files.check(header.file for header in source.headers)
    finally:
        files.close()
    if problems:
        raise VerificationError(path=str(source.directory), problems=tuple(problems))
    return checksums


def _whole(nbytes: int) -> Region:
    return Region("its tensors", 0, 0, (nbytes,), nbytes, "U8")


def _pieces(window: Window, file: TensorFile, entry: Entry) -> Iterator[memoryview]:
    """Yield a tensor's bytes, a piece at a time; each holds until the next one."""
    for done in range(0, entry.nbytes, READ_BYTES):
        yield window(file, entry.offset + done, min(READ_BYTES, entry.nbytes - done)).data


def _recorded(source: _Source) -> Mapping[str, str] | None:
    if source.record is None:
        return None
    with reading_record(source.directory):
        return {name: facts["xxh3"] for name, facts in source.record["tensors"].items()}


def _read_back(
    directory: Path, regions: Sequence[Region], start: int, checksums: Mapping[str, str]
) -> None:
    with RegionReader(directory, (WEIGHTS_NAME,), (start,)) as reader:
        problems = tuple(
            f"{WEIGHTS_NAME}: {region.name} does not read back as it was written"
            for region in regions
            if reader.checksum(region) != checksums[region.name]
        )
    if problems:
        raise VerificationError(path=str(directory), problems=problems)


def _carry(source: Path, target: Path) -> str:
    """Copy a file, make it durable, and return its checksum.

    Raises:
        InputUnreadableError, StorageError: it cannot be read, or not be written.
    """
    digest = xxhash.xxh3_128()
    try:
        reading = open_regular(source)
    except OSError as error:
        raise InputUnreadableError(
            f"cannot be read ({error.strerror})", path=str(source)
        ) from error
    try:
        with reading, target.open("xb") as stream:
            while data := reading.read(READ_BYTES):
                digest.update(data)
                stream.write(data)
    except OSError as error:
        raise StorageError(f"cannot be copied ({error.strerror})", path=str(target)) from error
    sync_file(target)
    return digest.hexdigest()


def _record(source: _Source, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the record: what the source's says of the merge, and what is true of the new files."""
    version = metadata.version("streammerge")
    came_from = {
        "path": str(source.directory),
        "files": {Path(header.file.path).name: header.file.size for header in source.headers},
        "streammerge": version,
    }
    before = source.record or {"format": FORMAT, "streammerge": version}
    return {**before, "consolidated": came_from, **facts}
