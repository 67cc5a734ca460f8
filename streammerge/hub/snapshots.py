"""What an id means on the Hub now: a commit and its files; and files brought into the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from streammerge.errors import HubError
from streammerge.hub.ids import COMMIT, PREFIX, HubId, file_path, split_path
from streammerge.hub.ranges import POLL_SECONDS
from streammerge.hub.trouble import TROUBLES, Trouble, explain

MAX_FILES = 100_000
"""Of a repository: more has none with an adapter in it."""

DOWNLOADS = 4
"""Files that are downloaded at once; each may take several connections."""

LOOK_UP_SECONDS = 10.0


@dataclass(frozen=True)
class Snapshot:
    """A folder of a repository at one commit."""

    id: HubId
    commit: str
    folder: str
    """Path in the repository; empty for the repository itself."""
    names: tuple[str, ...]
    """The files in it, without those of folders below."""
    chosen: str | None = None
    """The one file of weights, where the id names it."""

    def inside(self, name: str) -> str:
        """Return the path in the repository of a file in the folder."""
        return f"{self.folder}/{name}" if self.folder else name

    def path(self, name: str) -> str:
        """Return what manifests call a file in the folder."""
        return file_path(self.id.repo, self.commit, self.inside(name))


def look_up(asked: HubId) -> Snapshot | None:
    """Ask the Hub, once, which commit an id means and which files it has.

    Returns:
        None where the Hub is not to be asked.

    Raises:
        HubError: there is no such thing, or no answer.
    """
    try:
        told = HfApi().model_info(asked.repo, revision=asked.revision, timeout=LOOK_UP_SECONDS)
    except OfflineModeIsEnabled:
        return None
    except TROUBLES as error:
        trouble = explain(error)
        here = "" if asked.text.startswith(PREFIX) else "is no path here; on the Hub: "
        known = trouble.reason == "repository"
        message = trouble.message if known else f"{here}{trouble.message}"
        raise HubError(message, path=asked.text, reason=trouble.reason) from None
    if COMMIT.fullmatch(told.sha or "") is None:
        raise HubError("the Hub names no commit", path=asked.text, reason="network")
    paths = [file.rfilename for file in told.siblings or ()]
    if len(paths) > MAX_FILES:
        raise HubError(f"has {len(paths)} files", path=asked.text, reason="format")
    return _chosen(asked, str(told.sha), paths)


def _chosen(asked: HubId, commit: str, paths: Sequence[str]) -> Snapshot:
    folder, chosen = asked.inner, None
    if folder in paths:
        whole = PurePosixPath(folder)
        folder, chosen = str(whole.parent).removeprefix("."), whole.name
    start = f"{folder}/" if folder else ""
    inside = [path.removeprefix(start) for path in paths if path.startswith(start)]
    if not inside:
        raise HubError(
            f"there is no {folder!r} in {asked.repo} at {asked.revision!r}; it is mistyped, or "
            "lies in another revision",
            path=asked.text,
            reason="file",
        )
    names = tuple(sorted(name for name in inside if "/" not in name))
    return Snapshot(asked, commit, folder, names, chosen)


def cached_snapshot(asked: HubId, likely: Sequence[str]) -> Snapshot:
    """Return what the cache has of an id, without the Hub.

    Args:
        asked: the id.
        likely: names one of which an adapter has.

    Raises:
        HubError: it has nothing of it.
    """
    folder = asked.inner
    for name in ("", *likely):
        path = "/".join(part for part in (folder, name) if part)
        found = try_to_load_from_cache(asked.repo, path, revision=asked.revision) if path else None
        if isinstance(found, str) and Path(found).is_file():
            top = Path(found).parents[len(PurePosixPath(path).parts) - 1]
            listed = (p.relative_to(top).as_posix() for p in top.rglob("*") if p.is_file())
            return _chosen(asked, top.name, sorted(listed))
    raise HubError(explain(OfflineModeIsEnabled("")).message, path=asked.text, reason="offline")


def find_cached(snapshot: Snapshot, names: Sequence[str]) -> Path | None:
    """Return the folder of the cache in which these files of a snapshot are, all of them."""
    places = [
        try_to_load_from_cache(snapshot.id.repo, snapshot.inside(name), revision=snapshot.commit)
        for name in names
    ]
    if not places or not all(isinstance(place, str) and Path(place).is_file() for place in places):
        return None
    return Path(str(places[0])).parent


def download(
    paths: Sequence[str], done: Callable[[str, int], None], check: Callable[[], None]
) -> dict[str, Path]:
    """Bring files into the cache, several at once; return where they are.

    Args:
        paths: of the files, as manifests call them.
        done: called with the path and the bytes of each file that is there.
        check: called now and then; ends it by raising.

    Raises:
        HubError: one cannot be had.
    """
    places: dict[str, Path] = {}
    pool = ThreadPoolExecutor(DOWNLOADS)
    try:
        with _quiet():
            left = {pool.submit(_bring, path): path for path in paths}
            while left:
                ready, _ = wait(left, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                check()
                for future in ready:
                    path = left.pop(future)
                    places[path] = future.result()
                    done(path, places[path].stat().st_size)
    finally:
        # A download that is on its way is not waited for: what it has got is kept for the next.
        pool.shutdown(wait=False, cancel_futures=True)
    return places


def remember(path: str, place: Path, revision: str) -> None:
    """Have the cache know which commit a branch names, as its documented layout has it.

    Files are asked for by their commit, so that all are of one; the cache hears of the branch from
    here, and finds it when the Hub is not asked.

    Args:
        path: of a file, as manifests call it.
        place: where it is in the cache.
        revision: what was asked for.
    """
    _, commit, name = split_path(path)
    if revision == commit:
        return
    snapshots = place.parents[len(PurePosixPath(name).parts)]
    reference = snapshots.with_name("refs") / revision
    with suppress(OSError):  # the cache may be one that others keep
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)


def _bring(path: str) -> Path:
    repo, commit, name = split_path(path)
    try:
        place = hf_hub_download(repo, name, revision=commit, library_name="streammerge")
    except TROUBLES as error:
        trouble = explain(error)
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            trouble = Trouble("disk", f"cannot be put into the cache ({error.strerror})")
        raise HubError(trouble.message, path=path, reason=trouble.reason) from None
    return Path(place)


@contextmanager
def _quiet() -> Iterator[None]:
    """Have the Hub's client show no bars of its own."""
    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()
