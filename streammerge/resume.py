"""Going on with a run that was killed: what must still be the same, and what is taken over."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import xxhash

from streammerge.adapter import Adapter
from streammerge.errors import ResumeError, StorageError
from streammerge.kernels.census import Standing
from streammerge.output.journal import Unfinished
from streammerge.output.writer import RegionReader
from streammerge.plans import Plan, Task
from streammerge.worker import Receipt


def identity(
    plan: Plan, adapters: Sequence[Adapter], fingerprint: dict[str, Any]
) -> dict[str, Any]:
    """Return all that decides the bytes of an output, as JSON holds it; memory and cores do not."""
    return {
        "streammerge": metadata.version("streammerge"),
        "recipe": plan.recipe,
        "rule_origin": plan.rule_origin,
        "fingerprint": fingerprint,
        "inputs": {path: facts for adapter in adapters for path, facts in _files(adapter)},
        "commits": {a.path: a.origin.commit for a in adapters if a.origin is not None},
        "courses": _courses(plan),
    }


def _files(adapter: Adapter) -> Iterator[tuple[str, list[int]]]:
    for file in adapter.files:
        if adapter.origin is None:
            yield file.path, [file.size, file.mtime_ns, file.inode]
        else:
            # Its commit says what it is, wherever it is read.
            yield f"{adapter.path}: {Path(file.path).name}", [file.size]


def _courses(plan: Plan) -> str:
    """Return a checksum of how each target is merged, from what, and where its tensors lie."""
    digest, sources = xxhash.xxh3_128(), plan.sources
    for task in plan.tasks:
        course = (task.target, task.m, task.n, task.rank, task.route, task.block, task.passes)
        digest.update(repr((course, task.regions)).encode())
        # What an adapter's config says, for its file may have been edited; weights and densities.
        for column in vars(sources).values():
            digest.update(column[task.first : task.last].tobytes())
    digest.update(json.dumps(plan.config, sort_keys=True).encode())
    return digest.hexdigest()


def check_same(
    output: Path, before: dict[str, Any], now: dict[str, Any], *, mixed_hardware: bool
) -> None:
    """Check that what was begun is what would be gone on with.

    Args:
        output: where it is to lie.
        before: the identity that the run had.
        now: the identity that it has.
        mixed_hardware: whether the fingerprints may differ.

    Raises:
        ResumeError: it is not; says what has changed.
    """
    changes = list(_changes(before, now, mixed_hardware=mixed_hardware))
    if not changes and before["courses"] != now["courses"]:  # else they follow from the rest
        changes.append(
            "the targets, their shapes, what the adapters' configs say of them, or the layout of "
            "the output are others"
        )
    if changes:
        raise ResumeError(path=str(output), changes=tuple(changes))


def _changes(before: dict[str, Any], now: dict[str, Any], *, mixed_hardware: bool) -> Iterator[str]:
    if before["streammerge"] != now["streammerge"]:
        yield f"it was begun by streammerge {before['streammerge']}; this is {now['streammerge']}"
    was, now_is = (side.get("rule_origin") for side in (before, now))  # early journals have none
    if was != now_is:
        yield f"its rule was of {was or 'streammerge'}, and is of {now_is or 'streammerge'}"
    for option in sorted({*before["recipe"], *now["recipe"]}):
        was, now_is = (_as_json(side["recipe"].get(option)) for side in (before, now))
        if was != now_is:
            yield f"{option} was {was}, and is {now_is}"
    commits = before.get("commits", {})  # early journals have none
    for name in sorted(set(commits) & set(now["commits"])):
        was, now_is = commits[name], now["commits"][name]
        if was != now_is:
            yield f"{name} was commit {was} on the Hub, and has moved to {now_is}"
    for path in sorted({*before["inputs"], *now["inputs"]}):
        if before["inputs"].get(path) != now["inputs"].get(path):
            yield f"{path} is not the file that it was"
    if before["fingerprint"] != now["fingerprint"] and not mixed_hardware:
        yield (
            f"it was computed with {before['fingerprint']}, and would now be with "
            f"{now['fingerprint']}, which rounds otherwise; mixed_hardware allows it"
        )


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def take_back(
    plan: Plan,
    unfinished: Unfinished,
    directory: Path,
    starts: Sequence[int],
    check: Callable[[], None],
) -> Iterator[tuple[Task, Receipt]]:
    """Yield the tasks that are done, as their regions show that are read back, with receipts.

    Args:
        plan: of the run.
        unfinished: what its journal says.
        directory: where the output's files lie.
        starts: where each of these files' data begin.
        check: called now and then; raises when the run is to stop.
    """
    tasks = {task.target: task for task in plan.tasks}
    with RegionReader(directory, [file.name for file in plan.files], starts) as reader:
        for entry in unfinished.entries():
            check()
            receipt = Receipt.from_dict(entry)
            if _reads_back(reader, tasks[receipt.target], receipt):
                yield tasks.pop(receipt.target), receipt


def standings_of(unfinished: Unfinished) -> Iterator[Standing]:
    """Yield how far searches for thresholds have come, later standings behind earlier ones."""
    for counted in unfinished.counted():
        yield from map(Standing.from_dict, counted)


def _reads_back(reader: RegionReader, task: Task, receipt: Receipt) -> bool:
    try:
        return tuple(map(reader.checksum, receipt.done(task).regions)) == receipt.checksums
    except StorageError:
        return False
