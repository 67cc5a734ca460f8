"""Adapters on the Hub: ids, downloads, streams, and what goes wrong, against a real server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants

import streammerge
from clocks import within
from clusters import LocalCluster
from hub_server import CDN, HUB, HubServer
from making import (
    CONFIG,
    INDEX,
    PREFIX,
    WEIGHTS,
    contents,
    encode,
    frame,
    linear,
    make_config,
    make_factors,
    write_adapter,
    write_shards,
)
from streammerge import events
from streammerge.errors import (
    AdapterError,
    BudgetError,
    CorruptFileError,
    HubError,
    InputChangedError,
    InputUnreadableError,
    MissingFileError,
    ResumeError,
    StoppedError,
)
from streammerge.hub import find_id, parse_id, ranges
from streammerge.output.record import RECIPE_NAME
from streammerge.readers.remote import FIRST_BYTES
from streammerge.recipe_file import read_recipe

LAYERS = {f"layer.{i}.{name}": linear(96, 64, 8) for i in range(3) for name in ("q", "v")}
IDS = ["ann/one", "ann/two"]
TOKEN = "hf_not_to_be_seen_anywhere"
SECRETS = (TOKEN, "Signature")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.use(monkeypatch, tmp_path / "home")
        yield server


@pytest.fixture
def adapters(hub: HubServer, tmp_path: Path) -> list[Path]:
    """Two adapters on this machine, which are also on the Hub."""
    paths = [write_adapter(tmp_path / f"local{i}", LAYERS, seed=i) for i in range(2)]
    for name, path in zip(IDS, paths, strict=True):
        hub.add(name, path)
    return paths


def merged(adapters: list[Any], output: Path, **options: Any) -> dict[str, bytes | None]:
    """The weights and the config of a merge."""
    options = {"method": "linear", "on_event": events.ignore} | options
    streammerge.merge(adapters, output, **options)
    return {name: contents(output)[name] for name in (WEIGHTS, CONFIG)}


class TestIds:
    @pytest.mark.parametrize(
        ("text", "parts"),
        [
            ("user/repo", ("user/repo", "", "main")),
            ("user/repo@v1.0", ("user/repo", "", "v1.0")),
            ("user/repo@refs/pr/1", ("user/repo", "", "refs/pr/1")),
            ("user/repo/some/folder", ("user/repo", "some/folder", "main")),
            ("user/repo/some@refs/pr/12", ("user/repo", "some", "refs/pr/12")),
            ("hf://user/repo@main", ("user/repo", "", "main")),
            ("user/re.po_-x/a.safetensors", ("user/re.po_-x", "a.safetensors", "main")),
        ],
    )
    def test_an_id(self, text: str, parts: tuple[str, str, str]) -> None:
        found = find_id(text)
        assert found is not None
        assert (found.repo, found.inner, found.revision) == parts

    @pytest.mark.parametrize(
        "text",
        [
            "adapter",
            "./user/repo",
            "../user/repo",
            "/user/repo",
            "~/user/repo",
            "user\\repo/x",
            ".hidden/repo",
            "user/repo.safetensors",
            "user/repo/../../etc",
            "user/repo@",
            "user/repo@../x",
            "user/repo@a b",
            "user//repo",
            "user/repo/",
            "a--b/repo",
            "user/" + "r" * 97,
            "tcp://host:1/x",
        ],
    )
    def test_what_is_none_is_a_path(self, text: str) -> None:
        assert find_id(text) is None

    def test_what_is_here_wins(
        self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        hub.add("ann/one", write_adapter(tmp_path / "other", LAYERS))
        write_adapter(tmp_path / "ann" / "one", {"here": linear(4, 4, 2)})
        assert streammerge.open_adapter("ann/one").target(0) == "here"
        assert not hub.log
        assert len(streammerge.open_adapter("hf://ann/one")) == len(LAYERS)

    @pytest.mark.parametrize("text", ["hf://user", "hf://user/repo/../x", "hf://-/x", "hf://"])
    def test_what_begins_like_one_and_is_none(self, text: str) -> None:
        with pytest.raises(HubError, match="no id of the Hub") as caught:
            parse_id(text)
        assert caught.value.reason == "id"

    def test_a_path_never_goes_to_the_net(self, hub: HubServer) -> None:
        with pytest.raises(MissingFileError, match="no such file"):
            streammerge.open_adapter("./ann/one")
        assert not hub.log


@pytest.mark.usefixtures("adapters")
class TestReading:
    def test_only_config_and_header_are_read(self, hub: HubServer, tmp_path: Path) -> None:
        size = FIRST_BYTES * 4
        large = {f"layer.{i}": linear(size // 128, 64, 8) for i in range(2)}
        hub.add("ann/large", write_adapter(tmp_path / "large", large))
        found = streammerge.open_adapter("ann/large")
        assert found.path == "ann/large"
        assert found.origin is not None
        assert found.origin.commit == hub.repositories["ann/large"].refs["main"]
        assert hub.sent(server=CDN) == FIRST_BYTES
        assert not (tmp_path / "home").exists()

    def test_a_header_longer_than_the_first_guess(self, hub: HubServer, tmp_path: Path) -> None:
        layers = {f"layer.{'x' * 200}.{i}": linear(4, 4, 1) for i in range(300)}
        local = write_adapter(tmp_path / "long", layers)
        hub.add("ann/long", local)
        assert len(streammerge.open_adapter("ann/long")) == 300
        # The config is long too, and comes first.
        sizes = [request.sent for request in hub.requests(server=CDN)][1:]
        header = 8 + int.from_bytes((local / WEIGHTS).read_bytes()[:8], "little")
        assert sizes == [FIRST_BYTES, header - FIRST_BYTES]

    def test_the_columns_are_those_of_the_local_copy(self, adapters: list[Path]) -> None:
        here, there = (streammerge.open_adapter(p) for p in (adapters[0], IDS[0]))
        assert all(
            (a == b).all()
            for a, b in zip(vars(here.columns).values(), vars(there.columns).values(), strict=True)
        )
        assert here.config == there.config

    @pytest.mark.parametrize("inner", ["deep/er", f"deep/er/{WEIGHTS}"])
    def test_a_folder_or_a_file_of_a_revision(
        self, hub: HubServer, tmp_path: Path, inner: str
    ) -> None:
        write_adapter(tmp_path / "tree" / "deep" / "er", {"inside": linear(4, 4, 2)})
        commit = hub.add("ann/tree", tmp_path / "tree", "refs/pr/1")
        for revision in ("refs/pr/1", commit):
            found = streammerge.open_adapter(f"ann/tree/{inner}@{revision}")
            assert found.target(0) == "inside"
            assert found.config is not None

    def test_shards(self, hub: HubServer, tmp_path: Path) -> None:
        factors = list(make_factors(LAYERS).items())
        shards = {"s-1.safetensors": dict(factors[:5]), "s-2.safetensors": dict(factors[5:])}
        local = write_shards(tmp_path / "shards", shards, make_config(LAYERS))
        hub.add("ann/shards", local)
        expected = merged([local], tmp_path / "from-local")
        assert merged(["ann/shards"], tmp_path / "streamed", stream=True) == expected
        assert not (tmp_path / "home").exists()
        assert merged(["ann/shards"], tmp_path / "downloaded") == expected
        assert sorted(p.name for p in (tmp_path / "home").rglob("snapshots/*/*")) == sorted(
            [CONFIG, INDEX, *shards]
        )

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (frame(b"{", b"x" * 2000), "not JSON"),
            ((2**40).to_bytes(8, "little") + b"x" * 2000, "does not begin with"),
            ((10**7).to_bytes(8, "little") + b"x" * 2000, "truncated inside its header"),
            (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
            (b"", "too short"),
        ],
    )
    def test_hostile_headers(self, hub: HubServer, content: bytes, says: str) -> None:
        hub.add("bad/one", {WEIGHTS: content, CONFIG: b'{"peft_type": "LORA"}'})
        with pytest.raises(CorruptFileError, match=says) as caught:
            streammerge.open_adapter("bad/one")
        assert "bad/one@" in str(caught.value)

    def test_the_command_line_inspects_ids(self, hub: HubServer, tmp_path: Path) -> None:
        run = cli(hub, tmp_path, "inspect", IDS[0], "--json")
        assert run.returncode == 0, run.stderr
        assert json.loads(run.stdout)[0]["targets"] == len(LAYERS)


def cli(
    hub: HubServer, folder: Path, *arguments: str, token: str | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "streammerge.cli", *arguments],
        env={**os.environ, **hub.environment(folder / "home", token)},
        capture_output=True,
        text=True,
        check=False,
    )


class TestDownloads:
    def test_once_and_only_what_is_needed(
        self, hub: HubServer, adapters: list[Path], tmp_path: Path
    ) -> None:
        commit = hub.add("ann/one", {**files_of(adapters[0]), "model.bin": b"x" * 5000})
        heard: list[events.Event] = []
        first = merged(IDS, tmp_path / "first", on_event=heard.append)
        assert first == merged(adapters, tmp_path / "local")
        told = [event for event in heard if isinstance(event, events.Downloaded)]
        assert {event.path for event in told} >= {f"ann/one@{commit}/{WEIGHTS}"}
        cached = {p.name for p in (tmp_path / "home").rglob("snapshots/*/*")}
        assert cached == {CONFIG, WEIGHTS}
        hub.log.clear()
        assert merged(IDS, tmp_path / "second") == first
        assert [request.method for request in hub.log if "resolve" in request.path] == []

    @pytest.mark.usefixtures("adapters")
    def test_offline(
        self,
        hub: HubServer,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        expected = merged(IDS, tmp_path / "first")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        hub.log.clear()
        assert merged(IDS, tmp_path / "second") == expected
        with pytest.raises(HubError, match="not in the cache") as caught:
            streammerge.plan(["ann/other"])
        assert caught.value.reason == "offline"
        assert not hub.log

    def test_a_refusal_comes_before_the_download(
        self, adapters: list[Path], tmp_path: Path
    ) -> None:
        assert adapters
        with pytest.raises(BudgetError):
            merged(IDS, tmp_path / "out", max_memory="1MiB")
        assert not (tmp_path / "home").exists()

    def test_a_plan_downloads_nothing(self, adapters: list[Path], tmp_path: Path) -> None:
        there, here = streammerge.plan(IDS), streammerge.plan(adapters)
        assert there.tasks == here.tasks
        assert not (tmp_path / "home").exists()

    def test_a_pickle_is_downloaded_to_be_read(
        self, hub: HubServer, adapters: list[Path], tmp_path: Path
    ) -> None:
        import torch
        from safetensors.torch import load_file

        torch.save(load_file(adapters[0] / WEIGHTS), tmp_path / "pickle.bin")
        pickled = {
            "adapter_model.bin": (tmp_path / "pickle.bin").read_bytes(),
            CONFIG: (adapters[0] / CONFIG).read_bytes(),
        }
        hub.add("ann/pickled", pickled)
        with pytest.raises(HubError, match=r"pickled.*drop --stream"):
            streammerge.plan(["ann/pickled"], stream=True)
        expected = merged([adapters[0]], tmp_path / "local")
        assert merged(["ann/pickled"], tmp_path / "out") == expected

    def test_the_record_names_the_commit(
        self, hub: HubServer, adapters: list[Path], tmp_path: Path
    ) -> None:
        merged([IDS[0], adapters[1]], tmp_path / "out", stream=True)
        inputs = json.loads((tmp_path / "out" / "streammerge.json").read_bytes())["inputs"]
        assert inputs[0]["path"] == "ann/one"
        assert inputs[0]["commit"] == hub.repositories["ann/one"].refs["main"]
        assert "commit" not in inputs[1]

    def test_the_recipe_of_an_output_means_the_same_commit(
        self, hub: HubServer, adapters: list[Path], tmp_path: Path
    ) -> None:
        expected = merged([IDS[0], adapters[1]], tmp_path / "out", stream=True)
        hub.add("ann/one", adapters[1])
        recipe = read_recipe(tmp_path / "out" / RECIPE_NAME)
        assert recipe.adapters[0].startswith("ann/one@")
        assert merged([*recipe.adapters], tmp_path / "again", stream=True) == expected


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class TestRefusals:
    @pytest.mark.parametrize(
        ("what", "reason", "says"),
        [
            ("ann/none", "repository", "neither here nor a repository"),
            ("ann/private", "repository", "HF_TOKEN"),
            ("ann/gated", "gated", "granted"),
            ("ann/one@v9", "revision", "no such revision"),
            ("ann/one/deep", "file", "no 'deep' in ann/one"),
            ("ann/empty", "file", "no adapter_model.safetensors"),
        ],
    )
    def test_said_before_any_work(
        self,
        hub: HubServer,
        adapters: list[Path],
        tmp_path: Path,
        what: str,
        reason: str,
        says: str,
    ) -> None:
        hub.add("ann/private", adapters[0], token=TOKEN)
        hub.add("ann/gated", adapters[0], gated=True)
        hub.add("ann/empty", {"README.md": b""})
        with pytest.raises(HubError, match=says) as caught:
            merged([adapters[0], what], tmp_path / "out")
        assert caught.value.reason == reason
        assert caught.value.exit_code == 2
        assert "ann/" in str(caught.value)
        assert not (tmp_path / "out").exists()

    def test_several_files_of_weights(self, hub: HubServer, adapters: list[Path]) -> None:
        content = (adapters[0] / WEIGHTS).read_bytes()
        hub.add("ann/several", {"a.safetensors": content, "b.safetensors": content})
        with pytest.raises(AdapterError, match="name the one that is meant"):
            streammerge.plan(["ann/several"])

    def test_too_many_requests(self, hub: HubServer) -> None:
        hub.fail(HUB, "GET /api/models", status=429, times=9, headers={"Retry-After": "1"})
        with pytest.raises(HubError, match=r"no path here; .*429.*wait") as caught:
            streammerge.plan(["ann/one"])
        assert caught.value.reason == "busy"

    def test_nobody_answers(self, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        assert hub.url
        with pytest.raises(HubError, match="cannot be reached") as caught:
            streammerge.plan(["ann/one"])
        assert caught.value.reason == "network"

    def test_a_private_one_with_a_token(
        self, hub: HubServer, adapters: list[Path], tmp_path: Path
    ) -> None:
        hub.add("ann/private", adapters[0], token=TOKEN)
        out = tmp_path / "out"
        run = cli(
            hub, tmp_path, "merge", "ann/private", str(adapters[1]), "-o", str(out), "--stream",
            "--method", "linear", token=TOKEN,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        assert contents(out)[WEIGHTS] == merged(adapters, tmp_path / "local")[WEIGHTS]
        # What is signed gets no token; and nobody is told of it.
        assert {request.authorized for request in hub.requests("resolve", HUB)} == {True}
        assert {request.authorized for request in hub.requests(server=CDN)} == {False}
        told = [run.stdout.encode(), run.stderr.encode(), *filter(None, contents(out).values())]
        assert not any(secret.encode() in text for text in told for secret in SECRETS)
        assert not list((tmp_path / "home").rglob("*"))


class TestStream:
    @pytest.mark.parametrize(
        ("method", "options"),
        [("linear", {}), ("ties_svd", {"density": 0.3}), ("svd", {"rank": 4}), ("cat", {})],
    )
    def test_same_bytes_and_nothing_read_twice_or_stored(
        self, hub: HubServer, tmp_path: Path, method: str, options: dict[str, Any]
    ) -> None:
        layers = {f"layer.{i}": linear(1024, 768, 16) for i in range(3)}
        paths = [write_adapter(tmp_path / f"a{i}", layers, seed=i) for i in range(3)]
        ids = [f"bob/a{i}" for i in range(3)]
        for name, path in zip(ids, paths, strict=True):
            hub.add(name, path)
        options = {"method": method, "max_memory": "600MiB", **options}
        expected = merged(paths, tmp_path / "local", **options)
        plan = streammerge.plan(ids, stream=True, **options)
        hub.log.clear()
        assert merged(ids, tmp_path / "streamed", stream=True, **options) == expected
        headers = FIRST_BYTES * len(ids)
        needed = sum(task.read_bytes for task in plan.tasks)
        assert needed <= hub.sent(server=CDN) <= 1.05 * needed + headers
        # A and B in one request for each target and adapter.
        assert len(hub.requests(server=CDN)) == len(ids) * (1 + len(layers))
        assert not (tmp_path / "home").exists()

    def test_what_is_fetched_is_in_the_plan(self, hub: HubServer, tmp_path: Path) -> None:
        layers = {"layer": linear(4096, 4096, 64)}
        paths = [write_adapter(tmp_path / f"a{i}", layers, seed=i, dtype="F16") for i in range(8)]
        ids = [f"bob/a{i}" for i in range(8)]
        for name, path in zip(ids, paths, strict=True):
            hub.add(name, path)
        options: dict[str, Any] = {"method": "linear", "workers": 1}
        stored = streammerge.plan(ids, **options)
        streamed = streammerge.plan(ids, stream=True, **options)
        more = streamed.tasks[0].projected_bytes - stored.tasks[0].projected_bytes
        assert streamed.read_bytes < more < streamed.read_bytes + 16 * 2**20
        limit = stored.projected_bytes + 2**20
        streammerge.plan(ids, max_memory=limit, **options)
        with pytest.raises(BudgetError, match="without --stream"):
            streammerge.plan(ids, max_memory=limit, stream=True, **options)

    @pytest.mark.parametrize("policy", ["first", "mean"])
    def test_heads(self, policy: str, hub: HubServer, tmp_path: Path) -> None:
        """Fewer targets than tensors of heads."""
        paths = []
        for i in range(2):
            values = np.full((3, 64), float(i), np.float32)
            head = {f"{PREFIX}head.{side}": encode(values) for side in ("weight", "bias")}
            layers = {"layer": linear(48, 64, 4)}
            extra = {"extra": head, "modules_to_save": ["head"]}
            paths.append(write_adapter(tmp_path / f"h{i}", layers, seed=i, **extra))
            hub.add(f"bob/h{i}", paths[-1])
        ids = ["bob/h0", "bob/h1"]
        streamed = merged(ids, tmp_path / "streamed", stream=True, extras=policy)
        assert streamed == merged(paths, tmp_path / "local", extras=policy)

    def test_local_and_remote_ones_together(self, adapters: list[Path], tmp_path: Path) -> None:
        mixed = merged([adapters[0], IDS[1]], tmp_path / "mixed", stream=True, workers=2)
        assert mixed == merged(adapters, tmp_path / "local")

    def test_the_peak_is_within_the_projection(self, hub: HubServer, tmp_path: Path) -> None:
        layers = {f"layer.{i}": linear(2048, 2048, 64) for i in range(2)}
        ids = [f"bob/a{i}" for i in range(16)]
        for i, name in enumerate(ids):
            hub.add(name, write_adapter(tmp_path / name, layers, seed=i))
        run = subprocess.run(
            [sys.executable, "-c", PEAK, str(tmp_path / "out"), *ids],
            env={**os.environ, **hub.environment(tmp_path / "home")},
            capture_output=True,
            text=True,
            check=True,
        )
        peak, projected, reserved, fetched = map(int, run.stdout.split())
        assert reserved < peak <= projected
        # 16 MiB of each target's 16 sources, which two tasks hold.
        assert fetched == 16 * 2 * 2048 * 64 * 4
        assert projected - reserved > 2 * fetched


PEAK = """
import pathlib, sys
import streammerge
output, *ids = sys.argv[1:]
options = {"method": "linear", "workers": 2, "stream": True}
plan = streammerge.plan(ids, **options)
streammerge.merge(ids, output, **options)
status = dict(line.split(":") for line in pathlib.Path("/proc/self/status").open())
peak = int(status["VmHWM"].split()[0]) * 1024
print(peak, plan.projected_bytes, plan.reserved_bytes, plan.tasks[0].read_bytes)
"""


class TestClusters:
    def test_workers_of_a_cluster_fetch_themselves(
        self, hub: HubServer, adapters: list[Path], tmp_path: Path
    ) -> None:
        needed = streammerge.plan(IDS).read_bytes
        expected = merged(adapters, tmp_path / "local")
        out = tmp_path / "out"
        (tmp_path / "cluster").mkdir()
        cluster = LocalCluster(tmp_path / "cluster")
        try:
            cluster.add_worker()
            hub.log.clear()
            streamed = merged(IDS, out, stream=True, scheduler=cluster.address)
            assert streamed == expected
            headers = sum((path / WEIGHTS).stat().st_size for path in adapters)
            assert hub.sent(server=CDN) == needed + headers
        finally:
            cluster.stop()


FAULTS: list[tuple[str, str, dict[str, Any]]] = [
    (CDN, "GET", {"cut_after": 1000, "times": 3}),
    (CDN, "GET", {"cut_after": 0, "times": 2}),
    (CDN, "GET", {"status": 503, "times": 3}),
    (CDN, "GET", {"status": 429, "headers": {"Retry-After": "0"}, "times": 2}),
    (CDN, "GET", {"status": 403, "times": 2}),
    (HUB, "HEAD /ann/two", {"status": 502, "times": 2}),
    (HUB, "HEAD /ann/two", {"status": 429, "headers": {"Retry-After": "0"}, "times": 2}),
]


class TestFaults:
    @pytest.mark.parametrize(("server", "match", "fault"), FAULTS)
    def test_what_passes_is_outlived(
        self,
        hub: HubServer,
        adapters: list[Path],
        tmp_path: Path,
        server: str,
        match: str,
        fault: dict[str, Any],
    ) -> None:
        expected = merged(adapters, tmp_path / "local")
        met = hub.fail(server, match, **fault)
        assert merged(IDS, tmp_path / "out", stream=True) == expected
        assert met.times == 0

    def test_a_cut_connection_is_gone_on_with(
        self, hub: HubServer, adapters: list[Path], tmp_path: Path
    ) -> None:
        assert adapters
        plan = streammerge.plan(IDS)
        hub.log.clear()
        hub.fail(CDN, "GET", cut_after=3000, times=4)
        merged(IDS, tmp_path / "out", stream=True)
        files = sum((path / WEIGHTS).stat().st_size for path in adapters)
        # Both files are shorter than the first guess: that is, the headers come with all else.
        assert hub.sent(server=CDN) == files + plan.read_bytes

    def test_a_link_that_expires_is_asked_for_again(
        self, hub: HubServer, adapters: list[Path], tmp_path: Path
    ) -> None:
        def expire(event: events.Event) -> None:
            hub.signature += isinstance(event, events.TaskDone)

        expected = merged(adapters, tmp_path / "local")
        out = tmp_path / "out"
        assert merged(IDS, out, stream=True, on_event=expire, workers=1) == expected
        assert hub.signature == 1 + len(LAYERS)

    @pytest.mark.parametrize(
        ("fault", "error", "says"),
        [
            ({"ignore_range": True}, InputUnreadableError, "the whole file instead of a part"),
            (
                {"headers": {"Content-Range": "bytes 0-1/9"}},
                InputChangedError,
                "has 9 bytes now, and had",
            ),
            ({"status": 503, "times": 99}, InputUnreadableError, "answers 503, 6 times"),
            (
                {"status": 429, "headers": {"Retry-After": "9999"}},
                InputUnreadableError,
                "asks for a wait of 9999 s",
            ),
            ({"status": 416}, InputChangedError, "has become shorter"),
            ({"headers": {"Content-Encoding": "gzip"}}, InputUnreadableError, "encoded"),
            ({"status": 302}, InputUnreadableError, "answers 302"),
        ],
    )
    def test_what_does_not_pass_fails_and_is_gone_on_with(
        self,
        hub: HubServer,
        adapters: list[Path],
        tmp_path: Path,
        fault: dict[str, Any],
        error: type[Exception],
        says: str,
    ) -> None:
        def spoil(event: events.Event) -> None:
            if isinstance(event, events.TaskDone) and not hub.faults:
                hub.fail(CDN, "GET", **{"times": 50} | fault)

        expected = merged(adapters, tmp_path / "local")
        out = tmp_path / "out"
        with pytest.raises(error, match=says) as caught:
            merged(IDS, out, stream=True, on_event=spoil, workers=1)
        assert caught.value.resumable  # type: ignore[attr-defined]
        assert not any(secret in str(caught.value) for secret in SECRETS)
        assert not out.exists()
        hub.faults.clear()
        hub.log.clear()
        assert merged(IDS, out, stream=True, resume=True) == expected
        # What was done is not fetched again.
        assert len(hub.requests(server=CDN)) < len(IDS) * (1 + len(LAYERS))

    def test_another_file_at_the_commit(
        self, hub: HubServer, adapters: list[Path], tmp_path: Path
    ) -> None:
        def replace(event: events.Event) -> None:
            if isinstance(event, events.Planned):
                files = next(iter(hub.repositories["ann/two"].commits.values()))
                files[WEIGHTS] = bytes(len(files[WEIGHTS]))

        assert adapters
        with pytest.raises(InputChangedError, match=r"ann/two@.*another file"):
            merged(IDS, tmp_path / "out", stream=True, on_event=replace)

    def test_a_branch_that_has_moved_is_not_gone_on_with(
        self, hub: HubServer, adapters: list[Path], tmp_path: Path
    ) -> None:
        hub.fail(CDN, "GET", times=0)
        out = tmp_path / "out"
        with pytest.raises(StoppedError):
            merged(IDS, out, stream=True, workers=1, time_limit=1, on_event=slowly)
        hub.add("ann/two", adapters[0])
        with pytest.raises(ResumeError, match=r"ann/two was commit .* has moved to"):
            merged(IDS, out, resume=True)

    def test_what_was_streamed_is_gone_on_with_from_the_cache(
        self, adapters: list[Path], tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        with pytest.raises(StoppedError):
            merged(IDS, out, stream=True, workers=1, time_limit=1, on_event=slowly)
        heard: list[events.Event] = []
        assert merged(IDS, out, resume=True, on_event=heard.append) == merged(
            adapters, tmp_path / "local"
        )
        assert any(isinstance(event, events.Resumed) for event in heard)

    def test_a_signal_while_the_network_stands_still(
        self, hub: HubServer, adapters: list[Path], tmp_path: Path
    ) -> None:
        assert adapters
        out = tmp_path / "out"
        command = [
            sys.executable, "-m", "streammerge.cli", "merge", *IDS, "-o", str(out), "--stream",
            "--method", "linear",
        ]  # fmt: skip
        # Behind the headers of both.
        hub.fail(CDN, "GET", times=2)
        hub.fail(CDN, "GET", times=99, delay=60)
        with subprocess.Popen(
            command,
            env={**os.environ, **hub.environment(tmp_path / "home")},
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            while hub.faults[1].times == 99:
                time.sleep(0.05)
                assert process.poll() is None
            time.sleep(0.3)
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            _, told = process.communicate(timeout=50)
            took = time.monotonic() - began
        assert took < within(5)
        assert process.returncode == 75
        assert "go on with: streammerge merge --resume" in told


def slowly(event: events.Event) -> None:
    if isinstance(event, events.TaskDone):
        time.sleep(0.6)


@pytest.mark.usefixtures("adapters")
def test_a_fetch_ends_when_the_run_does(hub: HubServer) -> None:
    file = streammerge.open_adapter(IDS[0]).files[0]
    hub.fail(CDN, "GET", delay=60)
    began = time.monotonic()

    def check() -> None:
        if time.monotonic() - began > 0.3:
            raise StoppedError("over", done=0, targets=1)

    with pytest.raises(StoppedError):
        ranges.Ranges().fetch([ranges.Span(file, 0, file.size)], check)
    assert time.monotonic() - began < 30  # of the 60 that it would have waited


def test_connections_are_bounded(
    hub: HubServer, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "MAX_CONNECTIONS", 3)
    file = streammerge.open_adapter(IDS[0]).files[0]
    content = (adapters[0] / WEIGHTS).read_bytes()
    spans = [ranges.Span(file, start, 100) for start in range(0, 3000, 100)]
    hub.fail(CDN, "GET", delay=0.05, times=99)
    blocks = ranges.Ranges().fetch(spans)
    assert b"".join(block.tobytes() for block in blocks) == content[:3000]
    assert hub.most_together(CDN) == 3
