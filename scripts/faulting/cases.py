"""One merge under which the file system fails once, or from then on."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from making import CONFIG, WEIGHTS, linear, write_adapter
from streammerge.output.staging import MARK_NAME

SAME = (WEIGHTS, CONFIG, MARK_NAME)
LAYERS = {f"model.layers.{i}.up": linear(120, 160, 4) for i in range(6)}
METHODS = ("linear", "cat", "svd", "ties_svd")
SHORT = 0
FAULTS: Mapping[str, tuple[int, ...]] = {
    "open": (errno.EIO, errno.EACCES, errno.EMFILE),
    "read": (errno.EIO, SHORT, errno.EINTR),
    "write": (errno.EIO, errno.ENOSPC, errno.EDQUOT, SHORT, errno.EINTR),
    "fsync": (errno.EIO, errno.ENOSPC),
    "allocate": (errno.ENOSPC, errno.EIO),
    "rename": (errno.EIO, errno.EXDEV, errno.EINVAL),
    "unlink": (errno.EIO, errno.EPERM),
    "rmdir": (errno.EIO,),
    "mkdir": (errno.EIO, errno.ENOSPC),
}
"""What fails, and how; 0 stands for reads and writes that are cut short."""
HARMLESS = {SHORT, errno.EINTR}
"""What no merge may even notice."""


@dataclass(frozen=True)
class Merge:
    """What is merged, how, and over what."""

    method: str
    io: str
    workers: int
    over_another: bool

    def __str__(self) -> str:
        over = " over an earlier output" if self.over_another else ""
        return f"{self.method}, --io {self.io}, {self.workers} threads{over}"


@dataclass(frozen=True)
class Fault:
    """Which call fails, and how."""

    call: str
    number: int
    error: int
    lasting: bool

    def __str__(self) -> str:
        kind = errno.errorcode[self.error] if self.error else "cut short"
        return f"{self.call} {self.number}{' and later' if self.lasting else ''}: {kind}"


class Bench:
    """A folder with inputs, the shim, and what every undisturbed merge gives and calls."""

    def __init__(self, folder: Path) -> None:
        """Make the inputs and build the shim, which takes a C compiler."""
        self._folder = folder
        self._shim = folder / "shim.so"
        source = Path(__file__).with_name("shim.c")
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-O1", "-o", str(self._shim), str(source), "-ldl"],
            check=True,
            capture_output=True,
        )
        self._place = folder / "place"
        self._place.mkdir()
        self._inputs = [write_adapter(self._place / f"in{i}", LAYERS, seed=i) for i in range(3)]
        self._known: dict[Merge, tuple[dict[str, int], list[bytes]]] = {}

    def undisturbed(self, merge: Merge) -> tuple[dict[str, int], list[bytes]]:
        """Return how often a merge makes each call, and its output."""
        if merge not in self._known:
            out = self._prepare(merge)
            counts = self._folder / "counts"
            done = self._run(merge, out, {"FAULT_COUNTS": str(counts)})
            assert done.returncode == 0, done.stderr
            pairs = (line.split() for line in counts.read_text().splitlines())
            self._known[merge] = {name: int(n) for name, n in pairs}, _written(out)
        return self._known[merge]

    def play(self, merge: Merge, fault: Fault) -> str:
        """Let a merge meet a fault, and go on after it.

        Returns:
            What came of it: "missed", "unnoticed", "failed", or "refused", before any work.

        Raises:
            AssertionError: something was lost, half done, or not said.
        """
        _, expected = self.undisturbed(merge)
        out = self._prepare(merge)
        before = _written(out) if merge.over_another else None
        hit = self._folder / "hit"
        hit.unlink(missing_ok=True)
        done = self._run(
            merge,
            out,
            {
                "FAULT_CALL": fault.call,
                "FAULT_NUMBER": str(fault.number),
                "FAULT_ERROR": str(fault.error),
                "FAULT_HIT": str(hit),
                **({"FAULT_LASTING": "1"} if fault.lasting else {}),
            },
        )
        what = f"{merge}; {fault}; exit code {done.returncode}: {done.stderr}"
        assert "Traceback" not in done.stderr, what
        now = _written(out) if out.exists() else None
        if not hit.exists():
            assert (done.returncode, now) == (0, expected), what
            return "missed"
        if done.returncode == 0:
            assert now == expected, what
        else:
            assert done.returncode in (1, 2, 75), what
            assert fault.error not in HARMLESS, what
            assert "error: " in done.stderr, what
            assert now == before, f"{what}: the output's name is not as it was"
        again = self._run(merge, out, {}, "--resume", "--overwrite")
        assert again.returncode == 0, f"{what}; and then {again.stderr}"
        assert _written(out) == expected, f"{what}: the bytes differ afterwards"
        left = [path.name for path in self._place.iterdir() if path.name[0] == "."]
        assert not left, f"{what}: {left} is left"
        return {0: "unnoticed", 2: "refused"}.get(done.returncode, "failed")

    def _prepare(self, merge: Merge) -> Path:
        """Return an output's name, with an earlier output if there is to be one."""
        out = self._place / "out"
        for path in self._place.iterdir():
            if path not in self._inputs:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if merge.over_another:
            other = Merge("cat" if merge.method != "cat" else "svd", "mmap", 1, over_another=False)
            assert self._run(other, out, {}).returncode == 0
        return out

    def _run(
        self, merge: Merge, out: Path, faults: Mapping[str, str], *options: str
    ) -> subprocess.CompletedProcess[str]:
        density = ["--density=0.3"] if merge.method == "ties_svd" else []
        over = ["--overwrite"] if merge.over_another and "--overwrite" not in options else []
        under = {"LD_PRELOAD": str(self._shim), "FAULT_UNDER": str(self._place), **faults}
        return subprocess.run(
            [
                sys.executable, "-m", "streammerge.cli", "merge", *map(str, self._inputs),
                "-o", str(out), "--method", merge.method, "--io", merge.io,
                "--workers", str(merge.workers), "--quiet", *density, *over, *options,
            ],
            env={**os.environ, **(under if faults else {})},
            capture_output=True,
            text=True,
            check=False,
        )  # fmt: skip


def draw_case(draw: random.Random, bench: Bench) -> tuple[Merge, Fault]:
    """Return a merge, and a fault of a call that it makes."""
    merge = Merge(
        method=draw.choice(METHODS),
        io=draw.choice(("mmap", "pread")),
        workers=draw.choice((1, 2)),
        over_another=draw.random() < 0.5,
    )
    counts, _ = bench.undisturbed(merge)
    call = draw.choice([call for call in FAULTS if counts[call]])
    error = draw.choice(FAULTS[call])
    # EINTR for ever is no fault of a file system, and is tried again for ever.
    lasting = error != errno.EINTR and draw.random() < 0.3
    return merge, Fault(call, draw.randint(1, counts[call]), error, lasting)


def _written(out: Path) -> list[bytes]:
    return [(out / name).read_bytes() for name in SAME]
