"""From files to manifests: headers taken for hostile, key patterns as PEFT reads them, shards."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from safetensors.numpy import load_file

import streammerge
from making import (
    CONFIG,
    INDEX,
    PREFIX,
    WEIGHTS,
    Tensor,
    convolution,
    decode,
    draw,
    embedding,
    encode,
    frame,
    linear,
    make_config,
    make_factors,
    render,
    write_adapter,
    write_files,
    write_shards,
)
from streammerge import errors, events
from streammerge.adapter import Adapter, Factor, NameTable, TensorFile
from streammerge.output.staging import MARK_NAME
from streammerge.patterns import pattern_lookup
from streammerge.planner.output_config import rank_pattern
from streammerge.planner.scaling import scalings
from streammerge.readers import read_adapter
from streammerge.readers.header import MAX_DIMENSIONS, MAX_HEADER_BYTES, read_header
from streammerge.readers.windows import OpenFiles, Window, mapped, pread

TARGETS = {
    "model.words": embedding(6, 40, 3),
    "model.patches": convolution(8, 3, (2, 2), 3),
    "model.0.up": linear(20, 12, 3),
    "model.0.down": linear(12, 20, 5),
}


def stored(factor: Factor) -> Tensor:
    """The tensor at the place that a manifest names."""
    size = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}[factor.dtype] * factor.elements
    data = Path(factor.file.path).read_bytes()[factor.offset : factor.offset + size]
    return Tensor(factor.dtype, factor.shape, data)


def held(adapter: Adapter) -> dict[str, Tensor]:
    """Every factor of a manifest, by its full name."""
    factors = [adapter.factor(row, side) for row in range(len(adapter)) for side in "AB"]
    return {factor.key: stored(factor) for factor in factors}


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# ---------------------------------------------------------------------------------------------
# Headers


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def header_file(path: Path, entries: dict[str, Any], data: bytes) -> Path:
    return write(path, frame(json.dumps(entries).encode(), data))


SOUND = {
    "no tensors": ({}, 0),
    "a scalar": ({"a": entry("F32", [], 0, 4)}, 4),
    "an empty tensor": ({"a": entry("F32", [3, 0], 0, 0), "b": entry("I8", [2], 0, 2)}, 2),
    "an empty tensor between two": (
        {
            "a": entry("I8", [2], 0, 2),
            "b": entry("F32", [0], 2, 2),
            "c": entry("I8", [1], 2, 3),
        },
        3,
    ),
    "another order than that of the data": (
        {"b": entry("F16", [2], 4, 8), "a": entry("F32", [1], 0, 4)},
        8,
    ),
    "dtypes of less than a byte": ({"a": entry("F4", [2, 3], 0, 3)}, 3),
    "many dimensions": ({"a": entry("U8", [1] * MAX_DIMENSIONS, 0, 1)}, 1),
    "names of any kind": (
        {"": entry("U8", [1], 0, 1), "\u00e9\u4e16 .\n": entry("U8", [1], 1, 2)},
        2,
    ),
    "metadata that are null": ({"__metadata__": None, "a": entry("U8", [1], 0, 1)}, 1),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_header(name: str, tmp_path: Path) -> None:
    entries, size = SOUND[name]
    header = read_header(header_file(tmp_path / "f", entries, bytes(size)))
    start = 8 + int.from_bytes((tmp_path / "f").read_bytes()[:8], "little")
    described = {e.name: entry(e.dtype, list(e.shape), e.offset - start, 0) for e in header.entries}
    for e in header.entries:
        described[e.name]["data_offsets"][1] = e.offset - start + e.nbytes
    assert described == {k: v for k, v in entries.items() if k != "__metadata__"}
    assert (header.file.path, header.file.size) == (str(tmp_path / "f"), start + size)
    assert header.metadata == {}


UNSOUND = {
    "an overlap": ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, 6, "b"),
    "the same bytes twice": ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 0, 4)}, 4, "b"),
    "a hole between": ({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 3, 5)}, 5, "b"),
    "a hole at the start": ({"a": entry("U8", [2], 1, 3)}, 3, "a"),
    "an empty tensor inside another": (
        {"a": entry("U8", [4], 0, 4), "b": entry("U8", [0], 2, 2)},
        4,
        "b",
    ),
    "offsets that fall": ({"a": entry("U8", [2], 4, 2)}, 4, "a"),
    "offsets that are negative": ({"a": entry("U8", [2], -2, 0)}, 4, "a"),
    "offsets that are fractions": ({"a": entry("U8", [2], 0, 2.0)}, 2, "a"),
    "offsets that are true": ({"a": entry("U8", [1], False, True)}, 1, "a"),
    "three offsets": ({"a": entry("U8", [2], 0, 2) | {"data_offsets": [0, 1, 2]}}, 2, "a"),
    "a shape that is no list": ({"a": entry("U8", [2], 0, 2) | {"shape": 2}}, 2, "a"),
    "a shape in words": ({"a": entry("U8", [2], 0, 2) | {"shape": ["2"]}}, 2, "a"),
    "too many dimensions": ({"a": entry("U8", [1] * (MAX_DIMENSIONS + 1), 0, 1)}, 1, "a"),
    "bits that fill no byte": ({"a": entry("F4", [3], 0, 2)}, 2, "a"),
    "a dtype that is a list": ({"a": entry("U8", [1], 0, 1) | {"dtype": ["U8"]}}, 1, "a"),
    "an entry that is a list": ({"a": [1, 2]}, 0, "a"),
    "an entry that is null": ({"a": None}, 0, "a"),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_an_unsound_header(name: str, tmp_path: Path) -> None:
    entries, size, tensor = UNSOUND[name]
    with pytest.raises(errors.CorruptFileError) as caught:
        read_header(header_file(tmp_path / "f", entries, bytes(size)))
    assert caught.value.tensor == tensor
    assert str(caught.value).startswith(f"{tmp_path / 'f'}: {tensor}: ")


def test_the_limit_of_a_header(tmp_path: Path) -> None:
    """It is looked at before so much is read, and before it is compared with the file's size."""
    for length, word in ((MAX_HEADER_BYTES + 1, "allows"), (MAX_HEADER_BYTES, "truncated")):
        with pytest.raises(errors.CorruptFileError, match=word):
            read_header(write(tmp_path / "f", length.to_bytes(8, "little") + b"{}"))
    with pytest.raises(errors.CorruptFileError, match="allows"):
        read_header(write(tmp_path / "f", b"\xff" * 8 + b"{}"))


def test_a_header_that_is_filled_up_with_spaces(tmp_path: Path) -> None:
    text = json.dumps({"a": entry("U8", [1], 0, 1)}).encode() + b" " * 1000
    (found,) = read_header(write(tmp_path / "f", frame(text, b"x"))).entries
    assert (found.offset, found.nbytes) == (8 + len(text), 1)


ONE = {"up": linear(3, 2, 1)}
TOKEN = re.compile(r'"[^"]*"|-?[\d.]+|true|false|null|[{}\[\],:]')
OTHERS = (
    "null",
    "-1",
    "2.5",
    "1e999",
    "NaN",
    "[]",
    "[[]]",
    "{}",
    "true",
    '"\\u0000"',
    "9" * 400,
    "",
)


def is_read_or_refused(folder: Path) -> bool:
    """Whether an adapter is either read, or refused with its path."""
    try:
        scalings(streammerge.open_adapter(folder), 1.0)
    except errors.AdapterError as error:
        return str(folder) in str(error)
    except Exception:
        return False
    return True


def changed_tokens(text: str) -> list[str]:
    """The text with every token in turn replaced by every other thing."""
    return [
        text[: token.start()] + other + text[token.end() :]
        for token in TOKEN.finditer(text)
        for other in OTHERS
    ]


def test_any_change_of_a_config_is_read_or_refused(tmp_path: Path) -> None:
    config = make_config(ONE, rank_pattern={"up": 1}, alpha_pattern={"up": 2.0})
    adapter = write_files(tmp_path / "in", make_factors(ONE), config)
    wrong = []
    for text in changed_tokens(json.dumps(config)):
        (adapter / CONFIG).write_text(text)
        wrong += [] if is_read_or_refused(adapter) else [text]
    assert not wrong


def test_any_change_of_a_header_is_read_or_refused(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "in", ONE)
    data = (adapter / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    wrong = []
    for text in changed_tokens(data[8:end].decode()):
        (adapter / WEIGHTS).write_bytes(frame(text.encode(), data[end:]))
        wrong += [] if is_read_or_refused(adapter) else [text]
    assert not wrong


@settings(max_examples=200)
@given(
    changes=st.dictionaries(st.integers(0, 300), st.integers(0, 255), min_size=1, max_size=3),
    cut=st.one_of(st.none(), st.integers(0, 300)),
)
def test_any_change_of_bytes_is_read_or_refused(
    changes: dict[int, int], cut: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    adapter = write_adapter(tmp_path_factory.mktemp("changed") / "in", ONE)
    for name in (WEIGHTS, CONFIG):
        data = bytearray((adapter / name).read_bytes())
        for place, value in changes.items():
            data[place % len(data)] = value
        (adapter / name).write_bytes(data[:cut])
        assert is_read_or_refused(adapter)


# ---------------------------------------------------------------------------------------------
# Data


@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("shift", range(8))
def test_data_that_are_not_aligned(shift: int, dtype: str, io: str, tmp_path: Path) -> None:
    """Early writers let the data begin wherever the header's text ended."""
    factors = make_factors(TARGETS, dtype=dtype)
    padded = {f"{PREFIX}pad{'x' * shift}": encode(np.ones(3), "I8")} | factors
    adapter = write_files(tmp_path / "in", {}, make_config(TARGETS, lora_alpha=3))
    (adapter / WEIGHTS).write_bytes(render(padded, align=1))
    streammerge.merge(
        [adapter],
        tmp_path / "out",
        method="cat",
        include=r"0\.up",
        extras="drop",
        dtype="float64",
        compute_dtype="float64",
        io=io,
        on_event=events.ignore,
    )
    merged = load_file(tmp_path / "out" / WEIGHTS)
    assert len(merged) == 2
    for key, tensor in merged.items():
        np.testing.assert_array_equal(tensor, decode(factors[key]))


def test_every_kind_of_factor_is_found(tmp_path: Path) -> None:
    adapter = streammerge.open_adapter(write_adapter(tmp_path / "in", TARGETS))
    assert held(adapter) == make_factors(TARGETS)
    assert [adapter.target(row) for row in range(len(adapter))] == sorted(TARGETS)
    shapes = list(zip(adapter.columns.m.tolist(), adapter.columns.n.tolist(), strict=True))
    assert shapes == [(12, 20), (20, 12), (8, 12), (6, 40)]


def test_factors_of_different_dtypes(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    key = f"{PREFIX}model.0.up.lora_B.weight"
    extra = {key: draw(generator, (20, 3), "BF16")}
    adapter = streammerge.open_adapter(write_adapter(tmp_path / "in", TARGETS, extra=extra))
    assert held(adapter)[key] == extra[key]


def test_bfloat16_by_hand() -> None:
    """To the nearest, of two equally near to the even one."""
    values = np.array([1.0, 1 + 2**-8, 1 + 2**-7, 1 + 3 * 2**-8, -(1 + 2**-8 + 2**-20), 0.0])
    rounded = decode(encode(values, "BF16"))
    np.testing.assert_array_equal(rounded, [1, 1, 1 + 2**-7, 1 + 2**-6, -(1 + 2**-7), 0])


# ---------------------------------------------------------------------------------------------
# Windows

Make = Callable[[OpenFiles], Window]


def described(path: Path) -> TensorFile:
    status = path.stat()
    return TensorFile(str(path), status.st_size, status.st_mtime_ns, status.st_ino)


@pytest.mark.parametrize("make", [mapped, pread])
def test_windows(make: Make, tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(3 * 4096 + 17)
    file = described(write(tmp_path / "f", data))
    files = OpenFiles()
    window = make(files)
    for offset, nbytes in ((0, 1), (0, len(data)), (4095, 2), (4096, 4096), (len(data) - 1, 1)):
        assert window(file, offset, nbytes).tobytes() == data[offset : offset + nbytes]
    files.close()


@pytest.mark.parametrize("make", [mapped, pread])
@pytest.mark.parametrize("change", ["gone", "longer", "replaced", "rewritten"])
def test_a_file_that_has_changed(change: str, make: Make, tmp_path: Path) -> None:
    path = write(tmp_path / "f", bytes(100))
    file = described(path)
    if change == "gone":
        path.unlink()
    elif change == "longer":
        write(path, bytes(101))
    elif change == "replaced":
        write(tmp_path / "g", bytes(100)).rename(path)
        os.utime(path, ns=(file.mtime_ns, file.mtime_ns))
    else:
        os.utime(path, ns=(file.mtime_ns + 1, file.mtime_ns + 1))
    with pytest.raises(errors.InputChangedError, match=str(path)):
        make(OpenFiles())(file, 0, 10)


def test_a_file_that_becomes_shorter_while_it_is_open(tmp_path: Path) -> None:
    """Read into a buffer, not mapped: a map would end in SIGBUS."""
    path = write(tmp_path / "f", bytes(100))
    files = OpenFiles()
    window = pread(files)
    file = described(path)
    assert len(window(file, 0, 100)) == 100
    os.truncate(path, 50)
    with pytest.raises(errors.InputChangedError, match="has changed"):
        window(file, 0, 100)
    files.close()


@pytest.mark.parametrize("make", [mapped, pread])
def test_few_files_are_open(make: Make, tmp_path: Path) -> None:
    """More files than may be open, from several threads."""
    paths = [write(tmp_path / f"{i}", bytes([i]) * 10) for i in range(40)]
    files = OpenFiles(max_open=4)
    window = make(files)
    most, wrong = [], []

    def read(start: int) -> None:
        for i in [*range(start, 40), *range(start)]:
            if window(described(paths[i]), 3, 5).tobytes() != bytes([i]) * 5:
                wrong.append(i)
            most.append(open_files(tmp_path))

    threads = [threading.Thread(target=read, args=(7 * start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    # Each thread may borrow one more.
    assert max(most) <= 4 + 4
    files.close()
    assert open_files(tmp_path) == 0


def open_files(folder: Path) -> int:
    """How many descriptors of this process are of files in a folder."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            count += str(link.readlink()).startswith(str(folder))
        except FileNotFoundError:  # another thread has closed it
            continue
    return count


# ---------------------------------------------------------------------------------------------
# Prefixes and names


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_nested_prefixes_count_as_one(depth: int, tmp_path: Path) -> None:
    adapter = streammerge.open_adapter(
        write_adapter(tmp_path / "in", TARGETS, prefix=PREFIX * depth)
    )
    assert [adapter.target(row) for row in range(len(adapter))] == sorted(TARGETS)
    assert adapter.prefixes == (PREFIX * depth,)
    assert held(adapter) == make_factors(TARGETS, prefix=PREFIX * depth)


def test_prefixes_that_differ_within_an_adapter(tmp_path: Path) -> None:
    """They stand for one place in the model, so a target under both is an error."""
    factors = make_factors({"up": linear(3, 2, 1)}) | make_factors(
        {"down": linear(3, 2, 1)}, prefix=PREFIX * 2
    )
    config = make_config({"up": linear(3, 2, 1)})
    adapter = streammerge.open_adapter(write_files(tmp_path / "in", factors, config))
    assert held(adapter) == factors
    assert [adapter.target(row) for row in range(len(adapter))] == ["down", "up"]


def test_adapters_meet_whatever_their_prefixes(tmp_path: Path) -> None:
    adapters = [
        write_adapter(tmp_path / f"{depth}", TARGETS, prefix=PREFIX * depth) for depth in (1, 3)
    ]
    plan = streammerge.plan(adapters)
    assert [task.target for task in plan.tasks] == sorted(TARGETS)
    assert {task.last - task.first for task in plan.tasks} == {2}
    assert plan.notices == ()


ODD_NAMES = (
    "lora_A",
    "model.lora_A.weight",
    "a b",
    "\u00e9\u4e16",
    "x.base_model",
    "0",
    "a..b",
    ".a",
)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_of_modules(name: str, tmp_path: Path) -> None:
    """Read, merged, and read again under the same name."""
    source = write_adapter(tmp_path / "in", {name: linear(4, 3, 2), "plain": linear(4, 3, 1)})
    streammerge.merge([source], tmp_path / "out", method="svd", rank=2)
    adapter = streammerge.open_adapter(tmp_path / "out")
    assert {adapter.target(row) for row in range(len(adapter))} == {name, "plain"}
    assert adapter.columns.rank.tolist() == adapter.columns.declared_rank.tolist()
    assert (scalings(adapter, None) == 1.0).all()


def test_names_are_shared_between_adapters(tmp_path: Path) -> None:
    table = NameTable()
    for seed in range(3):
        read_adapter(str(write_adapter(tmp_path / f"{seed}", TARGETS)), table)
    assert sorted(table.names) == sorted(TARGETS)


def test_extras_are_listed(tmp_path: Path) -> None:
    names = {"model.classifier.weight", f"{PREFIX}score.bias", f"{PREFIX}model.0.up.lora_B.bias"}
    extra = {name: encode(np.ones(2)) for name in names}
    adapter = streammerge.open_adapter(write_adapter(tmp_path / "in", TARGETS, extra=extra))
    assert set(adapter.extras) == names
    assert len(adapter) == len(TARGETS)


def test_safetensors_win_over_pickles(tmp_path: Path) -> None:
    """As in PEFT, even where the two hold different weights."""
    adapter = write_adapter(tmp_path / "in", TARGETS)
    (adapter / "adapter_model.bin").write_bytes(b"never opened")
    assert held(streammerge.open_adapter(adapter)) == make_factors(TARGETS)


# ---------------------------------------------------------------------------------------------
# rank_pattern and alpha_pattern

words = st.sampled_from(["a", "b", "ab", "q_proj", "layers", "0", "1", "10", "h"])
module_paths = st.lists(words, min_size=1, max_size=5).map(".".join)
escaped = module_paths.map(lambda path: path.replace(".", r"\."))
regexes = st.sampled_from(
    [
        r".*",
        r".*\.q_proj",
        r"layers\.\d+\.a",
        r"(a|b)",
        r"a|b",
        r"layers\.[01]\..*",
        r"h+",
        r"[^.]+",
        r"a?",
        "",
        r"(?:layers|h)\.0(\..*)?",
        r"\w+\.b",
        r"0\.(?=a)a",
    ]
)
anchored = st.tuples(st.sampled_from(["", "^"]), escaped, st.sampled_from(["", "$"])).map("".join)
literal_keys = st.one_of(escaped, regexes, anchored)
plain_keys = st.one_of(literal_keys, module_paths)


def as_peft(pattern: dict[str, int], path: str, default: int) -> int:
    """How PEFT looks a module's rank or alpha up."""
    return pattern.get(get_pattern_key(pattern.keys(), path), default)


@settings(max_examples=600)
@given(
    pattern=st.dictionaries(literal_keys, st.integers(1, 9), max_size=6),
    paths=st.lists(module_paths, min_size=1, max_size=8),
)
@example(pattern={"b": 1, "a.b": 2}, paths=["x.a.b", "a.b", "b", "ab"])
@example(pattern={"^a.b$": 1, "b": 2}, paths=["a.b", "x.a.b"])
@example(pattern={r"a\.b": 1, ".*b": 2, "b": 3}, paths=["a.b", "c.b", "xb"])
def test_patterns_are_looked_up_as_in_peft(pattern: dict[str, int], paths: list[str]) -> None:
    look_up = pattern_lookup(pattern, -1)
    for path in paths:
        assert look_up(path) == as_peft(pattern, path, -1), path


@settings(max_examples=300)
@given(
    pattern=st.dictionaries(plain_keys, st.integers(1, 9), max_size=6),
    paths=st.lists(module_paths, min_size=1, max_size=8),
)
@example(pattern={"h.1": 1}, paths=["h.1", "h_1", "x.h01"])
def test_plain_paths_are_looked_up_as_in_peft(pattern: dict[str, int], paths: list[str]) -> None:
    look_up = pattern_lookup(pattern, -1)
    for path in paths:
        assert look_up(path) == as_peft(pattern, path, -1), path


@pytest.mark.parametrize("path", ["a+b", "a(b)", "a[0]", "block$.up"])
def test_a_key_that_is_the_path_itself(path: str) -> None:
    """Though as a regular expression it does not match itself."""
    assert as_peft({path: 3}, path, -1) == 3
    assert pattern_lookup({path: 3}, -1)(path) == 3


@settings(max_examples=300)
@given(
    ranks=st.dictionaries(
        st.one_of(module_paths, module_paths.map(lambda path: path.replace(".", "_", 1))),
        st.integers(1, 3),
        min_size=1,
        max_size=8,
    )
)
@example(ranks={"b": 1, "a.b": 2, "x.a.b": 3, "c.b": 2})
@example(ranks={"h.1": 1, "h_1": 2, "h_2": 2, "h_3": 2})
def test_peft_finds_the_ranks_that_are_written(ranks: dict[str, int]) -> None:
    for rank in set(ranks.values()):
        pattern = rank_pattern(ranks, rank)
        assert {target: as_peft(pattern, target, rank) for target in ranks} == ranks


def test_many_patterns_are_looked_up_in_linear_time() -> None:
    """45,000 targets with as many entries: 2e9 matches if each were tried on each."""
    paths = [f"model.layers.{i}.experts.{j}.up_proj" for i in range(100) for j in range(450)]
    look_up = pattern_lookup({path: i for i, path in enumerate(paths)}, -1)
    assert [look_up(path) for path in paths] == list(range(len(paths)))


SCALINGS = {
    "alpha over r": ({"r": 4, "lora_alpha": 6}, 1.5, 1.5),
    "rslora": ({"r": 4, "lora_alpha": 6, "use_rslora": True}, 3.0, 3.0),
    "alpha_pattern": ({"r": 4, "lora_alpha": 6, "alpha_pattern": {"up": 2}}, 0.5, 1.5),
    "alpha_pattern and rslora": (
        {"r": 4, "lora_alpha": 6, "alpha_pattern": {"up": 2}, "use_rslora": True},
        1.0,
        3.0,
    ),
    "alpha_pattern by a regular expression": (
        {"r": 4, "lora_alpha": 6, "alpha_pattern": {r"0\.(up|gate)": 2.5}},
        0.625,
        1.5,
    ),
    "the first entry counts": (
        {"r": 4, "lora_alpha": 6, "alpha_pattern": {"up": 2, "0.up": 3}},
        0.5,
        1.5,
    ),
    "a negative alpha": ({"r": 4, "lora_alpha": -4}, -1.0, -1.0),
    "alpha of nothing": ({"r": 4, "lora_alpha": 0}, 0.0, 0.0),
    "PEFT's own defaults": ({"r": None, "lora_alpha": None}, 2.0, 2.0),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_scalings(name: str, tmp_path: Path) -> None:
    fields, up, down = SCALINGS[name]
    targets = {"model.0.up": linear(6, 5, 4), "model.0.down": linear(5, 6, 4)}
    config = make_config(targets) | fields
    if name == "PEFT's own defaults":
        config = {key: value for key, value in config.items() if value is not None}
        config["rank_pattern"] = {"0": 8, ".*": 4}
    adapter = streammerge.open_adapter(write_files(tmp_path / "in", make_factors(targets), config))
    found = dict(zip(["model.0.down", "model.0.up"], scalings(adapter, None), strict=True))
    assert found == {"model.0.up": up, "model.0.down": down}


def test_scalings_with_rank_pattern(tmp_path: Path) -> None:
    """By the module's own rank, under rslora by its root."""
    targets = {"model.0.up": linear(40, 30, 16), "model.0.down": linear(30, 40, 4)}
    for use_rslora, expected in ((False, [2.0, 0.5]), (True, [4.0, 2.0])):
        adapter = write_files(
            tmp_path / f"{use_rslora}",
            make_factors(targets),
            make_config(targets)
            | {"r": 4, "lora_alpha": 8, "rank_pattern": {"up": 16}, "use_rslora": use_rslora},
        )
        assert scalings(streammerge.open_adapter(adapter), None).tolist() == expected


def test_unknown_scalings(tmp_path: Path) -> None:
    """Only of the targets that the config does not explain."""
    targets = {"model.0.up": linear(40, 30, 16), "model.0.down": linear(30, 40, 4)}
    config = make_config(targets) | {"r": 4, "lora_alpha": 8, "rank_pattern": {}}
    adapter = streammerge.open_adapter(write_files(tmp_path / "in", make_factors(targets), config))
    with pytest.raises(errors.UnknownScalingError, match=r"up\.lora_A.*rank 16.*config says 4"):
        scalings(adapter, None)
    assert scalings(adapter, "config").tolist() == [2.0, 2.0]
    assert scalings(adapter, "tensor").tolist() == [2.0, 0.5]
    assert scalings(adapter, 3.25).tolist() == [2.0, 3.25]


def test_unknown_keys_of_a_config_change_nothing(tmp_path: Path) -> None:
    plain = write_adapter(tmp_path / "plain", TARGETS)
    more = {"peft_version": "9.9", "megatron_core": "x", "eva_config": None, "loftq_config": {}}
    odd = write_adapter(
        tmp_path / "odd",
        TARGETS,
        **more,
        target_modules=r".*\.(up|down)",
        base_model_name_or_path=None,
        task_type=None,
        use_dora=False,
        target_parameters=None,
        layer_replication=None,
        trainable_token_indices=None,
        init_lora_weights="gaussian",
    )
    plans = [streammerge.plan([path], method="cat") for path in (plain, odd)]
    assert plans[0].tasks == plans[1].tasks
    assert plans[0].sources.scaling.tolist() == plans[1].sources.scaling.tolist()


# ---------------------------------------------------------------------------------------------
# Shards


def in_shards(factors: dict[str, Tensor], count: int) -> dict[str, dict[str, Tensor]]:
    """Deal tensors out, so that the A and the B of a target lie in different files."""
    names = [f"adapter_model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    return {
        name: {key: factors[key] for key in list(factors)[i::count]} for i, name in enumerate(names)
    }


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shards(count: int, tmp_path: Path) -> None:
    factors, config = make_factors(TARGETS), make_config(TARGETS)
    sharded = write_shards(tmp_path / "shards", in_shards(factors, count), config)
    adapter = streammerge.open_adapter(sharded)
    assert held(adapter) == factors
    assert len(adapter.files) == count
    whole = write_adapter(tmp_path / "whole", TARGETS)
    for name, path in (("a", sharded), ("b", whole)):
        streammerge.merge([path], tmp_path / name, method="svd", rank=2)
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
    records = [json.loads((tmp_path / name / MARK_NAME).read_text()) for name in "ab"]
    assert records[0]["inputs"][0]["xxh3"] == records[1]["inputs"][0]["xxh3"]


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    shards = in_shards(make_factors(TARGETS), 2)
    first, second = shards
    key = next(iter(shards[first]))
    shards[second][key] = shards[first][key]
    with pytest.raises(errors.CorruptFileError, match="two A factors") as caught:
        streammerge.open_adapter(write_shards(tmp_path / "in", shards, make_config(TARGETS)))
    assert caught.value.tensor == key


def test_an_index_that_names_a_tensor_that_no_shard_has(tmp_path: Path) -> None:
    factors = make_factors(TARGETS)
    sharded = write_shards(tmp_path / "in", in_shards(factors, 2), make_config(TARGETS))
    lost = [key for key in factors if "model.0.up" in key]
    for name, tensors in in_shards(factors, 2).items():
        kept = {key: tensor for key, tensor in tensors.items() if key not in lost}
        (sharded / name).write_bytes(render(kept))
    with pytest.raises(errors.CorruptFileError, match=r"model\.0\.up"):
        streammerge.open_adapter(sharded)


@pytest.mark.parametrize("name", ["../in/x.safetensors", "/etc/passwd", "a/b", "..", "", "."])
def test_an_index_that_names_a_path_outside(name: str, tmp_path: Path) -> None:
    """Whatever lies there is not opened."""
    sharded = write_shards(
        tmp_path / "in", {"x.safetensors": make_factors(TARGETS)}, make_config(TARGETS)
    )
    weight_map = dict.fromkeys(make_factors(TARGETS), name)
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(errors.CorruptFileError, match=str(sharded)):
        streammerge.open_adapter(sharded)


def test_one_file_wins_over_an_index(tmp_path: Path) -> None:
    """As in transformers; streammerge never writes both."""
    adapter = write_adapter(tmp_path / "in", TARGETS)
    (adapter / INDEX).write_text("never opened")
    assert held(streammerge.open_adapter(adapter)) == make_factors(TARGETS)
