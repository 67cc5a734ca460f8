"""Python processes that begin with torch and dask imported, which take three seconds of a core.

A server has imported them, and forks for each process that is asked for one that is then as
`python -m MODULE …` or `python -c SOURCE …` would be: with its own arguments, environment, folder
and files, and its own end. Not for what is read from the environment at an import, nor for what
happens while a process begins, nor for memory.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

_IMPORTED = ("torch", "distributed.cli.dask_worker", "streammerge.cli", "streammerge.executors")
_LONGEST = 2**17
_ENVIRONMENT = dict(os.environ)
"""As it is before any test has changed it."""

PATIENCE = 60


class Forked:
    """A process; what it has of `subprocess.Popen` is the same. At the end of a `with` block it is
    killed, if it is still there."""

    def __init__(self, arguments: Sequence[str], *, stdout: BinaryIO, stderr: BinaryIO) -> None:
        """Begin what follows `python`, with these files."""
        with Path(os.devnull).open("rb") as nothing:
            files = [file.fileno() for file in (nothing, stdout, stderr)]
            self._status, self.pid = _server().fork(arguments, files)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None while it runs."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for it and return the exit status."""
        status = self._ended(timeout)
        if status is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return status

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it is still there."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.wait()

    def kill(self) -> None:
        """Kill it."""
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._status, selectors.EVENT_READ)
                if not selector.select(timeout):
                    return None
            with self._status:
                said = self._status.read()
            # Of what has lost its server it is not known, and that it was no success is.
            self.returncode = int(said or -signal.SIGKILL)
        return self.returncode


def run(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run it to its end, and return what it said."""
    with TemporaryFile() as stdout, TemporaryFile() as stderr:
        with Forked(arguments, stdout=stdout, stderr=stderr) as process:
            code = process.wait()
        for file in (stdout, stderr):
            file.seek(0)
        said = [file.read().decode() for file in (stdout, stderr)]
    return subprocess.CompletedProcess(["python", *arguments], code, *said)


class _Server:
    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        self._socket = ours

    def fork(self, arguments: Sequence[str], files: Sequence[int]) -> tuple[BinaryIO, int]:
        """Return where the exit status will come from, and the number of the process."""
        mine, theirs = os.pipe()
        asked = {
            "arguments": list(arguments),
            "environment": dict(os.environ),
            "folder": str(Path.cwd()),
            "path": sys.path,
        }
        message = json.dumps(asked).encode()
        assert len(message) <= _LONGEST
        status = os.fdopen(mine, "rb")
        try:
            socket.send_fds(self._socket, [message], [theirs, *files])
            pid = int(self._socket.recv(_LONGEST))
        except (OSError, ValueError) as error:
            status.close()
            code = self._process.wait(PATIENCE)
            raise AssertionError(f"the server ended with {code}: see its traceback") from error
        finally:
            os.close(theirs)
        return status, pid

    def ended(self) -> bool:
        """Whether it has come to its end, which it does only by a fault."""
        return self._process.poll() is not None

    def close(self) -> None:
        """End it."""
        self._socket.close()
        self._process.wait(PATIENCE)


_servers: list[_Server] = []


def _server() -> _Server:
    if not _servers or _servers[-1].ended():
        _servers.append(_Server())
        atexit.register(_servers[-1].close)
    return _servers[-1]


# ---------------------------------------------------------------------------------------------
# The server


def _serve(asking: socket.socket) -> dict[str, Any] | None:
    """Fork until nobody asks any more; return, in each process that is made, what it is to be."""
    running: dict[int, tuple[int, int]] = {}
    selector = selectors.DefaultSelector()
    selector.register(asking, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fd in running:
                pid, status = running.pop(key.fd)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with suppress(BrokenPipeError):  # nobody wants to know
                    os.write(status, str(code).encode())
                selector.unregister(key.fd)
                os.close(status)
                os.close(key.fd)
                continue
            message, files, *_ = socket.recv_fds(asking, _LONGEST, 4)
            if not message:
                return None
            status, *files = files
            pid = os.fork()
            if not pid:
                for number, file in enumerate(files):
                    os.dup2(file, number)
                for pidfd, (_, other) in running.items():
                    os.close(pidfd)
                    os.close(other)
                for file in (status, *files):
                    os.close(file)
                selector.close()
                asking.close()
                asked: dict[str, Any] = json.loads(message)
                return asked
            for file in files:
                os.close(file)
            pidfd = os.pidfd_open(pid)
            running[pidfd] = pid, status
            selector.register(pidfd, selectors.EVENT_READ)
            asking.send(str(pid).encode())


def _become(asked: dict[str, Any]) -> None:
    """Be the process that was asked for, to its end."""
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
    # By lines and whatever it holds, as Python's own: what was said before a kill is there.
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace")
    sys.path[:] = asked["path"]
    kind, what, *rest = asked["arguments"]
    sys.argv = [kind, *rest]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    for name in _IMPORTED:
        __import__(name)
    # What is collected, or only looked at for it, after a fork is copied first.
    gc.collect()
    gc.freeze()
    made = _serve(socket.socket(fileno=int(sys.argv[1])))
    if made is not None:
        _become(made)
