"""The small Hub's other half: it makes repositories and takes uploads, from two users.

It does not speak xet, so that large files come by the protocol of git-lfs.
"""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from hub_server import HUB, LARGE, REPO, ROUTES, Handler, HubServer, Repository, git_blob, sha256

TOKENS = {"hf_token_of_alice": "alice", "hf_token_of_bob": "bob"}
TOKEN = "hf_token_of_alice"
ORGANIZATIONS = ("u",)
"""Where both may write."""


class Hub(HubServer):
    """A Hub that takes uploads."""

    def __init__(self) -> None:
        super().__init__()
        self.arrived: dict[str, bytes] = {}
        """Large files by their sha256, committed or not."""
        self.puts: Counter[str] = Counter()
        """How often each of them was sent to its end."""
        self.messages: list[str] = []
        """Of the commits."""

    def head(self, name: str) -> str:
        """The last commit of a repository."""
        return self.repositories[name].refs["main"]

    def files(self, name: str) -> dict[str, bytes]:
        """What a repository holds now."""
        return self.repositories[name].commits[self.head(name)]

    def is_private(self, name: str) -> bool:
        """Whether only its owner sees a repository."""
        return self.repositories[name].token is not None

    def knows(self, digest: str) -> bool:
        """Whether a large file is here."""
        return digest in self.arrived or self.blob(digest) is not None

    def variables(self, home: Path) -> dict[str, str]:
        """The environment variables of a process of alice's."""
        return self.environment(home, TOKEN) | {"TRANSFORMERS_OFFLINE": "0"}


@contextmanager
def serving() -> Iterator[Hub]:
    """Run a Hub of its own."""
    with Hub() as hub:
        yield hub


def _user(handler: Handler) -> str | None:
    return TOKENS.get(_bearer(handler))


def _bearer(handler: Handler) -> str:
    return handler.headers.get("Authorization", "").removeprefix("Bearer ")


def _may_write(handler: Handler, name: str) -> bool:
    """Whether a request may write; answer it if not."""
    user, owner = _user(handler), name.split("/", maxsplit=1)[0]
    if user is None:
        handler.refuse(401, "", "Invalid username or password.")
    elif owner not in (user, *ORGANIZATIONS):
        handler.refuse(403, "", f"You don't have the rights to write to {owner}")
    else:
        return True
    return False


def _found(handler: Handler, name: str) -> tuple[Repository, dict[str, bytes]] | None:
    """The repository and its files; None if the request may not write there."""
    found = handler.find(name, "main") if _may_write(handler, name) else None
    return None if found is None else (found[0], found[0].commits[found[1]])


def _whoami(handler: Handler, _query: Mapping[str, Any]) -> None:
    if _user(handler) is None:
        handler.refuse(401, "", "Invalid username or password.")
    else:
        handler.send_json({"name": _user(handler), "type": "user", "orgs": []})


def _create(handler: Handler, _query: Mapping[str, Any]) -> None:
    asked = json.loads(handler.body)
    name = f"{asked['organization']}/{asked['name']}"
    if not _may_write(handler, name):
        return
    url = f"{handler.hub.url}/{name}"
    if name in handler.hub.repositories:
        body = json.dumps({"error": "You already created it", "url": url}).encode()
        handler.refuse(409, "", "You already created this model repo", body)
        return
    private = asked.get("private") is True or asked.get("visibility") == "private"
    token = _bearer(handler) if private else None
    handler.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, token=token)
    handler.send_json({"url": url})


def _validate_yaml(handler: Handler, _query: Mapping[str, Any]) -> None:
    """A base model is no path, says the Hub."""
    found = re.match(r"---\n(.*?)---", json.loads(handler.body)["content"], flags=re.DOTALL)
    bases = yaml.safe_load(found[1]).get("base_model", []) if found else []
    wrong = [base for base in ([bases] if isinstance(bases, str) else bases) if base[0] in "/.~"]
    errors = [{"message": f'"base_model" with value "{base}" is not valid'} for base in wrong]
    handler.send_json({"errors": errors, "warnings": []})


def _preupload(handler: Handler, _query: Mapping[str, Any], name: str) -> None:
    found = _found(handler, name)
    if found is None:
        return
    _, there = found
    modes = []
    for file in json.loads(handler.body)["files"]:
        path, content = file["path"], there.get(file["path"])
        modes.append(
            {
                "path": path,
                "uploadMode": "lfs" if file["size"] > LARGE else "regular",
                "shouldIgnore": False,
                "oid": None if content is None else _oid(content),
            }
        )
    handler.send_json({"files": modes})


def _oid(content: bytes) -> str:
    return sha256(content) if len(content) > LARGE else git_blob(content)


def _batch(handler: Handler, _query: Mapping[str, Any], name: str) -> None:
    if _found(handler, name) is None:
        return
    objects: list[dict[str, Any]] = []
    for asked in json.loads(handler.body)["objects"]:
        answer = {"oid": asked["oid"], "size": asked["size"]}
        if not _hub(handler).knows(asked["oid"]):
            answer["actions"] = {"upload": {"href": f"{handler.hub.url}/lfs/{asked['oid']}"}}
        objects.append(answer)
    handler.send_json({"transfer": "basic", "objects": objects})


def _put(handler: Handler, _query: Mapping[str, Any], digest: str) -> None:
    if sha256(handler.body) != digest:
        handler.refuse(400, "", "another checksum")
        return
    _hub(handler).puts[digest] += 1
    _hub(handler).arrived[digest] = handler.body
    handler.send(200)


def _commit(handler: Handler, _query: Mapping[str, Any], name: str) -> None:
    found = _found(handler, name)
    if found is None:
        return
    hub, (repository, there) = _hub(handler), found
    files = dict(there)
    for line in handler.body.splitlines():
        operation = json.loads(line)
        key, value = operation["key"], operation["value"]
        if key == "header":
            if value.get("parentCommit") not in (None, repository.refs["main"]):
                handler.refuse(412, "", "A commit has happened since. Please refresh")
                return
            hub.messages.append(value["summary"])
        elif key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            digest = value["oid"]
            files[value["path"]] = hub.arrived.get(digest) or hub.blob(digest) or b""
        elif key == "deletedFile":
            del files[value["path"]]
    sha = hub.add(name, files)
    url = f"{hub.url}/{name}/commit/{sha}"
    handler.send_json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})


def _hub(handler: Handler) -> Hub:
    assert isinstance(handler.hub, Hub)
    return handler.hub


ROUTES += [
    (HUB, r"/api/whoami-v2", _whoami),
    (HUB, r"/api/repos/create", _create),
    (HUB, r"/api/validate-yaml", _validate_yaml),
    (HUB, rf"/api/models/{REPO}/preupload/main", _preupload),
    (HUB, rf"/{REPO}\.git/info/lfs/objects/batch", _batch),
    (HUB, r"/lfs/([0-9a-f]{64})", _put),
    (HUB, rf"/api/models/{REPO}/commit/main", _commit),
]
