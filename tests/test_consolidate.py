"""A sharded adapter made into one file: the bytes of the merge without shards, or nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.numpy import load_file

import streammerge
from making import (
    CONFIG,
    INDEX,
    PREFIX,
    WEIGHTS,
    Tensor,
    contents,
    convolution,
    embedding,
    encode,
    linear,
    make_config,
    make_factors,
    write_adapter,
    write_files,
    write_shards,
)
from streammerge import consolidation, events
from streammerge.cli import main
from streammerge.errors import (
    CorruptFileError,
    DiskSpaceError,
    InputChangedError,
    MissingFileError,
    OutputExistsError,
    StorageError,
    UnfinishedError,
    VerificationError,
)
from streammerge.output.journal import Journal
from streammerge.output.record import RECIPE_NAME
from streammerge.output.staging import MARK_NAME, journal_path, staging_path

TIMINGS = "streammerge-timings.json"
TARGETS = {
    "model.words": embedding(6, 40, 3),
    "model.patches": convolution(8, 3, (2, 2), 3),
    "model.up": linear(20, 12, 3),
    "model.down": linear(12, 20, 3),
}


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same merge in shards and in one file."""
    folder = tmp_path_factory.mktemp("merged")
    sources = [write_adapter(folder / f"{seed}", TARGETS, seed=seed) for seed in range(2)]
    streammerge.merge(sources, folder / "shards", max_shard_size=500, workers=1)
    streammerge.merge(sources, folder / "one", workers=1)
    return folder


@pytest.fixture
def shards(merged: Path, tmp_path: Path) -> Path:
    """A copy that may be spoilt."""
    return Path(shutil.copytree(merged / "shards", tmp_path / "shards"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------------------
# What is written


def test_the_bytes_are_those_of_the_merge_without_shards(merged: Path, tmp_path: Path) -> None:
    result = streammerge.consolidate(merged / "shards", tmp_path / "out")
    assert (result.files, result.tensors, result.checksums) == (4, 8, True)
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == [CONFIG, WEIGHTS, TIMINGS, MARK_NAME, RECIPE_NAME]
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "out" / name).read_bytes() == (merged / "one" / name).read_bytes()


def test_the_record_is_true_of_the_new_file(merged: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    streammerge.consolidate(merged / "shards", out)
    assert streammerge.verify(out).checksums
    record, one, before = (
        json.loads((folder / MARK_NAME).read_text())
        for folder in (out, merged / "one", merged / "shards")
    )
    assert record["files"] == one["files"]
    # The recipe says how it was merged, with shards.
    assert record["other_files"] == {
        **one["other_files"],
        RECIPE_NAME: before["other_files"][RECIPE_NAME],
    }
    for key in ("recipe", "inputs", "modules", "fingerprint", "rule", "space", "dtype"):
        assert record[key] == before[key]
    assert record["consolidated"]["path"] == str(merged / "shards")
    assert record["consolidated"]["files"] == {f["name"]: f["bytes"] for f in before["files"]}
    content = bytearray((out / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (out / WEIGHTS).write_bytes(content)
    with pytest.raises(VerificationError, match="was changed"):
        streammerge.verify(out)


def test_shards_of_anybody(tmp_path: Path) -> None:
    """Of several dtypes, some of which no factor has; other files come along."""
    factors = make_factors(TARGETS, dtype="F16")
    head = {f"{PREFIX}score.weight": encode(np.arange(6.0).reshape(2, 3), "F32")}
    odd = {
        f"{PREFIX}a.flag": Tensor("BOOL", (3,), b"\1\0\1"),
        f"{PREFIX}b.none": Tensor("F32", (0,), b""),
    }
    items = list(factors.items())
    source = write_shards(
        tmp_path / "in",
        {
            "adapter_model-00001-of-00003.safetensors": odd,
            "adapter_model-00002-of-00003.safetensors": dict(items[:3]),
            "adapter_model-00003-of-00003.safetensors": dict(items[3:]) | head,
        },
        make_config(TARGETS),
    )
    (source / "README.md").write_text("mine")
    (source / "optimizer.bin").write_text("large")
    (source / "runs").mkdir()
    result = streammerge.consolidate(source, tmp_path / "out")
    assert not result.checksums
    assert result.notices == (f"{source}: optimizer.bin, runs: not carried over",)
    assert names(tmp_path / "out") == ["README.md", CONFIG, WEIGHTS, MARK_NAME]
    expected = {k: v for path in source.glob("*.safetensors") for k, v in load_file(path).items()}
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        np.testing.assert_array_equal(found[name], tensor)
    with safe_open(tmp_path / "out" / WEIGHTS, "np") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert streammerge.verify(tmp_path / "out").checksums
    (tmp_path / "out" / "README.md").write_text("changed")
    with pytest.raises(VerificationError, match=r"README\.md"):
        streammerge.verify(tmp_path / "out")


def test_one_file_is_copied_with_a_notice(merged: Path, tmp_path: Path) -> None:
    result = streammerge.consolidate(merged / "one", tmp_path / "out")
    assert result.notices == (f"{merged / 'one'}: is one file already; it is copied as it is",)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (merged / "one" / WEIGHTS).read_bytes()
    assert streammerge.verify(tmp_path / "out").checksums


def test_in_place(merged: Path, shards: Path) -> None:
    with pytest.raises(OutputExistsError, match="--overwrite"):
        streammerge.consolidate(shards, shards)
    streammerge.consolidate(shards, shards, overwrite=True)
    assert names(shards) == [CONFIG, WEIGHTS, TIMINGS, MARK_NAME, RECIPE_NAME]
    assert (shards / WEIGHTS).read_bytes() == (merged / "one" / WEIGHTS).read_bytes()
    assert names(shards.parent) == ["shards"]


def test_in_place_after_a_kill_between_two_renames(merged: Path, shards: Path) -> None:
    """Where the file system cannot exchange names: the source has another name then."""
    out = shards.rename(shards.with_name(".shards.streammerge-old"))
    staging_path(shards).mkdir()
    journal = Journal(journal_path(shards))
    journal.begin({"recipe": None}, ())
    journal.publish(None)
    journal.close()
    streammerge.consolidate(shards, shards, overwrite=True)
    assert not out.exists()
    assert names(shards.parent) == ["shards"]
    assert (shards / WEIGHTS).read_bytes() == (merged / "one" / WEIGHTS).read_bytes()


def test_an_unfinished_merge_is_not_dropped(merged: Path, shards: Path) -> None:
    out = shards.parent / "out"
    sources = [merged / f"{seed}" for seed in range(2)]
    with pytest.raises(KeyboardInterrupt):
        streammerge.merge(sources, out, workers=1, on_event=stop_at_a_target)
    before = contents(shards.parent)
    with pytest.raises(UnfinishedError):
        streammerge.consolidate(shards, out)
    assert contents(shards.parent) == before
    streammerge.consolidate(shards, out, overwrite=True)
    assert names(shards.parent) == ["out", "shards"]


def stop_at_a_target(event: events.Event) -> None:
    if isinstance(event, events.TaskDone):
        raise KeyboardInterrupt


# ---------------------------------------------------------------------------------------------
# What is refused, and what fails


def flip(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


SPOILT: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "a tensor": (
        lambda s: flip(sorted(s.glob("*.safetensors"))[1]),
        VerificationError,
        "00002-of-00004.*was changed",
    ),
    "a header": (
        lambda s: flip(min(s.glob("*.safetensors")), 30),
        VerificationError,
        "00001.*another header",
    ),
    "the config": (lambda s: (s / CONFIG).write_text("{}"), VerificationError, CONFIG),
    "the record": (
        lambda s: (s / MARK_NAME).write_text((s / MARK_NAME).read_text().replace("svd", "cat", 1)),
        VerificationError,
        f"{MARK_NAME} was changed",
    ),
    "a record of something else": (
        lambda s: (s / MARK_NAME).write_text("{}"),
        CorruptFileError,
        "not a record",
    ),
    "a shard is missing": (
        lambda s: min(s.glob("*.safetensors")).unlink(),
        MissingFileError,
        "00001",
    ),
    "one file beside the shards": (
        lambda s: shutil.copy(min(s.glob("*.safetensors")), s / WEIGHTS),
        CorruptFileError,
        "both",
    ),
    "a link out of it": (
        lambda s: (s / "notes.txt").symlink_to("/etc/hostname"),
        VerificationError,
        r"notes\.txt",
    ),
    "nothing": (shutil.rmtree, MissingFileError, "no such file or directory"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_what_is_spoilt_is_not_consolidated(what: str, shards: Path) -> None:
    spoil, kind, message = SPOILT[what]
    spoil(shards)
    before = contents(shards.parent)
    with pytest.raises(kind, match=message):
        streammerge.consolidate(shards, shards.parent / "out")
    assert contents(shards.parent) == before


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    factors = make_factors({"up": linear(4, 4, 2)})
    shards = {"a.safetensors": factors | {"head": encode(np.ones(2))}, "b.safetensors": factors}
    source = write_shards(tmp_path / "in", shards, {})
    with pytest.raises(CorruptFileError, match="stands in two"):
        streammerge.consolidate(source, tmp_path / "out")


def test_a_link_among_what_is_carried(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "in", TARGETS)
    (source / "token").symlink_to("/etc/hostname")
    with pytest.raises(CorruptFileError, match="is a link to"):
        streammerge.consolidate(source, tmp_path / "out")
    assert names(tmp_path) == ["in"]


def test_an_input_that_changes_under_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a record nothing but the file itself tells."""
    source = write_files(tmp_path / "in", make_factors(TARGETS), make_config(TARGETS))
    original = consolidation.allocate_file

    def allocate(path: Path, header: bytes, data_bytes: int) -> None:
        original(path, header, data_bytes)
        flip(source / WEIGHTS)

    monkeypatch.setattr(consolidation, "allocate_file", allocate)
    with pytest.raises(InputChangedError, match="changed"):
        streammerge.consolidate(source, tmp_path / "out")
    assert names(tmp_path) == ["in"]


def test_a_disk_that_is_too_small(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 9))
    with pytest.raises(DiskSpaceError, match="9 are free"):
        streammerge.consolidate(shards, shards.parent / "out")
    assert names(shards.parent) == ["shards"]


def test_a_write_that_fails(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(StorageError, match="No space left"):
        streammerge.consolidate(shards, shards.parent / "out")
    assert names(shards.parent) == ["shards"]


# ---------------------------------------------------------------------------------------------
# As a process


def test_killed_in_the_middle(tmp_path: Path) -> None:
    """Nothing lies at the output's name, what is left does not hinder, and memory is bounded."""
    big = {"big": linear(150_000, 64, 64)}
    parts = {"a.safetensors": make_factors(big), "b.safetensors": make_factors(TARGETS)}
    source = write_shards(tmp_path / "in", parts, make_config(TARGETS | big))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "streammerge.cli", "consolidate", str(source), "-o", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    weights = staging_path(out) / WEIGHTS
    deadline = time.monotonic() + 60
    while not weights.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it was over before it could be killed"
    assert not out.exists()
    assert weights.exists()
    before = contents(source)
    source_text = (
        "import streammerge, sys\n"
        "def peak():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(l.split()[1]) for l in lines if l.startswith('VmHWM')) * 1024\n"
        "streammerge.consolidate(sys.argv[1], sys.argv[2])\n"
        "before = peak()\n"
        "streammerge.consolidate(sys.argv[3], sys.argv[4])\n"
        "print(peak() - before)\n"
    )
    small = write_adapter(tmp_path / "small", TARGETS)
    arguments = [str(small), str(tmp_path / "first"), str(source), str(out)]
    grown = subprocess.run(
        [sys.executable, "-c", source_text, *arguments], capture_output=True, text=True, check=True
    )
    assert int(grown.stdout) < 4 * 2**20
    assert (out / WEIGHTS).stat().st_size > 36 * 2**20
    assert streammerge.verify(out).checksums
    assert contents(source) == before
    assert names(tmp_path) == ["first", "in", "out", "small"]


def test_the_command(shards: Path) -> None:
    out = shards.parent / "out"
    run = CliRunner().invoke
    found = run(main, ["consolidate", str(shards), "-o", str(out), "--json"])
    assert found.exit_code == 0, found.output
    facts = json.loads(found.stdout)
    assert {key: facts[key] for key in ("output", "files", "tensors", "checksums")} == {
        "output": str(out),
        "files": 4,
        "tensors": 8,
        "checksums": True,
    }
    again = run(main, ["consolidate", str(shards), "-o", str(out), "--json"])
    assert again.exit_code == 2
    assert json.loads(again.stdout)["error"]["type"] == "OutputExistsError"
    found = run(main, ["consolidate", str(out), "-o", str(out), "--overwrite"])
    assert found.exit_code == 0, found.output
    assert "every checksum is right" in found.stdout
    assert "note: " in found.stderr
    flip(min(shards.glob("*.safetensors")))
    assert run(main, ["consolidate", str(shards), "-o", str(shards.parent / "b")]).exit_code == 1
    assert (shards / INDEX).exists()
