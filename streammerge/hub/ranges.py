"""Bytes of files on the Hub by HTTP range requests, several at once, nothing stored.

A file is named by its commit, so its content cannot change; what is sent is held to that: size and
ETag, and the range that was asked for. A request that fails on its way is gone on with where it
stopped.
"""

from __future__ import annotations

import re
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from streammerge.adapter import TensorFile
from streammerge.errors import InputChangedError, InputUnreadableError
from streammerge.hub.ids import split_path

Result = TypeVar("Result")

MAX_CONNECTIONS = 8
"""Requests in flight at once."""

TIMEOUT_SECONDS = 10.0
"""Until a connection stands, and between two pieces of an answer."""

TRIES = 6
"""Failures in a row after which a file is given up."""

BACKOFF_SECONDS = 0.5
"""Before the second try; doubled with each."""

MAX_WAIT_SECONDS = 120.0
"""A server that asks for a longer wait is given up at once."""

PROGRESS_BYTES = 2**16
"""So much has to come for the tries to be counted anew."""

POLL_SECONDS = 0.1
"""How often who waits for bytes looks whether the run goes on."""

_EXPIRED = (301, 302, 303, 307, 308, 401, 403, 404, 410)
"""What is answered where a link's signature has expired, or the file has moved."""


@dataclass(frozen=True)
class Span:
    """Bytes of a file that follow one another."""

    file: TensorFile
    offset: int
    nbytes: int


@dataclass(frozen=True)
class _Place:
    """Where a file's bytes are had at the moment."""

    url: str
    own: bool
    """Whether that is the Hub itself; nobody else gets the token."""


class _AgainError(Exception):
    """What may work at the next try."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


class Ranges:
    """Reads files on the Hub; used by several threads."""

    def __init__(self) -> None:
        self._places: dict[str, _Place] = {}
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)

    def open(self, path: str) -> TensorFile:
        """Return a file as it is, from its path in manifests; nothing of its content is read.

        Raises:
            InputUnreadableError, InputChangedError: it cannot be had.
        """
        return _tried(path, lambda: self._ask(path), threading.Event())

    def fetch(
        self, spans: Sequence[Span], check: Callable[[], None] = lambda: None
    ) -> list[npt.NDArray[np.uint8]]:
        """Return the bytes of each span, read-only.

        Args:
            spans: one request each, if all goes well.
            check: called now and then while bytes are on their way; ends it by raising.

        Raises:
            InputUnreadableError: they cannot be had.
            InputChangedError: the file is not the one whose header was read.
        """
        blocks = [np.empty(span.nbytes, np.uint8) for span in spans]
        waiting, over = deque(range(len(spans))), threading.Event()
        failures: list[BaseException] = []

        def work() -> None:
            try:
                while (i := _next(waiting)) is not None and not over.is_set():
                    self._fill(spans[i], memoryview(blocks[i].data), over)
            except BaseException as error:  # raised where it is waited for
                failures.append(error)
                over.set()

        threads = [
            # Daemons, for a process that ends does not wait for what they wait for.
            threading.Thread(target=work, daemon=True)
            for _ in range(min(len(spans), MAX_CONNECTIONS))
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive() and not failures:
                    thread.join(POLL_SECONDS)
                    check()
        finally:
            over.set()
        if failures:
            raise failures[0]
        for block in blocks:
            block.flags.writeable = False
        return blocks

    def _fill(self, span: Span, into: memoryview, over: threading.Event) -> None:
        done = 0

        def more() -> int:
            nonlocal done
            before = done
            try:
                with self._slots:
                    for piece in self._stream(span.file, span.offset + done, len(into) - done):
                        into[done : done + len(piece)] = piece
                        done += len(piece)
                        if over.is_set():
                            break
            except _AgainError:
                if done - before < PROGRESS_BYTES:
                    raise
            return len(into) - done

        while not over.is_set() and _tried(span.file.path, more, over):
            pass

    def _stream(self, file: TensorFile, start: int, count: int) -> Iterator[bytes]:
        """Yield the pieces of a range as they come, no more than was asked for."""
        from huggingface_hub import get_session  # noqa: PLC0415  # see the package

        from streammerge.hub.trouble import TROUBLES  # noqa: PLC0415  # loads the Hub's client

        if count == 0:
            return
        place = self._place(file)
        headers = _headers(place) | {"Range": f"bytes={start}-{start + count - 1}"}
        left = count
        try:
            with get_session().stream(
                "GET", place.url, headers=headers, timeout=TIMEOUT_SECONDS, follow_redirects=False
            ) as response:
                self._judge(file, place, response, start, count)
                for piece in response.iter_raw():
                    if len(piece) > left:
                        raise InputUnreadableError(
                            "the server sends more than was asked for", path=file.path
                        )
                    left -= len(piece)
                    yield piece
        except InputUnreadableError:
            raise
        except TROUBLES as error:
            raise _AgainError(f"the connection failed ({type(error).__name__})") from None
        if left:
            raise _AgainError("the connection was cut")

    def _judge(
        self, file: TensorFile, place: _Place, response: Any, start: int, count: int
    ) -> None:
        """Check that an answer is the range that was asked for."""
        status = response.status_code
        if status in _EXPIRED:
            self._places.pop(file.path, None)
            raise _AgainError(f"the server answers {status}")
        if status in (408, 429) or status >= 500:
            raise _AgainError(
                f"the server answers {status}", _asked_wait(response.headers.get("Retry-After"))
            )
        if status == 416:
            raise InputChangedError("has become shorter", path=file.path)
        if status != 206:
            whole = ", the whole file instead of a part" if status == 200 else ""
            raise InputUnreadableError(
                f"the server answers {status}{whole}; it cannot be streamed from there",
                path=file.path,
            )
        told = re.fullmatch(
            r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", ""), re.ASCII
        )
        wanted = (start, start + count - 1, file.size)
        if told is None or tuple(map(int, told.groups())) != wanted:
            if told is not None and int(told[3]) != file.size:
                raise InputChangedError(
                    f"has {told[3]} bytes now, and had {file.size}", path=file.path
                )
            raise InputUnreadableError(
                "the server sends another range than it was asked for", path=file.path
            )
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise InputUnreadableError("the server sends it encoded", path=file.path)
        told_etag = response.headers.get("ETag")
        if place.own and told_etag is not None and _plain(told_etag) != file.etag:
            raise InputChangedError("is another file now (its ETag)", path=file.path)

    def _place(self, file: TensorFile) -> _Place:
        with self._locks[file.path]:
            place = self._places.get(file.path)
            if place is None:
                found = self._ask(file.path)
                if found != file:
                    raise InputChangedError(
                        "is another file than the one whose header was read", path=file.path
                    )
                place = self._places[file.path]
        return place

    def _ask(self, path: str) -> TensorFile:
        """Ask the Hub for a file's size and ETag, and remember where its bytes are had."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url  # noqa: PLC0415

        from streammerge.hub.trouble import TROUBLES, explain  # noqa: PLC0415

        repo, commit, name = split_path(path)
        url = hf_hub_url(repo, name, revision=commit)
        try:
            told = get_hf_file_metadata(url, timeout=TIMEOUT_SECONDS)
        except TROUBLES as error:
            trouble = explain(error)
            if trouble.again:
                response = getattr(error, "response", None)
                wait = response.headers.get("Retry-After") if response is not None else None
                raise _AgainError(trouble.message, _asked_wait(wait)) from None
            raise InputUnreadableError(trouble.message, path=path, reason=trouble.reason) from None
        if told.commit_hash != commit:
            raise InputChangedError("the Hub answers for another commit", path=path)
        link = urlsplit(told.location)
        if told.size is None or told.etag is None or link.scheme not in ("http", "https"):
            raise InputUnreadableError("the Hub does not say what it is", path=path)
        hub = urlsplit(url)
        own = (link.scheme, link.netloc) == (hub.scheme, hub.netloc)
        self._places[path] = _Place(told.location, own)
        return TensorFile(path, told.size, 0, 0, _plain(told.etag))


def _headers(place: _Place) -> dict[str, str]:
    # Public, as its documentation says.
    from huggingface_hub.utils import build_hf_headers  # type: ignore  # noqa: PLC0415

    headers: dict[str, str] = build_hf_headers(
        token=None if place.own else False, library_name="streammerge"
    )
    return headers | {"Accept-Encoding": "identity"}


def _plain(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')


def _next(waiting: deque[int]) -> int | None:
    try:
        return waiting.popleft()
    except IndexError:
        return None


def _tried(path: str, step: Callable[[], Result], over: threading.Event) -> Result:
    """Return what a step returns, which is tried again after failures that may pass.

    Raises:
        InputUnreadableError: they do not.
    """
    for failed in range(TRIES):
        try:
            return step()
        except _AgainError as error:
            why, wait = str(error), error.wait
        if wait is not None and wait > MAX_WAIT_SECONDS:
            raise InputUnreadableError(
                f"{why}, and asks for a wait of {wait:.0f} s; try later", path=path
            )
        if failed + 1 < TRIES and over.wait(wait or BACKOFF_SECONDS * 2**failed):
            raise InputUnreadableError("is not waited for any more", path=path)
    raise InputUnreadableError(f"{why}, {TRIES} times in a row; try later", path=path)


def _asked_wait(told: str | None) -> float | None:
    """Return the seconds that a Retry-After asks for; None where it asks for none."""
    if told is None:
        return None
    try:
        return max(0.0, float(int(told)))
    except ValueError:
        pass
    try:
        until = parsedate_to_datetime(told)
        return max(0.0, until.timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None
