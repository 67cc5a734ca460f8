"""The installed command, as a process of its own: what it prints, where, and how it ends."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

import streammerge
from clocks import within
from making import CONFIG, PREFIX, WEIGHTS, contents, embedding, linear, write_adapter
from streammerge import events
from streammerge.catalog import METHODS, SPACES
from streammerge.cli import main
from streammerge.cli.console import _quoted

INSTALLED = Path(sys.executable).with_name("streammerge")
COMMAND = [str(INSTALLED)] if INSTALLED.exists() else [sys.executable, "-m", "streammerge.cli"]
PATIENCE = 120.0

TARGETS = {
    "model.words": embedding(16, 60, 4),
    "model.0.up": linear(40, 30, 4),
    "model.0.down": linear(30, 40, 4),
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("adapters")
    return [str(write_adapter(folder / f"{seed}", TARGETS, seed=seed)) for seed in range(3)]


def run(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    found = subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
        **more,
    )
    assert "Traceback" not in found.stderr
    return found


def succeed(*arguments: str, **more: Any) -> str:
    found = run(*arguments, **more)
    assert found.returncode == 0, found.stderr
    return found.stdout


def invoke(*arguments: str) -> str:
    """The same inside this process, where torch need not be loaded again; it has to succeed."""
    found = CliRunner().invoke(main, arguments)
    assert found.exit_code == 0, found.output
    return found.stdout


# ---------------------------------------------------------------------------------------------
# merge


@dataclass(frozen=True)
class Merged:
    """An output and the process that made it."""

    out: Path
    process: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def merged(adapters: list[str], tmp_path_factory: pytest.TempPathFactory) -> Merged:
    """One plain merge, as a person runs it."""
    folder = tmp_path_factory.mktemp("merged")
    options = ["--method", "ties", "--weights", "2.0,0.3,0.7", "--density", "0.2"]
    return Merged(folder / "out", run("merge", *adapters, "-o", str(folder / "out"), *options))


def test_merge(merged: Merged) -> None:
    assert merged.process.returncode == 0
    assert re.fullmatch(
        rf"{re.escape(str(merged.out))}: 3 targets from 3 adapters, [\d.]+ KiB, [\d.]+ s\n",
        merged.process.stdout,
    )
    assert merged.process.stderr == "", "no progress line in a pipe, and nothing to note"
    assert sorted(path.name for path in merged.out.iterdir()) == [
        CONFIG,
        WEIGHTS,
        "streammerge-timings.json",
        "streammerge.json",
        "streammerge_config.yml",
    ]
    assert [path.name for path in merged.out.parent.iterdir()] == ["out"]


def test_merge_for_machines(adapters: list[str], tmp_path: Path) -> None:
    """With a note, from another working directory, and the same bytes as the call gives."""
    other = write_adapter(tmp_path / "other", TARGETS, base_model_name_or_path="C:\\other")
    sources = [*adapters, str(other)]
    flags = ["--method=dare_ties_svd", "--density=0.4", "--seed=3", "--rank=2", "--json"]
    more = ["--weights", "-1.5,0.5,0,2", "--dtype=bfloat16", "--workers=2"]
    found = run("merge", *sources, "-o", "deeper/out", *flags, *more, cwd=tmp_path)
    assert found.returncode == 0
    facts = json.loads(found.stdout)
    assert facts["output"] == "deeper/out"
    assert {module["target"] for module in facts["modules"]} == set(TARGETS)
    assert all(0 < module["relative_error"] < 1 for module in facts["modules"])
    sides = sum(m + n for m, n in ((16, 60), (40, 30), (30, 40)))
    assert facts["write_bytes"] == 2 * sides * 2
    assert facts["read_bytes"] == 4 * (4 * sides * 4)
    (notice,) = facts["notices"]
    assert notice.startswith("the adapters name different base models: 'some/base'")
    assert found.stderr == f"note: {notice}\n"
    streammerge.merge(
        sources,
        tmp_path / "call",
        method="dare_ties_svd",
        weights=[-1.5, 0.5, 0, 2],
        density=0.4,
        seed=3,
        rank=2,
        dtype="bfloat16",
        workers=1,
        on_event=events.ignore,
    )
    for name in (WEIGHTS, CONFIG, "streammerge.json"):
        ours, theirs = tmp_path / "deeper" / "out" / name, tmp_path / "call" / name
        assert ours.read_bytes() == theirs.read_bytes()


def test_merge_says_what_truncation_cost(adapters: list[str], tmp_path: Path) -> None:
    found = invoke("merge", *adapters, "-o", str(tmp_path / "out"), "--rank", "3")
    cut = found.splitlines()[1]
    worst = re.fullmatch(
        r"cut to rank 3: relative error ([\d.]+) on average, ([\d.]+) at most \((.+)\)", cut
    )
    assert worst is not None
    assert 0 < float(worst[1]) <= float(worst[2]) < 1
    assert worst[3] in TARGETS


@pytest.mark.parametrize("flags", [["--weights", "-1.5,2,0"], ["--weights=-1.5,2,0"]], ids=str)
def test_a_negative_first_weight(flags: list[str], adapters: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    invoke("merge", *adapters, "-o", str(out), "--method", "cat", *flags)
    key = f"{PREFIX}model.0.up.lora_A.weight"
    theirs = [load_file(Path(adapter) / WEIGHTS)[key] for adapter in adapters]
    # Alpha is twice the rank.
    expected = [np.float32(2 * weight) * a for weight, a in zip((-1.5, 2, 0), theirs, strict=True)]
    np.testing.assert_array_equal(load_file(out / WEIGHTS)[key], np.concatenate(expected))


def test_overwrite(adapters: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    invoke("merge", *adapters, "-o", str(out), "--method=cat")
    before = contents(tmp_path)
    refused = run("merge", *adapters, "-o", str(out))
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert "--overwrite" in refused.stderr
    assert contents(tmp_path) == before
    invoke("merge", *adapters, "-o", str(out), "--overwrite")
    assert json.loads((out / "streammerge.json").read_text())["recipe"]["method"] == "svd"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_error_for_machines(adapters: list[str], tmp_path: Path) -> None:
    found = run("merge", *adapters, "-o", str(tmp_path / "out"), "--method=ties", "--json")
    assert found.returncode == 2
    facts = json.loads(found.stdout)
    assert facts["exit_code"] == 2
    assert facts["error"]["type"] == "RecipeError"
    assert "density" in facts["error"]["message"]
    assert found.stderr == f"error: {facts['error']['message']}\n"
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------
# Progress


def run_on_a_terminal(*arguments: str) -> str:
    """What the command shows on a terminal that is its standard error."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=theirs, stdin=subprocess.DEVNULL
    )
    os.close(theirs)
    shown = b""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if not select.select([ours], [], [], 1.0)[0]:
            continue
        try:
            data = os.read(ours, 65536)
        except OSError:  # Linux says so when the other side is closed
            break
        if not data:
            break
        shown += data
    os.close(ours)
    assert process.wait(PATIENCE) == 0
    return shown.decode()


def test_a_bar_on_a_terminal(adapters: list[str], tmp_path: Path) -> None:
    shown = run_on_a_terminal("merge", *adapters, "-o", str(tmp_path / "out"))
    assert "merging" in shown
    assert "100%" in shown


def test_quiet(adapters: list[str], tmp_path: Path) -> None:
    shown = run_on_a_terminal("merge", *adapters, "-o", str(tmp_path / "out"), "--quiet")
    assert shown == ""


# ---------------------------------------------------------------------------------------------
# plan, inspect, methods, verify


def test_plan_writes_nothing(adapters: list[str], tmp_path: Path) -> None:
    before = contents(Path(adapters[0]).parent)
    flags = ["--method=ties_svd", "--density=0.2", "--rank=3", "--max-memory=1GiB"]
    shown = succeed("plan", *adapters, "-o", str(tmp_path / "out"), *flags)
    assert contents(tmp_path) == {}
    assert contents(Path(adapters[0]).parent) == before
    for line in (
        "method +ties_svd: rule ties, space delta",
        "adapters +3",
        "targets +3",
        "output rank +3",
        "output dtype +float32",
        "reads +10.1 KiB",
        r"writes +2.5 KiB in 1 file\(s\)",
        "memory allowed +1.0 GiB, max_memory",
        r"memory reserved +[\d.]+ MiB",
        r"memory projected +[\d.]+ MiB at most",
        r"model.words +16x60 +3 +3 +dense .*",
    ):
        assert re.search(rf"^{line}", shown, re.MULTILINE), line


def test_plan_for_machines(adapters: list[str]) -> None:
    """The same plan, but for the process's own size, which was measured there and here."""
    options = {"method": "ties", "density": 0.2, "max_memory": "1GiB", "workers": 1}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    theirs = json.loads(succeed("plan", *adapters, "--json", *flags))
    ours = json.loads(streammerge.plan(adapters, **options).to_json())
    assert 0 < theirs.pop("reserved_bytes") < 2**30
    assert ours.pop("reserved_bytes") > 0
    assert theirs == ours


def test_the_smallest_budget_that_is_named_works(adapters: list[str]) -> None:
    """In the next process too, which measures anew what it takes itself."""
    refused = run("plan", *adapters, "--max-memory=1MiB", "--workers=1")
    assert refused.returncode == 2
    named = re.search(r"\((\d+) bytes\) at least", refused.stderr)
    assert named is not None
    succeed("plan", *adapters, f"--max-memory={named[1]}", "--workers=1")


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_headers_are_read_without_torch(command: str, adapters: list[str]) -> None:
    """It takes seconds to load."""
    assert loaded_by("streammerge", command, adapters[0]).isdisjoint({"torch", "dask"})


def loaded_by(*arguments: str) -> set[str]:
    """The modules that a process has loaded after a command, which has to succeed."""
    source = (
        "import sys\n"
        "from streammerge.cli import main\n"
        f"sys.argv = {list(arguments)!r}\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "print()\n"
        "print(*sys.modules)\n"
    )
    command = [sys.executable, "-c", source]
    shown = subprocess.run(command, check=True, text=True, capture_output=True).stdout
    return set(shown.splitlines()[-1].split())


def test_inspect(adapters: list[str]) -> None:
    shown = succeed("inspect", *adapters)
    assert all(adapter in shown for adapter in adapters)
    for line in (
        r"base model +some/base",
        r"targets +3",
        r"modules +down \(1\), up \(1\), words \(1\)",
        r"layers +embedding \(1\), linear \(2\)|layers +linear \(2\), embedding \(1\)",
        r"ranks +4 \(3\)",
        r"alphas +8",
        r"dtypes +F32",
        r"scaling +known",
        r"extra tensors +none",
    ):
        assert len(re.findall(line, shown)) == 3, line


def test_inspect_for_machines(adapters: list[str]) -> None:
    facts = json.loads(succeed("inspect", *adapters, "--json"))
    assert [fact["path"] for fact in facts] == adapters
    assert {fact["parameters"] for fact in facts} == {4 * (76 + 70 + 70)}
    assert facts[0]["bytes"] == (Path(adapters[0]) / WEIGHTS).stat().st_size
    assert facts[0]["ranks"] == {"4": 3}


def test_inspect_of_a_broken_adapter(adapters: list[str], tmp_path: Path) -> None:
    found = run("inspect", adapters[0], str(tmp_path / "gone"))
    assert found.returncode == 2
    assert "no such file or directory" in found.stderr


def test_methods() -> None:
    shown = succeed("methods")
    lines = {line.split()[0]: line for line in shown.splitlines() if line.strip()}
    for name, method in METHODS.items():
        assert lines[name].split()[:3] == [name, method.rule, method.space]
    assert all(f"space {name}: " in shown for name in SPACES)


def test_methods_for_machines() -> None:
    listed = json.loads(succeed("methods", "--json"))
    assert [entry["method"] for entry in listed] == list(METHODS)
    assert {entry["method"] for entry in listed if "equal ranks" in entry["needs"]} == {
        name for name, method in METHODS.items() if method.space == "factor"
    }


def test_verify(merged: Merged, tmp_path: Path) -> None:
    shown = succeed("verify", str(merged.out))
    assert shown == f"{merged.out}: 3 targets, every checksum is right\n"
    facts = json.loads(succeed("verify", str(merged.out), "--json"))
    assert facts == {"path": str(merged.out), "targets": 3, "checksums": True}
    spoilt = tmp_path / "spoilt"
    shutil.copytree(merged.out, spoilt)
    data = bytearray((spoilt / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (spoilt / WEIGHTS).write_bytes(data)
    found = run("verify", str(spoilt), "--json")
    assert found.returncode == 1
    assert re.match(rf"error: .*{WEIGHTS}: {PREFIX}model.words\S+ was changed\n", found.stderr)
    assert json.loads(found.stdout)["error"]["type"] == "VerificationError"


def test_verify_of_an_adapter_without_a_record(adapters: list[str]) -> None:
    assert "no checksums to compare" in succeed("verify", adapters[0])
    assert json.loads(succeed("verify", adapters[0], "--json"))["checksums"] is False


# ---------------------------------------------------------------------------------------------
# Signals


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell has what it starts in the background ignore SIGINT, and children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("sent", "workers"),
    [
        pytest.param(signal.SIGTERM, 1, id="SIGTERM, serial"),
        pytest.param(signal.SIGINT, 2, id="SIGINT, dask"),
    ],
)
@pytest.mark.usefixtures("interruptible")
def test_a_signal_leaves_what_is_done(sent: signal.Signals, workers: int, tmp_path: Path) -> None:
    """The work would take minutes; it is stopped when a target or two are done."""
    targets = {f"model.{i:02d}.up": linear(3000, 3000, 8) for i in range(24)}
    source = str(write_adapter(tmp_path / "in", targets))
    arguments = ["merge", *[source] * 3, "-o", str(tmp_path / "out"), "--method=ties_svd"]
    arguments += ["--density=0.2", f"--workers={workers}"]
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    journal = tmp_path / ".out.streammerge.journal"
    try:
        wait_for(lambda: journal.exists() and journal.read_bytes().count(b"\n") > 1, process)
        sent_at = time.monotonic()
        process.send_signal(sent)
        shown, said = process.communicate(timeout=PATIENCE)
        took = time.monotonic() - sent_at
    finally:
        process.kill()
        process.wait()
    assert took < within(5)
    assert process.returncode == 75
    assert shown == ""
    command = shlex.join(["streammerge", "merge", "--resume", *arguments[1:]])
    assert said == f"error: stopped\ngo on with: {command}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".out.streammerge",
        ".out.streammerge.journal",
        "in",
    ]


def wait_for(there: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + PATIENCE
    while not there():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.02)


@pytest.mark.parametrize(
    "name", [b"plain", b"it's", b"a\nb'c\\d $HOME", b"\x1b[31m0a", b"\xff\xfe", "größer ε".encode()]
)
def test_the_command_that_goes_on_can_be_typed(name: bytes) -> None:
    """Whatever an output is called, what is printed has no control characters and means it."""
    quoted = _quoted(os.fsdecode(name))
    assert quoted.isprintable()
    done = subprocess.run(["bash", "-c", f"printf %s {quoted}"], check=True, capture_output=True)
    assert done.stdout == name
