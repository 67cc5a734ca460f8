"""Directories that once made a reader hang, fail, or say what a terminal would obey."""

from __future__ import annotations

import itertools
import json
import math
import os
import pickle
import re
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import streammerge
from making import CONFIG, INDEX, PREFIX, WEIGHTS, encode, frame, linear, write_adapter
from streammerge import errors, events, regular
from streammerge.readers import header
from streammerge.regular import FEW_WAYS, LONG, Meter, _parser, _Walk, _ways, compile_matcher
from streammerge.tiling import longest, split

ONE = {"up": linear(3, 2, 1)}
SECONDS = 2.0
"""Of processor time: for what used to take for ever."""


WAIT = 120
"""Seconds on the wall after which a test is ended, for what waits takes no processor."""


class WaitedError(BaseException):
    """Nothing that catches errors catches it."""


def stop(_signal: int, _frame: object) -> NoReturn:
    raise WaitedError


@contextmanager
def in_time() -> Iterator[None]:
    """End what takes for ever, and fail what takes too long."""
    before, began = signal.signal(signal.SIGALRM, stop), time.process_time()
    signal.alarm(WAIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert time.process_time() - began < SECONDS


# ---------------------------------------------------------------------------------------------
# What is said

ESCAPE = "\x1b[2J\x1b]0;owned\x07"


def test_messages_of_errors_are_printable(tmp_path: Path) -> None:
    """A Python traceback sends them to a terminal as they are."""
    extra = {f"{PREFIX}{ESCAPE}.lora_A.weight": encode(np.ones((2, 2)))}
    with pytest.raises(errors.CorruptFileError, match="no B factor") as caught:
        streammerge.open_adapter(write_adapter(tmp_path / "in", ONE, extra=extra))
    assert str(caught.value).isprintable()
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert caught.value.tensor == f"{PREFIX}{ESCAPE}.lora_A.weight"


def test_notices_as_warnings_are_printable(tmp_path: Path) -> None:
    adapters = [
        write_adapter(tmp_path / f"{i}", ONE, base_model_name_or_path=base)
        for i, base in enumerate((ESCAPE, "plain"))
    ]
    adapters.append(write_adapter(tmp_path / "2", {ESCAPE: ONE["up"]}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        streammerge.merge(adapters, tmp_path / "out", method="cat")
    assert any("owned" in str(warning.message) for warning in caught)
    assert all(str(warning.message).isprintable() for warning in caught)
    streammerge.merge(adapters, tmp_path / "silent", method="cat", on_event=events.ignore)


# ---------------------------------------------------------------------------------------------
# Regular expressions

VICTIM = "a" * 40 + "b"
ENDLESS = (
    "(a+)+c",
    "(a|a)*c",
    "(a*)*c",
    "(.*)*c",
    "(a?){40}" + "a" * 40 + "c",
    ".*.*.*.*.*.*.*.*c",
    "(.*,){25}P",
    "((a{0,1000}){0,1000}){0,1000}c",
    "(a{1000}){1000}",
    "(?=(a+)+c)a",
)


@pytest.mark.parametrize("entry", ENDLESS)
def test_patterns_that_a_backtracking_engine_never_ends_on(entry: str, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "in", {VICTIM: linear(3, 2, 1)}, rank_pattern={entry: 7})
    with in_time():
        adapter = streammerge.open_adapter(path)
    assert adapter.columns.declared_rank.tolist() == [1]


REFUSED = {
    "a{99999999999999999999}": "repetition number",
    "(" * 3000 + ")" * 3000: "recursion|deep",
    "(" * 100 + "a" + ")" * 100: "deep",
    r"(a|ab)*\1c": "groupref",
    "(?>a+)b": "atomic_group",
    "a++b": "possessive_repeat",
    "(?i:a)": "flags",
    "[[a]": "",
    "(": "missing",
}


@pytest.mark.parametrize("entry", REFUSED)
def test_patterns_that_are_refused(entry: str, tmp_path: Path) -> None:
    """Or read without a word, where only Python has doubts."""
    path = write_adapter(tmp_path / "in", ONE, alpha_pattern={entry: 7})
    if not REFUSED[entry]:
        streammerge.open_adapter(path)
        return
    with pytest.raises(
        errors.CorruptFileError, match=rf"alpha_pattern.*({REFUSED[entry]})"
    ) as caught:
        streammerge.open_adapter(path)
    assert len(str(caught.value)) < 1000


pieces = st.sampled_from(
    [
        "a",
        "b",
        ".",
        r"\.",
        r"\d",
        r"\W",
        "[ab]",
        "[^a.]",
        "[a-z0]",
        r"[\d.]",
        "",
        "^",
        "$",
        r"\b",
        r"\B",
    ]
)
quantifiers = st.sampled_from(["", "", "*", "+", "?", "{2}", "{1,2}", "*?", "{0,3}?"])


def joined(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    groups = st.sampled_from(["({})", "(?:{})", "(?={})", "(?!{})"])
    alternatives = st.lists(inner, min_size=1, max_size=3).map("|".join)
    grouped = st.builds(lambda group, text: group.format(text), groups, alternatives)
    repeated = st.builds(lambda text, times: text + times, grouped, quantifiers)
    return st.lists(st.one_of(repeated, inner), min_size=1, max_size=3).map("".join)


expressions = st.recursive(st.builds(lambda p, q: (p + q) if p else p, pieces, quantifiers), joined)


@settings(max_examples=400)
@given(expression=expressions, text=st.text("ab.0 _", min_size=1, max_size=7))
@example(expression="(a|ab)(c|bcd)?", text="abcd")
@example(expression=r"(?<=a)b|a", text="ab")
@example(expression=r"x*(?<!a)b", text="b")
def test_sets_of_places_match_as_re_does(expression: str, text: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = re.compile(f"({expression})$").match(text) is not None
            nodes = _parser.parse(f"({expression})$")
    except re.error:
        return
    assert bool(_Walk(text, Meter()).after_all(nodes, frozenset((0,)))) == expected


def test_a_pattern_that_takes_long_on_many_long_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes seconds, and a header of 2 MB has a thousand."""
    monkeypatch.setattr(regular, "MAX_STEPS", 10**5)
    layers = {f"{'a.' * 400}{i}": linear(3, 2, 1) for i in range(50)}
    path = write_adapter(tmp_path / "in", layers, rank_pattern={".*.*.*z": 1})
    with in_time(), pytest.raises(errors.CorruptFileError, match="takes too long"):
        streammerge.open_adapter(path)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_links_out_of_the_directory_are_not_followed(name: str, tmp_path: Path) -> None:
    private = write_adapter(tmp_path / "private", ONE, seed=1)
    path = write_adapter(tmp_path / "in", ONE, seed=2)
    (path / name).unlink()
    (path / name).symlink_to(Path("..") / "private" / name)
    with pytest.raises(errors.CorruptFileError, match="link"):
        streammerge.open_adapter(path)
    (path / name).unlink()
    (private / name).rename(path / "another")
    (path / name).symlink_to("another")
    assert len(streammerge.open_adapter(path)) == 1


@pytest.mark.parametrize("folder", [".", "sub"])
def test_the_links_of_the_hubs_cache_are(folder: str, tmp_path: Path) -> None:
    made = write_adapter(tmp_path / "made", ONE)
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "a1" / folder
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in made.iterdir():
        file.rename(blobs / f"of-{file.name}")
        up = "../" * len(snapshot.relative_to(tmp_path / "hub").parts)
        (snapshot / file.name).symlink_to(f"{up}blobs/of-{file.name}")
    assert len(streammerge.open_adapter(snapshot)) == 1


def test_a_header_of_more_than_any_adapter_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(header, "MAX_QUOTES", 1000)
    text = json.dumps({"__metadata__": {f"{i}": "" for i in range(300)}}).encode()
    path = write_adapter(tmp_path / "in", ONE)
    (path / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(errors.CorruptFileError, match="more than any adapter"):
        streammerge.open_adapter(path)


def test_few_ways_are_left_to_re() -> None:
    """Which is a hundred times as fast, for entries as people write them."""
    for entry in (r".*\.q_proj", r"h\.\d+\.(up|down)", "(a|b|c)"):
        assert _ways(_parser.parse(rf"(.*\.)?({entry})$"), 0) <= FEW_WAYS
    long = "a." * LONG + "q_proj"
    assert compile_matcher(r"(.*\.)?(.*\.q_proj)$")(long)
    assert not compile_matcher(r"(.*\.)?(.*\.q_proj)$")(long + "x")


# ---------------------------------------------------------------------------------------------
# Headers


def with_header(directory: Path, text: str, data_bytes: int = 0) -> Path:
    """An adapter whose weights have this header, and zeros that take no disk."""
    write_adapter(directory, ONE)
    (directory / WEIGHTS).write_bytes(frame(text.encode()))
    os.truncate(directory / WEIGHTS, 8 + len(text.encode()) + data_bytes)
    return directory


def test_the_last_of_many_tensors_stands_twice(tmp_path: Path) -> None:
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    names = [*range(60_000), 59_999]
    text = "{" + ",".join(f'"k{name}":{entry}' for name in names) + "}"
    with in_time(), pytest.raises(errors.CorruptFileError, match="'k59999' stands twice"):
        streammerge.open_adapter(with_header(tmp_path / "in", text))


LONG_NAMES = {
    "dots": PREFIX + "." * 300_000 + ".lora_A.weight",
    "prefixes": PREFIX * 20_000 + "up.lora_A.weight",
    "prefixes and no target": PREFIX * 20_000 + "\\n",
}


@pytest.mark.parametrize("name", LONG_NAMES)
def test_names_that_take_the_square_of_their_length(name: str, tmp_path: Path) -> None:
    text = f'{{"{LONG_NAMES[name]}":{{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}}}}'
    with in_time(), pytest.raises(errors.CorruptFileError, match="characters") as caught:
        streammerge.open_adapter(with_header(tmp_path / "in", text, 4))
    assert len(str(caught.value)) < 1000


def factors_of_zeros(directory: Path, a: list[int], b: list[int]) -> Path:
    entries, end = {}, 0
    for side, shape in (("A", a), ("B", b)):
        start, end = end, end + 2 * math.prod(shape)
        entry = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
        entries[f"{PREFIX}up.lora_{side}.weight"] = entry
    return with_header(directory, json.dumps(entries), end)


@pytest.mark.parametrize(
    ("a", "b"), [([1, 2**31], [4, 1]), ([2**31, 1], [1, 2**31]), ([1, 2**31, 1], [1, 1, 1])]
)
def test_sides_that_no_column_holds(a: list[int], b: list[int], tmp_path: Path) -> None:
    with pytest.raises(errors.CorruptFileError, match="of no layer"):
        streammerge.open_adapter(factors_of_zeros(tmp_path / "in", a, b))


@pytest.mark.parametrize("method", ["cat", "ties", "svd", "ties_svd"])
@pytest.mark.parametrize("side", [2**27, 2**30, 2**31 - 1])
def test_a_target_of_a_billion_rows_is_refused_in_time(
    side: int, method: str, tmp_path: Path
) -> None:
    """By its size, and not by a list of its tiles."""
    path = factors_of_zeros(tmp_path / "in", [1, side], [side, 1])
    density = {"density": 0.5} if "ties" in method else {}
    with in_time(), suppress(errors.BudgetError):
        streammerge.plan([path], method=method, workers=2, max_memory="4GiB", **density)


@pytest.mark.parametrize("length", [0, 1, 7, 1000, 1001])
@pytest.mark.parametrize("size", [1, 7, 300])
def test_pieces_are_those_of_the_edges(length: int, size: int) -> None:
    pieces = split(length, size)
    edges = [length * i // len(pieces) for i in range(len(pieces) + 1)]
    expected = list(itertools.pairwise(edges))
    assert list(pieces) == expected == pieces[:]
    assert pieces[-1] == expected[-1]
    assert longest(pieces) == longest(expected)
    assert pieces[2:5] == expected[2:5]
    with pytest.raises(IndexError):
        pieces[len(pieces)]


# ---------------------------------------------------------------------------------------------
# Files


def put_in_place(adapter: Path, name: str, what: str) -> None:
    (adapter / name).unlink(missing_ok=True)
    if name == INDEX:
        (adapter / WEIGHTS).unlink()
    if what == "a pipe":
        os.mkfifo(adapter / name)
    else:
        (adapter / name).symlink_to({"a device": "/dev/zero", "a loop": name}[what])


@pytest.mark.parametrize("what", ["a pipe", "a device", "a loop"])
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, INDEX, "streammerge.json"])
def test_what_is_no_file_is_not_waited_for(name: str, what: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "in", ONE)
    put_in_place(adapter, name, what)
    with in_time():
        if name == "streammerge.json":
            streammerge.verify(adapter)
            return
        with pytest.raises(errors.AdapterError, match=str(adapter)):
            streammerge.open_adapter(adapter)


@pytest.mark.parametrize("name", [CONFIG, INDEX])
def test_files_that_are_too_large_to_be_what_they_are_called(name: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "in", ONE)
    if name == INDEX:
        (adapter / WEIGHTS).unlink()
    (adapter / name).touch()
    os.truncate(adapter / name, 2**40)
    with pytest.raises(errors.CorruptFileError, match=f"{2**40} bytes"):
        streammerge.open_adapter(adapter)


def test_an_index_of_shards_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first says so; the others are not looked for, which took seconds."""
    looked: list[Path] = []
    monkeypatch.setattr("streammerge.readers.shards.check_inside", looked.append)
    source = write_adapter(tmp_path / "in", ONE)
    (source / WEIGHTS).unlink()
    weight_map = {f"t{n}": f"s{n}" for n in range(20_000)}
    (source / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(errors.MissingFileError, match="s0: "):
        streammerge.open_adapter(source)
    assert [path.name for path in looked] == ["s0"]


def test_an_index_of_more_shards_than_are_counted(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "in", ONE)
    (adapter / WEIGHTS).unlink()
    weight_map = {f"t{i}": f"s{i}" for i in range(2**16)}
    (adapter / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(errors.CorruptFileError, match="65536 files"):
        streammerge.open_adapter(adapter)


def test_an_index_with_names_of_any_length(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "in", ONE)
    (adapter / WEIGHTS).rename(adapter / "shard.safetensors")
    for weight_map in ({"x" * 10**6: "shard.safetensors"}, {"x": "x" * 10**6}):
        (adapter / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(errors.CorruptFileError, match=r"shard|same directory") as caught:
            streammerge.open_adapter(adapter)
        assert len(str(caught.value)) < 1000


# ---------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("key", ["auto_mapping", "revision"])
@pytest.mark.parametrize("text", ["1e999", "[NaN]", '{"a": -Infinity}', "[" * 900 + "]" * 900])
def test_values_that_cannot_be_written_again(key: str, text: str, tmp_path: Path) -> None:
    """They went into the output's config, and failed there when all the work was done."""
    adapter = write_adapter(tmp_path / "in", ONE)
    config = (adapter / CONFIG).read_text()
    (adapter / CONFIG).write_text(f'{config[:-1]}, "{key}": {text}}}')
    streammerge.merge([adapter], tmp_path / "out", method="cat")
    assert json.loads((tmp_path / "out" / CONFIG).read_text())[key] is None


def test_values_of_the_right_kind_are_kept(tmp_path: Path) -> None:
    more = {"auto_mapping": {"base_model_class": "A", "parent_library": None}, "revision": "main"}
    adapter = write_adapter(tmp_path / "in", ONE, **more)
    config = streammerge.plan([adapter]).config
    assert {key: config[key] for key in more} == more


@pytest.mark.parametrize(
    "key", ["peft_type", "r", "lora_alpha", "rank_pattern", "init_lora_weights"]
)
def test_values_of_any_depth_and_size_are_named_shortly(key: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "in", ONE)
    config = json.loads((adapter / CONFIG).read_text())
    for text in (
        *("[" * n + "]" * n for n in range(880, 1000, 4)),
        json.dumps("pissa" + "x" * 10**6),
    ):
        whole = json.dumps(config | {key: None}).replace(f'"{key}": null', f'"{key}": {text}')
        (adapter / CONFIG).write_text(whole)
        with suppress(errors.AdapterError):
            streammerge.open_adapter(adapter)
            continue
        with pytest.raises(errors.AdapterError) as caught:
            streammerge.open_adapter(adapter)
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("path", ["x" * 5000, "x\\0y", "", "/dev/null/x"])
def test_paths_that_no_directory_can_have(path: str) -> None:
    with pytest.raises(errors.AdapterError):
        streammerge.open_adapter(path)


# ---------------------------------------------------------------------------------------------
# Records


def spoil(out: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    record = json.loads((out / "streammerge.json").read_text())
    change(record)
    (out / "streammerge.json").write_text(json.dumps(record))
    return out


RECORDS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a header of any length": lambda r: r["files"][0].update(header_bytes=2**60),
    "a header of less than nothing": lambda r: r["files"][0].update(header_bytes=-1),
    "a file elsewhere": lambda r: r["files"][0].update(name="../in/" + WEIGHTS),
    "a pipe": lambda r: r["other_files"].update(pipe="00"),
    "sizes below nothing": lambda r: [t.update(shape=[-1, 5]) for t in r["tensors"].values()],
}


@pytest.mark.parametrize("name", RECORDS)
def test_records_that_ask_for_the_impossible(name: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "in", ONE)
    streammerge.merge([adapter], tmp_path / "out", method="cat")
    if name == "a pipe":
        os.mkfifo(tmp_path / "out" / "pipe")
    with in_time(), pytest.raises((errors.VerificationError, errors.CorruptFileError)):
        streammerge.verify(spoil(tmp_path / "out", RECORDS[name]))
