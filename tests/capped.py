"""Runs the real command line in a process of its own, under a hard cap, and measures its peak.

The cap is a memory control group where one may be made (root, cgroup v1 or v2), else RLIMIT_DATA,
which counts private memory only. The peak is VmHWM, which the process reads of itself at its end:
the child's ru_maxrss would inherit the peak of its parent.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import resource
import subprocess
import sys
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
import ctypes, gc, json, os, re, sys, tempfile, threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import torch
from streammerge.adapter import NameTable
from streammerge.api import plan
from streammerge import worker
from streammerge.budget import PROCESS_BYTES
from streammerge.output.writer import allocate
from streammerge.readers import read_adapter
from streammerge.worker import Job, Lanes, one_thread_each, run_task

# Plans are those of a fresh process, which this one soon is not.
fresh = worker.measure_process
worker.measure_process = lambda *rules: fresh(*rules) and PROCESS_BYTES

def status(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

libc = ctypes.CDLL(None)
libc.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
POPULATE_READ = 22

def load_code():
    # A fork begins with none of the libraries' pages, and they are no task's.
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions, _, _, _, *path = line.split()
        if path and permissions[:3] == "r-x" and path[0].startswith("/"):
            start, stop = (int(bound, 16) for bound in span.split("-"))
            libc.madvise(start, stop - start, POPULATE_READ)

def warm(barrier):
    # What BLAS and LAPACK keep for a thread is in what is reserved for it, not in a task's peak.
    barrier.wait()
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.float64):
        matrix = torch.ones(4096, 256, dtype=dtype)
        torch.linalg.svd((matrix @ (matrix.mT @ matrix))[:256])
        torch.linalg.eigh(matrix[:256])
        torch.linalg.qr(matrix[:1024])
    barrier.wait()

def measure(adapters, options, directory):
    made = plan(adapters, scratch=directory, **options)
    table = NameTable()
    manifests = [read_adapter(path, table) for path in adapters]
    job = Job(made, manifests, Path(directory), allocate(Path(directory), made.files, made.regions))
    with one_thread_each(), ThreadPoolExecutor(made.concurrency) as pool:
        barrier = threading.Barrier(made.concurrency)
        list(pool.map(warm, [barrier] * made.concurrency))
        warm(threading.Barrier(1))
        for task in made.tasks:
            gc.collect()
            # What earlier tasks left in the heap would hide what this one takes from it.
            libc.malloc_trim(0)
            before = status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")
            each = Lanes(pool, task.lanes, job.stopped) if task.lanes > 1 else map
            receipt = run_task(job, task, each)
            yield made.reserved_bytes, {
                "target": task.target,
                "route": task.route,
                "lanes": task.lanes,
                "projected_bytes": task.projected_bytes,
                "peak_bytes": status("VmHWM") - before,
                "before_bytes": before,
                "seconds": receipt.seconds,
            }

def answer(adapters, options):
    load_code()
    with tempfile.TemporaryDirectory() as directory:
        reserved, rows = zip(*measure(adapters, options, directory))
    print(json.dumps({"reserved_bytes": reserved[0], "tasks": rows}), flush=True)

worker.warm_up()
for line in sys.stdin:
    # Each in a process of its own: what one merge has left in the heap is not the next one's.
    child = os.fork()
    if not child:
        answer(*json.loads(line))
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(1)
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


class _Measuring:
    """Forks a process for the tasks of each merge, which would spend most of its time loading."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, adapters: list[str], options: dict[str, Any]) -> dict[str, Any]:
        """Return what it measured."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _TASKS],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            atexit.register(self.end)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([adapters, options]), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            code = self._process.wait()
            self.end()
            raise AssertionError(f"the measuring process ended with {code}: see its traceback")
        result: dict[str, Any] = json.loads(answer)
        return result

    def end(self) -> None:
        """End it."""
        process, self._process = self._process, None
        if process is not None:
            with process:
                pass
            atexit.unregister(self.end)


_measuring = _Measuring()


def task_peaks(adapters: Sequence[str], *, workers: int = 1, **options: Any) -> dict[str, Any]:
    """Run a merge's tasks one by one in another process; return each one's projection and peak.

    With more workers a task that is alone has several lanes.
    """
    return _measuring(list(adapters), {"workers": workers, **options})


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
