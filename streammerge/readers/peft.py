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
    PREFIX,
    WEIGHTS_NAME,
    Adapter,
    AdapterConfig,
    Columns,
    NameTable,
)
from streammerge.errors import CorruptFileError, MissingFileError, UnsupportedAdapterError
from streammerge.patterns import Value, pattern_lookup
from streammerge.readers.config import read_config
from streammerge.readers.header import (
    Entry,
    Header,
    HeaderText,
    parse_header,
    read_header,
    read_text,
)
from streammerge.readers.recognise import recognise

PICKLE_NAME = "adapter_model.bin"

_KEY = re.compile(rf"((?:{re.escape(PREFIX)})+)(.+?)\.(lora_[AB]\.weight|lora_embedding_[AB])")

_SIDES = {
    "lora_A.weight": "a",
    "lora_embedding_A": "a",
    "lora_B.weight": "b",
    "lora_embedding_B": "b",
}

Place = tuple[Header, int, Entry]
"""A tensor, the header that it stands in, and that file's number."""


@dataclass(slots=True)
class _Factors:
    """Where the two factors of a target lie, as far as they are found."""

    prefix: str
    a: Place | None = None
    b: Place | None = None


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
    text = read_text(single)
    # The size belongs to it, for it is checked against the header.
    key = (hashlib.sha256(text.text).digest(), text.file.size, _what_decides(config))
    content = None if known is None else known.get(key)
    if content is None:
        content = _content(directory, [parse_header(text)], config, table)
    if known is not None:
        known[key] = content
    return _adapter(path, table, config, [text], content)


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
    pairs, extras = _pair_up(places)
    if not pairs:
        _refuse_without_factors(directory, [entry.name for _, _, entry in places])
    prefixes = tuple(sorted({pair.prefix for pair in pairs.values()}))
    columns = Columns.of_rows(_rows(pairs, prefixes, config, table))
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
    if directory.is_dir():
        return
    if directory.exists():
        raise MissingFileError(
            "is a file; give the adapter's directory, with adapter_config.json in it",
            path=str(directory),
        )
    raise MissingFileError("no such directory", path=str(directory))


def _index(directory: Path) -> Path:
    """Return the index of a directory without a single file of weights."""
    if (directory / INDEX_NAME).exists():
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
        weight_map = json.loads(index.read_bytes())["weight_map"]
        names = sorted(set(weight_map.values()))
        plain = all(Path(name).name == name != "" and name.isprintable() for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptFileError("is not a safetensors index", path=str(index)) from error
    if not plain or not names:
        raise CorruptFileError(
            "its weight_map must name files in the same directory, and nothing else",
            path=str(index),
        )
    headers = [read_header(index.with_name(name)) for name in names]
    found = {
        entry.name: name for name, h in zip(names, headers, strict=True) for entry in h.entries
    }
    for tensor, name in weight_map.items():
        if found.get(tensor) != name:
            raise CorruptFileError(
                f"should be in {name}, and is not", path=str(index), tensor=tensor
            )
    return headers


def _pair_up(places: list[Place]) -> tuple[dict[str, _Factors], list[str]]:
    """Sort tensors into the factors of each target, and the names of the rest."""
    pairs: dict[str, _Factors] = {}
    extras: list[str] = []
    for place in places:
        name = place[2].name
        _refuse_variant_tensor(place)
        match = _KEY.fullmatch(name)
        if match is None:
            extras.append(name)
            continue
        prefix, target, factor = match.groups()
        pair = pairs.get(target) or pairs.setdefault(target, _Factors(prefix))
        if pair.prefix != prefix:
            raise CorruptFileError(
                f"{target} stands under two prefixes, {pair.prefix!r} and {prefix!r}",
                path=place[0].file.path,
                tensor=name,
            )
        side = _SIDES[factor]
        if getattr(pair, side) is not None:
            raise CorruptFileError(
                f"{target} has two {side.upper()} factors", path=place[0].file.path, tensor=name
            )
        setattr(pair, side, place)
    for pair in pairs.values():
        _check_pair(pair)
    return pairs, extras


def _refuse_variant_tensor(place: Place) -> None:
    header, _, entry = place
    if entry.name.endswith(
        (".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".dora_scale")
    ):
        raise UnsupportedAdapterError(
            "is a DoRA magnitude; DoRA adapters are not merged, for a sum of them is no LoRA",
            path=header.file.path,
            tensor=entry.name,
            variant="DoRA",
        )
    if ".base_layer.lora_" in entry.name:
        raise UnsupportedAdapterError(
            "is a factor inside another LoRA layer, as target_parameters makes them; such "
            "adapters are not merged",
            path=header.file.path,
            tensor=entry.name,
            variant="LoRA on parameters (target_parameters)",
        )


def _check_pair(pair: _Factors) -> None:
    """Check that a target has both factors, and that their shapes make one delta."""
    place_a, place_b = pair.a, pair.b
    if place_a is None or place_b is None:
        found = place_a or place_b
        assert found is not None, "a pair is made for a factor"
        header, _, entry = found
        raise CorruptFileError(
            f"has no {'A' if place_a is None else 'B'} factor beside it",
            path=header.file.path,
            tensor=entry.name,
        )
    (header, _, a), (_, _, b) = place_a, place_b
    for entry in (a, b):
        if entry.dtype not in DTYPES:
            raise UnsupportedAdapterError(
                f"its dtype is {entry.dtype}; factors must be one of {', '.join(DTYPES)}",
                path=header.file.path,
                tensor=entry.name,
                variant=entry.dtype,
            )
    embedding = "lora_embedding_" in a.name
    if embedding != ("lora_embedding_" in b.name):
        raise CorruptFileError(f"is paired with {b.name}", path=header.file.path, tensor=a.name)
    _check_shapes(header, a, b)


def _check_shapes(header: Header, a: Entry, b: Entry) -> None:
    dimensions = (2,) if "lora_embedding_" in a.name else (2, 3, 4, 5)
    if len(a.shape) not in dimensions or len(b.shape) != len(a.shape) or 0 in a.shape + b.shape:
        raise CorruptFileError(
            f"shapes {list(a.shape)} of A and {list(b.shape)} of B make no delta",
            path=header.file.path,
            tensor=a.name,
        )
    if any(size != 1 for size in b.shape[2:]):
        raise CorruptFileError(
            f"shape {list(b.shape)}: the B of a convolution must be 1×1",
            path=header.file.path,
            tensor=b.name,
        )
    rank = a.shape[0]
    if b.shape[1] == rank:
        return
    if len(a.shape) > 2 and rank % b.shape[1] == 0:
        raise UnsupportedAdapterError(
            f"has {b.shape[1]} columns for a rank of {rank}: a grouped convolution "
            f"({rank // b.shape[1]} groups); these are not merged",
            path=header.file.path,
            tensor=b.name,
            variant="grouped convolution",
        )
    raise CorruptFileError(
        f"shape {list(b.shape)}: B must have as many columns as A has rows ({rank}, in {a.name})",
        path=header.file.path,
        tensor=b.name,
    )


def _rows(
    pairs: dict[str, _Factors],
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
            declared(target),
            alpha(target),
            numbers[pair.prefix],
            a_file,
            a.offset,
            codes[a.dtype],
            b_file,
            b.offset,
            codes[b.dtype],
        )


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
