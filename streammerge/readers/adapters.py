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
    Origin,
    TensorFile,
)
from streammerge.errors import CorruptFileError
from streammerge.hub import find_id
from streammerge.readers.config import parse_config, read_config
from streammerge.readers.contents import Content, Source
from streammerge.readers.diffusers import read_diffusers
from streammerge.readers.find import find_files
from streammerge.readers.header import Header, HeaderText, parse_header, read_text
from streammerge.readers.kohya import read_kohya
from streammerge.readers.mlx import read_mlx
from streammerge.readers.peft import read_peft
from streammerge.readers.recognise import recognise
from streammerge.readers.remote import Gathered, gather
from streammerge.readers.shards import check_shards, read_shards
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


def read_adapters(paths: Sequence[str], table: NameTable, *, store: bool = True) -> list[Adapter]:
    """Read the manifests of several adapters over one name table.

    Adapters that were trained alike have the same header to the byte. It is parsed once, and they
    share its columns: 64 adapters of 45,000 targets are read in the time of a few.

    Args:
        paths: as for `read_adapter`.
        table: where their targets' names are entered.
        store: whether files may be brought into the Hub's cache, where no part can be read alone.

    Raises:
        AdapterError: a subclass of it says why one of them cannot be used.
    """
    known: Known = {}
    remote = gather({asked for asked in map(find_id, paths) if asked is not None}, store=store)
    collecting = gc.isenabled()
    # Headers make millions of objects and no cycles; the collector would go over them in vain.
    gc.disable()
    try:
        return [
            _of_gathered(remote[path], table, known)
            if path in remote
            else _read_local(path, table, known)
            for path in paths
        ]
    finally:
        if collecting:
            gc.enable()


def read_adapter(path: str, table: NameTable) -> Adapter:
    """Read the manifest of a LoRA adapter; of the weights only headers and alphas are read.

    Args:
        path: the adapter's directory, its file of weights, or its id on the Hub.
        table: where its targets' names are entered.

    Raises:
        AdapterError: a subclass of it says why it cannot be used.
    """
    return read_adapters([path], table)[0]


def _read_local(path: str, table: NameTable, known: Known) -> Adapter:
    found = find_files(path)
    config = read_config(found.config) if found.has_config else None
    source = Source(path, found.config, (), config, table)
    if found.weights is None:
        assert found.index is not None, "one of the two is found"
        return _of_headers(source, read_shards(found.index))
    if is_torch_file(found.weights):
        adapter = _of_headers(source, [read_torch_file(found.weights)])
    else:
        adapter = _of_text(source, read_text(found.weights), known)
    notices = (f"{path}: {notice}" for notice in found.notices)
    return replace(adapter, notices=(*notices, *adapter.notices))


def _of_gathered(gathered: Gathered, table: NameTable, known: Known) -> Adapter:
    """Return the manifest of an adapter on the Hub, of which config and headers are here."""
    path, commit = gathered.path, gathered.commit
    if gathered.local is not None:
        adapter = _read_local(gathered.local, table, known)
        return replace(adapter, path=path, origin=Origin(commit))
    config = parse_config(gathered.config_path, gathered.config) if gathered.config else None
    source = Source(path, gathered.config_path, (), config, table)
    if gathered.index is None:
        adapter = _of_text(source, gathered.headers[0], known)
    else:
        headers = [parse_header(text) for text in gathered.headers]
        check_shards(gathered.index_path, gathered.index, headers)
        adapter = _of_headers(source, headers)
    return replace(adapter, origin=Origin(commit, gathered.others))


def _of_text(source: Source, text: HeaderText, known: Known) -> Adapter:
    """Return the manifest of an adapter in one file; its header may be one that is known."""
    # The size belongs to it, for it is checked against the header.
    decides = _what_decides(source.config)
    key = (hashlib.sha256(text.text).digest(), text.file.size, decides)
    content = known.get(key) or _content(replace(source, headers=[parse_header(text)]))
    if content.from_headers:
        known[key] = content
    return _adapter(source, (text.file,), content)


def _of_headers(source: Source, headers: Sequence[Header]) -> Adapter:
    files = tuple(header.file for header in headers)
    return _adapter(source, files, _content(replace(source, headers=headers)))


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


def _adapter(source: Source, files: tuple[TensorFile, ...], content: Content) -> Adapter:
    config = source.config
    return Adapter(
        path=source.path,
        config=config if config is not None and config.dialect == content.dialect else None,
        files=files,
        table=source.table,
        columns=content.columns,
        prefixes=content.prefixes,
        extra_columns=content.extras,
        dialect=content.dialect,
        keys=content.keys,
        notices=tuple(f"{source.path}: {notice}" for notice in content.notices),
    )
