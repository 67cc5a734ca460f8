"""Signals, faults and edits at moments when little was thought of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import forking
import streammerge
from clocks import within
from making import CONFIG, WEIGHTS, linear, write_adapter
from streammerge import errors, events
from streammerge.adapter import NameTable
from streammerge.cli import main
from streammerge.cli.stopping import GRACE_SECONDS
from streammerge.executors.threads import run_threads
from streammerge.output.space import check_space
from streammerge.output.staging import MARK_NAME, Staging, journal_path, staging_path
from streammerge.output.writer import allocate
from streammerge.readers import read_adapters
from streammerge.worker import Job, Receipt
from streammerge.worker import run as worker_run

TARGETS = {f"{i}.up": linear(40 + i, 60, 4) for i in range(6)}
SAME = (WEIGHTS, CONFIG, MARK_NAME)


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    return [write_adapter(tmp_path / f"in{i}", TARGETS, seed=i) for i in range(3)]


def written(out: Path) -> list[bytes]:
    return [(out / name).read_bytes() for name in SAME]


def at_target(count: int, act: Callable[[], object]) -> events.OnEvent:
    """A listener that acts when so many targets are done."""
    seen: list[str] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.TaskDone):
            seen.append(event.target)
            if len(seen) == count:
                act()

    return listen


def interrupt() -> None:
    raise KeyboardInterrupt


def stop(sources: list[Path], out: Path, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        streammerge.merge(sources, out, workers=1, on_event=at_target(3, interrupt), **options)


# ---------------------------------------------------------------------------------------------
# Inputs that change


@pytest.mark.parametrize("option", ["lora_alpha", "use_rslora"])
def test_an_edited_config_is_another_input(
    option: str, sources: list[Path], tmp_path: Path
) -> None:
    """It decides the scaling, and no weight changes with it."""
    stop(sources, tmp_path / "out", method="cat")
    path = sources[1] / CONFIG
    config = json.loads(path.read_text())
    config[option] = 160 if option == "lora_alpha" else True
    path.write_text(json.dumps(config))
    with pytest.raises(errors.ResumeError, match="configs"):
        streammerge.merge(sources, tmp_path / "out", method="cat", resume=True)


def test_the_record_tells_scalings_apart(sources: list[Path], tmp_path: Path) -> None:
    sums = []
    for alpha in (4, 8):
        path = sources[0] / CONFIG
        config = json.loads(path.read_text()) | {"lora_alpha": alpha}
        path.write_text(json.dumps(config))
        streammerge.merge(sources, tmp_path / f"{alpha}")
        record = json.loads((tmp_path / f"{alpha}" / MARK_NAME).read_text())
        sums.append([entry["xxh3"] for entry in record["inputs"]])
    assert sums[0][0] != sums[1][0]
    assert sums[0][1:] == sums[1][1:]


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_an_input_that_is_written_to_under_the_run(
    io: str, sources: list[Path], tmp_path: Path
) -> None:
    """It has been opened by then, and has the same size and inode afterwards."""
    victim = sources[1] / WEIGHTS
    whole, status = victim.read_bytes(), victim.stat()

    def rewrite() -> None:
        with victim.open("r+b") as stream:
            stream.seek(-8, os.SEEK_END)
            stream.write(bytes(8))

    with pytest.raises(errors.InputChangedError, match="has changed"):
        streammerge.merge(
            sources, tmp_path / "out", io=io, workers=1, on_event=at_target(2, rewrite)
        )
    with victim.open("r+b") as stream:
        stream.write(whole)
    os.utime(victim, ns=(status.st_atime_ns, status.st_mtime_ns))
    heard: list[events.Event] = []
    streammerge.merge(sources, tmp_path / "out", resume=True, on_event=heard.append)
    assert [event.done for event in heard if isinstance(event, events.Resumed)] == [2]
    streammerge.merge(sources, tmp_path / "undisturbed")
    assert written(tmp_path / "out") == written(tmp_path / "undisturbed")


def test_an_input_that_cannot_be_read_for_once(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system's hiccup costs nothing that was done."""
    preadv = os.preadv

    def failing(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched, pytest.raises(errors.InputUnreadableError):
        streammerge.merge(
            sources, tmp_path / "out", io="pread", workers=1,
            on_event=at_target(3, lambda: patched.setattr(os, "preadv", failing)),
        )  # fmt: skip
    assert os.preadv is preadv
    heard: list[events.Event] = []
    streammerge.merge(sources, tmp_path / "out", resume=True, on_event=heard.append)
    assert [event.done for event in heard if isinstance(event, events.Resumed)] == [3]


# ---------------------------------------------------------------------------------------------
# Around the publishing


KILLED = """
import os, signal, sys
import streammerge
from streammerge.output.staging import Staging

when, out, *paths = sys.argv[1:]
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
removals = Staging._removals

def patched(staging):
    before = [] if when == "exchange" else removals(staging)
    return [*before, kill] if staging._published else removals(staging)

Staging._removals = patched
streammerge.merge(paths, out, method="cat", overwrite=True)
"""


@pytest.mark.parametrize("when", ["exchange", "removal"])
def test_killed_after_the_publishing(when: str, sources: list[Path], tmp_path: Path) -> None:
    """The output is one of the inputs: to merge it again would be another merge."""
    out = tmp_path / "out"
    streammerge.merge(sources[:2], out, method="cat")
    paths = [str(out), str(sources[2])]
    streammerge.merge(paths, tmp_path / "undisturbed", method="cat")
    # An earlier output in the staging directory's place, as the run leaves it.
    done = forking.run(["-c", KILLED, when, str(out), *paths])
    assert done.returncode == -signal.SIGKILL
    weights = (out / WEIGHTS).read_bytes()
    assert weights == (tmp_path / "undisturbed" / WEIGHTS).read_bytes()
    command = ["-m", "streammerge.cli", "merge", *paths, "-o", str(out)]
    again = forking.run([*command, "--method", "cat", "--overwrite", "--resume"])
    assert again.returncode == 0, again.stderr
    assert "what this merge has made" in again.stderr
    assert (out / WEIGHTS).read_bytes() == weights
    assert not list(tmp_path.glob(".out*"))


def test_another_merge_after_one_that_was_killed_while_it_cleared_up(
    sources: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    streammerge.merge(sources, out, method="svd")
    forking.run(["-c", KILLED, "exchange", str(out), *map(str, sources)])
    with pytest.raises(errors.OutputExistsError):
        streammerge.merge(sources, out, method="linear", resume=True)
    assert not list(tmp_path.glob(".out*"))
    streammerge.merge(sources, out, method="linear", resume=True, overwrite=True)
    streammerge.merge(sources, tmp_path / "undisturbed", method="linear")
    assert written(out) == written(tmp_path / "undisturbed")


def test_an_interrupt_after_the_publishing_is_none(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    streammerge.merge(sources, out, method="svd")
    heard: list[events.Event] = []
    with monkeypatch.context() as patched:
        removals = Staging._removals
        patched.setattr(
            Staging, "_removals", lambda s: [interrupt] if s._published else removals(s)
        )
        streammerge.merge(sources, out, method="cat", overwrite=True, on_event=heard.append)
    assert any("interrupted" in e.message for e in heard if isinstance(e, events.Notice))
    streammerge.merge(sources, tmp_path / "undisturbed", method="cat")
    assert written(out) == written(tmp_path / "undisturbed")
    # Nobody holds the lock, and the next merge clears up.
    streammerge.merge(sources, out, method="svd", overwrite=True)
    assert not list(tmp_path.glob(".out*"))


def test_what_is_published_stays_published(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the directory above cannot be made durable."""
    sync = streammerge.output.staging.sync_directory

    def failing(path: Path) -> None:
        if path == tmp_path:
            raise PermissionError(13, "Permission denied", str(path))
        sync(path)

    monkeypatch.setattr("streammerge.output.staging.sync_directory", failing)
    heard: list[events.Event] = []
    streammerge.merge(sources, tmp_path / "out", on_event=heard.append)
    assert any("made durable" in e.message for e in heard if isinstance(e, events.Notice))
    assert streammerge.verify(tmp_path / "out").checksums


def test_an_earlier_output_is_put_back_though_its_name_was_made_again(
    sources: list[Path], tmp_path: Path
) -> None:
    """Killed between two renames; then a job's script has made the directory."""
    out = tmp_path / "out"
    streammerge.merge(sources, out)
    before = written(out)
    out.rename(tmp_path / ".out.streammerge-old")
    out.mkdir()
    with pytest.raises(errors.OutputExistsError), Staging(out):
        pass
    assert written(out) == before


def test_a_spoilt_journal_is_not_dropped_in_silence(sources: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop(sources, out)
    path = journal_path(out)
    path.write_bytes(b"x" + path.read_bytes())
    for resume in (False, True):
        with pytest.raises(errors.StorageError, match="spoilt"):
            streammerge.merge(sources, out, resume=resume)
    assert staging_path(out).is_dir()
    streammerge.merge(sources, out, overwrite=True)


def test_the_time_limit_while_what_is_done_is_read_back(
    sources: list[Path], tmp_path: Path
) -> None:
    stop(sources, tmp_path / "out")
    with pytest.raises(errors.StoppedError):
        streammerge.merge(sources, tmp_path / "out", resume=True, time_limit=1e-9)
    heard: list[events.Event] = []
    streammerge.merge(sources, tmp_path / "out", resume=True, on_event=heard.append)
    assert [event.done for event in heard if isinstance(event, events.Resumed)] == [3]


def test_a_refusal_is_not_told_to_go_on(sources: list[Path], tmp_path: Path) -> None:
    stop(sources, tmp_path / "out")
    with pytest.raises(errors.ResumeError) as caught:
        streammerge.merge(sources, tmp_path / "out", resume=True, method="cat")
    assert not getattr(caught.value, "__notes__", [])


# ---------------------------------------------------------------------------------------------
# The command line


BUSY = """
import hashlib, sys
from streammerge import finish, run
from streammerge.cli import main, stopping

stopping.GRACE_SECONDS = float(sys.argv.pop(1))

def busy(*_, **__):
    print("busy", file=sys.stderr, flush=True)
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 200_000_000)  # a minute in one call

run.finish = busy
sys.argv[0] = "streammerge"
main(prog_name="streammerge")
"""


def started(sources: list[Path], out: Path, grace: float = GRACE_SECONDS) -> subprocess.Popen[str]:
    """A merge whose main thread is in one call of C."""
    words = ["merge", *map(str, sources), "-o", str(out), "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY, f"{grace}", *words], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    while "busy" not in process.stderr.readline():
        assert process.poll() is None
    return process


def wait_until_taken(process: subprocess.Popen[str]) -> None:
    """Wait until no signal is pending: two of a kind would be one."""
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None and any(
        int(line.split()[1], 16)
        for line in status.read_text().splitlines()
        if line.startswith(("SigPnd", "ShdPnd"))
    ):
        time.sleep(0.01)


@pytest.mark.parametrize("signals", [1, 2])
def test_a_stop_while_the_main_thread_is_in_a_long_call(
    signals: int, sources: list[Path], tmp_path: Path
) -> None:
    # By a second signal it ends though the first one has given it time.
    process = started(sources, tmp_path / "out", GRACE_SECONDS if signals == 1 else 600)
    began = time.monotonic()
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        wait_until_taken(process)
    _, said = process.communicate(timeout=60)
    took = time.monotonic() - began
    assert process.returncode == 75
    assert took < within(5)
    assert "streammerge merge --resume" in said
    streammerge.merge(sources, tmp_path / "out", resume=True)


def test_a_stop_when_nobody_listens(sources: list[Path], tmp_path: Path) -> None:
    process = started(sources, tmp_path / "out")
    assert process.stderr is not None
    process.stderr.close()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75


ON_ITS_WAY_OUT = """
import os, signal, sys
from streammerge import finish, run
from streammerge.cli import main

class Last:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGTERM):
        kill(pid, number)  # the interpreter has given its signals back

last = Last()

def stopped(*_, **__):
    os.kill(os.getpid(), signal.SIGTERM)

run.finish = stopped
sys.argv[0] = "streammerge"
main(prog_name="streammerge")
"""


def test_a_second_signal_when_the_interpreter_is_taken_down(
    sources: list[Path], tmp_path: Path
) -> None:
    words = ["merge", *map(str, sources), "-o", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", ON_ITS_WAY_OUT, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 75, done.stderr
    assert "streammerge merge --resume" in done.stderr


SIGNALLED = """
import os, signal, sys
from pathlib import Path
from streammerge.cli import main

when, *sys.argv[1:] = sys.argv[1:]

def kill():
    os.kill(os.getpid(), signal.SIGTERM)

class Loading:
    def find_spec(self, name, *_):
        if name == "streammerge.api":
            kill()

if when == "loading":
    sys.meta_path.insert(0, Loading())
if when == "renaming":
    rename = Path.rename
    def rename_and_kill(path, target):
        rename(path, target)
        kill()
    Path.rename = rename_and_kill
if when == "telling":
    merge = sys.modules["streammerge.cli.merge"]
    say = merge.say
    merge.say = lambda *lines: (kill(), say(*lines))

class Last:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGTERM):
        kill(pid, number)

if when == "leaving":
    last = Last()
sys.argv[0] = "streammerge"
main(prog_name="streammerge")
"""


def signalled(when: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A command that a signal reaches at that moment."""
    return subprocess.run(
        [sys.executable, "-c", SIGNALLED, when, *words],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_signal_before_the_work(sources: list[Path], tmp_path: Path) -> None:
    """While torch is loaded, which takes seconds."""
    done = signalled("loading", "merge", *map(str, sources), "-o", str(tmp_path / "out"))
    assert done.returncode == 75, done.stderr
    assert "go on with: streammerge merge --resume" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("when", ["renaming", "telling", "leaving"])
def test_a_signal_after_the_publishing_is_none(
    when: str, sources: list[Path], tmp_path: Path
) -> None:
    """There is nothing left that could be gone on with."""
    out = tmp_path / "out"
    done = signalled(when, "merge", *map(str, sources), "-o", str(out), "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr
    assert f"{out}: 6 targets" in done.stdout
    assert streammerge.verify(out).checksums
    assert not list(tmp_path.glob(".out*"))


def test_a_signal_after_a_refusal_is_none(sources: list[Path], tmp_path: Path) -> None:
    words = ["merge", *map(str, sources), "-o", str(tmp_path / "out"), "--method", "nothing"]
    assert signalled("leaving", *words).returncode == 2


def held_here() -> tuple[int, int]:
    """Open files and threads of this process."""
    return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()


def test_signals_are_given_back_to_what_hosts_the_program(
    sources: list[Path], tmp_path: Path
) -> None:
    """As the tests do themselves; the thread that listens ends, and its pipe is closed."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    held = held_here()
    for name in ("a", "b"):
        CliRunner().invoke(main, ["merge", *map(str, sources), "-o", str(tmp_path / name)])
    assert streammerge.verify(tmp_path / "b").checksums
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.set_wakeup_fd(-1) == -1
    deadline = time.monotonic() + 60
    while held_here() != held:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_earlier_output_is_put_back_at_an_interrupt(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system that cannot exchange names, between two renames."""
    out = tmp_path / "out"
    streammerge.merge(sources, out)
    before = written(out)

    def exchange(_new: Path, old: Path, between: Path) -> None:
        old.rename(between)
        raise KeyboardInterrupt

    monkeypatch.setattr("streammerge.output.staging.exchange", exchange)
    with pytest.raises(KeyboardInterrupt):
        streammerge.merge(sources, out, method="cat", overwrite=True)
    assert written(out) == before


# ---------------------------------------------------------------------------------------------
# Elsewhere


def test_out_of_device_memory_in_a_task_that_is_alone(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried again; a failure in a lane would have ended the job."""
    plan = streammerge.plan(sources, method="svd", workers=2)
    plan = replace(plan, tasks=tuple(replace(task, alone=True) for task in plan.tasks))
    regions = plan.regions
    starts = allocate(tmp_path, plan.files, regions)
    job = Job(plan, read_adapters([str(path) for path in sources], NameTable()), tmp_path, starts)
    run_on = worker_run._run_on

    def fill(_: int) -> None:
        raise torch.OutOfMemoryError("injected")

    def full(device: torch.device, *of_task: Any, each: Any, team: Any) -> Receipt:
        if device.type != "cpu":
            list(each(fill, [1]))
        return run_on(device, *of_task, each=each, team=team)

    monkeypatch.setattr(worker_run, "_run_on", full)
    job.device = torch.device("cuda")
    receipts: list[Receipt] = []
    run_threads(job, plan.tasks, lambda _, receipt: receipts.append(receipt))
    assert {receipt.device for receipt in receipts} == {"cpu"}
    assert len(receipts) == len(TARGETS)


def test_output_and_scratch_on_one_disk_share_its_room(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    check_space([(str(tmp_path), free // 2)])
    with pytest.raises(errors.DiskSpaceError) as caught:
        check_space([(str(tmp_path), free * 2 // 3), (str(tmp_path / "new"), free * 2 // 3)])
    assert caught.value.needed_bytes == 2 * (free * 2 // 3)
