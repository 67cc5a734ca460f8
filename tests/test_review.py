"""Faults that a review found, each with what shows that it is gone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

import streammerge
from making import PREFIX, Tensor, frame, linear, render, write_adapter, write_files
from streammerge import errors
from streammerge.adapter import Factor, TensorFile
from streammerge.plans import Task
from streammerge.readers.header import read_header
from streammerge.readers.windows import (
    PAGE_BYTES,
    REUSED_BYTES,
    Bytes,
    OpenFiles,
    Window,
    mapped,
    pread,
)
from streammerge.worker.factors import FactorReader
from streammerge.worker.job import Job, TaskStoppedError
from streammerge.worker.receipt import Receipt

SMALL = {"up": linear(12, 8, 2)}


def described(path: Path) -> TensorFile:
    status = path.stat()
    return TensorFile(str(path), status.st_size, status.st_mtime_ns, status.st_ino)


def test_a_map_of_a_file_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(8192))
    file, files = described(path), OpenFiles()
    window = mapped(files)
    assert len(window(file, 0, 8192)) == 8192
    os.truncate(path, 100)
    with pytest.raises(errors.InputChangedError, match="data"):
        window(file, 4096, 4096)


def test_pread_reuses_one_small_buffer_for_each_thread(tmp_path: Path) -> None:
    """A small window lasts until the thread's next one; a large one is its caller's."""
    path = tmp_path / "data"
    path.write_bytes(bytes(range(64)) + bytes(2 * REUSED_BYTES))
    file, window = described(path), pread(OpenFiles())
    first = window(file, 0, 8)
    assert first.tolist() == list(range(8))
    second = window(file, 8, 8)
    assert second.tolist() == list(range(8, 16))
    assert second.base is first.base
    with ThreadPoolExecutor(1) as pool:
        elsewhere = pool.submit(window, file, 16, 8).result()
    assert elsewhere.base is not second.base
    assert second.tolist() == list(range(8, 16))
    large = window(file, 0, REUSED_BYTES + 1)
    again = window(file, 0, REUSED_BYTES + 1)
    assert large.base is not again.base
    assert not any(taken.ctypes.data % PAGE_BYTES for taken in (first, elsewhere, large))


def test_a_selection_does_not_match_other_modules(tmp_path: Path) -> None:
    """What was left out may end in the path of what was not."""
    layers = {"enc.q": linear(8, 8, 2), "dec.enc.q": linear(8, 8, 2)}
    adapter = write_adapter(tmp_path / "in", layers)
    streammerge.merge([adapter], tmp_path / "out", exclude="^dec")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == r"enc\.q"
    assert streammerge.plan([adapter]).config["target_modules"] == ["dec.enc.q", "enc.q"]


def test_what_cancels_is_zero(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "in", {"up": linear(60, 50, 4)})
    (module,) = streammerge.merge([adapter, adapter], tmp_path / "out", weights=[1, -1]).modules
    assert (module.kept_energy, module.relative_error) == (1.0, 0.0)


def test_keys_that_stand_twice_behind_spaces(tmp_path: Path) -> None:
    entry = '{"dtype" :"F32","shape" :[1],"data_offsets" :[0,4]}'
    plain = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    path = tmp_path / "double.safetensors"
    path.write_bytes(frame(f'{{"x" :{entry},"x":{plain}}}'.encode(), bytes(4)))
    with pytest.raises(errors.CorruptFileError, match="twice"):
        read_header(path)


def test_the_dtype_of_what_is_merged(tmp_path: Path) -> None:
    """A target that is left out does not make the output wider."""
    half, full = np.ones((2, 8), "<f2"), np.ones((2, 8), "<f4")
    tensors = {
        f"{PREFIX}{name}.lora_{side}.weight": Tensor(dtype, shape, values.tobytes())
        for name, dtype, values in (("half", "F16", half), ("full", "F32", full))
        for side, shape in (("A", (2, 8)), ("B", (8, 2)))
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["half", "full"]}
    adapter = write_files(tmp_path / "in", tensors, config)
    assert render(tensors)
    assert streammerge.plan([adapter], include="half").dtype == "float16"
    assert streammerge.plan([adapter]).dtype == "float32"


@pytest.mark.parametrize("method", ["svd", "linear", "dare_linear"])
def test_a_sign_that_nobody_elects(method: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "in", SMALL)
    density = 0.5 if method.startswith("dare") else None
    with pytest.raises(errors.RecipeError, match="elects no sign"):
        streammerge.plan([adapter], method=method, density=density, majority_sign="frequency")


def test_numbers_of_numpy(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "in", SMALL)
    result = streammerge.merge(
        [adapter, adapter],
        tmp_path / "out",
        weights=np.array([1.0, 0.5], np.float32),
        rank=np.int64(2),
        clamp=np.float32(0.99),
        seed=np.int32(3),
        scaling=np.float64(1.0),
    )
    recipe = json.loads((result.output / "streammerge.json").read_text())["recipe"]
    assert recipe["weights"] == [1.0, 0.5]
    assert recipe["rank"] == 2


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("weights", "12"),
        ("clamp", "0.9"),
        ("rank", 1.5),
        ("workers", "2"),
        ("workers", 1.5),
        ("seed", True),
        ("scaling", [1.0]),
    ],
)
def test_what_is_no_number(option: str, value: object, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "in", SMALL)
    with pytest.raises(errors.RecipeError) as refused:
        streammerge.plan([adapter, adapter], **{option: value})
    assert refused.value.option == option


def test_energies_beyond_float64(tmp_path: Path) -> None:
    """The report is JSON, which has no NaN."""
    adapter = write_adapter(tmp_path / "in", SMALL)
    wide = {"compute_dtype": "float64", "dtype": "float64", "weights": [1e200, 1e200]}
    with pytest.raises(errors.ComputeOverflowError, match="up"):
        streammerge.merge([adapter, adapter], tmp_path / "out", **wide)


def test_a_task_ends_when_the_run_is_over(tmp_path: Path) -> None:
    """At its next read, so that a stop does not wait for a large target."""
    adapter = write_adapter(tmp_path / "in", SMALL)
    plan = streammerge.plan([adapter])
    job = Job(plan, [streammerge.open_adapter(adapter)], tmp_path, [0])
    job.stopped.set()
    factor = job.adapters[0].factor(0, "A")
    with pytest.raises(TaskStoppedError):
        job.window(factor.file, factor.offset, 8)


def noting(found: dict[str, tuple[str, str]]) -> Callable[[Task, Receipt], None]:
    """A listener that notes the checksums of each target."""
    return lambda task, receipt: found.update({task.target: receipt.checksums})


def test_one_worker_on_dask(tmp_path: Path) -> None:
    """The threaded executor with one thread, which the public call never chooses."""
    from streammerge.adapter import NameTable
    from streammerge.executors.serial import run_serial
    from streammerge.executors.threads import run_threads
    from streammerge.output.writer import allocate
    from streammerge.readers import read_adapters

    paths = [
        str(write_adapter(tmp_path / f"in{i}", SMALL | {"down": linear(8, 12, 2)}, seed=i))
        for i in range(2)
    ]
    plan = streammerge.plan(paths, workers=1)
    regions = plan.regions
    checksums = []
    for name, run in (("serial", run_serial), ("dask", run_threads)):
        (tmp_path / name).mkdir()
        starts = allocate(tmp_path / name, plan.files, regions)
        job = Job(plan, read_adapters(paths, NameTable()), tmp_path / name, starts)
        before = torch.get_num_threads()
        found: dict[str, tuple[str, str]] = {}
        run(job, plan.tasks, noting(found))
        checksums.append(found)
        assert torch.get_num_threads() == before
    assert checksums[0] == checksums[1]


@pytest.mark.parametrize("io", [mapped, pread])
@pytest.mark.parametrize("threads", [1, 4])
def test_a_factor_is_hashed_once_in_whatever_order_it_is_read(
    io: Callable[[OpenFiles], Window], threads: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    rows, width = 4000, 90
    stored = rng.standard_normal((rows, width), dtype=np.float32)
    path = tmp_path / "data"
    path.write_bytes(b"x" * 12 + stored.tobytes())
    expected = xxhash.xxh3_128_hexdigest(stored.tobytes())
    for _ in range(10):
        factor = Factor(described(path), "t", 12, "F32", (rows, width))
        reader = FactorReader(io(OpenFiles()), factor, torch.float32, torch.device("cpu"), None)
        spans = [(int(a), int(min(rows, a + 1 + rng.integers(300)))) for a in rng.permutation(40)]

        def right(span: tuple[int, int], reader: FactorReader = reader) -> bool:
            return bool((reader.rows(*span).numpy() == stored[slice(*span)]).all())

        with ThreadPoolExecutor(threads) as pool:
            assert all(pool.map(right, [(90 * a, min(rows, 90 * b)) for a, b in spans if a < b]))
        assert reader.checksum() == expected


def test_a_factor_is_read_once(tmp_path: Path) -> None:
    """Going over it from its start to its end, nothing is asked for twice, for its checksum least
    of all."""
    stored = np.ones((4000, 90), np.float32)
    path = tmp_path / "data"
    path.write_bytes(stored.tobytes())
    read, asked = pread(OpenFiles()), []

    def window(file: TensorFile, offset: int, nbytes: int) -> Bytes:
        asked.append((offset, nbytes))
        return read(file, offset, nbytes)

    factor = Factor(described(path), "t", 0, "F32", stored.shape)
    reader = FactorReader(window, factor, torch.float32, torch.device("cpu"), None)
    for start in range(0, 4000, 500):
        reader.rows(start, start + 500)
    reader.checksum()
    assert asked == [(start, 180_000) for start in range(0, stored.nbytes, 180_000)]
