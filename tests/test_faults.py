"""The file system fails under the command line: a few cases of scripts/fault-test, and a real disk
that is too small."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from faulting.cases import SHORT, Bench, Fault, Merge
from making import linear, write_adapter

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
        (PLAIN, Fault("write", 1, SHORT, lasting=True), "unnoticed"),
        (PLAIN, Fault("read", 1, SHORT, lasting=True), "unnoticed"),
        (OVER, Fault("rename", 2, errno.EIO, lasting=False), "failed"),
        (OVER, Fault("unlink", 3, errno.EPERM, lasting=True), "unnoticed"),
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
