"""Files of torch.save: read where they lie, and never run."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import streammerge
from dialects import agree, deltas, diffusers, kohya, pairs
from making import CONFIG, WEIGHTS, decode, linear, make_config, make_factors, write_adapter
from streammerge import errors
from streammerge.readers.archive import MAX_PICKLE_BYTES

LAYERS = {"up": linear(12, 8, 2), "down": linear(8, 12, 2)}
BIN = "adapter_model.bin"
C, U = errors.CorruptFileError, errors.UnsupportedAdapterError

Tensors = dict[str, Any]


def factors(dtype: torch.dtype = torch.float32) -> Tensors:
    made = make_factors(LAYERS)
    return {name: torch.from_numpy(decode(tensor)).to(dtype) for name, tensor in made.items()}


def save(directory: Path, value: Any, **options: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / CONFIG).write_text(json.dumps(make_config(LAYERS)))
    torch.save(value, directory / BIN, **options)
    return directory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_it_merges_as_safetensors_do(dtype: torch.dtype, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    pickled = save(tmp_path / "bin", factors(dtype))
    safe = tmp_path / "safe"
    shutil.copytree(pickled, safe)
    (safe / BIN).unlink()
    save_file(factors(dtype), safe / WEIGHTS)
    for source, way in ((pickled, "mmap"), (safe, "pread"), (pickled / BIN, "pread")):
        out = tmp_path / f"out-{source.name}-{way}"
        streammerge.merge([source], out, method="svd", io=way)
        assert (out / WEIGHTS).read_bytes() == (tmp_path / "out-bin-mmap" / WEIGHTS).read_bytes()


def test_parameters_and_an_ordered_dict_with_metadata(tmp_path: Path) -> None:
    module = torch.nn.Module()
    for name, tensor in factors().items():
        module.register_parameter(name.replace(".", "/"), torch.nn.Parameter(tensor))
    state = module.state_dict(keep_vars=True)
    for name in list(state):
        state[name.replace("/", ".")] = state.pop(name)
    adapter = streammerge.open_adapter(save(tmp_path / "in", state))
    assert len(adapter) == len(LAYERS)


def test_safetensors_beside_it_win_with_a_notice(tmp_path: Path) -> None:
    save(tmp_path / "in", {"x": torch.zeros(1)})
    write_adapter(tmp_path / "in", LAYERS)
    (notice,) = streammerge.plan([tmp_path / "in"]).notices
    assert f"{BIN} is not looked at" in notice


@pytest.mark.parametrize("layout", [kohya, diffusers])
def test_image_adapters_in_it(layout: Callable[..., Any], tmp_path: Path) -> None:
    made = pairs()
    tensors = {n: torch.from_numpy(decode(t)) for n, t in layout(made).items()}
    torch.save(tensors, tmp_path / "any.pt")
    agree(deltas(streammerge.open_adapter(tmp_path / "any.pt")), made)


def test_torch_is_not_loaded_for_others(tmp_path: Path) -> None:
    write_adapter(tmp_path / "in", LAYERS)
    script = (
        "import sys, streammerge; streammerge.open_adapter(sys.argv[1]); print(len(sys.modules))"
    )
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            script + "; assert 'torch' not in sys.modules",
            str(tmp_path / "in"),
        ],
        check=False,
    )
    assert found.returncode == 0


# ---------------------------------------------------------------------------------------------
# What is refused


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["BOMB"],)


def rewritten(path: Path, change: Callable[[dict[str, bytes]], None], **options: Any) -> None:
    """Write the archive again with other records."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    change(records)
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def another_record(records: dict[str, bytes]) -> None:
    records["adapter_model/data/99"] = bytes(64)


def shorter_record(records: dict[str, bytes]) -> None:
    records["adapter_model/data/0"] = records["adapter_model/data/0"][:-4]


def another_pickle(records: dict[str, bytes]) -> None:
    records["other/data.pkl"] = records["adapter_model/data.pkl"]


def other_order(records: dict[str, bytes]) -> None:
    records["adapter_model/byteorder"] = b"big"


def long_pickle(records: dict[str, bytes]) -> None:
    records["adapter_model/data.pkl"] += bytes(MAX_PICKLE_BYTES)


def half_pickle(records: dict[str, bytes]) -> None:
    records["adapter_model/data.pkl"] = records["adapter_model/data.pkl"][:99]


def allocating_pickle(records: dict[str, bytes]) -> None:
    """A bytearray of a terabyte, which torch's own unpickler would make."""
    text = b"cbuiltins\nbytearray\n(\x8a\x06\x00\x00\x00\x00\x00\x01tR."
    records["adapter_model/data.pkl"] = b"\x80\x02" + text


def bomb_inside(records: dict[str, bytes]) -> None:
    records["adapter_model/data.pkl"] = pickle.dumps(Bomb(), protocol=2)


RECORDS = {
    "a record that no tensor is in": (another_record, C, "not its records"),
    "a record that is too short": (shorter_record, C, "torch cannot load|not its records"),
    "two pickles": (another_pickle, C, "not of one torch.save"),
    "another byte order": (other_order, C, "byte order"),
    "a long pickle": (long_pickle, C, "are the limit"),
    "half a pickle": (half_pickle, C, "pickle is not sound"),
    "a pickle that allocates": (allocating_pickle, U, "bytearray"),
    "a pickle that acts": (bomb_inside, U, "mkdir"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_records_that_are_wrong(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "bomb"))
    change, error, words = RECORDS[name]
    directory = save(tmp_path / "in", factors())
    rewritten(directory / BIN, change)
    refuse(directory, error, words)
    assert not (tmp_path / "bomb").exists()


def refuse(directory: Path, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        streammerge.plan([directory])
    assert str(directory / BIN) in str(caught.value)


VALUES = {
    "a view": ({"x": torch.zeros(4)[1:]}, U, "view of a part"),
    "a transposed tensor": ({"x": torch.zeros(4, 3).t()}, U, "view of a part"),
    "an empty tensor": ({"x": torch.zeros(0)}, U, "empty"),
    "complex numbers": ({"x": torch.zeros(2, dtype=torch.complex64)}, U, "ComplexFloatStorage"),
    "a sparse tensor": ({"x": torch.eye(2).to_sparse()}, U, "torch Size"),
    "a list": ([torch.zeros(2)], U, "APPEND"),
    "a number among tensors": ({"x": 5}, U, "no plain tensor"),
    "a name that is none": ({5: torch.zeros(2)}, C, "names a tensor 5"),
    "nothing": ({}, U, "does not hold tensors"),
    "nested tensors": ({"state": {"x": torch.zeros(2)}}, U, "no plain tensor"),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_that_are_no_plain_tensors(name: str, tmp_path: Path) -> None:
    value, error, words = VALUES[name]
    refuse(save(tmp_path / "in", value), error, words)


def test_the_format_before_torch_1_6(tmp_path: Path) -> None:
    directory = save(tmp_path / "in", factors(), _use_new_zipfile_serialization=False)
    refuse(directory, U, "before 1.6")


def test_a_compressed_archive(tmp_path: Path) -> None:
    directory = save(tmp_path / "in", factors())
    rewritten(directory / BIN, lambda _: None, compression=zipfile.ZIP_DEFLATED)
    refuse(directory, C, "is compressed")


def test_records_one_in_another(tmp_path: Path) -> None:
    """The list of records is made to say that all data lie at one place."""
    directory = save(tmp_path / "in", factors())
    data = bytearray((directory / BIN).read_bytes())
    listed, place = b"PK\x01\x02", 0
    offsets = []
    while (place := data.find(listed, place)) >= 0:
        offsets.append(place + 42)
        place += 4
    for offset in offsets[3:]:
        data[offset : offset + 4] = data[offsets[2] : offsets[2] + 4]
    (directory / BIN).write_bytes(data)
    refuse(directory, C, "overlap|where its list says")


def test_a_list_of_records_without_end(tmp_path: Path) -> None:
    """It would be read whole; the end of the archive says how long it is."""
    directory = save(tmp_path / "in", factors())
    data = bytearray((directory / BIN).read_bytes())
    end = data.rfind(b"PK\x05\x06")
    size = 3 * 2**29
    with (directory / BIN).open("wb") as stream:
        stream.write(data[:end])
        stream.truncate(end + size)
        stream.seek(0, io.SEEK_END)
        stream.write(struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 1, 1, size, end, 0))
    refuse(directory, C, "list of records takes")


def test_cut_off_and_lfs_pointers(tmp_path: Path) -> None:
    directory = save(tmp_path / "in", factors())
    data = (directory / BIN).read_bytes()
    for cut in (3, 100, len(data) - 1, len(data) // 2):
        (directory / BIN).write_bytes(data[:cut])
        refuse(directory, C, "is not")
    (directory / BIN).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    refuse(directory, C, "git lfs pull")


def test_a_real_one(real_adapters: Path, tmp_path: Path) -> None:
    """Merged with itself it is twice itself, by torch's own reading."""
    source = real_adapters / "gpt2-causal" / "yoonyerin-be-great-bin"
    loaded = torch.load(source / BIN, weights_only=True, map_location="cpu")
    streammerge.merge([source, source], tmp_path / "out", method="cat")
    found = deltas(streammerge.open_adapter(tmp_path / "out"))
    assert len(found) == 12
    for target, delta in found.items():
        a, b = (loaded[f"base_model.model.{target}.lora_{side}.weight"].double() for side in "AB")
        expected = 2 * (b @ a).numpy() * (32 / 8)
        assert np.abs(delta - expected).max() <= 1e-6 * np.abs(expected).max()
