"""What the package makes of a directory: a clean error, a right answer, or a fault of ours."""

from __future__ import annotations

import json
import math
import resource
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType
from typing import NoReturn

import torch

from fuzzing.directories import Directory, write_directory
from streammerge.adapter import Adapter, NameTable
from streammerge.budget import Budget
from streammerge.catalog import METHODS, RULES
from streammerge.cli.inspect import _facts, _shown
from streammerge.errors import RefusedError, StreammergeError
from streammerge.output.header import render_header
from streammerge.planner import make_plan
from streammerge.plans import Plan
from streammerge.readers import read_adapter
from streammerge.recipe import Recipe
from streammerge.verification import verify

SECONDS = 2.0
"""Processor time that a case may take."""
WALL_SECONDS = 60.0
"""And time on the wall, of which a busy machine takes its share: for a pipe takes no processor."""
MEMORY_BYTES = 512 * 1024**2
"""What a case may take above what the process held before."""
LONGEST_MESSAGE = 20_000

BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16}
CLEAN, READ, FAULT = "clean error", "read", "fault"


class TooSlow(BaseException):
    """The limit of a case; nothing that catches errors catches it."""


@dataclass(frozen=True)
class Verdict:
    """What became of a case."""

    outcome: str
    """CLEAN, READ or FAULT."""
    words: str
    """The error's name, or what is wrong."""
    seconds: float = 0.0
    """Of processor time."""
    grown_bytes: int = 0
    """By which the process's largest size grew."""


def judge(place: Path, pieces: Directory, random: Random) -> Verdict:
    """Write a directory, give it to the package, look at what comes."""
    write_directory(place, pieces)
    before, began = _largest(), time.process_time()
    try:
        with _limited():
            outcome, words = CLEAN, _use(place, random)
            if not words:
                outcome = READ
    except TooSlow as error:
        outcome, words = FAULT, str(error)
    except AssertionError as error:
        outcome, words = FAULT, f"wrong: {error}"
    except Exception as error:
        outcome, words = FAULT, f"{type(error).__name__}: {str(error)[:200]!r} {_where(error)}"
    seconds, grown = time.process_time() - began, _largest() - before
    if outcome != FAULT and grown > MEMORY_BYTES:
        outcome, words = FAULT, f"took {grown / 2**20:.0f} MiB"
    return Verdict(outcome, words, seconds, grown)


def _where(error: BaseException) -> str:
    trace = error.__traceback__
    ours = ""
    while trace is not None:
        code = trace.tb_frame.f_code
        if "streammerge/" in code.co_filename and "scripts/" not in code.co_filename:
            ours = f"{code.co_filename.rpartition('streammerge/')[2]}:{code.co_name}"
        trace = trace.tb_next
    return f"in {ours or 'the fuzzer'}"


def _use(place: Path, random: Random) -> str:
    """Do all that reads an adapter's directory; return the error's name where one comes."""
    try:
        adapter = read_adapter(str(place), NameTable())
    except StreammergeError as error:
        _check_message(error, place)
        words = type(error).__name__
    else:
        _check_adapter(adapter)
        _check_inspection(adapter)
        words = _plan_it(adapter, place, random)
    if (place / "streammerge.json").exists():
        try:
            verify(place)
        except StreammergeError as error:
            _check_message(error, place)
            return type(error).__name__
    return words


def _check_message(error: StreammergeError, place: Path) -> None:
    message = str(error)
    assert message.isprintable(), f"a message that is not printable: {message[:200]!r}"
    message.encode()
    assert len(message) <= LONGEST_MESSAGE, f"a message of {len(message)} characters"
    if hasattr(error, "path"):
        assert error.path.startswith(str(place)), "a path of another directory"


def _check_adapter(adapter: Adapter) -> None:
    """Compare every factor with what the file says, read once more without any care."""
    offsets = {adapter.factor(row, side).offset for row in range(len(adapter)) for side in "AB"}
    files = {file.path: _tensors_of(Path(file.path), offsets) for file in adapter.files}
    for row in range(len(adapter)):
        for side in "AB":
            factor = adapter.factor(row, side)
            dtype, shape, low, high = files[factor.file.path][factor.key]
            # The rows of a B may be those of several targets.
            stop = factor.offset + BITS[factor.dtype] * factor.elements // 8
            whole = side == "A" or adapter.dialect != "kohya"
            assert dtype == factor.dtype, f"{factor.key}: dtype"
            assert low <= factor.offset, f"{factor.key}: offset"
            assert stop <= high <= factor.file.size, f"{factor.key}: outside its tensor"
            if whole:
                stored = factor.shape[::-1] if factor.turned else factor.shape
                assert shape == stored, f"{factor.key}: shape"
                assert (low, high) == (factor.offset, stop), f"{factor.key}: place"
            assert math.prod(factor.shape) > 0, f"{factor.key}: empty"
    assert adapter.columns.rank.min() > 0
    assert adapter.columns.n.min() > 0


def _tensors_of(path: Path, offsets: set[int]) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """The dtype, shape and place of each tensor of a file."""
    with path.open("rb") as stream:
        head = stream.read(8)
        if head.startswith(b"PK"):
            return _tensors_of_torch(path, offsets)
        length = int.from_bytes(head, "little")
        entries = json.loads(stream.read(length))
    entries.pop("__metadata__", None)
    return {
        name: (e["dtype"], tuple(e["shape"]), *(8 + length + o for o in e["data_offsets"]))
        for name, e in entries.items()
    }


def _tensors_of_torch(
    path: Path, offsets: set[int]
) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """The same of a file of torch.save: what torch reads is looked for where it should be.

    By a map, for it has been seen to hand out memory that nothing was read into otherwise.
    """
    data, found = path.read_bytes(), {}
    for name, tensor in torch.load(path, map_location="cpu", weights_only=True, mmap=True).items():
        raw = bytes(tensor.contiguous().view(torch.uint8).numpy())
        place = next((o for o in offsets if data[o : o + len(raw)] == raw), -1)
        dtype = {"float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16"}.get(
            str(tensor.dtype).removeprefix("torch."), "other"
        )
        found[name] = (dtype, tuple(tensor.shape), place, place + len(raw))
    return found


def _check_inspection(adapter: Adapter) -> None:
    facts = _facts(adapter)
    json.dumps(facts, allow_nan=False)
    for value in facts.values():
        _shown(value)


def _plan_it(adapter: Adapter, place: Path, random: Random) -> str:
    """Plan a merge of it with itself; return the error's name where it is refused."""
    method = random.choice(list(METHODS))
    count = random.choice((1, 2))
    recipe = Recipe(
        adapters=(str(place),) * count,
        weights=(1.0, random.choice((-0.5, 0.5)))[:count],
        method=method,
        density=0.3 if RULES[METHODS[method].rule].needs_density else None,
        extras=random.choice(("drop", "drop", "first", "mean", "error")),
        scaling=random.choice((None, 1.0, 1.0, "config", "tensor")),
        max_shard_bytes=random.choice((None, None, 100)),
        strict_base=random.random() < 0.5,
    )
    budget = Budget(random.choice((2**29, 2**34, 2**50)), "fuzzing", threads=random.choice((1, 2)))
    try:
        plan = make_plan([adapter] * count, recipe, budget, scratch=random.choice((None, "/tmp")))
    except RefusedError as error:
        _check_message(error, place)
        return type(error).__name__
    _check_plan(plan)
    return ""


def _check_plan(plan: Plan) -> None:
    assert plan.projected_bytes <= plan.allowed_bytes, "a plan beyond its budget"
    regions = plan.regions
    for region in regions:
        assert region.offset + region.nbytes <= plan.files[region.file].data_bytes, region.name
    assert sum(region.nbytes for region in regions) == plan.write_bytes
    json.dumps(plan.config, allow_nan=False)
    json.dumps(json.loads(plan.to_json()), allow_nan=False)
    render_header(regions)


@contextmanager
def _limited() -> Iterator[None]:
    """Stop what takes too long, and take warnings for errors, for they reach a terminal too."""
    before = [(number, signal.signal(number, _stop)) for number in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before:
            signal.signal(number, handler)


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    if number == signal.SIGPROF:
        raise TooSlow(f"over {SECONDS} s of processor time")
    raise TooSlow(f"over {WALL_SECONDS} s on the wall")


def _largest() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
