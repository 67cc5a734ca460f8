"""A real dask cluster on this machine: a scheduler and workers, each a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from forking import Forked

Process = subprocess.Popen[bytes] | Forked
LOOPBACK = "127.0.0.1"
PATIENCE = 60


class LocalCluster:
    """A scheduler on loopback, and workers that are started, and killed, one by one."""

    def __init__(self, folder: Path, security: Sequence[str] = (), *, forked: bool = True) -> None:
        """Start the scheduler.

        Args:
            folder: of their files.
            security: the options of dask for TLS.
            forked: whether they begin with their libraries loaded, in less time.
        """
        self.folder = folder
        self._security = security
        self._forked = forked
        self.file = folder / "scheduler.json"
        self.workers: list[Process] = []
        self._logs = 0
        self.scheduler = self._start(
            "scheduler", "--host", f"{'tls://' if security else ''}{LOOPBACK}", "--port", "0",
            "--dashboard-address", f"{LOOPBACK}:0", "--scheduler-file", str(self.file),
        )  # fmt: skip
        # It is there before it is written.
        wait_until(lambda: self.file.is_file() and self.file.read_text().endswith("}"))
        self.address: str = json.loads(self.file.read_text())["address"]

    def add_worker(self, *options: str) -> Process:
        """Start a worker of one thread and return its process."""
        options = options or ("--nthreads", "1")
        worker = self._start(
            "worker", self.address, "--host", LOOPBACK, "--no-nanny",
            "--dashboard-address", f"{LOOPBACK}:0", "--memory-limit", "1GiB", *options,
            "--local-directory", str(self.folder),
        )  # fmt: skip
        self.workers.append(worker)
        return worker

    def stop(self) -> None:
        """Stop all processes."""
        for process in (*self.workers, self.scheduler):
            process.kill()
            process.wait()

    def log(self) -> str:
        """Everything that the processes have said."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*.log")))

    def _start(self, kind: str, *arguments: str) -> Process:
        self._logs += 1
        command = ["-m", "dask", kind, *arguments, *self._security]
        with (self.folder / f"{self._logs}-{kind}.log").open("wb") as log:
            if self._forked:
                return Forked(command, stdout=log, stderr=log)
            return subprocess.Popen(
                [sys.executable, *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )


@contextmanager
def cluster_of(
    folder: Path, workers: int, security: Sequence[str] = (), *, forked: bool = True
) -> Iterator[LocalCluster]:
    """Have a cluster with so many workers of one thread each, as long as the block lasts."""
    folder.mkdir()
    cluster = LocalCluster(folder, security, forked=forked)
    try:
        for _ in range(workers):
            cluster.add_worker()
        wait_until(lambda: cluster.log().count("Registered to:") >= workers)
        yield cluster
    finally:
        cluster.stop()


def wait_until(holds: Callable[[], object]) -> None:
    """Wait until something holds."""
    end = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError("it has not come about")
        time.sleep(0.02)


def kill(process: Process) -> None:
    """Kill a process so that it cannot say goodbye."""
    process.send_signal(signal.SIGKILL)
    process.wait()
