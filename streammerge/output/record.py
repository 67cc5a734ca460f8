"""streammerge.json: what was merged, how, from what, and a checksum of everything written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from streammerge.adapter import CONFIG_NAME, DTYPE_BITS, INDEX_NAME
from streammerge.errors import CorruptFileError, MissingFileError, StorageError
from streammerge.files import open_regular, read_whole
from streammerge.output.staging import MARK_NAME
from streammerge.output.writer import READ_BYTES, RegionReader, headers, write_file
from streammerge.plans import OutputFile, Plan, Region

TIMINGS_NAME = "streammerge-timings.json"
FORMAT = 1

MAX_RECORD_BYTES = 2**30
"""A record has some 400 bytes for each tensor."""


def write_config(directory: Path, plan: Plan) -> None:
    """Write adapter_config.json, and the index where there are shards."""
    write_file(directory / CONFIG_NAME, _pretty(plan.config))
    if len(plan.files) > 1:
        index = {
            "metadata": {"total_size": plan.write_bytes},
            "weight_map": {r.name: plan.files[r.file].name for r in plan.regions},
        }
        write_file(directory / INDEX_NAME, _pretty(index))


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
    rendered = headers(plan.files, regions)
    record: dict[str, Any] = {
        "format": FORMAT,
        **facts,
        "recipe": plan.recipe,
        "rule": plan.rule,
        "space": plan.space,
        "dtype": plan.dtype,
        "files": [
            {
                "name": file.name,
                "bytes": len(header) + file.data_bytes,
                "header_bytes": len(header),
                "header_xxh3": _digest(header),
            }
            for file, header in zip(plan.files, rendered, strict=True)
        ],
        "other_files": {
            path.name: _digest(path.read_bytes())
            for path in sorted(directory.iterdir())
            if path.name in (CONFIG_NAME, INDEX_NAME)
        },
        "tensors": {
            region.name: {
                "file": region.file,
                "offset": region.offset,
                "shape": list(region.shape),
                "dtype": region.dtype,
                "xxh3": tensors[region.name],
            }
            for region in regions
        },
    }
    write_file(directory / MARK_NAME, _sealed(_pretty(record)))


def write_timings(directory: Path, seconds: Mapping[str, float], total: float) -> None:
    """Write how long the run and each target took; this file differs from run to run."""
    write_file(
        directory / TIMINGS_NAME, _pretty({"total_seconds": total, "target_seconds": seconds})
    )


def check_record(directory: Path) -> list[str]:
    """Check an output against its own record: every byte of every file in it but the timings.

    Returns:
        A sentence for each thing that is wrong.

    Raises:
        MissingFileError: there is no record.
        CorruptFileError: the record is not one.
    """
    record = read_record(directory)
    problems = [] if _is_sealed(directory / MARK_NAME) else [f"{MARK_NAME} was changed"]
    try:
        problems += _check_files(directory, record)
    except (KeyError, TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
        raise CorruptFileError(
            "is not a record of a merge", path=str(directory / MARK_NAME)
        ) from error
    return problems


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


def _check_files(directory: Path, record: dict[str, Any]) -> list[str]:
    known = {MARK_NAME, TIMINGS_NAME, *record["other_files"], *(f["name"] for f in record["files"])}
    found = sorted(path.name for path in directory.iterdir())
    problems = [f"{name} does not belong to it" for name in found if name not in known]
    for name, digest in record["other_files"].items():
        if _file_digest(directory / Path(name).name) != digest:
            problems.append(f"{name} was changed or is missing")
    files = [OutputFile(f["name"], f["bytes"] - f["header_bytes"]) for f in record["files"]]
    sound = []
    for file, facts in zip(files, record["files"], strict=True):
        path = directory / Path(file.name).name
        wrong = _check_header(path, facts)
        problems += [f"{file.name} {wrong}"] if wrong else []
        sound.append(not wrong)
    names = [Path(file.name).name for file in files]
    starts = [facts["header_bytes"] for facts in record["files"]]
    with RegionReader(directory, names, starts) as reader:
        for region in _regions(record["tensors"]):
            if not sound[region.file]:
                continue
            try:
                digest = reader.checksum(region)
            except StorageError as error:
                problems.append(str(error))
                continue
            if digest != record["tensors"][region.name]["xxh3"]:
                problems.append(f"{files[region.file].name}: {region.name} was changed")
    return problems


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
    return "" if _digest(header) == facts["header_xxh3"] else "has another header"


def _regions(tensors: dict[str, Any]) -> Sequence[Region]:
    regions = []
    for name, facts in tensors.items():
        shape, dtype = tuple(int(size) for size in facts["shape"]), str(facts["dtype"])
        nbytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
        place = int(facts["file"]), int(facts["offset"])
        regions.append(Region(name, *place, shape, nbytes, dtype))
    return regions


def _digest(data: bytes) -> str:
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
    return b' "xxh3": "' + _digest(body).encode() + b'"\n}\n'


def _is_sealed(path: Path) -> bool:
    text = path.read_bytes()
    body = text[: len(text) - len(_seal(b""))]
    return text == body + _seal(body)


def _pretty(value: Any) -> bytes:
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
