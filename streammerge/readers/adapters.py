"""From a path to a manifest: which files are meant, in which format they are, who reads it."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from streammerge.adapter import (
    DIFFUSERS,
    KOHYA,
    MLX,
    PEFT,
    Adapter,
    AdapterConfig,
    Dialect,
    NameTable,
    TensorFile,
)
from streammerge.errors import CorruptFileError
from streammerge.readers.config import read_config
from streammerge.readers.contents import Content, Source
from streammerge.readers.diffusers import read_diffusers
from streammerge.readers.find import find_files
from streammerge.readers.header import Header, parse_header, read_text
from streammerge.readers.kohya import read_kohya
from streammerge.readers.mlx import read_mlx
from streammerge.readers.peft import read_peft
from streammerge.readers.recognise import recognise
from streammerge.readers.shards import read_shards
from streammerge.readers.torch_file import is_torch_file, read_torch_file

READERS: dict[Dialect, Callable[[Source], Content]] = {
    PEFT: read_peft,
    DIFFUSERS: read_diffusers,
    KOHYA: read_kohya,
    MLX: read_mlx,
}
"""A format is one function from headers and config to the content of a manifest."""

Known = dict[tuple[bytes, int, str], Content]
"""Contents by header, size and config."""


def read_adapters(paths: Sequence[str], table: NameTable) -> list[Adapter]:
    """Read the manifests of several adapters over one name table.

    Adapters that were trained alike have the same header to the byte. It is parsed once, and they
    share its columns: 64 adapters of 45,000 targets are read in the time of a few.

    Raises:
        MissingFileError, CorruptFileError, UnsupportedAdapterError: one of them cannot be used.
    """
    known: Known = {}
    collecting = gc.isenabled()
    # Headers make millions of objects and no cycles; the collector would go over them in vain.
    gc.disable()
    try:
        return [read_adapter(path, table, known) for path in paths]
    finally:
        if collecting:
            gc.enable()


def read_adapter(path: str, table: NameTable, known: Known | None = None) -> Adapter:
    """Read the manifest of a LoRA adapter; of the weights only headers and alphas are read.

    Args:
        path: the adapter's directory, or its file of weights.
        table: where its targets' names are entered.
        known: contents by header and config, for adapters that have the same; added to.

    Raises:
        MissingFileError, CorruptFileError, UnsupportedAdapterError: it cannot be used.
    """
    found = find_files(path)
    config = read_config(found.config) if found.has_config else None

    def content_of(headers: Sequence[Header]) -> Content:
        return _content(Source(path, found.config, headers, config, table))

    if found.weights is None:
        assert found.index is not None, "one of the two is found"
        headers = read_shards(found.index)
        files = tuple(header.file for header in headers)
        content = content_of(headers)
    elif is_torch_file(found.weights):
        header = read_torch_file(found.weights)
        files, content = (header.file,), content_of([header])
    else:
        text = read_text(found.weights)
        files = (text.file,)
        # The size belongs to it, for it is checked against the header.
        key = (hashlib.sha256(text.text).digest(), text.file.size, _what_decides(config))
        shared = None if known is None else known.get(key)
        content = shared or content_of([parse_header(text)])
        if known is not None and content.from_headers:
            known[key] = content
    adapter = _adapter(path, table, config, files, content)
    notices = (f"{path}: {notice}" for notice in (*found.notices, *content.notices))
    return replace(adapter, notices=tuple(notices))


def _content(source: Source) -> Content:
    names = [entry.name for _, _, entry in source.places]
    config = source.config
    dialect = recognise(names, config.dialect if config else None, source.headers[0].file.path)
    content = READERS[dialect](source)
    if len(content.columns.name) == 0:
        raise CorruptFileError("holds no LoRA tensors", path=source.path)
    return content


def _what_decides(config: AdapterConfig | None) -> str:
    """Return what of a config the content depends on, as text."""
    if config is None:
        return ""
    patterns = (list(config.rank_pattern.items()), list(config.alpha_pattern.items()))
    given = config.raw.get("lora_parameters") if config.dialect == MLX else None
    return repr((config.dialect, config.rank, config.alpha, config.use_rslora, patterns, given))


def _adapter(
    path: str,
    table: NameTable,
    config: AdapterConfig | None,
    files: tuple[TensorFile, ...],
    content: Content,
) -> Adapter:
    spoken_of = config if config is not None and config.dialect == content.dialect else None
    return Adapter(
        path=path,
        config=spoken_of,
        files=files,
        table=table,
        columns=content.columns,
        prefixes=content.prefixes,
        extras=content.extras,
        dialect=content.dialect,
        keys=content.keys,
    )
