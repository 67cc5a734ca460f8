"""A merge's private directory beside the output, and the rename that makes it the output.

Whoever holds the lock beside them owns both names. The lock goes with the process, so what a
killed run left behind is gone on with, or removed, by the next merge into the same output, and
never while its process lives.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import xxhash

from streammerge.errors import (
    MergeFailedError,
    OutputExistsError,
    PublishedError,
    RefusedError,
    StorageError,
    StreammergeError,
    UnfinishedError,
)
from streammerge.output.journal import Journal, Unfinished
from streammerge.output.lock import take_lock
from streammerge.output.names import exchange, make_directories, sync_directory

MARK_NAME = "streammerge.json"
"""Every output holds it; only a directory that does may be overwritten."""


OWN_FILES = re.compile(
    r"adapter_config\.json|adapter_model(-\d+-of-\d+)?\.safetensors|"
    r"pytorch_lora_weights\.safetensors|adapter_model\.safetensors\.index\.json|"
    r"streammerge(-timings)?\.json|streammerge_config\.yml"
)
"""What streammerge writes into an output, and so may remove with it."""


def check_output(output: Path, *, overwrite: bool) -> None:
    """Check that `output` may be written.

    Raises:
        OutputExistsError: something lies there that may not be replaced.
    """
    if output.is_symlink():
        raise OutputExistsError(
            f"{output}: exists as a symbolic link; give the name that it points to, or another name"
        )
    if not output.exists():
        return
    if output.is_dir() and output.is_mount():
        raise OutputExistsError(
            f"{output}: exists as a mount point, which cannot be replaced; choose a name in it"
        )
    found = sorted(child.name for child in output.iterdir()) if output.is_dir() else None
    if found == []:
        return
    if not overwrite or found is None:
        hint = " or, if it is an earlier merge, --overwrite" if found else ""
        raise OutputExistsError(f"{output}: exists; choose another name{hint}")
    others = [name for name in found if not OWN_FILES.fullmatch(name)]
    if MARK_NAME not in found or others:
        what = f"holds {others[0]}, which is not streammerge's" if others else f"has no {MARK_NAME}"
        raise OutputExistsError(
            f"{output}: exists and {what}, so it is not overwritten; remove it yourself or choose "
            "another name"
        )


def staging_path(output: Path) -> Path:
    """Return where a merge into `output` keeps its files until it is done."""
    resolved = output.resolve()
    return resolved.with_name(f".{resolved.name}.streammerge")


def draft_path(output: Path) -> Path:
    """Return where a merge into `output` keeps tensors whose places are only known at its end:
    beside its staging directory, which becomes the output as it is."""
    staging = staging_path(output)
    return staging.with_name(staging.name + "-draft")


def lock_path(output: Path) -> Path:
    """Return the file whose lock a merge into `output` holds."""
    staging = staging_path(output)
    return staging.with_name(staging.name + ".lock")


def journal_path(output: Path) -> Path:
    """Return the journal of a merge into `output`: beside its staging directory, which becomes
    the output as it is."""
    staging = staging_path(output)
    return staging.with_name(staging.name + ".journal")


class Staging:
    """The staging directory, held from `__enter__` until it is published, kept or removed."""

    def __init__(self, output: Path, *, overwrite: bool = False, resume: bool = False) -> None:
        """Say what is wanted.

        Args:
            output: where the directory will lie.
            overwrite: replace an earlier output, and drop an unfinished merge.
            resume: go on with an unfinished merge, where there is one.
        """
        self.output = output.resolve()
        self.path = staging_path(output)
        self.draft = draft_path(output)
        """Made by whoever needs it; it is removed as `path` is."""
        self.journal = Journal(journal_path(output))
        self.unfinished: Unfinished | None = None
        """What is gone on with."""
        self._overwrite = overwrite
        self._resume = resume
        self._aside = self.output.with_name(f".{self.output.name}.streammerge-old")
        self._lock = -1
        self._is_ours = False
        """Whether it is settled that what lies there is gone on with, or dropped."""
        self._published = False
        self.left: list[str] = []
        """What should have been done at the end, and could not be."""

    def __enter__(self) -> Self:
        try:
            make_directories(self.path.parent)
            self._lock = take_lock(lock_path(self.output), self.output)
            self._restore()
            self._clear_published()
            check_output(self.output, overwrite=self._overwrite)
            self._look_for_unfinished()
            self._is_ours = True
            if self.unfinished is None:
                self._discard()
                self.path.mkdir()
        except BaseException as error:
            # An interrupt too, or what was made would stay.
            self.__exit__(type(error), error, None)
            if isinstance(error, OSError) and not isinstance(error, StreammergeError):
                raise StorageError(
                    f"cannot be made ({error.strerror})", path=str(self.path)
                ) from error
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        """Keep or remove what is there; an interrupt after the publishing is none."""
        if self._lock < 0:
            return False
        try:
            if self._published:
                # The journal last: it says that the merge is done, and nothing else does.
                for remove in (*self._removals(), self.journal.remove):
                    self._clear(remove)
            elif not self._is_ours or (error is not None and self._worth_keeping(error)):
                self.journal.close()
                kept = self.journal.worth_keeping and not isinstance(error, RefusedError)
                if kept and isinstance(error, StreammergeError):
                    error.add_note(
                        f"{self.journal.entries} targets are done and kept; --resume goes on"
                    )
            else:
                for remove in (self.journal.remove, *self._removals()):
                    self._clear(remove)
            # Removed while it is held: who has opened it meanwhile finds that it is another file.
            self._clear(lambda: lock_path(self.output).unlink(missing_ok=True))
        finally:
            os.close(self._lock)
            self._lock = -1
        if isinstance(error, StreammergeError):
            for left in self.left:
                error.add_note(left)
        return self._published and isinstance(error, KeyboardInterrupt)

    def publish(self) -> None:
        """Make the staging directory the output, in one rename, or one exchange with an earlier.

        Raises:
            StorageError: something has appeared at the output's name, or the system refused.
        """
        try:
            check_output(self.output, overwrite=self._overwrite)
        except OutputExistsError as error:
            raise StorageError("has appeared during the work", path=str(self.output)) from error
        try:
            sync_directory(self.path)
            self.journal.publish(_mark(self.path))
            made = self.path.stat()
            try:
                if self.output.exists() and any(self.output.iterdir()):
                    exchange(self.path, self.output, self._aside)
                else:
                    self.path.rename(self.output)
            finally:
                # Whatever came meanwhile, an interrupt too: what lies there decides.
                self._published = _lies_at(self.output, made)
                if not self._published:
                    self._restore()
        except OSError as error:
            if isinstance(error, StreammergeError):
                raise
            raise StorageError(
                f"cannot be published ({error.strerror})", path=str(self.output)
            ) from error
        # It is there, whatever comes now.
        self._clear(lambda: sync_directory(self.output.parent), "made durable")

    def settle(self, recipe: dict[str, Any] | None = None) -> None:
        """Clear up after a run that was killed while it published, before anything is read: the
        output may be one of the inputs.

        Args:
            recipe: of a merge that is to be gone on with, as `Recipe.to_dict` gives it.

        Raises:
            PublishedError: the output is what this merge has made.
            OutputBusyError: another merge is writing to it.
        """
        if not self.journal.path.exists():
            return
        self._lock = take_lock(lock_path(self.output), self.output)
        try:
            self._restore()
            done = self._clear_published()
        finally:
            self.__exit__(None, None, None)
        if done is not None and done.identity["recipe"] == json.loads(json.dumps(recipe)):
            raise PublishedError(path=str(self.output))

    def _clear(self, act: Callable[[], None], what: str = "removed") -> None:
        """Do something at the end; that it cannot be done undoes nothing of what was done."""
        try:
            act()
        except OSError as error:
            self.left.append(f"{error.filename}: cannot be {what} ({error.strerror})")
        except KeyboardInterrupt:
            if not self._published:
                raise
            self.left.append(f"{self.path}: is not {what} yet, for the merge was interrupted")

    def _look_for_unfinished(self) -> None:
        try:
            found = self.journal.read() if self.path.is_dir() else None
        except StorageError:
            if not self._overwrite:
                raise
            found = None
        if found is None:
            return
        if self._resume:
            self.unfinished = found
        elif not self._overwrite:
            raise UnfinishedError(path=str(self.output), done=found.done)
        else:
            self.journal.drop()

    def _clear_published(self) -> Unfinished | None:
        """Remove what is left of a merge that was killed after it was published, and return it."""
        try:
            found = self.journal.read()
        except StorageError:
            return None
        if found is None or found.published is None or found.published != _mark(self.output):
            return None
        for remove in (*self._removals(), self.journal.remove):
            remove()
        self.journal.drop()
        return found

    def _worth_keeping(self, error: BaseException) -> bool:
        """Whether a later run can go on from what is there."""
        if isinstance(error, MergeFailedError) and not error.resumable:
            return False
        return self.journal.worth_keeping and self.path.is_dir()

    def _discard(self) -> None:
        """Remove all that is left of this merge, or of an earlier one."""
        # The journal first: without its directory it is of no use, nor the other way round.
        for remove in (self.journal.remove, *self._removals()):
            remove()

    def _removals(self) -> list[Callable[[], None]]:
        """Return what removes each of the directories."""

        def remove(left: Path) -> None:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(left)

        return [lambda: remove(self._aside), lambda: remove(self.draft), lambda: remove(self.path)]

    def _restore(self) -> None:
        """Give an earlier output its name back, if a run was killed between two renames, or remove
        it, if that was after them."""
        if not self._aside.exists():
            return
        if self.output.is_dir() and not any(self.output.iterdir()):
            self.output.rmdir()  # made since, by a script perhaps
        if not self.output.exists():
            self._aside.rename(self.output)
        else:
            shutil.rmtree(self._aside, ignore_errors=True)


def _lies_at(path: Path, made: os.stat_result) -> bool:
    """Return whether it is what was made that has this name."""
    try:
        return os.path.samestat(path.stat(), made)
    except OSError:
        return False


def _mark(directory: Path) -> str | None:
    """Return a checksum of the record in a directory; None where there is none."""
    try:
        return xxhash.xxh3_128_hexdigest((directory / MARK_NAME).read_bytes())
    except OSError:
        return None
