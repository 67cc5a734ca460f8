"""A Hub on this machine that takes uploads: huggingface_hub talks to it as to the real one.

It keeps repositories in memory, knows two users, and can be told to fail: with a status, or by
cutting the line in the middle of what is sent. It does not speak xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKENS = {"hf_token_of_alice": "alice", "hf_token_of_bob": "bob"}
TOKEN = "hf_token_of_alice"
ORGANIZATIONS = ("u",)
"""Where everybody may write."""

LFS = (".safetensors", ".bin")
PIECE = 64 * 1024


@dataclass
class Fault:
    """What is to go wrong: so often, with requests that match."""

    pattern: str
    """Of "METHOD /path"."""
    status: int | None = None
    """The answer; None cuts the line in the middle of what is sent."""
    times: int = 1
    headers: Mapping[str, str] = field(default_factory=dict)
    message: str = "so it was asked for"


@dataclass
class Repo:
    """A repository: what each commit holds."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    @property
    def head(self) -> str:
        return next(reversed(self.commits))

    @property
    def files(self) -> dict[str, bytes]:
        """What it holds now."""
        return self.commits[self.head]

    def commit(self, files: dict[str, bytes], message: str) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[sha] = files
        self.messages.append(message)
        return sha


class Hub:
    """The state of the server, which tests look into."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.received = 0
        """Bytes of large files."""
        self.url = ""
        self.lock = threading.Lock()

    def make(self, name: str, files: Mapping[str, bytes] | None = None, **more: Any) -> Repo:
        """Make a repository, as it would be after a first commit."""
        repo = self.repos[name] = Repo(**more)
        repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        if files:
            repo.commit({**repo.files, **files}, "files")
        return repo

    def fault(self, request: str) -> Fault | None:
        """Return what is to go wrong with a request, once less from now on."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None


class RefusedError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, url: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.url = url
        self.headers = headers


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        fault = self.hub.fault(request)
        length = int(self.headers.get("content-length") or 0)
        if fault is not None and fault.status is None:
            self.rfile.read(min(length // 2, PIECE))
            self.close_connection = True
            self.connection.shutdown(2)
            return
        body = self.rfile.read(length)
        try:
            if fault is not None:
                raise RefusedError(fault.status or 500, fault.message, **fault.headers)
            for pattern, method in ROUTES:
                found = re.fullmatch(pattern, request)
                if found:
                    method(self, body, *found.groups())
                    return
            raise RefusedError(404, f"no such endpoint: {request}")
        except RefusedError as error:
            headers = {"X-Error-Message": str(error), **error.headers}
            body = {"error": str(error), "url": error.url}
            self._send(json.dumps(body).encode(), error.status, headers)

    def _send(
        self, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any) -> None:
        self._send(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

    # -----------------------------------------------------------------------------------------
    # Who may do what

    def _user(self) -> str | None:
        return TOKENS.get(self.headers.get("authorization", "").removeprefix("Bearer "))

    def _may_write(self, name: str) -> None:
        user = self._user()
        if user is None:
            raise RefusedError(401, "Invalid username or password.")
        owner = _owner(name)
        if owner not in (user, *ORGANIZATIONS):
            raise RefusedError(403, f"You don't have the rights to write to {owner}")

    def _repo(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        hidden = repo is not None and repo.private and self._user() != _owner(name)
        if repo is None or hidden:
            raise RefusedError(404, "Repository not found", **{"X-Error-Code": "RepoNotFound"})
        return repo

    def _files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repo = self._repo(name)
        sha = repo.head if revision == "main" else revision
        if sha not in repo.commits:
            raise RefusedError(404, "Revision not found", **{"X-Error-Code": "RevisionNotFound"})
        return sha, repo.commits[sha]

    # -----------------------------------------------------------------------------------------
    # Endpoints

    def whoami(self, _body: bytes) -> None:
        if self._user() is None:
            raise RefusedError(401, "Invalid username or password.")
        self._json({"name": self._user(), "type": "user", "orgs": []})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        self._may_write(name)
        if name in self.hub.repos:
            raise RefusedError(409, "You already created this model repo", f"{self.hub.url}/{name}")
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.hub.make(name, private=private)
        self._json({"url": f"{self.hub.url}/{name}"})

    def validate_yaml(self, body: bytes) -> None:
        """As the Hub does: a base model is no path."""
        import yaml

        found = re.match(r"---\n(.*?)---", json.loads(body)["content"], flags=re.DOTALL)
        bases = yaml.safe_load(found[1]).get("base_model", []) if found else []
        wrong = [base for base in ([bases] if isinstance(bases, str) else bases) if base[0] in "/."]
        errors = [{"message": f'"base_model" with value "{base}" is not valid'} for base in wrong]
        self._json({"errors": errors, "warnings": []})

    def preupload(self, body: bytes, name: str) -> None:
        self._may_write(name)
        there = self._repo(name).files
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS) else "regular",
                "shouldIgnore": False,
                "oid": _oid(file["path"], there[file["path"]]) if file["path"] in there else None,
            }
            for file in json.loads(body)["files"]
        ]
        self._json({"files": modes})

    def lfs_batch(self, body: bytes, name: str) -> None:
        self._may_write(name)
        objects: list[dict[str, Any]] = []
        for asked in json.loads(body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.lfs:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise RefusedError(400, "another checksum")
        self.hub.received += len(body)
        self.hub.lfs[oid] = body
        self._send(b"")

    def commit(self, body: bytes, name: str) -> None:
        self._may_write(name)
        repo = self._repo(name)
        files, message = dict(repo.files), ""
        for line in body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, repo.head):
                    raise RefusedError(412, "A commit has happened since. Please refresh")
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(files, message)
        url = f"{self.hub.url}/{name}/commit/{sha}"
        self._json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def info(self, _body: bytes, name: str, revision: str | None) -> None:
        sha, files = self._files(name, revision or "main")
        siblings = [{"rfilename": path, "size": len(data)} for path, data in files.items()]
        private = self._repo(name).private
        self._json({"id": name, "sha": sha, "private": private, "siblings": siblings})

    def tree(self, _body: bytes, name: str, revision: str) -> None:
        _, files = self._files(name, revision)
        self._json(
            [
                {"type": "file", "path": path, "size": len(data), "oid": _oid(path, data)}
                for path, data in files.items()
            ]
        )

    def resolve(self, _body: bytes, name: str, revision: str, path: str) -> None:
        sha, files = self._files(name, revision)
        if path not in files:
            raise RefusedError(404, "Entry not found", **{"X-Error-Code": "EntryNotFound"})
        data = files[path]
        self._send(data, headers={"ETag": f'"{_oid(path, data)}"', "X-Repo-Commit": sha})


_NAME = r"([\w.-]+/[\w.-]+)"

ROUTES: list[tuple[str, Any]] = [
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate_yaml),
    (rf"POST /api/models/{_NAME}/preupload/main", Handler.preupload),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (r"PUT /lfs/(\w+)", Handler.lfs_put),
    (rf"POST /api/models/{_NAME}/commit/main", Handler.commit),
    (rf"GET /api/models/{_NAME}(?:/revision/([\w.-]+))?", Handler.info),
    (rf"GET /api/models/{_NAME}/tree/([\w.-]+)", Handler.tree),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/([\w.-]+)/(.+)", Handler.resolve),
]


def _owner(name: str) -> str:
    return name.split("/", maxsplit=1)[0]


def _oid(path: str, data: bytes) -> str:
    if path.endswith(LFS):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    """Run a Hub of its own on a free port."""
    hub = Hub()
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def environment(hub: Hub, home: Any, token: str | None = TOKEN) -> dict[str, str]:
    """Return the variables with which a process takes this Hub for the real one."""
    variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    variables |= {"TRANSFORMERS_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    variables |= {"HF_HUB_DISABLE_TELEMETRY": "1"}
    return variables | ({"HF_TOKEN": token} if token else {})
