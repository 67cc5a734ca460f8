"""One recipe and its inputs give the same bytes: any budget, executor, number of workers, run."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import streammerge
from making import (
    CONFIG,
    INDEX,
    PREFIX,
    WEIGHTS,
    convolution,
    decode,
    embedding,
    linear,
    make_factors,
    write_adapter,
)
from names import PAIRS, chosen, most, rule_of, space_of
from streammerge import events
from streammerge.adapter import Adapter, NameTable
from streammerge.budget import Budget
from streammerge.errors import BudgetError, RecipeError
from streammerge.kernels import shared
from streammerge.output.space import find_scratch
from streammerge.output.staging import Staging
from streammerge.planner import make_plan
from streammerge.planner.memory import PAGE_BYTES
from streammerge.plans import Plan
from streammerge.readers import read_adapter
from streammerge.recipe import Recipe
from streammerge.run import run_plan
from streammerge.tiling import flat_tiles, row_tiles
from streammerge.worker.factors import FactorReader

SAME = (WEIGHTS, CONFIG, "streammerge.json")
"""Files of an output that may not differ by a bit; the timings may."""

LARGE = "model.up"
WORDS = "model.words"
TARGETS = {
    LARGE: linear(1200, 900, 6),
    "model.down": linear(270, 1000, 6),
    "model.small": linear(30, 40, 6),
    WORDS: embedding(24, 140_000, 6),
    "model.patches": convolution(50, 6, (3, 3), 6),
}
WEIGHTS_GIVEN = (1.0, -0.6, 0.3)

BY_THRESHOLD = tuple(n for n in PAIRS if rule_of(n).sparsity in ("largest", "varied"))
IN_TILES = tuple(
    pair
    for pair in PAIRS
    if space_of(pair) not in ("factor", "exact")
    and rule_of(pair).kind == "element-wise"
    and rule_of(pair).name != "linear"
)
STREAMED = tuple(pair for pair in IN_TILES if space_of(pair) == "delta")

Saved = Callable[[str], list[Path]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Three adapters of normal values, or of whole numbers in bfloat16, of which many are equal."""
    made = {
        kind: [
            write_adapter(
                tmp_path_factory.mktemp(kind) / f"{seed}",
                TARGETS,
                seed=seed,
                dtype=dtype,
                levels=levels,
                lora_alpha=6,
            )
            for seed in range(3)
        ]
        for kind, dtype, levels in (("normal", "F32", None), ("equals", "BF16", 2))
    }
    return made.__getitem__


@pytest.fixture(autouse=True)
def _few_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """How well ctm's bases are found makes no difference here, and random ones take it long."""
    monkeypatch.setattr(shared, "SWEEPS", 3)


@pytest.fixture
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A directory that is not in memory: pytest's, or one beside the tests."""
    folder = tmp_path_factory.mktemp("scratch")
    try:
        yield find_scratch(str(folder), None)
    except RecipeError:
        with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as beside:
            yield find_scratch(beside, None)


def options_for(method: str, **more: Any) -> dict[str, Any]:
    """The words are there for their large factor; their delta would only take time."""
    options = {**chosen(method), "weights": WEIGHTS_GIVEN[: most(method)], "seed": 7, **more}
    if method in IN_TILES:
        options["exclude"] = WORDS
    return options | ({"density": 0.3} if rule_of(method).needs_density else {})


@dataclass(frozen=True)
class Setting:
    """What may not make a difference; `room` is what each task may hold."""

    room: int
    workers: int = 1
    io: str = "mmap"
    scratch: str | None = None


def plan_for(
    adapters: list[Path], options: dict[str, Any], setting: Setting
) -> tuple[Plan, list[Adapter]]:
    """A plan for so many bytes to the byte; `max_memory` counts the test's own process in."""
    recipe = Recipe(adapters=tuple(map(str, adapters)), **options)
    table = NameTable()
    manifests = [read_adapter(str(path), table) for path in adapters]
    reserved = Budget(0, "", process_bytes=0, threads=setting.workers).reserved_bytes
    allowed = reserved + setting.workers * setting.room
    budget = Budget(allowed, "the test", process_bytes=0, threads=setting.workers)
    plan = make_plan(manifests, recipe, budget, io=setting.io, scratch=setting.scratch)
    assert plan.concurrency == setting.workers
    return plan, manifests


def least_room(adapters: list[Path], options: dict[str, Any]) -> int:
    """What the largest task holds at least."""
    with pytest.raises(BudgetError) as caught:
        plan_for(adapters, options, Setting(0))
    return caught.value.projected_bytes


def run(adapters: list[Path], out: Path, options: dict[str, Any], setting: Setting) -> Plan:
    plan, manifests = plan_for(adapters, options, setting)
    with Staging(out) as staging:
        run_plan(plan, manifests, staging, events.ignore)
        staging.publish()
    return plan


def heights(target: str) -> list[int]:
    layer = TARGETS[target]
    return [stop - start for start, stop in row_tiles(layer.b[0], layer.a[1])]


def written(out: Path, names: tuple[str, ...] = SAME) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in names}


def assert_same(outputs: dict[str, dict[str, bytes]]) -> None:
    first, *others = outputs
    for other in others:
        for file, data in outputs[first].items():
            assert outputs[other][file] == data, f"{file}: {other} differs from {first}"


def kept(plan: Plan) -> tuple[int, int, int]:
    """Of the large target: tiles in memory, tiles on disk, sources whose factors are in memory."""
    task = next(task for task in plan.tasks if task.target == LARGE)
    return task.resident, task.spilled, task.factors


def lanes(plan: Plan) -> int:
    """Threads that work on the large target, which is a good part of the work."""
    task = next(task for task in plan.tasks if task.target == LARGE)
    assert task.alone
    return task.lanes


@pytest.mark.parametrize(
    ("kind", "method"),
    [("normal", pair) for pair in PAIRS] + [("equals", pair) for pair in BY_THRESHOLD],
)
def test_same_bytes(kind: str, method: str, saved: Saved, disk: str, tmp_path: Path) -> None:
    adapters, options = saved(kind)[: most(method)], options_for(method)
    tile = max(heights(LARGE)) * TARGETS[LARGE].a[1] * 4
    least, pages = least_room(adapters, options), 2 * PAGE_BYTES
    factors = 3 * 6 * (TARGETS[LARGE].a[1] + TARGETS[LARGE].b[0]) * 4
    stack = 2 * tile if rule_of(method).sweeps > 1 else 0
    settings = {
        "small": Setting(least),
        "medium": Setting(least + factors + stack + 2 * (tile + pages)),
        "large": Setting(2**30),
        "two workers, small": Setting(least // 2 + 1, workers=2),
        "two workers, large": Setting(2**30, workers=2),
        "pread": Setting(least, workers=2, io="pread"),
        "scratch": Setting(least, scratch=disk),
    }
    plans = {name: run(adapters, tmp_path / name, options, s) for name, s in settings.items()}
    for name, workers in (("merge", 1), ("merge with two", 2)):
        streammerge.merge(adapters, tmp_path / name, workers=workers, **options)
    assert_same({out.name: written(out) for out in sorted(tmp_path.iterdir())})
    if method in STREAMED:
        tiles = len(heights(LARGE))
        assert tiles > 3
        assert kept(plans["small"]) == kept(plans["two workers, small"]) == (0, 0, 0)
        assert kept(plans["medium"]) == (2, 0, 3)
        assert kept(plans["large"]) == kept(plans["two workers, large"]) == (tiles, 0, 3)
        assert lanes(plans["two workers, small"]) == 1
        assert lanes(plans["two workers, large"]) == 2
        assert kept(plans["scratch"]) == (0, tiles, 0)


def test_parts_of_many_factors_are_read_in_few_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiles of B's side by side get lower with each adapter; the reading must not, and where
    there is no room for it the bytes are the same."""
    options: dict[str, Any] = {"method": "cat", "dtype": "float16"}
    reads: dict[str, int] = {}
    pieces = FactorReader._read

    def counted(reader: FactorReader, start: int, stop: int) -> Any:
        reads[where] = reads.get(where, 0) + 1
        return pieces(reader, start, stop)

    monkeypatch.setattr(FactorReader, "_read", counted)
    targets = {"up": linear(2048, 64, 8)}
    adapters = [write_adapter(tmp_path / f"{i}", targets, seed=i) for i in range(64)]
    for where, count in (("a few", 16), ("many", 64)):
        weighted = options | {"weights": (1.0,) * count}
        run(adapters[:count], tmp_path / where, weighted, Setting(2**30))
    assert reads["many"] <= 4 * reads["a few"]
    where = "small"
    run(adapters, tmp_path / where, weighted, Setting(least_room(adapters, weighted)))
    assert reads["small"] > 2 * reads["many"]
    assert_same({name: written(tmp_path / name) for name in ("small", "many")})


def test_same_bytes_of_a_sum_of_many(tmp_path: Path) -> None:
    """More adapters than Gram matrices pay for: an iteration, adapter by adapter."""
    targets = {"up": linear(300, 280, 2), "down": linear(280, 300, 2)}
    adapters = [write_adapter(tmp_path / f"{i}", targets, seed=i) for i in range(64)]
    options = {"method": "svd", "weights": tuple(1 - i / 40 for i in range(64)), "rank": 2}
    outs = {
        "serial": Setting(2**28),
        "again": Setting(2**28),
        "dask": Setting(2**28, workers=2),
        "pread": Setting(2**28, io="pread"),
    }
    for name, setting in outs.items():
        plan = run(adapters, tmp_path / name, options, setting)
        assert {task.route for task in plan.tasks} == {"sum"}
    assert_same({name: written(tmp_path / name) for name in outs})


def test_other_recipes_give_other_bytes(saved: Saved, tmp_path: Path) -> None:
    """What the test above compares does depend on the recipe."""
    adapters = saved("normal")
    outputs = set()
    for number, more in enumerate(({}, {"seed": 8}, {"density": 0.4}, {"weights": (1, 1, 1)})):
        options = options_for("dare_ties_svd", include="down") | more
        streammerge.merge(adapters, tmp_path / f"{number}", workers=1, **options)
        outputs.add((tmp_path / f"{number}" / WEIGHTS).read_bytes())
    assert len(outputs) == 4


@pytest.mark.parametrize("method", ["svd", "ties_svd", "dare_linear_svd"])
def test_threads_of_the_caller_do_not_matter(method: str, saved: Saved, tmp_path: Path) -> None:
    """Results must not depend on how many threads torch would use; the caller keeps that number."""
    adapters, options = saved("normal"), options_for(method)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            for workers in (1, 2):
                torch.set_num_threads(threads)
                out = tmp_path / f"{threads}-{workers}"
                streammerge.merge(adapters, out, workers=workers, **options)
                assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len({(out / WEIGHTS).read_bytes() for out in tmp_path.iterdir()}) == 1


def test_another_process_gives_the_same_bytes(saved: Saved, tmp_path: Path) -> None:
    """With other hashes of strings, other threads, another working directory."""
    adapters, options = saved("normal"), options_for("dare_ties_svd")
    source = (
        "import streammerge, sys\n"
        f"streammerge.merge({[str(path) for path in adapters]!r}, sys.argv[1], **{options!r})"
    )
    streammerge.merge(adapters, tmp_path / "here", **options)
    environment = os.environ | {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", source, str(tmp_path / "there")]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    assert written(tmp_path / "there") == written(tmp_path / "here")


@pytest.mark.parametrize("method", ["cat", "ties", "svd", "dare_linear_svd"])
def test_shards_hold_what_one_file_holds(method: str, saved: Saved, tmp_path: Path) -> None:
    adapters, options = saved("normal"), options_for(method)
    streammerge.merge(adapters, tmp_path / "one", workers=1, **options)
    one = load_file(tmp_path / "one" / WEIGHTS)
    for name, workers in (("shards", 1), ("again", 2)):
        out = tmp_path / name
        streammerge.merge(adapters, out, workers=workers, max_shard_size="31KiB", **options)
        files = sorted(out.glob("*.safetensors"))
        assert len(files) > 2
        parts = [load_file(file) for file in files]
        assert sum(map(len, parts)) == len(one)
        tensors = {name: tensor for part in parts for name, tensor in part.items()}
        assert tensors.keys() == one.keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in one.items())
        assert (out / CONFIG).read_bytes() == (tmp_path / "one" / CONFIG).read_bytes()
    names = (*(file.name for file in files), CONFIG, INDEX, "streammerge.json")
    assert written(tmp_path / "shards", names) == written(tmp_path / "again", names)


# ---------------------------------------------------------------------------------------------
# Of equals at the threshold the first survive, in whatever tiles they lie


def of_equals_the_first(values: np.ndarray, density: float) -> np.ndarray:
    """Which elements are kept, by a stable sort."""
    keep = np.zeros(values.size, bool)
    order = np.argsort(-np.abs(values), axis=None, kind="stable")
    keep[order[: int(density * values.size)]] = True
    return keep.reshape(values.shape)


def check_equals(values: np.ndarray, kept: np.ndarray, edges: list[int]) -> None:
    """The threshold's equals are in several tiles, and some of them were cut off."""
    equal = np.abs(values).ravel() == np.abs(values[kept]).min()
    assert 0 < (equal & kept.ravel()).sum() < equal.sum()
    assert sum(part.any() for part in np.split(equal, edges)) > 1


def test_equals_in_a_factor(tmp_path: Path) -> None:
    targets = {"words": embedding(24, 140_000, 6)}
    adapter = write_adapter(tmp_path / "in", targets, dtype="BF16", levels=2, lora_alpha=6)
    streammerge.merge([adapter], tmp_path / "out", method="magnitude_prune", density=0.3)
    stored = decode(
        make_factors(targets, dtype="BF16", levels=2)[f"{PREFIX}words.lora_embedding_A"]
    )
    kept = of_equals_the_first(stored, 0.3)
    check_equals(stored, kept, [start for start, _ in flat_tiles(stored.size)[1:]])
    found = load_file(tmp_path / "out" / WEIGHTS)[f"{PREFIX}words.lora_embedding_A"]
    np.testing.assert_array_equal(found.double().numpy(), np.where(kept, stored, 0.0))


def whole_numbers(directory: Path, m: int, n: int) -> tuple[Path, np.ndarray]:
    """An adapter whose delta is of whole numbers, and that delta."""
    targets = {"up": linear(m, n, 2)}
    factors = make_factors(targets, dtype="BF16", levels=2)
    a, b = (decode(factors[f"{PREFIX}up.lora_{side}.weight"]) for side in "AB")
    return write_adapter(directory, targets, dtype="BF16", levels=2, lora_alpha=2), b @ a


def merged_delta(adapter: Path, out: Path, m: int, density: float) -> np.ndarray:
    """Pruned, and not truncated: the rank is full."""
    options = {"method": "magnitude_prune_svd", "density": density, "rank": m, "dtype": "float32"}
    streammerge.merge([adapter], out, **options)
    merged = load_file(out / WEIGHTS)
    a, b = (merged[f"{PREFIX}up.lora_{side}.weight"].double() for side in "AB")
    return (b @ a).numpy()


def test_equals_in_a_delta(tmp_path: Path) -> None:
    m, n = 40, 30_000
    adapter, delta = whole_numbers(tmp_path / "in", m, n)
    kept = of_equals_the_first(delta, 0.3)
    check_equals(delta, kept, [start * n for start, _ in row_tiles(m, n)[1:]])
    found = merged_delta(adapter, tmp_path / "out", m, 0.3)
    np.testing.assert_array_equal(np.abs(found) > 0.5, kept)


def test_a_wide_delta_at_full_rank(tmp_path: Path) -> None:
    """Rows that repeat and a long side: what a QR in float32 loses shows."""
    m, n = 40, 120_000
    adapter, delta = whole_numbers(tmp_path / "in", m, n)
    expected = np.where(of_equals_the_first(delta, 0.3), delta, 0.0)
    found = merged_delta(adapter, tmp_path / "out", m, 0.3)
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("compute_dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("method", "shape"),
    [
        *itertools.product(
            ("ties_svd", "sce", "dare_ties_svd", "ties@knots"), ((201, 201), (27, 333), (35, 9))
        ),
        ("ties_svd", (600_003, 1)),  # of two tiles, the second of which begins anywhere
    ],
)
def test_buffers_of_odd_sizes_have_the_same_bytes(
    method: str, shape: tuple[int, int], compute_dtype: str, tmp_path: Path
) -> None:
    """A product of or into memory that is not aligned may be rounded otherwise: none lies there."""
    adapters = [
        write_adapter(tmp_path / f"in{seed}", {"up": linear(*shape, 5)}, seed=seed)
        for seed in range(3)
    ]
    options: dict[str, Any] = {**chosen(method), "density": 0.3, "seed": 7}
    options |= {"weights": WEIGHTS_GIVEN, "compute_dtype": compute_dtype, "dtype": "float64"}
    rooms = {"small": least_room(adapters, options), "large": 2**30}
    plans = [run(adapters, tmp_path / name, options, Setting(rooms[name])) for name in rooms]
    assert [task.stacked for plan in plans for task in plan.tasks] == [False, True]
    assert_same({name: written(tmp_path / name) for name in rooms})
