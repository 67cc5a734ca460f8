"""PEFT adapter directories: adapter_config.json beside adapter_model.safetensors.

The weights are one file, or shards named by adapter_model.safetensors.index.json (which
streammerge writes and PEFT does not read). Keys are `base_model.model.<module path>.lora_A.weight`
and the like; nested prefixes, which a wrapper around a wrapper leaves behind, count as one.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streammerge.adapter import (
    CONFIG_NAME,
    CONV,
    DTYPES,
    EMBEDDING,
    INDEX_NAME,
    LINEAR,
    WEIGHTS_NAME,
    Adapter,
    AdapterConfig,
    Columns,
    NameTable,
)
from streammerge.errors import (
    CorruptFileError,
    MissingFileError,
    UnsupportedAdapterError,
    shorten,
)
from streammerge.files import check_inside, read_whole
from streammerge.patterns import Value, pattern_lookup
from streammerge.readers.config import read_config
from streammerge.readers.header import (
    MAX_NAME,
    Header,
    HeaderText,
    parse_header,
    read_header,
    read_text,
)
from streammerge.readers.pairs import Factors, pair_up
from streammerge.readers.recognise import recognise

PICKLE_NAME = "adapter_model.bin"

MAX_INDEX_BYTES = 100_000_000
"""As large as a header may be, for it holds the same names."""

MAX_SHARDS = 2**16 - 1
"""A column of a manifest counts them in 16 bits."""


@dataclass(frozen=True)
class _Content:
    """What an adapter's headers and config say of its tensors."""

    columns: Columns
    prefixes: tuple[str, ...]
    extras: tuple[str, ...]


def read_adapters(paths: Sequence[str], table: NameTable) -> list[Adapter]:
    """Read the manifests of several adapters over one name table.

    Adapters that were trained alike have the same header to the byte. It is parsed once, and they
    share its columns: 64 adapters of 45,000 targets are read in the time of a few.

    Raises:
        MissingFileError, CorruptFileError, UnsupportedAdapterError: one of them cannot be used.
    """
    known: dict[tuple[bytes, int, str], _Content] = {}
    collecting = gc.isenabled()
    # Headers make millions of objects and no cycles; the collector would go over them in vain.
    gc.disable()
    try:
        return [read_adapter(path, table, known) for path in paths]
    finally:
        if collecting:
            gc.enable()


def read_adapter(
    path: str, table: NameTable, known: dict[tuple[bytes, int, str], _Content] | None = None
) -> Adapter:
    """Read the manifest of a PEFT LoRA adapter; of the weights only headers are read.

    Args:
        path: the adapter's directory.
        table: where its targets' names are entered.
        known: contents by header and config, for adapters that have the same; added to.

    Raises:
        MissingFileError, CorruptFileError, UnsupportedAdapterError: it cannot be used.
    """
    directory = Path(path)
    _check_directory(directory)
    config = read_config(directory)
    single = directory / WEIGHTS_NAME
    if not single.exists():
        headers = _read_shards(_index(directory))
        return _adapter(path, table, config, headers, _content(directory, headers, config, table))
    check_inside(single)
    text = read_text(single)
    # The size belongs to it, for it is checked against the header.
    key = (hashlib.sha256(text.text).digest(), text.file.size, _what_decides(config))
    content = None if known is None else known.get(key)
    if content is None:
        content = _content(directory, [parse_header(text)], config, table)
    if known is not None:
        known[key] = content
    return _adapter(path, table, config, [text], content)


def read_headers(path: str) -> list[Header]:
    """Read the headers of all files that hold an adapter's tensors, in the order of their names.

    Raises:
        MissingFileError, CorruptFileError, UnsupportedAdapterError: there are none to be read.
    """
    directory = Path(path)
    _check_directory(directory)
    single = directory / WEIGHTS_NAME
    if not single.exists():
        return _read_shards(_index(directory))
    check_inside(single)
    return [read_header(single)]


def _what_decides(config: AdapterConfig | None) -> str:
    """Return what of a config the columns depend on, as text."""
    if config is None:
        return ""
    patterns = (list(config.rank_pattern.items()), list(config.alpha_pattern.items()))
    return repr((config.rank, config.alpha, patterns))


def _content(
    directory: Path, headers: Sequence[Header], config: AdapterConfig | None, table: NameTable
) -> _Content:
    places = [(header, n, entry) for n, header in enumerate(headers) for entry in header.entries]
    pairs, extras = pair_up(places)
    if not pairs:
        _refuse_without_factors(directory, [entry.name for _, _, entry in places])
    prefixes = tuple(sorted({pair.prefix for pair in pairs.values()}))
    columns = Columns.of_rows(_rows(directory, pairs, prefixes, config, table))
    return _Content(columns, prefixes, tuple(sorted(extras)))


def _adapter(
    path: str,
    table: NameTable,
    config: AdapterConfig | None,
    headers: Sequence[Header | HeaderText],
    content: _Content,
) -> Adapter:
    return Adapter(
        path=path,
        config=config,
        files=tuple(header.file for header in headers),
        table=table,
        columns=content.columns,
        prefixes=content.prefixes,
        extras=content.extras,
    )


def _check_directory(directory: Path) -> None:
    try:
        if directory.is_dir():
            return
        there = directory.exists()
    except OSError as error:
        raise MissingFileError(
            f"cannot be opened ({error.strerror})", path=str(directory)
        ) from error
    if there:
        raise MissingFileError(
            "is a file; give the adapter's directory, with adapter_config.json in it",
            path=str(directory),
        )
    raise MissingFileError("no such directory", path=str(directory))


def _index(directory: Path) -> Path:
    """Return the index of a directory without a single file of weights."""
    if (directory / INDEX_NAME).exists():
        check_inside(directory / INDEX_NAME)
        return directory / INDEX_NAME
    if (directory / PICKLE_NAME).exists():
        raise UnsupportedAdapterError(
            f"only {PICKLE_NAME} is here; pickled weights are not read yet. Load and save the "
            "adapter with PEFT to get safetensors",
            path=str(directory),
            variant="pickle",
        )
    nested = sorted(child.parent.name for child in directory.glob(f"*/{CONFIG_NAME}"))
    hint = (
        f"; did you mean {', '.join(str(directory / name) for name in nested)}?" if nested else ""
    )
    raise MissingFileError(f"there is no {WEIGHTS_NAME} in it{hint}", path=str(directory))


def _read_shards(index: Path) -> list[Header]:
    """Read the headers of all shards that an index names, and check that it tells the truth."""
    try:
        weight_map = json.loads(read_whole(index, MAX_INDEX_BYTES))["weight_map"]
        names = sorted(set(weight_map.values()))
        plain = all(map(_is_plain, names))
    except OSError as error:
        raise CorruptFileError(f"cannot be read ({error.strerror})", path=str(index)) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptFileError("is not a safetensors index", path=str(index)) from error
    if not plain or not names:
        raise CorruptFileError(
            "its weight_map must name files in the same directory, and nothing else",
            path=str(index),
        )
    if len(names) > MAX_SHARDS:
        raise CorruptFileError(
            f"names {len(names)} files; {MAX_SHARDS} are the limit", path=str(index)
        )
    for name in names:
        check_inside(index.with_name(name))
    headers = [read_header(index.with_name(name)) for name in names]
    found = {
        entry.name: name for name, h in zip(names, headers, strict=True) for entry in h.entries
    }
    for tensor, name in weight_map.items():
        if found.get(tensor) != name:
            raise CorruptFileError(
                f"should be in {name}, and is not",
                path=str(index),
                tensor=tensor if len(tensor) <= MAX_NAME else shorten(tensor),
            )
    return headers


def _is_plain(name: str) -> bool:
    """Whether a name can be that of a file in the same directory."""
    return 0 < len(name) <= 255 and Path(name).name == name and name.isprintable()


def _rows(
    directory: Path,
    pairs: dict[str, Factors],
    prefixes: tuple[str, ...],
    config: AdapterConfig | None,
    table: NameTable,
) -> Iterator[tuple[Any, ...]]:
    """Yield one row of the manifest for each target, in the order of their names."""
    # No config, no declared rank and no alpha: a rank of 0 explains no tensor.
    declared = pattern_lookup(config.rank_pattern, config.rank) if config else _always(0)
    alpha = pattern_lookup(config.alpha_pattern, config.alpha) if config else _always(math.nan)
    numbers = {prefix: number for number, prefix in enumerate(prefixes)}
    codes = {dtype: code for code, dtype in enumerate(DTYPES)}
    for target in sorted(pairs):
        pair = pairs[target]
        assert pair.a is not None, "pairs were checked"
        assert pair.b is not None, "pairs were checked"
        (_, a_file, a), (_, b_file, b) = pair.a, pair.b
        rank, *inner = a.shape
        kind = CONV if len(inner) > 1 else EMBEDDING if a.name.endswith("_A") else LINEAR
        yield (
            table.add(target),
            kind,
            rank,
            b.shape[0],
            math.prod(inner),
            (*inner, 0, 0, 0)[:4],
            *_look_up(directory, target, declared, alpha),
            numbers[pair.prefix],
            a_file,
            a.offset,
            codes[a.dtype],
            b_file,
            b.offset,
            codes[b.dtype],
        )


def _look_up(directory: Path, target: str, *patterns: Callable[[str], Value]) -> list[Value]:
    try:
        return [look_up(target) for look_up in patterns]
    except re.error as error:
        raise CorruptFileError(
            f"a regular expression of rank_pattern or alpha_pattern is refused: {error}",
            path=str(directory / CONFIG_NAME),
        ) from error


def _always(value: Value) -> Callable[[str], Value]:
    return lambda _target: value


def _refuse_without_factors(directory: Path, names: list[str]) -> None:
    known = recognise(names)
    if known:
        raise UnsupportedAdapterError(
            f"its tensors are in the layout of {known}, which is not read yet",
            path=str(directory),
            tensor=names[0],
            variant=known,
        )
    raise CorruptFileError("holds no LoRA tensors", path=str(directory))
