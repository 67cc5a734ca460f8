"""The output directory: whole or not at all, one writer at a time, and every bit of it checked."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import streammerge
from making import (
    CONFIG,
    INDEX,
    WEIGHTS,
    contents,
    convolution,
    embedding,
    linear,
    write_adapter,
)
from streammerge import events
from streammerge.errors import (
    CorruptFileError,
    MissingFileError,
    OutputBusyError,
    OutputExistsError,
    StorageError,
    StreammergeError,
    VerificationError,
)
from streammerge.output import writer
from streammerge.output.header import render_header
from streammerge.output.staging import MARK_NAME, Staging, lock_path, staging_path
from streammerge.plans import Region

TIMINGS = "streammerge-timings.json"
TARGETS = {
    "model.words": embedding(6, 40, 3),
    "model.patches": convolution(8, 3, (2, 2), 3),
    "model.up": linear(20, 12, 3),
    "model.down": linear(12, 20, 3),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sources")
    return [write_adapter(folder / f"{seed}", TARGETS, seed=seed) for seed in range(2)]


def merge(sources: list[Path], out: Path, **options: Any) -> streammerge.MergeResult:
    return streammerge.merge(sources, out, workers=1, **{"method": "svd", **options})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------------------
# What is written


def test_one_file(sources: list[Path], tmp_path: Path) -> None:
    merge(sources, tmp_path / "out")
    assert names(tmp_path / "out") == [CONFIG, WEIGHTS, TIMINGS, MARK_NAME]
    assert names(tmp_path) == ["out"]


def test_shards(sources: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(sources, out, max_shard_size=500)
    shards = names_of_shards(out)
    count = len(shards)
    assert count == 4
    assert shards == [
        f"adapter_model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
    ]
    index = json.loads((out / INDEX).read_text())
    held = {key: shard for shard in shards for key in load_file(out / shard)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for shard in shards for tensor in load_file(out / shard).values()
    )
    assert names(out) == sorted([*shards, CONFIG, INDEX, TIMINGS, MARK_NAME])


def names_of_shards(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("max_shard_size", [None, 500])
def test_safetensors_opens_every_file(
    dtype: str, max_shard_size: int | None, sources: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    merge(sources, out, dtype=dtype, max_shard_size=max_shard_size)
    tensors = {}
    for name in names_of_shards(out):
        tensors |= load_file(out / name)
        with safe_open(out / name, "np") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert {str(tensor.dtype) for tensor in tensors.values()} == {dtype}
    for target, layer in TARGETS.items():
        shapes = [tensors[f"base_model.model.{target}{suffix}"].shape for suffix in layer.suffixes]
        assert shapes == [layer.a, layer.b]


def test_the_data_are_aligned(sources: list[Path], tmp_path: Path) -> None:
    merge(sources, tmp_path / "out", max_shard_size=500)
    for name in names_of_shards(tmp_path / "out"):
        head = (tmp_path / "out" / name).read_bytes()[:8]
        assert int.from_bytes(head, "little") % 8 == 0


@pytest.mark.parametrize("length", range(1, 10))
def test_a_header_is_padded(length: int) -> None:
    header = render_header([Region("x" * length, 0, 0, (2,), 8, "F32")])
    size = int.from_bytes(header[:8], "little")
    assert size == len(header) - 8
    assert size % 8 == 0
    assert json.loads(header[8:])["x" * length]["data_offsets"] == [0, 8]


def test_a_region_goes_to_the_disk_as_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every byte once, and no more than a few of them wait."""
    begun: list[tuple[int, int]] = []

    def begin(_: int, offset: Any, length: Any, __: int) -> None:
        begun.append((offset.value, length.value))

    monkeypatch.setattr(writer, "_sync_file_range", lambda: begin)
    path, size = tmp_path / "data", 2 * writer.BEHIND_BYTES + 1000
    path.touch()
    with writer.RegionWriter(path, 8, Region("t", 0, 16, (size,), size, "U8")) as region:
        for start in range(0, size, 10**6):
            region.append(memoryview(bytes(min(10**6, size - start))))
            assert start - sum(length for _, length in begun) < writer.BEHIND_BYTES
    assert sum(length for _, length in begun) == size
    ends = [offset + length for offset, length in begun]
    assert [offset for offset, _ in begun] == [24, *ends[:-1]]


def test_our_reader_reads_both_forms(sources: list[Path], tmp_path: Path) -> None:
    """Merging an output gives the same whether it is one file or several."""
    merge(sources, tmp_path / "one")
    merge(sources, tmp_path / "several", max_shard_size=500)
    adapters = [streammerge.open_adapter(tmp_path / name) for name in ("one", "several")]
    assert [len(adapter.files) for adapter in adapters] == [1, 4]
    for row in range(len(TARGETS)):
        assert adapters[0].target(row) == adapters[1].target(row)
        for side in "AB":
            factors = [adapter.factor(row, side) for adapter in adapters]
            assert factors[0].key == factors[1].key
            assert factors[0].shape == factors[1].shape
            data = [
                Path(f.file.path).read_bytes()[f.offset : f.offset + f.elements * 4]
                for f in factors
            ]
            assert data[0] == data[1]
    for name in ("one", "several"):
        merge([tmp_path / name, sources[0]], tmp_path / f"{name} again", method="cat")
    again = [load_file(tmp_path / f"{name} again" / WEIGHTS) for name in ("one", "several")]
    assert again[0].keys() == again[1].keys()
    assert all(np.array_equal(again[1][key], tensor) for key, tensor in again[0].items())


def test_the_record_says_what_was_done(sources: list[Path], tmp_path: Path) -> None:
    result = merge(sources, tmp_path / "out", weights=[2.0, -1.0], rank=2)
    record = json.loads((tmp_path / "out" / MARK_NAME).read_text())
    assert record["recipe"] == json.loads(json.dumps(result.plan.recipe))
    assert (record["recipe"]["weights"], record["recipe"]["rank"]) == ([2.0, -1.0], 2)
    assert [entry["path"] for entry in record["inputs"]] == [str(path) for path in sources]
    assert {entry["targets_used"] for entry in record["inputs"]} == {len(TARGETS)}
    assert record["modules"].keys() == TARGETS.keys()
    assert record["fingerprint"]["device"] == "cpu"
    for module in result.modules:
        assert record["modules"][module.target]["relative_error"] == module.relative_error
    timings = json.loads((tmp_path / "out" / TIMINGS).read_text())
    assert timings["target_seconds"].keys() == TARGETS.keys()


def test_the_checksums_of_inputs_follow_their_values(tmp_path: Path) -> None:
    """Not the file's layout, nor what its config says."""
    one, same = (write_adapter(tmp_path / name, TARGETS, seed=0) for name in ("one", "same"))
    other = write_adapter(tmp_path / "other", TARGETS, seed=1)
    merge([one, same, other], tmp_path / "out", method="cat")
    record = json.loads((tmp_path / "out" / MARK_NAME).read_text())
    sums = [entry["xxh3"] for entry in record["inputs"]]
    assert sums[0] == sums[1] != sums[2]


# ---------------------------------------------------------------------------------------------
# Where it may be written


def test_an_empty_directory(sources: list[Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    merge(sources, tmp_path / "out")
    assert streammerge.verify(tmp_path / "out").checksums
    assert names(tmp_path) == ["out"]


def test_the_working_directory(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    merge(sources, Path("out"))
    assert streammerge.verify("out").targets == len(TARGETS)
    assert names(tmp_path / "here") == ["out"]


def test_directories_above_are_made(sources: list[Path], tmp_path: Path) -> None:
    merge(sources, tmp_path / "a" / "b" / "out")
    assert streammerge.verify(tmp_path / "a" / "b" / "out").checksums


def test_a_linked_parent(sources: list[Path], tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    merge(sources, tmp_path / "link" / "out")
    assert names(tmp_path / "real") == ["out"]
    assert names(tmp_path) == ["link", "real"]


def test_overwriting_an_earlier_output(sources: list[Path], tmp_path: Path) -> None:
    """Whole: what only the earlier one had is gone."""
    out = tmp_path / "out"
    merge(sources, out, max_shard_size=500)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        merge(sources, out)
    merge(sources, out, overwrite=True, method="cat")
    assert names(out) == [CONFIG, WEIGHTS, TIMINGS, MARK_NAME]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["notes.txt", "adapter/adapter_config.json", ".hidden"])
def test_what_is_not_ours_is_never_replaced(name: str, sources: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(sources, out)
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(OutputExistsError, match=name.split("/", maxsplit=1)[0]):
        merge(sources, out, overwrite=True)
    assert contents(tmp_path) == before


def test_a_mount_point_is_refused_before_the_work(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name cannot be given to another directory; nothing needs to be computed to know that."""
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(type(out), "is_mount", lambda place: place.name == "out")
    with pytest.raises(OutputExistsError, match="mount point"):
        merge(sources, out)


def test_a_file_that_was_put_into_an_output_is_found(sources: list[Path], tmp_path: Path) -> None:
    """A single file of weights beside shards would be loaded in their place."""
    out = tmp_path / "out"
    merge(sources, out, max_shard_size=500)
    merge(sources, tmp_path / "other", method="cat")
    (out / WEIGHTS).write_bytes((tmp_path / "other" / WEIGHTS).read_bytes())
    with pytest.raises(VerificationError, match=f"{WEIGHTS} does not belong"):
        streammerge.verify(out)


def test_a_changed_config_is_named_as_such(sources: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(sources, out)
    config = json.loads((out / CONFIG).read_text())
    (out / CONFIG).write_text(json.dumps({**config, "r": config["r"] + 1}))
    with pytest.raises(VerificationError, match=CONFIG):
        streammerge.verify(out)


def test_overwriting_one_of_the_inputs(sources: list[Path], tmp_path: Path) -> None:
    """It is read until the last task is done, and replaced afterwards."""
    for name in ("out", "copy"):
        merge(sources, tmp_path / name)
    merge([tmp_path / "copy", sources[0]], tmp_path / "expected", method="cat")
    merge([tmp_path / "out", sources[0]], tmp_path / "out", method="cat", overwrite=True)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (
        tmp_path / "expected" / WEIGHTS
    ).read_bytes()


def test_something_that_appears_during_the_work(sources: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"

    def appear(event: events.Event) -> None:
        if isinstance(event, events.TaskDone):
            out.mkdir(exist_ok=True)
            (out / "thesis.txt").write_text("years of work")

    with pytest.raises(StorageError, match="has appeared") as caught:
        merge(sources, out, on_event=appear)
    assert caught.value.__notes__ == [f"{len(TARGETS)} targets are done and kept; --resume goes on"]
    assert contents(out) == {"thesis.txt": b"years of work"}
    shutil.rmtree(out)
    merge(sources, out, resume=True)
    assert names(tmp_path) == ["out"]


def test_a_place_that_cannot_be_written(sources: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(StreammergeError, match="file"):
        merge(sources, tmp_path / "file" / "out")
    assert names(tmp_path) == ["file"]


def test_an_input_that_changes_during_the_work(tmp_path: Path) -> None:
    """Its header was planned with; what lies there now may be anything."""
    first, second = (write_adapter(tmp_path / f"{i}", TARGETS, seed=i) for i in range(2))

    def change(event: events.Event) -> None:
        if isinstance(event, events.Planned):
            write_adapter(second, TARGETS, seed=9)

    with pytest.raises(StreammergeError, match="has changed since its header was read") as caught:
        merge([first, second], tmp_path / "out", on_event=change)
    assert caught.value.exit_code == 1
    assert str(second / WEIGHTS) in str(caught.value)
    assert names(tmp_path) == ["0", "1"]


# ---------------------------------------------------------------------------------------------
# One writer at a time

HOLD = """
import fcntl, sys
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def another_holds(lock: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a lock until the block ends or it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def stale_staging(out: Path) -> Path:
    """What a killed merge leaves behind: files, a subdirectory, a lock that nobody holds."""
    staging = staging_path(out)
    (staging / "deeper").mkdir(parents=True)
    for name in (WEIGHTS, CONFIG, MARK_NAME, "deeper/more"):
        (staging / name).write_text("stale")
    lock_path(out).write_text("stale")
    return staging


def test_a_second_merge_is_refused(sources: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    stale_staging(out)
    with another_holds(lock_path(out)):
        before = contents(tmp_path)
        with pytest.raises(OutputBusyError, match=re.escape(str(out))) as caught:
            merge(sources, out)
        assert caught.value.exit_code == 2
        assert contents(tmp_path) == before
    merge(sources, out)
    assert names(tmp_path) == ["out"]


def test_a_second_merge_in_the_same_process(sources: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused = []

    def again(event: events.Event) -> None:
        if isinstance(event, events.TaskDone):
            with pytest.raises(OutputBusyError) as caught:
                merge(sources, out, method="cat")
            refused.append(caught.value)

    merge(sources, out, on_event=again)
    assert len(refused) == len(TARGETS)
    assert streammerge.verify(out).checksums
    assert names(tmp_path) == ["out"]


def test_two_outputs_do_not_stand_in_each_others_way(sources: list[Path], tmp_path: Path) -> None:
    def another(event: events.Event) -> None:
        if isinstance(event, events.Planned):
            merge(sources, tmp_path / "two")

    merge(sources, tmp_path / "one", on_event=another)
    assert names(tmp_path) == ["one", "two"]


def test_a_stale_staging_directory_is_taken_over(sources: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    stale_staging(out)
    merge(sources, out)
    assert names(tmp_path) == ["out"]
    assert names(out) == [CONFIG, WEIGHTS, TIMINGS, MARK_NAME]
    assert streammerge.verify(out).checksums


def test_a_killed_holder_is_taken_over(sources: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    stale_staging(out)
    with another_holds(lock_path(out)) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        merge(sources, out)
    assert names(tmp_path) == ["out"]


AT_RENAME = """
import subprocess, sys
from pathlib import Path
from streammerge.output.staging import Staging

output = Path(sys.argv[1])
second = '''
import sys
from pathlib import Path
from streammerge.errors import OutputBusyError
from streammerge.output.staging import Staging
try:
    with Staging(Path(sys.argv[1])):
        print("taken over")
except OutputBusyError:
    print("busy")
'''

def at_rename(event, arguments):
    if event == "os.rename" and str(arguments[1]) == str(output):
        found = subprocess.run([sys.executable, "-c", second, str(output)], capture_output=True)
        print(found.stdout.decode().strip(), found.stderr.decode().strip())

with Staging(output) as staging:
    (staging.path / "streammerge.json").write_text("finished")
    sys.addaudithook(at_rename)
    staging.publish()
"""


def test_the_lock_is_held_until_the_output_is_published(tmp_path: Path) -> None:
    """A second merge starts at the last moment before the rename."""
    out = tmp_path / "out"
    found = subprocess.run(
        [sys.executable, "-c", AT_RENAME, str(out)], capture_output=True, text=True, check=False
    )
    assert found.stdout == "busy \n", found.stderr
    assert (out / MARK_NAME).read_text() == "finished"
    assert names(out) == [MARK_NAME]


def test_staging_is_removed_whatever_fails(tmp_path: Path) -> None:
    def fail_in_staging() -> None:
        with Staging(tmp_path / "out") as staging:
            (staging.path / WEIGHTS).write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_in_staging()
    assert names(tmp_path) == []


def test_an_interrupt_while_staging_is_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("streammerge.output.staging.check_output", interrupted)
    with pytest.raises(KeyboardInterrupt), Staging(tmp_path / "out"):
        pass
    assert names(tmp_path) == []


# ---------------------------------------------------------------------------------------------
# Killed

KILLED = """
import os, signal, sys
import streammerge

kind, count, workers, overwrite, out, *sources = sys.argv[1:]
seen = []

def stop(event):
    seen.append(type(event).__name__)
    if seen[-1] == kind and seen.count(kind) == int(count):
        os.kill(os.getpid(), signal.SIGKILL)

streammerge.merge(
    sources, out, method="svd", workers=int(workers), overwrite=overwrite == "True", on_event=stop
)
"""


@pytest.mark.parametrize(
    ("kind", "count", "workers", "overwrite"),
    [
        pytest.param("Planned", 1, 1, False, id="when the files are allocated"),
        pytest.param("TaskDone", 2, 1, False, id="half way"),
        pytest.param("TaskDone", 4, 2, True, id="after the last task, over an earlier output"),
    ],
)
def test_a_killed_merge(
    kind: str, count: int, workers: int, overwrite: bool, sources: list[Path], tmp_path: Path
) -> None:
    """It leaves the output's name as it was, and the next merge can go on with it."""
    out = tmp_path / "out"
    if overwrite:
        merge(sources, out, method="cat")
    before = contents(tmp_path)
    arguments = [kind, count, workers, overwrite, out, *sources]
    found = subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)], check=False)
    assert found.returncode == -signal.SIGKILL
    assert (staging_path(out) / WEIGHTS).exists()
    left = contents(tmp_path)
    assert {name: left[name] for name in left if not name.startswith(".")} == before
    merge(sources, out, overwrite=overwrite, resume=True)
    assert names(tmp_path) == ["out"]
    merge(sources, tmp_path / "undisturbed")
    for name in (WEIGHTS, CONFIG, MARK_NAME):
        assert (out / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


KILLED_AT_REMOVAL = """
import os, signal, sys
def at_removal(event, arguments):
    name = str(arguments[0]) if event == "shutil.rmtree" else ""
    if name.endswith(".streammerge") and os.path.exists(name):
        if '"method": "svd"' in open(os.path.join(out, "streammerge.json")).read():
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(at_removal)
"""


def test_a_kill_while_publishing_over_an_earlier_output(
    sources: list[Path], tmp_path: Path
) -> None:
    """The two exchange names at once; killed before the earlier one is removed, the new one is
    there, and the next merge clears up."""
    out = tmp_path / "out"
    merge(sources, out, method="cat")
    arguments = ["never", "1", "1", "True", str(out), *map(str, sources)]
    command = [sys.executable, "-c", KILLED_AT_REMOVAL + KILLED, *arguments]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert streammerge.verify(out).checksums
    staging = ".out.streammerge"
    assert names(tmp_path) == [staging, f"{staging}.journal", f"{staging}.lock", "out"]
    assert '"method": "cat"' in (staging_path(out) / MARK_NAME).read_text()
    merge(sources, out, overwrite=True)
    assert names(tmp_path) == ["out"]


# ---------------------------------------------------------------------------------------------
# verify

FLIPS = 160
"""Of each file; in every run the same."""


@pytest.fixture(scope="module")
def outputs(sources: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("outputs")
    options = {"rank": 2, "weights": [1e-5, 1.0]}
    merge(sources, folder / "one", **options)
    merge(sources, folder / "several", max_shard_size=300, **options)
    return {name: folder / name for name in ("one", "several")}


def spoilt_copy(output: Path, folder: Path) -> Path:
    shutil.copytree(output, folder / "out")
    return folder / "out"


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def is_found(out: Path) -> bool:
    """Whether something is found to be wrong, and said of what."""
    try:
        streammerge.verify(out)
    except StreammergeError as error:
        return str(out) in str(error)
    return False


FILES = [
    ("one", WEIGHTS),
    ("one", CONFIG),
    ("several", INDEX),
    ("several", "adapter_model-00001-of-00004.safetensors"),
    ("several", "adapter_model-00004-of-00004.safetensors"),
]


@pytest.mark.parametrize(("form", "name"), FILES)
def test_a_flipped_bit_is_found(
    form: str, name: str, outputs: dict[str, Path], tmp_path: Path
) -> None:
    out = spoilt_copy(outputs[form], tmp_path)
    streammerge.verify(out)
    bits = (out / name).stat().st_size * 8
    for bit in np.random.default_rng(0).choice(bits, FLIPS, replace=False):
        flip(out / name, bit)
        assert is_found(out), f"bit {bit} of {name}"
        flip(out / name, bit)
    assert streammerge.verify(out).checksums


@pytest.mark.parametrize("form", ["one", "several"])
def test_a_flipped_bit_of_the_record_is_found(
    form: str, outputs: dict[str, Path], tmp_path: Path
) -> None:
    out = spoilt_copy(outputs[form], tmp_path)
    text = (out / MARK_NAME).read_bytes()
    random = np.random.default_rng(1).choice(len(text) * 8, FLIPS, replace=False).tolist()
    cases = [match.start() * 8 + 5 for match in re.finditer(rb"(?<=\d)e(?=-\d)", text)]
    digits = [(match.end() - 1) * 8 for match in re.finditer(rb"\d\.\d{15,}(?=[,\ne])", text)]
    assert cases
    assert digits
    missed = []
    for bit in [*random, *cases, *digits]:
        flip(out / MARK_NAME, bit)
        missed += [] if is_found(out) else [bit]
        flip(out / MARK_NAME, bit)
    assert not missed
    assert streammerge.verify(out).checksums


def test_every_tensor_is_checked(outputs: dict[str, Path], tmp_path: Path) -> None:
    """The lowest bit of the last number of each, and the name that is given."""
    out = spoilt_copy(outputs["one"], tmp_path)
    adapter = streammerge.open_adapter(out)
    for row in range(len(adapter)):
        for side in "AB":
            factor = adapter.factor(row, side)
            bit = (factor.offset + 4 * factor.elements - 4) * 8
            flip(out / WEIGHTS, bit)
            with pytest.raises(VerificationError) as caught:
                streammerge.verify(out)
            assert caught.value.problems == (f"{WEIGHTS}: {factor.key} was changed",)
            flip(out / WEIGHTS, bit)


def test_several_faults_are_all_named(outputs: dict[str, Path], tmp_path: Path) -> None:
    out = spoilt_copy(outputs["several"], tmp_path)
    shards = names_of_shards(out)
    for name in shards[:2]:
        flip(out / name, (out / name).stat().st_size * 8 - 1)
    config = json.loads((out / CONFIG).read_text())
    (out / CONFIG).write_text(json.dumps(config))
    with pytest.raises(VerificationError) as caught:
        streammerge.verify(out)
    assert [problem.split()[0].rstrip(":") for problem in caught.value.problems] == [
        CONFIG,
        *shards[:2],
    ]


CHANGES = {
    "empty": lambda _: b"",
    "shorter": lambda data: data[:-1],
    "longer": lambda data: data + b"\n",
    "doubled": lambda data: data + data,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_of_another_size_is_found(
    change: str, outputs: dict[str, Path], tmp_path: Path
) -> None:
    out = spoilt_copy(outputs["several"], tmp_path)
    missed = []
    for name in (*names_of_shards(out), CONFIG, INDEX, MARK_NAME):
        data = (out / name).read_bytes()
        (out / name).write_bytes(CHANGES[change](data))
        missed += [] if is_found(out) else [name]
        (out / name).write_bytes(data)
    assert not missed
    assert streammerge.verify(out).checksums


def test_a_missing_file_is_found(outputs: dict[str, Path], tmp_path: Path) -> None:
    out = spoilt_copy(outputs["several"], tmp_path)
    for name in (*names_of_shards(out), INDEX):
        (out / name).rename(tmp_path / "aside")
        assert is_found(out), name
        (tmp_path / "aside").rename(out / name)
    (out / CONFIG).unlink()
    assert is_found(out)


def test_exchanged_shards_are_found(outputs: dict[str, Path], tmp_path: Path) -> None:
    out = spoilt_copy(outputs["several"], tmp_path)
    first, second, *_ = names_of_shards(out)
    (out / first).rename(out / "aside")
    (out / second).rename(out / first)
    (out / "aside").rename(out / second)
    assert is_found(out)


def test_the_timings_are_not_checked(outputs: dict[str, Path], tmp_path: Path) -> None:
    out = spoilt_copy(outputs["one"], tmp_path)
    (out / TIMINGS).unlink()
    assert streammerge.verify(out).checksums


@pytest.mark.parametrize(
    "record",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b"{}", id="an empty object"),
        pytest.param(b'{"files": 1, "other_files": 2, "tensors": 3}', id="numbers"),
        pytest.param(b"[" * 100_000, id="too deep"),
    ],
)
def test_a_record_that_is_none(record: bytes, outputs: dict[str, Path], tmp_path: Path) -> None:
    out = spoilt_copy(outputs["one"], tmp_path)
    (out / MARK_NAME).write_bytes(record)
    with pytest.raises(CorruptFileError, match=MARK_NAME):
        streammerge.verify(out)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no such directory"):
        streammerge.verify(tmp_path / "gone")


# ---------------------------------------------------------------------------------------------
# A disk that refuses

FULL = """
import resource, signal, sys
import streammerge
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
from streammerge.errors import StorageError
try:
    streammerge.merge(sys.argv[2:], sys.argv[1], method="svd", workers=1)
except StorageError as error:
    print(error)
"""


def test_a_file_system_that_refuses(sources: list[Path], tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", FULL, str(out), *map(str, sources)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert WEIGHTS in found.stdout
    assert "File too large" in found.stdout
    assert issubclass(StorageError, StreammergeError)
    assert names(tmp_path) == []
