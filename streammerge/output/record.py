"""streammerge.json: what was merged, how, from what, and a checksum of everything written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from streammerge.adapter import CONFIG_NAME, DIFFUSERS, DTYPE_BITS, INDEX_NAME
from streammerge.errors import CorruptFileError, MissingFileError, StorageError, StreammergeError
from streammerge.files import open_regular, read_whole
from streammerge.output.header import metadata_of
from streammerge.output.staging import MARK_NAME
from streammerge.output.writer import READ_BYTES, RegionReader, headers, write_file
from streammerge.plans import Plan, Region

TIMINGS_NAME = "streammerge-timings.json"
FORMAT = 1

_SEAL = "xxh3"
"""The record's last field."""

FURNITURE = ("README.md", ".gitattributes")
"""What the Hub adds to a repository, or a user: it belongs to nothing, and is not checked."""

MAX_RECORD_BYTES = 2**30
"""A record has some 400 bytes for each tensor."""


RECIPE_NAME = "streammerge_config.yml"
"""An output's own recipe, called after mergekit's mergekit_config.yml."""


def write_config(directory: Path, plan: Plan, recipe: bytes) -> None:
    """Write the recipe and adapter_config.json, and the index where there are shards.

    diffusers reads no config but the one in the header, which stands there already.
    """
    write_file(directory / RECIPE_NAME, recipe)
    if plan.format == DIFFUSERS:
        return
    write_file(directory / CONFIG_NAME, render_json(plan.config))
    if len(plan.files) > 1:
        index = {
            "metadata": {"total_size": plan.write_bytes},
            "weight_map": {r.name: plan.files[r.file].name for r in plan.regions},
        }
        write_file(directory / INDEX_NAME, render_json(index))


def write_record(
    directory: Path, plan: Plan, facts: Mapping[str, Any], tensors: Mapping[str, str]
) -> None:
    """Write streammerge.json.

    Args:
        directory: where the other files already lie.
        plan: of the run.
        facts: what the caller knows: version, fingerprint, inputs, modules.
        tensors: xxh3-128 of every output tensor, by its full name.
    """
    regions = plan.regions
    rendered = headers(plan.files, regions, metadata_of(plan))
    record: dict[str, Any] = {
        "format": FORMAT,
        **facts,
        "recipe": plan.recipe,
        "rule": plan.rule,
        "rule_origin": plan.rule_origin,
        "space": plan.space,
        "dtype": plan.dtype,
        "files": [
            describe_file(file.name, header, file.data_bytes)
            for file, header in zip(plan.files, rendered, strict=True)
        ],
        "other_files": {
            path.name: digest(path.read_bytes())
            for path in sorted(directory.iterdir())
            if path.name in (CONFIG_NAME, INDEX_NAME, RECIPE_NAME)
        },
        "tensors": {
            region.name: describe_tensor(region, tensors[region.name]) for region in regions
        },
    }
    write_file(directory / MARK_NAME, render_record(record))


def describe_file(name: str, header: bytes, data_bytes: int) -> dict[str, Any]:
    """Return what a record says of a file of weights."""
    return {
        "name": name,
        "bytes": len(header) + data_bytes,
        "header_bytes": len(header),
        "header_xxh3": digest(header),
    }


def describe_tensor(region: Region, checksum: str) -> dict[str, Any]:
    """Return what a record says of a tensor."""
    return {
        "file": region.file,
        "offset": region.offset,
        "shape": list(region.shape),
        "dtype": region.dtype,
        "xxh3": checksum,
    }


def render_record(record: Mapping[str, Any]) -> bytes:
    """Return the text of a record: its JSON, with a checksum of that as its last field."""
    fields = {name: value for name, value in record.items() if name != _SEAL}
    return _sealed(render_json(fields))


def write_timings(
    directory: Path, plan: Plan, seconds: Mapping[str, float], total: float, peak: int | None
) -> None:
    """Write how long the run took and what it held; this file differs from run to run.

    Args:
        directory: of the output.
        plan: of the run, for what was projected.
        seconds: of each target.
        total: of the run.
        peak: the most that the process has held, before the run too; None where others did it.
    """
    memory = {
        "allowed_bytes": plan.allowed_bytes,
        "reserved_bytes": plan.reserved_bytes,
        "projected_bytes": plan.projected_bytes,
        "peak_bytes": peak,
    }
    timings = {"total_seconds": total, "memory": memory, "target_seconds": seconds}
    write_file(directory / TIMINGS_NAME, render_json(timings))


def read_timings(directory: Path) -> dict[str, Any] | None:
    """Read the file of timings; None where there is none, or what there is is not one."""
    try:
        timings = json.loads(read_whole(directory / TIMINGS_NAME, MAX_RECORD_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return timings if isinstance(timings, dict) else None


def check_record(directory: Path) -> list[str]:
    """Check an output against its own record: every byte of every file in it but the timings.

    Returns:
        A sentence for each thing that is wrong.

    Raises:
        MissingFileError: there is no record.
        CorruptFileError: the record is not one.
    """
    record = read_record(directory)
    with reading_record(directory):
        problems, sound = _check_files(directory, record)
        return [*problems, *_check_tensors(directory, record, sound)]


def check_but_tensors(directory: Path, record: dict[str, Any]) -> list[str]:
    """Check an output as `check_record` does, but for the tensors, of which there may be much.

    Raises:
        CorruptFileError: the record is not one.
    """
    with reading_record(directory):
        return _check_files(directory, record)[0]


@contextmanager
def reading_record(directory: Path) -> Iterator[None]:
    """Turn what a record lacks, or has of another kind, into an error that says so.

    Raises:
        CorruptFileError: the record is not one.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
        if isinstance(error, StreammergeError):
            raise
        raise CorruptFileError(
            "is not a record of a merge", path=str(directory / MARK_NAME)
        ) from error


def read_record(directory: Path) -> dict[str, Any]:
    """Read streammerge.json.

    Raises:
        MissingFileError: there is none.
        CorruptFileError: it is not JSON.
    """
    path = directory / MARK_NAME
    try:
        record = json.loads(read_whole(path, MAX_RECORD_BYTES))
    except FileNotFoundError as error:
        raise MissingFileError("no such file", path=str(path)) from error
    except OSError as error:
        raise CorruptFileError(f"cannot be read ({error.strerror})", path=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"is not JSON ({error})", path=str(path)) from error
    if not isinstance(record, dict):
        raise CorruptFileError("is not a JSON object", path=str(path))
    return record


def _check_files(directory: Path, record: dict[str, Any]) -> tuple[list[str], list[bool]]:
    """Return what is wrong with anything but tensors, and which files of weights are sound."""
    problems = [] if _is_sealed(directory / MARK_NAME) else [f"{MARK_NAME} was changed"]
    files = record["files"]
    known = {MARK_NAME, TIMINGS_NAME, *FURNITURE, *record["other_files"]}
    known |= {facts["name"] for facts in files}
    found = sorted(path.name for path in directory.iterdir())
    problems += [f"{name} does not belong to it" for name in found if name not in known]
    for name, checksum in record["other_files"].items():
        if _file_digest(directory / Path(name).name) != checksum:
            problems.append(f"{name} was changed or is missing")
    sound = []
    for facts in files:
        wrong = _check_header(directory / Path(facts["name"]).name, facts)
        problems += [f"{facts['name']} {wrong}"] if wrong else []
        sound.append(not wrong)
    return problems, sound


def _check_tensors(directory: Path, record: dict[str, Any], sound: Sequence[bool]) -> Iterator[str]:
    names = [Path(facts["name"]).name for facts in record["files"]]
    starts = [facts["header_bytes"] for facts in record["files"]]
    with RegionReader(directory, names, starts) as reader:
        for region in _regions(record["tensors"]):
            if not sound[region.file]:
                continue
            try:
                checksum = reader.checksum(region)
            except StorageError as error:
                yield str(error)
                continue
            if checksum != record["tensors"][region.name]["xxh3"]:
                yield f"{names[region.file]}: {region.name} was changed"


def _check_header(path: Path, facts: dict[str, Any]) -> str:
    """Return what is wrong with a weights file, its tensors aside; empty when nothing is."""
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            # Not more than there is: the record may ask for any number of bytes.
            header = stream.read(max(0, min(facts["header_bytes"], size)))
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if size != facts["bytes"]:
        return f"has {size} bytes, not the {facts['bytes']} that were written"
    return "" if digest(header) == facts["header_xxh3"] else "has another header"


def _regions(tensors: dict[str, Any]) -> Iterator[Region]:
    for name, facts in tensors.items():
        shape, dtype = tuple(int(size) for size in facts["shape"]), str(facts["dtype"])
        nbytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
        yield Region(name, int(facts["file"]), int(facts["offset"]), shape, nbytes, dtype)


def digest(data: bytes) -> str:
    """Return xxh3-128 of bytes, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(data)


def _file_digest(path: Path) -> str | None:
    digest = xxhash.xxh3_128()
    try:
        with open_regular(path) as stream:
            while data := stream.read(READ_BYTES):
                digest.update(data)
    except OSError:
        return None
    return digest.hexdigest()


def _sealed(text: bytes) -> bytes:
    """Return a JSON object's text with one more field, a checksum of all that stands before it."""
    body = text.rstrip().removesuffix(b"}").rstrip() + b",\n"
    return body + _seal(body)


def _seal(body: bytes) -> bytes:
    return f' "{_SEAL}": "'.encode() + digest(body).encode() + b'"\n}\n'


def _is_sealed(path: Path) -> bool:
    text = path.read_bytes()
    body = text[: len(text) - len(_seal(b""))]
    return text == body + _seal(body)


def render_json(value: Any) -> bytes:
    """Return the text of a JSON file with a line for each entry, as those of an output are."""
    return (_lines(value, 2) + "\n").encode()


def _lines(value: Any, depth: int, margin: str = "") -> str:
    """Return JSON with a line for each entry down to a depth, and what is deeper in its line.

    Written by hand, for json's own indentation takes six times as long, seconds for 45,000 targets.
    """
    if depth == 0 or not value or not isinstance(value, dict | list):
        return json.dumps(value, allow_nan=False)
    inner = margin + " "
    if isinstance(value, list):
        entries = [inner + _lines(entry, depth - 1, inner) for entry in value]
    else:
        entries = [
            f"{inner}{json.dumps(str(key))}: {_lines(entry, depth - 1, inner)}"
            for key, entry in value.items()
        ]
    start, end = "[]" if isinstance(value, list) else "{}"
    return f"{start}\n" + ",\n".join(entries) + f"\n{margin}{end}"
