"""One merge that is killed again and again."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from making import CONFIG, WEIGHTS, linear, write_adapter
from streammerge.catalog import METHODS, RULES, SPACES
from streammerge.output.staging import MARK_NAME, journal_path

SAME = (WEIGHTS, CONFIG, MARK_NAME)
TARGETS = {f"model.layers.{i:02d}.up": linear(700, 900, 8) for i in range(24)}
EARLY = 0.15
"""Share of the kills that come before the work has begun."""
SOON, LATE = 0.4, 0.25
"""In which part of the work the others come, but for this share."""


@dataclass(frozen=True)
class Round:
    """One merge: what, from what, where to, and how."""

    method: str
    inputs: tuple[Path, ...]
    folder: Path
    workers: int
    over_another: bool
    late: bool
    """Whether a policy chooses the ranks, so that the output is assembled at the end."""

    @classmethod
    def of(cls, number: int, inputs: Sequence[Path], folder: Path) -> Round:
        """Return the round of this number: all methods come by, each in four ways."""
        methods = list(METHODS)
        way = number // len(methods)
        method = methods[number % len(methods)]
        rule = RULES[METHODS[method].rule]
        return cls(
            method=method,
            inputs=tuple(inputs)[: rule.most_adapters],
            folder=folder,
            workers=1 + (number + way) % 2,
            over_another=(number + way // 2) % 2 == 1,
            late=SPACES[METHODS[method].space].truncates
            and not rule.of_rank
            and (number + way) % 3 != 0,
        )

    def __str__(self) -> str:
        over = " over an earlier output" if self.over_another else ""
        late = " of late ranks" if self.late else ""
        return f"{self.method}{late}, {self.workers} threads{over}"

    def command(self, out: Path, *options: str) -> list[str]:
        """Return the command line that does it."""
        density = ["--density=0.3"] if RULES[METHODS[self.method].rule].needs_density else []
        return [
            sys.executable, "-m", "streammerge.cli", "merge", *map(str, self.inputs),
            "-o", str(out), "--method", self.method, "--workers", str(self.workers), "--seed=3",
            *density, *(["--rank=energy:0.2"] if self.late else []), *options,
        ]  # fmt: skip


def make_inputs(folder: Path) -> list[Path]:
    """Write three adapters."""
    return [write_adapter(folder / f"in{i}", TARGETS, seed=i) for i in range(3)]


def play(each: Round, draw: random.Random) -> Counter[str]:
    """Kill a merge until it gets to its end; check what it leaves after every kill.

    Raises:
        AssertionError: something was lost, half done, or other than it should be.
    """
    each.folder.mkdir()
    out, undisturbed = each.folder / "out", each.folder / "undisturbed"
    seconds = _undisturbed(each, undisturbed)
    before: list[bytes] | None = None
    options = ["--resume"]
    if each.over_another:
        other = replace(each, method="cat", workers=1, over_another=False, late=False)
        subprocess.run(other.command(out), check=True, capture_output=True)
        before, options = _written(out), ["--resume", "--overwrite"]
    found: Counter[str] = Counter()
    while True:
        journal = _state(journal_path(out))
        process = subprocess.Popen(
            each.command(out, *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        found[_kill(process, journal_path(out), journal, draw, seconds)] += 1
        _, said = process.communicate()
        going_on = re.search(r"going on: (\d+) of", said)
        found["taken over"] += int(going_on[1]) if going_on else 0
        finished = _written(undisturbed)
        now = _written(out) if out.exists() else None
        if process.returncode == -signal.SIGKILL and now != finished:
            assert now == before, f"{each}: the output's name is not as it was"
            continue
        # It is published; where it was killed after that, the next merge clears up.
        assert process.returncode in (0, -signal.SIGKILL), f"{each}: {process.returncode}: {said}"
        if process.returncode:
            again = [*options, "--overwrite"]
            subprocess.run(each.command(out, *again), check=True, capture_output=True)
        assert _written(out) == finished, f"{each}: the bytes differ"
        assert [path.name for path in each.folder.iterdir() if path.name[0] == "."] == []
        found["kills"] = found["before"] + found["during"]
        return found


def _undisturbed(each: Round, out: Path) -> float:
    """Make the output that is to be compared with; return how long the work took, about."""
    process = subprocess.Popen(each.command(out, "--quiet"), stdout=subprocess.DEVNULL)
    _wait_for(journal_path(out), None, process)
    began = time.monotonic()
    assert process.wait() == 0
    return time.monotonic() - began


def _kill(
    process: subprocess.Popen[str],
    journal: Path,
    before: tuple[int, int] | None,
    draw: random.Random,
    seconds: float,
) -> str:
    """Kill a process at a random moment; return when it was: before, during or after the work.

    Args:
        process: to be killed.
        journal: which it makes anew when the work begins.
        before: the state of that before it began.
        draw: where the moment comes from.
        seconds: how long the work takes.
    """
    early = draw.random() < EARLY
    # Mostly soon, for more kills in a round; now and then late, or it would never come to its end.
    most = seconds if draw.random() < LATE else SOON * seconds
    moment = draw.uniform(0, 1.0 if early else most)
    if not early:
        _wait_for(journal, before, process)
    try:
        process.wait(timeout=moment)
    except subprocess.TimeoutExpired:
        process.kill()
        return "before" if early else "during"
    return "after"


def _wait_for(
    path: Path,
    before: tuple[int, int] | None,
    process: subprocess.Popen[str] | subprocess.Popen[bytes],
) -> None:
    """Wait until a file is another one than before, or the process has ended."""
    while _state(path) in (None, before) and process.poll() is None:
        time.sleep(0.002)


def _state(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _written(out: Path) -> list[bytes]:
    return [(out / name).read_bytes() for name in SAME]
