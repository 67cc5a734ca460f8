"""Adapters on the Hub: their configs and headers, read by ranges; of the weights nothing else."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from streammerge.adapter import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME, TensorFile
from streammerge.errors import HubError, InputChangedError, InputUnreadableError
from streammerge.hub import HubId, Ranges, Span
from streammerge.readers.config import MAX_CONFIG_BYTES
from streammerge.readers.find import MLX_WEIGHTS_NAME, PICKLE_NAMES, WITH_CONFIG, only_weights
from streammerge.readers.header import HeaderText, header_length
from streammerge.readers.shards import MAX_INDEX_BYTES, parse_index, shard_names

if TYPE_CHECKING:
    from streammerge.hub.snapshots import Snapshot

FIRST_BYTES = 2**16
"""Read of a file before it is known how long its header is; most are shorter."""

LOOK_UPS = 8
"""Adapters that are looked up at once."""

_LIKELY = (CONFIG_NAME, WEIGHTS_NAME, INDEX_NAME, MLX_WEIGHTS_NAME, *PICKLE_NAMES)


@dataclass(frozen=True)
class Gathered:
    """What is here of an adapter on the Hub."""

    path: str
    """Its id."""
    commit: str
    local: str | None = None
    """Where it lies in the cache, if all of it does; then nothing else is set."""
    config_path: Path = Path()
    config: bytes | None = None
    index_path: Path = Path()
    index: dict[str, str] | None = None
    """Which shard each tensor is in."""
    headers: tuple[HeaderText, ...] = ()
    others: tuple[str, ...] = ()
    """Files beside the weights, by their paths on the Hub."""


def gather(ids: Collection[HubId], *, store: bool) -> dict[str, Gathered]:
    """Look up adapters, several at once; return what is here of each by its id.

    Args:
        ids: as they were asked for.
        store: whether files may be brought into the cache.

    Raises:
        AdapterError: one cannot be had.
    """
    if not ids:
        return {}
    ordered, ranges = sorted(ids, key=lambda asked: asked.text), Ranges()
    pool = ThreadPoolExecutor(min(LOOK_UPS, len(ordered)))
    try:
        found = pool.map(lambda asked: _gather_one(asked, ranges, store=store), ordered)
        return {gathered.path: gathered for gathered in found}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _gather_one(asked: HubId, ranges: Ranges, *, store: bool) -> Gathered:
    # Loads the Hub's client.
    from streammerge.hub.snapshots import (  # noqa: PLC0415  # loads the Hub's client
        cached_snapshot,
        download,
        find_cached,
        look_up,
    )

    snapshot = look_up(asked)
    offline = snapshot is None
    if snapshot is None:
        snapshot = cached_snapshot(asked, _LIKELY)
    weights = _weights(snapshot)
    has_config = snapshot.chosen is None or snapshot.chosen in WITH_CONFIG
    others = [CONFIG_NAME] if has_config and CONFIG_NAME in snapshot.names else []
    wanted = [weights, *others]
    folder = find_cached(snapshot, wanted)
    if folder is not None and weights == INDEX_NAME and not offline:
        names = shard_names(parse_index(folder / INDEX_NAME, (folder / INDEX_NAME).read_bytes()))
        folder = find_cached(snapshot, [*wanted, *names])
    if folder is None and not weights.endswith((".safetensors", ".json")):
        if not store:
            raise HubError(
                f"{weights} is pickled, and no part of it can be read alone; drop --stream",
                path=asked.text,
                reason="format",
            )
        places = download([snapshot.path(n) for n in wanted], _ignore, lambda: None)
        folder = places[snapshot.path(weights)].parent
    if folder is not None:
        local = folder / snapshot.chosen if snapshot.chosen else folder
        return Gathered(asked.text, snapshot.commit, str(local))
    with refused_by_hub(asked.text):
        return _read(snapshot, weights, others, ranges)


def _ignore(path: str, nbytes: int) -> None:
    """Nobody is told of a file that is brought for its header."""


def _weights(snapshot: Snapshot) -> str:
    """Return the file of weights, or the index of several."""
    for name in (snapshot.chosen, WEIGHTS_NAME, INDEX_NAME):
        if name is not None and (name == snapshot.chosen or name in snapshot.names):
            return name
    found = only_weights(snapshot.names, snapshot.id.text)
    if found is None:
        raise HubError(
            f"there is no {WEIGHTS_NAME} in it; name the folder of the adapter (user/repo/folder)",
            path=snapshot.id.text,
            reason="file",
        )
    return found


def _read(snapshot: Snapshot, weights: str, others: Sequence[str], ranges: Ranges) -> Gathered:
    beside = [*others, weights] if weights == INDEX_NAME else others
    files, index = [weights], None
    if weights == INDEX_NAME:
        path = snapshot.path(INDEX_NAME)
        index = parse_index(Path(path), _whole(ranges, path, MAX_INDEX_BYTES))
        files = shard_names(index)
    config_path = snapshot.path(CONFIG_NAME)
    return Gathered(
        snapshot.id.text,
        snapshot.commit,
        config_path=Path(config_path),
        config=_whole(ranges, config_path, MAX_CONFIG_BYTES) if others else None,
        index_path=Path(snapshot.path(INDEX_NAME)),
        index=index,
        headers=tuple(read_remote_text(ranges, snapshot.path(name)) for name in files),
        others=tuple(map(snapshot.path, beside)),
    )


def _whole(ranges: Ranges, path: str, limit: int) -> bytes:
    file = ranges.open(path)
    if file.size > limit:
        raise HubError(
            f"has {file.size} bytes, and {limit} are the limit", path=path, reason="format"
        )
    return _bytes(ranges, file, 0, file.size)


def read_remote_text(ranges: Ranges, path: str) -> HeaderText:
    """Read the header of a safetensors file on the Hub; of it only its length is checked.

    Raises:
        CorruptFileError: not a safetensors file, or truncated inside its header.
    """
    file = ranges.open(path)
    head = _bytes(ranges, file, 0, min(FIRST_BYTES, file.size))
    end = 8 + header_length(Path(path), head[:8], file.size)
    if end > len(head):
        head += _bytes(ranges, file, len(head), end - len(head))
    return HeaderText(file, head[8:end])


def _bytes(ranges: Ranges, file: TensorFile, offset: int, nbytes: int) -> bytes:
    return ranges.fetch([Span(file, offset, nbytes)])[0].tobytes()


@contextmanager
def refused_by_hub(path: str) -> Iterator[None]:
    """Turn what goes wrong with ranges into a refusal: no work has begun.

    Raises:
        HubError: something did.
    """
    try:
        yield
    except (InputUnreadableError, InputChangedError) as error:
        message = str(error)
        raise HubError(
            message.removeprefix(f"{path}: "),
            path=path,
            reason=getattr(error, "reason", None) or "network",
        ) from None
