"""A small Hub on loopback: repositories with revisions, metadata, files, ranges, and faults.

Two real HTTP servers: the Hub itself, and the "CDN" on another port that large files are redirected
to by signed links. Every request is logged with the bytes of its answer's body.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants

from streammerge.hub import ranges

LARGE = 1024
"""Files of more bytes lie on the CDN, as the Hub's large files do."""

HUB, CDN = "hub", "cdn"


@dataclass(frozen=True)
class Request:
    """One request as it was answered."""

    server: str
    """HUB or CDN."""
    method: str
    path: str
    range: str | None
    authorized: bool
    """Whether it carried an Authorization header."""
    status: int
    sent: int
    """Bytes of the answer's body that were sent."""


@dataclass
class Fault:
    """What goes wrong with requests that match, the next `times` of them."""

    server: str
    match: str
    """Found in the method and path, such as "GET /user/repo/resolve/"."""
    times: int = 1
    status: int = 0
    """Answer with it and nothing else; 0: answer as usual, but for what follows."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Instead of, or beside, the usual ones."""
    cut_after: int | None = None
    """Bytes of the body after which the connection is cut."""
    cut_request_after: int | None = None
    """Bytes of the request's body after which the connection is cut, without an answer."""
    ignore_range: bool = False
    delay: float = 0.0
    """Seconds before the answer; ended by the server's end."""


@dataclass
class Repository:
    """Its commits, what its branches name, and who may read it."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    """Private, but for requests with this token."""
    gated: bool = False
    """Seen by all; files are had by nobody."""

    def commit(self, revision: str) -> str | None:
        """The commit that a branch, a tag or a commit names."""
        return revision if revision in self.commits else self.refs.get(revision)


class HubServer:
    """Both servers, started; a context manager that ends them."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.signature = 1
        """What links to the CDN are signed with; raised, the older ones have expired."""
        self.over = threading.Event()
        self.together = {HUB: 0, CDN: 0}
        self.most = {HUB: 0, CDN: 0}
        self.lock = threading.Lock()
        self._servers = {name: _Server(self, name) for name in (HUB, CDN)}

    def __enter__(self) -> HubServer:
        for server in self._servers.values():
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for server in self._servers.values():
            server.shutdown()
            server.server_close()

    @property
    def url(self) -> str:
        """The Hub's address, as HF_ENDPOINT has it."""
        return f"http://127.0.0.1:{self._servers[HUB].server_port}"

    @property
    def cdn_url(self) -> str:
        """The CDN's address."""
        return f"http://localhost:{self._servers[CDN].server_port}"

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """The environment variables that have a process use this Hub, and a cache of its own."""
        found = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        return found | ({"HF_TOKEN": token} if token else {})

    def use(self, patch: pytest.MonkeyPatch, home: Path, token: str | None = None) -> None:
        """Have this process use this Hub and a cache of its own, and no token but this."""
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            patch.delenv(name, raising=False)
        for name, value in self.environment(home, token).items():
            patch.setenv(name, value)
        # What the client has read of its environment when it was imported.
        template = f"{self.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for name, constant in {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
            "AGENT_HARNESSES_PATH": str(home / "agents"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }.items():
            patch.setattr(constants, name, constant, raising=False)
        patch.setattr(ranges, "BACKOFF_SECONDS", 0.01)

    def add(
        self, name: str, files: Mapping[str, bytes] | Path, branch: str = "main", **options: Any
    ) -> str:
        """Commit files to a repository, which is made if it is new, and return the commit.

        Args:
            name: such as "user/repo".
            files: by path, or a local folder of them.
            branch: what names the commit from now on.
            options: `token` and `gated` of the repository.
        """
        if isinstance(files, Path):
            files = {
                str(path.relative_to(files)): path.read_bytes()
                for path in sorted(files.rglob("*"))
                if path.is_file()
            }
        with self.lock:
            repository = self.repositories.setdefault(name, Repository())
            vars(repository).update(options)
            text = repr((name, len(repository.commits), sorted(files))).encode()
            commit = hashlib.sha1(text).hexdigest()
            repository.commits[commit] = dict(files)
            repository.refs[branch] = commit
        return commit

    def fail(self, server: str, match: str, **what: Any) -> Fault:
        """Have requests fail; see Fault."""
        fault = Fault(server, match, **what)
        self.faults.append(fault)
        return fault

    def sent(self, match: str = "", server: str = "") -> int:
        """Bytes of bodies sent in answer to requests whose method and path hold `match`."""
        return sum(r.sent for r in self.requests(match, server))

    def requests(self, match: str = "", server: str = "") -> list[Request]:
        """The requests whose method and path hold `match`."""
        return [
            request
            for request in self.log
            if match in f"{request.method} {request.path}" and server in ("", request.server)
        ]

    def most_together(self, server: str) -> int:
        """How many requests it has had in hand at once, at most."""
        return self.most[server]

    def count(self, server: str, change: int) -> None:
        """Count the requests in hand."""
        with self.lock:
            self.together[server] += change
            self.most[server] = max(self.most[server], self.together[server])

    def blob(self, digest: str) -> bytes | None:
        """A large file's content by its sha256."""
        for repository in self.repositories.values():
            for files in repository.commits.values():
                for content in files.values():
                    if len(content) > LARGE and sha256(content) == digest:
                        return content
        return None

    def take_fault(self, server: str, request: str) -> Fault | None:
        """The fault that a request meets, which is used up by one."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.server == server and fault.match in request:
                    fault.times -= 1
                    return fault
        return None


@lru_cache(maxsize=1024)
def sha256(content: bytes) -> str:
    """What the Hub calls a large file by."""
    return hashlib.sha256(content).hexdigest()


def git_blob(content: bytes) -> str:
    """What the Hub calls a small file by."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, hub: HubServer, name: str) -> None:
        self.hub = hub
        self.name = name
        super().__init__(("127.0.0.1", 0), Handler)

    def handle_error(self, *_: object) -> None:
        """Say nothing: clients that hang up are a part of the tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.hub = self.server.hub
        self.fault: Fault | None = None

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.hub.count(self.server.name, 1)
        try:
            self._route()
        finally:
            self.hub.count(self.server.name, -1)

    def _route(self) -> None:
        self.fault = self.hub.take_fault(self.server.name, f"{self.command} {self.path}")
        if self.fault is not None and self.fault.cut_request_after is not None:
            self.rfile.read(self.fault.cut_request_after)
            self._cut()
            return
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        if self.fault is not None:
            self.hub.over.wait(self.fault.delay)
            if self.fault.status:
                self.send(self.fault.status)
                return
        parts = urlsplit(self.path)
        path, query = parts.path, parse_qs(parts.query)
        for server, pattern, answer in ROUTES:
            found = re.fullmatch(pattern, path) if server == self.server.name else None
            if found:
                answer(self, query, *(unquote(part or "") for part in found.groups()))
                return
        self.send(404)

    def send(
        self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> None:
        """Answer; a fault may change the headers and cut the body."""
        sent = b"" if self.command == "HEAD" else body
        fault = self.fault
        if fault is not None and fault.cut_after is not None:
            sent = sent[: fault.cut_after]
        # Before it is sent: who has the answer may look at the log.
        with self.hub.lock:
            self.hub.log.append(
                Request(
                    server=self.server.name,
                    method=self.command,
                    path=self.path,
                    range=self.headers.get("Range"),
                    authorized="Authorization" in self.headers,
                    status=status,
                    sent=len(sent),
                )
            )
        with suppress(OSError):
            self.send_response(status)
            merged = {"Content-Length": str(len(body)), **(headers or {})}
            for name, value in {**merged, **(fault.headers if fault else {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(sent)
            self.wfile.flush()
        if self.command != "HEAD" and len(sent) < len(body):
            self._cut()

    def _cut(self) -> None:
        # With a reset, as a broken network does; what was sent arrives first.
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))

    def send_json(self, value: Any, headers: Mapping[str, str] | None = None) -> None:
        """Answer with JSON."""
        body = json.dumps(value).encode()
        self.send(200, body, {"Content-Type": "application/json", **(headers or {})})

    def refuse(self, status: int, code: str, message: str, body: bytes = b"") -> None:
        """Answer with one of the Hub's own errors."""
        self.send(status, body, {"X-Error-Code": code, "X-Error-Message": message})

    def send_content(self, content: bytes, headers: Mapping[str, str]) -> None:
        """Answer with a file, or the range of it that was asked for."""
        headers = {"Accept-Ranges": "bytes", **headers}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None or (self.fault and self.fault.ignore_range):
            self.send(200, content, headers)
            return
        start, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if start >= len(content):
            self.send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        headers["Content-Range"] = f"bytes {start}-{last}/{len(content)}"
        self.send(206, content[start : last + 1], headers)

    def find(self, name: str, revision: str) -> tuple[Repository, str] | None:
        """The repository and the commit; None if the request was refused."""
        repository = self.hub.repositories.get(name)
        bearer = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repository is None or repository.token not in (None, bearer):
            # The Hub does not say whether a private repository is there.
            self.refuse(401, "RepoNotFound", "Repository not found")
            return None
        commit = repository.commit(revision)
        if commit is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repository, commit


def _info(handler: Handler, query: Mapping[str, Any], name: str, revision: str = "main") -> None:
    found = handler.find(name, revision)
    if found is None:
        return
    repository, commit = found
    siblings: list[dict[str, Any]] = [{"rfilename": path} for path in repository.commits[commit]]
    if "blobs" in query:
        siblings = [
            {"rfilename": path, **_blob(content)}
            for path, content in repository.commits[commit].items()
        ]
    handler.send_json(
        {
            "_id": "0" * 24,
            "id": name,
            "modelId": name,
            "author": name.split("/", maxsplit=1)[0],
            "sha": commit,
            "private": repository.token is not None,
            "gated": "auto" if repository.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": siblings,
        }
    )


def _blob(content: bytes) -> dict[str, Any]:
    facts: dict[str, Any] = {"size": len(content), "blobId": git_blob(content)}
    if len(content) > LARGE:
        facts["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 134}
    return facts


def _tree(
    handler: Handler, query: Mapping[str, Any], name: str, revision: str, folder: str = ""
) -> None:
    found = handler.find(name, revision)
    if found is None:
        return
    repository, commit = found
    files, prefix = repository.commits[commit], f"{folder}/" if folder else ""
    if prefix and not any(path.startswith(prefix) for path in files):
        handler.refuse(404, "EntryNotFound", "Entry not found")
        return
    entries: dict[str, dict[str, Any]] = {}
    for path, content in files.items():
        if not path.startswith(prefix):
            continue
        inner = path[len(prefix) :].split("/")
        for depth in range(1, len(inner)):
            parent = prefix + "/".join(inner[:depth])
            entries[parent] = {"type": "directory", "path": parent, "size": 0, "oid": "0" * 40}
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_blob(content)}
        if len(content) > LARGE:
            entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
        entries[path] = entry
    deep = "true" in [value.lower() for value in query.get("recursive", [])]
    shown = [e for e in entries.values() if deep or "/" not in e["path"][len(prefix) :]]
    handler.send_json(shown)


def _resolve(
    handler: Handler, _query: Mapping[str, Any], name: str, revision: str, path: str
) -> None:
    found = handler.find(name, revision)
    if found is None:
        return
    repository, commit = found
    if repository.gated:
        handler.refuse(403, "GatedRepo", "Access to it is restricted")
        return
    content = repository.commits[commit].get(path)
    if content is None:
        headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
        handler.send(404, b"", headers)
        return
    headers = {"X-Repo-Commit": commit, "ETag": f'"{git_blob(content)}"'}
    if len(content) <= LARGE:
        handler.send_content(content, headers)
        return
    digest = sha256(content)
    headers["X-Linked-Etag"] = f'"{digest}"'
    headers["X-Linked-Size"] = str(len(content))
    headers["Location"] = f"{handler.hub.cdn_url}/blobs/{digest}?Signature={handler.hub.signature}"
    handler.send(302, b"", headers)


def _cdn(handler: Handler, query: Mapping[str, Any], digest: str) -> None:
    content = handler.hub.blob(digest)
    if query.get("Signature") != [str(handler.hub.signature)]:
        handler.send(403)
    elif content is None:
        handler.send(404)
    else:
        handler.send_content(content, {"ETag": f'"cdn-{digest[:16]}"'})


REPO = r"([^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    (HUB, rf"/api/models/{REPO}", _info),
    (HUB, rf"/api/models/{REPO}/revision/(.+)", _info),
    (HUB, rf"/api/models/{REPO}/tree/([^/]+)(?:/(.+))?", _tree),
    (HUB, rf"/{REPO}/resolve/([^/]+)/(.+)", _resolve),
    (CDN, r"/blobs/([0-9a-f]{64})", _cdn),
]
"""By server and path: what answers. Added to by tests that need more of a Hub."""
