"""Outputs brought to the Hub: what is uploaded, what is left alone, and what fails how."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import streammerge
from hub_here import hub_here
from hub_server import HUB, Fault
from hub_uploads import TOKEN, Hub
from making import CONFIG, INDEX, WEIGHTS, contents, linear, write_adapter
from streammerge import events
from streammerge.cli import main
from streammerge.errors import (
    CorruptFileError,
    MissingFileError,
    PublishedError,
    PushError,
    RecipeError,
    VerificationError,
)
from streammerge.output.record import RECIPE_NAME, digest, render_record
from streammerge.output.staging import MARK_NAME, Staging, journal_path
from streammerge.publishing.answers import explain
from streammerge.publishing.card import CARD_NAME, is_own_card
from streammerge.publishing.publication import publication_of

# huggingface_hub sends its commits in a way that the newest httpx does not like.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "alice/merged"
TARGETS = {"model.up": linear(20, 12, 3), "model.down": linear(12, 20, 3)}
OURS = [".gitattributes", CARD_NAME, CONFIG, WEIGHTS, MARK_NAME, RECIPE_NAME]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two outputs of adapters that lie, like their base, where nobody need know of."""
    folder = tmp_path_factory.mktemp("home-of-a-secret-project")
    sources = [
        write_adapter(
            folder / f"adapter-{i}", TARGETS, seed=i, base_model_name_or_path=f"{folder}/base"
        )
        for i in range(2)
    ]
    streammerge.merge(sources, folder / "one", workers=1)
    streammerge.merge(sources, folder / "shards", workers=1, max_shard_size=500)
    return folder


hub = pytest.fixture(hub_here)


def invoke(*arguments: str) -> Result:
    found = CliRunner().invoke(main, arguments)
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found


# ---------------------------------------------------------------------------------------------
# What is uploaded


def test_a_push(made: Path, hub: Hub) -> None:
    pushed = streammerge.push(made / "one", REPO)
    assert sorted(hub.files(REPO)) == sorted(OURS)
    assert not hub.is_private(REPO)
    assert pushed.commit == hub.head(REPO)
    assert pushed.url == f"{hub.url}/{REPO}"
    assert sorted(pushed.files) == sorted(OURS[1:])
    assert hub.files(REPO)[WEIGHTS] == (made / "one" / WEIGHTS).read_bytes()
    assert hub.messages[-1] == "Upload a merge by streammerge"


def test_no_place_on_this_machine_is_uploaded(made: Path, hub: Hub) -> None:
    pushed = streammerge.push(made / "one", REPO)
    for name, data in hub.files(REPO).items():
        assert b"secret-project" not in data, name
        assert b"/tmp" not in data, name
    record = json.loads(hub.files(REPO)[MARK_NAME])
    assert record["recipe"]["adapters"] == ["adapter-0", "adapter-1"]
    assert [entry["path"] for entry in record["inputs"]] == ["adapter-0", "adapter-1"]
    assert json.loads(hub.files(REPO)[CONFIG])["base_model_name_or_path"] is None
    (notice,) = pushed.notices
    assert "place on this machine" in notice


@pytest.mark.parametrize("which", ["one", "shards"])
def test_what_was_uploaded_verifies(which: str, made: Path, hub: Hub, tmp_path: Path) -> None:
    """Downloaded again it is an output like any other, every checksum right."""
    streammerge.push(made / which, REPO)
    (tmp_path / "down").mkdir()
    for name, data in hub.files(REPO).items():
        (tmp_path / "down" / name).write_bytes(data)
    assert streammerge.verify(tmp_path / "down").checksums
    (tmp_path / "down" / CONFIG).write_text("{}")
    with pytest.raises(VerificationError, match=CONFIG):
        streammerge.verify(tmp_path / "down")


def test_a_config_without_places_is_uploaded_as_it_is(tmp_path: Path, hub: Hub) -> None:
    streammerge.merge([write_adapter(tmp_path / "a", TARGETS)], tmp_path / "out", workers=1)
    assert streammerge.push(tmp_path / "out", REPO).notices == ()
    assert hub.files(REPO)[CONFIG] == (tmp_path / "out" / CONFIG).read_bytes()


def test_what_was_carried_over_stays(tmp_path: Path, hub: Hub) -> None:
    source = write_adapter(tmp_path / "in", TARGETS)
    (source / "notes.txt").write_text("mine")
    (source / CARD_NAME).write_text("# my own card\n")
    streammerge.consolidate(source, tmp_path / "out")
    pushed = streammerge.push(tmp_path / "out", REPO)
    assert pushed.notices == ("notes.txt: not uploaded, for a merge does not make them",)
    files = hub.files(REPO)
    assert files[CARD_NAME] == b"# my own card\n"
    assert sorted(files) == sorted(set(OURS) - {RECIPE_NAME})
    assert json.loads(files[MARK_NAME])["consolidated"]["path"] == "in"


def test_a_recipe_file_goes_without_places(made: Path, tmp_path: Path, hub: Hub) -> None:
    out = shutil.copytree(made / "one", tmp_path / "out")
    text = f"method: svd  # mine\nadapters:\n- path: {made}/adapter-0\n- {made}/adapter-1\n"
    (out / RECIPE_NAME).write_text(text)
    record = json.loads((out / MARK_NAME).read_text())
    record["other_files"][RECIPE_NAME] = digest(text.encode())
    (out / MARK_NAME).write_bytes(render_record(record))
    streammerge.push(out, REPO)
    recipe = hub.files(REPO)[RECIPE_NAME]
    assert recipe == b"method: svd\nadapters:\n- path: adapter-0\n- adapter-1\n"
    assert json.loads(hub.files(REPO)[MARK_NAME])["other_files"][RECIPE_NAME] == digest(recipe)


def test_private(made: Path, hub: Hub) -> None:
    streammerge.push(made / "one", REPO, private=True, message="mine")
    assert hub.is_private(REPO)
    assert hub.messages[-1] == "mine"
    streammerge.push(made / "shards", REPO, private=True)
    hub.add("alice/public", {".gitattributes": b""})
    with pytest.raises(PushError, match="is public"):
        streammerge.push(made / "one", "alice/public", private=True)
    assert list(hub.files("alice/public")) == [".gitattributes"]


# ---------------------------------------------------------------------------------------------
# What is there already


def test_again_sends_nothing(made: Path, hub: Hub) -> None:
    first = streammerge.push(made / "one", REPO)
    puts = hub.puts.copy()
    assert streammerge.push(made / "one", REPO) == first
    assert hub.puts == puts


def test_an_earlier_merge_is_replaced_whole(made: Path, hub: Hub) -> None:
    """A file of weights that stayed would be loaded in the place of the shards."""
    streammerge.push(made / "one", REPO)
    streammerge.push(made / "shards", REPO)
    files = hub.files(REPO)
    assert WEIGHTS not in files
    assert INDEX in files
    streammerge.push(made / "one", REPO)
    assert sorted(hub.files(REPO)) == sorted(OURS)


def test_what_is_not_ours_stays(made: Path, hub: Hub) -> None:
    hub.add(REPO, {"picture.png": b"png", CARD_NAME: b"# mine\n"})
    pushed = streammerge.push(made / "one", REPO)
    files = hub.files(REPO)
    assert files["picture.png"] == b"png"
    assert files[CARD_NAME] == b"# mine\n"
    assert CARD_NAME not in pushed.files
    assert any("left as it is" in notice for notice in pushed.notices)
    streammerge.push(made / "one", REPO, overwrite=True)
    assert is_own_card(hub.files(REPO)[CARD_NAME].decode())


def test_an_edited_card_stays(made: Path, hub: Hub) -> None:
    streammerge.push(made / "one", REPO)
    edited = hub.files(REPO)[CARD_NAME].replace(b"# merged", b"# merged, and fine")
    hub.add(REPO, {**hub.files(REPO), CARD_NAME: edited})
    streammerge.push(made / "shards", REPO)
    assert hub.files(REPO)[CARD_NAME] == edited


def test_somebody_elses_adapter_is_not_replaced(made: Path, hub: Hub) -> None:
    hub.add(REPO, {WEIGHTS: b"precious"})
    with pytest.raises(PushError, match="holds an adapter that is not streammerge's"):
        streammerge.push(made / "one", REPO)
    assert hub.files(REPO)[WEIGHTS] == b"precious"
    streammerge.push(made / "one", REPO, overwrite=True)
    assert hub.files(REPO)[WEIGHTS] == (made / "one" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "adapters.safetensors"])
def test_weights_of_other_formats_are_not_replaced(name: str, made: Path, hub: Hub) -> None:
    hub.add(REPO, {name: b"precious"})
    with pytest.raises(PushError, match="holds an adapter that is not streammerge's"):
        streammerge.push(made / "one", REPO)
    assert hub.files(REPO)[name] == b"precious"


def test_no_place_is_published(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths relative to the working directory, and a base model on a disk."""
    monkeypatch.chdir(tmp_path)
    for name in ("clients/acme/A", "clients/acme/B"):
        write_adapter(Path(name), TARGETS)
    options = {"base_model": "/home/me/secret/base", "weights": [[1.0, 2.0], 1.0]}
    adapters = ["clients/acme/A", "clients/acme/B"]
    streammerge.merge(adapters, "out", **options, on_event=events.ignore)
    streammerge.push("out", REPO)
    for name, content in hub.files(REPO).items():
        for secret in (b"acme", b"secret", b"home"):
            assert secret not in content, name
    assert b"streammerge run streammerge_config.yml" in hub.files(REPO)[CARD_NAME]


# ---------------------------------------------------------------------------------------------
# What is refused before anything is sent


@pytest.mark.parametrize("repo", ["", "merged", "a/b/c", "../x", "alice/", "alice/a b", "a--b/c"])
def test_an_id_that_is_none(repo: str, made: Path, hub: Hub) -> None:
    with pytest.raises(RecipeError, match="is not the id of a repository"):
        streammerge.push(made / "one", repo)
    assert hub.log == []


def test_no_token(made: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also before a merge, which may take hours."""
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RecipeError, match="no token"):
        streammerge.push(made / "one", REPO)
    out = tmp_path / "out"
    found = invoke("merge", str(made / "adapter-0"), "-o", str(out), "--push", REPO)
    assert found.exit_code == 2
    assert not out.exists()
    assert hub.log == []


def test_offline(made: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match="HF_HUB_OFFLINE"):
        streammerge.push(made / "one", REPO)
    assert hub.log == []


def test_what_is_no_output(tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(MissingFileError, match=r"streammerge\.json"):
        streammerge.push(write_adapter(tmp_path / "a", TARGETS), REPO)
    assert hub.repositories == {}


def test_a_spoilt_output_is_not_pushed(made: Path, tmp_path: Path, hub: Hub) -> None:
    out = shutil.copytree(made / "one", tmp_path / "out")
    content = bytearray((out / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (out / WEIGHTS).write_bytes(content)
    found = invoke("push", str(out), REPO)
    assert found.exit_code == 1
    assert "was changed" in found.stderr
    assert hub.repositories == {}


def test_a_link_out_of_an_output_is_not_followed(made: Path, tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "secret").write_text("of mine")
    out = shutil.copytree(made / "one", tmp_path / "out")
    (out / CARD_NAME).symlink_to(tmp_path / "secret")
    with pytest.raises(CorruptFileError, match="is a link to"):
        streammerge.push(out, REPO)
    assert hub.repositories == {}


def test_a_record_that_names_a_file_elsewhere(made: Path, tmp_path: Path, hub: Hub) -> None:
    """It may have come with the output from anybody."""
    out = shutil.copytree(made / "one", tmp_path / "out")
    record = json.loads((out / MARK_NAME).read_text())
    record["files"][0]["name"] = f"../out/{WEIGHTS}"
    (out / MARK_NAME).write_bytes(render_record(record))
    with pytest.raises((CorruptFileError, VerificationError)):
        streammerge.push(out, REPO)
    with pytest.raises(CorruptFileError, match="as a file of weights"):
        publication_of(out, REPO)
    assert hub.repositories == {}


# ---------------------------------------------------------------------------------------------
# What fails on the way

ENDLESS = 1000
CREATE, PREUPLOAD, BATCH, PUT, COMMIT = (
    "POST /api/repos/create", "/preupload/", "/objects/batch", "PUT /lfs/", "/commit/main",
)  # fmt: skip


def answer(match: str, status: int, times: int = ENDLESS, **headers: str) -> Fault:
    """A Hub that answers with an error."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Fault(HUB, match, times, status, named)


def cut(match: str, times: int = ENDLESS) -> Fault:
    """A line that is cut while the request is sent."""
    return Fault(HUB, match, times, cut_request_after=100)


FAULTS = {
    "not the token": (answer(CREATE, 401), 401, "hf auth login"),
    "no right": (answer(CREATE, 403), 403, "may not write"),
    "not found": (answer(PREUPLOAD, 404), 404, "check the name"),
    "changed meanwhile": (answer(COMMIT, 412), 412, "at the same time"),
    "conflict": (answer(COMMIT, 409), 409, "at the same time"),
    "too many": (answer(BATCH, 429, Retry_After="30"), 429, "wait 30 s"),
    "too large": (answer(PUT, 413), 413, "too large"),
    "down": (answer(COMMIT, 503), 503, "try later"),
    "down at the start": (answer(CREATE, 500), 500, "try later"),
    "a teapot": (answer(CREATE, 418), 418, "refuses"),
    "cut in the middle": (cut(PUT), None, "the line was cut"),
    "cut at the end": (cut(COMMIT), None, "the line was cut"),
    "no answer": (Fault(HUB, COMMIT, ENDLESS, cut_after=0), None, "the line was cut"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_failure_is_explained_and_gone_on_from(what: str, made: Path, hub: Hub) -> None:
    fault, status, message = FAULTS[what]
    hub.faults.append(replace(fault))
    before = contents(made)
    with pytest.raises(PushError, match=message) as caught:
        streammerge.push(made / "one", REPO)
    error = caught.value
    assert error.status == status
    assert (error.repo, error.output) == (REPO, str(made / "one"))
    assert f"streammerge push {made / 'one'} {REPO}" in str(error)
    assert TOKEN not in str(error)
    assert contents(made) == before
    hub.faults.clear()
    streammerge.push(made / "one", REPO)
    assert sorted(hub.files(REPO)) == sorted(OURS)
    assert set(hub.puts.values()) == {1}, "what was there was sent again"


@pytest.mark.parametrize(
    "fault",
    [cut(PUT, 2), answer(PREUPLOAD, 503, 2), answer(BATCH, 429, 1, Retry_After="1")],
    ids=["cut", "down", "too many"],
)
def test_what_passes_is_waited_for(fault: Fault, made: Path, hub: Hub) -> None:
    hub.faults.append(fault := replace(fault))
    streammerge.push(made / "one", REPO)
    assert fault.times == 0
    assert sorted(hub.files(REPO)) == sorted(OURS)


def test_a_commit_whose_answer_was_lost(made: Path, hub: Hub) -> None:
    """It is there, and the next push finds that nothing is left to do."""
    hub.faults.append(Fault(HUB, COMMIT, cut_after=0))
    with pytest.raises(PushError, match="the line was cut"):
        streammerge.push(made / "one", REPO)
    pushed = streammerge.push(made / "one", REPO)
    assert pushed.commit == hub.head(REPO)
    assert len(hub.messages) == 1


def test_a_namespace_of_somebody_else(made: Path, hub: Hub) -> None:
    with pytest.raises(PushError, match="may not write") as caught:
        streammerge.push(made / "one", "bob/merged")
    assert caught.value.status == 403
    assert hub.repositories == {}


class Answer:
    """An answer as any library for HTTP has it."""

    def __init__(self, status_code: int, reason_phrase: str = "", **headers: str) -> None:
        self.status_code = status_code
        self.reason_phrase = reason_phrase
        self.headers = headers


class AnsweredError(Exception):
    def __init__(self, message: str = "", response: Answer | None = None) -> None:
        super().__init__(message)
        self.response = response


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (AnsweredError("", Answer(503)), 503, "the Hub fails; try later (503: nothing more was"),
        (AnsweredError("", Answer(418, "teapot\r\nmore")), 418, "the Hub refuses (418: teapot)"),
        (
            AnsweredError("", Answer(429, "slow", **{"retry-after": "x\n"})),
            429,
            "; wait (429: slow)",
        ),
        (ValueError(""), None, "fails (ValueError: nothing more was said)"),
        (TimeoutError("late"), None, "was not reached, or the line was cut (TimeoutError: late)"),
        (FileNotFoundError(2, "No such file", "/x"), None, "/x cannot be read (No such file)"),
        (AnsweredError("a\x1b\nb"), None, "fails (AnsweredError: a\\x1b)"),
        (AnsweredError("x" * 9999), None, "x" * 200 + ")"),
    ],
)
def test_whatever_the_library_raises(error: Exception, status: int | None, message: str) -> None:
    """Alone, or as the cause of something else that it raises."""
    assert explain(error)[0] == status
    assert message in explain(error)[1]
    outer = RuntimeError("Error while uploading")
    outer.__cause__ = error
    assert explain(outer) == explain(error)


def test_nobody_listens(made: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(PushError, match="was not reached") as caught:
        streammerge.push(made / "one", REPO)
    assert caught.value.status is None
    assert hub.log == []


def test_the_token_is_not_printed(made: Path, hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    """Even where the Hub itself says it."""
    hub.faults.append(answer(CREATE, 403, X_Error_Message=f"{TOKEN} may not \t\x7f"))
    found = invoke("push", str(made / "one"), REPO)
    assert found.exit_code == 1
    assert TOKEN not in found.output + caplog.text
    assert "\x7f" not in found.output
    assert "*** may not" in found.stderr


# ---------------------------------------------------------------------------------------------
# The command line


def test_merge_and_push(made: Path, hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    adapters = [str(made / f"adapter-{i}") for i in range(2)]
    merge = ["merge", *adapters, "-o", str(out), "--workers", "1", "--json"]
    found = invoke(*merge, "--push", REPO, "--private")
    assert found.exit_code == 0, found.output
    facts = json.loads(found.stdout)
    assert facts["pushed"]["commit"] == hub.head(REPO)
    assert hub.is_private(REPO)
    assert hub.files(REPO)[WEIGHTS] == (out / WEIGHTS).read_bytes()


def test_a_push_that_fails_after_a_merge(made: Path, hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    hub.faults.append(answer(CREATE, 403))
    merge = ["merge", str(made / "adapter-0"), "-o", str(out), "--workers", "1"]
    found = invoke(*merge, "--push", REPO, "--json")
    assert found.exit_code == 1
    assert json.loads(found.stdout)["error"]["type"] == "PushError"
    assert f"streammerge push {out} {REPO}" in found.stderr
    assert streammerge.verify(out).checksums
    hub.faults.clear()
    found = invoke("push", str(out), REPO)
    assert found.exit_code == 0, found.output
    assert found.stdout.startswith(f"{hub.url}/{REPO}: 5 files, commit ")


def test_the_python_call(made: Path, hub: Hub, tmp_path: Path) -> None:
    from streammerge import events

    told: list[events.Event] = []
    result = streammerge.merge(
        [made / "adapter-0"], tmp_path / "out", workers=1, push=REPO, on_event=told.append
    )
    assert result.pushed is not None
    assert result.pushed.commit == hub.head(REPO)
    assert any("place on this machine" in e.message for e in told if isinstance(e, events.Notice))


def test_stopped_during_the_push(made: Path, hub: Hub, tmp_path: Path) -> None:
    """Exit code 75, and the command that goes on: the merge itself is done."""
    out = tmp_path / "out"
    hub.faults.append(answer(PUT, 503))  # the client waits and tries again
    command = [sys.executable, "-m", "streammerge.cli", "merge", str(made / "adapter-0")]
    process = subprocess.Popen(
        [*command, "-o", str(out), "--push", REPO, "--private", "--workers", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | hub.variables(tmp_path / "home"),
    )
    deadline = time.monotonic() + 60
    while not hub.requests(PUT) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 75, said
    assert f"go on with: streammerge push {out} {REPO} --private" in said
    assert "Traceback" not in said
    assert TOKEN not in said
    assert streammerge.verify(out).checksums


def test_going_on_with_a_merge_that_is_done_pushes_it(
    made: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was killed while it cleared up: its journal is still there."""
    publish_it = Staging.publish

    def publish_and_die(staging: Staging) -> None:
        publish_it(staging)
        staging.journal.remove = staging.journal.close  # type: ignore[method-assign]

    adapters, out = [str(made / f"adapter-{i}") for i in range(2)], tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(Staging, "publish", publish_and_die)
        streammerge.merge(adapters, out, workers=1)
    journal = journal_path(out).read_bytes()
    found = invoke("merge", *adapters, "-o", str(out), "--resume", "--push", REPO)
    assert found.exit_code == 0, found.output
    assert "what this merge has made" in found.stderr
    assert hub.files(REPO)[WEIGHTS] == (out / WEIGHTS).read_bytes()

    journal_path(out).write_bytes(journal)
    with pytest.raises(PublishedError):
        streammerge.merge(adapters, out, resume=True, push="alice/again")
    assert hub.files("alice/again")[WEIGHTS] == (out / WEIGHTS).read_bytes()
