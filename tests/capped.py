"""Runs the real command line in a process of its own, under a hard cap, and measures its peak.

The cap is a memory control group where one may be made (root, cgroup v1 or v2), else RLIMIT_DATA,
which counts private memory only. The peak is VmHWM, which the process reads of itself at its end:
the child's ru_maxrss would inherit the peak of its parent.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 1024**2

_CLI = """
import atexit, re, sys
def report():
    status = open("/proc/self/status").read()
    print("VmHWM", int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) * 1024, file=sys.stderr)
atexit.register(report)
from streammerge.cli import main
main(prog_name="streammerge")
"""

_TASKS = """
import ctypes, gc, json, re, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from streammerge.adapter import NameTable
from streammerge.api import plan
from streammerge.output.writer import allocate
from streammerge.readers import read_adapter
from streammerge.run import run_plan
from streammerge.worker import Job, Lanes, one_thread_each, run_task

def status(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

adapters, options, directory = json.load(sys.stdin)
made = plan(adapters, scratch=directory, **options)
table = NameTable()
manifests = [read_adapter(path, table) for path in adapters]
regions = made.regions
starts = allocate(Path(directory), made.files, regions)
job = Job(made, manifests, Path(directory), starts)
rows = []
with one_thread_each(), ThreadPoolExecutor(made.concurrency) as pool:
    for task in made.tasks:
        gc.collect()
        # What earlier tasks left in the heap would hide what this one takes from it.
        ctypes.CDLL(None).malloc_trim(0)
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        each = Lanes(pool, task.lanes, job.stopped) if task.lanes > 1 else map
        receipt = run_task(job, task, each)
        rows.append(
            {
                "target": task.target,
                "route": task.route,
                "lanes": task.lanes,
                "projected_bytes": task.projected_bytes,
                "peak_bytes": status("VmHWM") - before,
                "before_bytes": before,
                "seconds": receipt.seconds,
            }
        )
print(json.dumps({"reserved_bytes": made.reserved_bytes, "tasks": rows}))
"""


@dataclass(frozen=True)
class CappedRun:
    """A finished run."""

    returncode: int
    stdout: str
    stderr: str
    peak_bytes: int
    """VmHWM; 0 where the process was killed."""
    capped_by: str
    """"cgroup", "RLIMIT_DATA" or "nothing"."""


def run_cli(
    arguments: Sequence[str], *, cap_bytes: int | None = None, open_files: int | None = None
) -> CappedRun:
    """Run `streammerge` with these arguments under the cap."""
    with _cap(cap_bytes) as (capped_by, join):

        def prepare() -> None:
            join()
            if open_files is not None:
                resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))

        done = subprocess.run(
            [sys.executable, "-c", _CLI, *arguments],
            capture_output=True,
            text=True,
            preexec_fn=prepare,
            check=False,
        )
    lines = done.stderr.splitlines()
    peaks = [int(line.split()[1]) for line in lines if line.startswith("VmHWM ")]
    kept = "\n".join(line for line in lines if not line.startswith("VmHWM "))
    return CappedRun(done.returncode, done.stdout, kept, peaks[-1] if peaks else 0, capped_by)


def task_peaks(adapters: Sequence[str], *, workers: int = 1, **options: Any) -> dict[str, Any]:
    """Run a merge's tasks one by one in a fresh process; return each one's projection and peak.

    With more workers a task that is alone has several lanes.
    """
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            [sys.executable, "-c", _TASKS],
            input=json.dumps([list(adapters), {"workers": workers, **options}, directory]),
            capture_output=True,
            text=True,
            check=True,
        )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@contextlib.contextmanager
def _cap(cap_bytes: int | None) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield how the cap is enforced, and what the child calls to put itself under it."""
    if cap_bytes is None:
        yield "nothing", lambda: None
        return
    group = _make_group(cap_bytes)
    if group is None:
        limits = (cap_bytes, cap_bytes)
        yield "RLIMIT_DATA", lambda: resource.setrlimit(resource.RLIMIT_DATA, limits)
        return
    try:
        yield "cgroup", lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        group.rmdir()


def _make_group(cap_bytes: int) -> Path | None:
    """Make a memory control group below this process's own; None where that is not allowed."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            base, limit = Path("/sys/fs/cgroup"), "memory.max"
        elif controllers == "memory":
            base, limit = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        else:
            continue
        group = base / name.lstrip("/") / f"streammerge-{uuid.uuid4().hex}"
        with contextlib.suppress(OSError):
            group.mkdir()
            try:
                (group / limit).write_text(str(cap_bytes))
            except OSError:
                group.rmdir()
                raise
            return group
    return None
