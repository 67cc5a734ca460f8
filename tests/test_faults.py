"""The file system fails under the command line: a few cases of scripts/fault-test, and a real disk
that is too small."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import streammerge
from faulting.cases import SAME, SHORT, Bench, Fault, Merge
from making import WEIGHTS, linear, write_adapter
from streammerge import errors, events

PLAIN = Merge("ties_svd", "pread", 1, over_another=False)
OVER = Merge("linear", "mmap", 2, over_another=True)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler to build what makes calls fail")
    return Bench(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize(
    ("merge", "fault", "expected"),
    [
        (PLAIN, Fault("fsync", 1, errno.EIO, lasting=False), "failed"),
        (PLAIN, Fault("write", 9, errno.ENOSPC, lasting=True), "failed"),
        (PLAIN, Fault("read", 1, SHORT, lasting=True), "unnoticed"),
        pytest.param(
            PLAIN, Fault("write", 1, SHORT, lasting=True), "unnoticed", marks=pytest.mark.long
        ),
        pytest.param(
            PLAIN, Fault("open", 29, errno.EMFILE, lasting=True), "failed", marks=pytest.mark.long
        ),
        (OVER, Fault("rename", 2, errno.EIO, lasting=False), "failed"),
        pytest.param(
            OVER, Fault("unlink", 3, errno.EPERM, lasting=True), "unnoticed", marks=pytest.mark.long
        ),
    ],
    ids=str,
)
def test_a_call_fails(merge: Merge, fault: Fault, expected: str, bench: Bench) -> None:
    assert bench.play(merge, fault) == expected


SMALL = """
set -e
mount -t tmpfs -o size={size} none {disk}
cp -r {kept}/. {disk}
{command} > {said} 2>&1 && code=0 || code=$?
echo "exit code $code" >> {said}
mount -o remount,size=64m {disk}
cp -r {disk}/. {kept}
"""
"""Runs a command on a small disk of its own, which nobody else sees, and copies what is left."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run(probe, check=False).returncode:
        pytest.skip("no disk may be mounted here")
    (tmp_path / "disk").mkdir()
    (tmp_path / "kept").mkdir()
    return tmp_path


def merged_on(folder: Path, size: str, *options: str) -> str:
    """Merge on a disk of this size with what an earlier run left on it; return what was said."""
    paths = [
        write_adapter(folder / f"in{i}", {"up": linear(900, 1100, 64)}, seed=i) for i in (1, 2)
    ]
    arguments = [sys.executable, "-m", "streammerge.cli", "merge", *map(str, paths), "-o"]
    command = " ".join([*arguments, str(folder / "disk" / "out"), "--method", "cat", *options])
    said = folder / "said"
    script = SMALL.format(
        size=size, disk=folder / "disk", kept=folder / "kept", command=command, said=said
    )
    subprocess.run(["unshare", "-rm", "sh", "-c", script], check=True)
    return said.read_text()


def test_a_disk_that_is_too_small_is_seen_before_the_work(small_disk: Path) -> None:
    said = merged_on(small_disk, "800k")
    assert "exit code 2" in said
    assert "free" in said
    assert not list((small_disk / "kept").iterdir())


def test_a_disk_that_holds_the_output_does(small_disk: Path) -> None:
    said = merged_on(small_disk, "4m")
    assert "exit code 0" in said
    assert [path.name for path in (small_disk / "kept").iterdir()] == ["out"]


CUT = """
import os, sys
import streammerge
from streammerge.worker.factors import FactorReader

victim, out, io, *paths = sys.argv[1:]
read, seen = FactorReader._read, []

def cut_after(reader, start, stop):
    window = read(reader, start, stop)
    if reader.factor.file.path == victim:
        seen.append(reader.factor.key)
        if len(set(seen)) == 5:
            os.truncate(victim, 200)
    return window

FactorReader._read = cut_after
streammerge.merge(paths, out, method="linear", io=io, workers=1)
"""


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_an_input_is_cut_short_while_it_is_read(io: str, tmp_path: Path) -> None:
    """A map of it is a death that no process survives, a read is an error; either way what is
    done is gone on with once the input is as it was."""
    layers = {f"model.{i}": linear(300, 400, 8) for i in range(6)}
    paths = [str(write_adapter(tmp_path / f"in{i}", layers, seed=i)) for i in range(2)]
    streammerge.merge(paths, tmp_path / "undisturbed", method="linear", workers=1)
    victim = Path(paths[1]) / WEIGHTS
    whole, status = victim.read_bytes(), victim.stat()
    arguments = [sys.executable, "-c", CUT, str(victim), str(tmp_path / "out"), io, *paths]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert not (tmp_path / "out").exists()
    if io == "mmap":
        assert done.returncode == -signal.SIGBUS
    else:
        assert done.returncode == 1
        assert "has changed" in done.stderr
    with pytest.raises(errors.StreammergeError):
        streammerge.merge(paths, tmp_path / "out", method="linear", resume=True)
    with victim.open("r+b") as stream:
        stream.write(whole)
    os.utime(victim, ns=(status.st_atime_ns, status.st_mtime_ns))
    heard: list[events.Event] = []
    streammerge.merge(paths, tmp_path / "out", method="linear", resume=True, on_event=heard.append)
    assert any(isinstance(event, events.Resumed) for event in heard)
    for name in SAME:
        made, expected = ((tmp_path / out / name).read_bytes() for out in ("out", "undisturbed"))
        assert made == expected
