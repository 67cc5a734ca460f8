"""Laws of every plan: what it covers, what it promises to hold, and what it may depend on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import streammerge
from making import convolution, embedding, linear, write_adapter
from names import PAIRS, chosen, most, space_of
from streammerge.adapter import (
    CONV,
    DTYPES,
    EMBEDDING,
    ITEM_BYTES,
    LINEAR,
    TORCH_NAMES,
    Adapter,
    AdapterConfig,
    Columns,
    NameTable,
    TensorFile,
)
from streammerge.budget import Budget, format_size, parse_size
from streammerge.catalog import SPACES
from streammerge.errors import BudgetError, RecipeError
from streammerge.planner import make_plan
from streammerge.plans import Plan, Region
from streammerge.recipe import Recipe
from streammerge.registry import METHODS, RULES
from streammerge.tiling import (
    GROUP_ELEMENTS,
    MIN_TILE_ROWS,
    PANELS,
    TILE_ELEMENTS,
    coprime_step,
    factor_groups,
    factor_rows,
    flat_tiles,
    panels,
    row_tiles,
    split,
)

FAST = settings(max_examples=100)
PLENTY = 2**45

# ---------------------------------------------------------------------------------------------
# Manifests without files


@dataclass(frozen=True)
class Module:
    """One target, in the canonical orientation."""

    kind: int
    m: int
    inner: tuple[int, ...]

    @property
    def n(self) -> int:
        return math.prod(self.inner)


@dataclass(frozen=True)
class Case:
    """Adapters of some modules, what is asked for, and what may be used."""

    modules: tuple[Module, ...]
    ranks: tuple[tuple[int | None, ...], ...]
    """Of each adapter, one for each module: None where it lacks the module."""
    dtypes: tuple[int, ...]
    method: str
    rank: int | None
    dtype: str
    max_shard_bytes: int | None
    threads: int
    space: str | None = None
    """Instead of the method's own."""

    @property
    def recipe(self) -> Recipe:
        spec = METHODS[self.method]
        return Recipe(
            adapters=tuple(f"adapter{i}" for i in range(len(self.ranks))),
            method=self.method,
            space=self.space,
            weights=(1.0,) * len(self.ranks),
            density=0.3 if RULES[spec.rule].needs_density else None,
            rank=self.rank if SPACES[self.space or spec.space].truncates else None,
            dtype=self.dtype,
            max_shard_bytes=self.max_shard_bytes,
        )

    def plan(self, allowed: int = PLENTY, **more: Any) -> Plan:
        budget = Budget(allowed, "the test", process_bytes=2**28, threads=self.threads)
        return make_plan(self.manifests(), self.recipe, budget, **more)

    def manifests(self) -> list[Adapter]:
        table = NameTable()
        return [
            manifest(f"adapter{i}", self.modules, ranks, dtype, table)
            for i, (ranks, dtype) in enumerate(zip(self.ranks, self.dtypes, strict=True))
        ]


def manifest(
    path: str,
    modules: tuple[Module, ...],
    ranks: tuple[int | None, ...],
    dtype: int,
    table: NameTable,
) -> Adapter:
    """An adapter as a reader would describe it."""
    rows, offset, item = [], 0, ITEM_BYTES[TORCH_NAMES[DTYPES[dtype]]]
    for number, (module, rank) in enumerate(zip(modules, ranks, strict=True)):
        if rank is None:
            continue
        inner = (*module.inner, 0, 0, 0)[:4]
        a, b = offset, offset + rank * module.n * item
        offset = b + rank * module.m * item
        name = table.add(f"model.{number}.{'up' if number % 2 else 'down'}")
        shape = (module.kind, rank, module.m, module.n, inner)
        rows.append((name, *shape, rank, 16.0, 1.0, 0, 0, a, dtype, 0, b, dtype))
    return Adapter(
        path=path,
        config=AdapterConfig(rank=8, alpha=16.0),
        files=(TensorFile(f"{path}/adapter_model.safetensors", offset, 0, 0),),
        table=table,
        columns=Columns.of_rows(rows),
    )


# ---------------------------------------------------------------------------------------------
# Strategies

sides = st.one_of(st.integers(1, 64), st.integers(1, 5000), st.sampled_from([1, 768, 4096, 32_000]))
modules = st.one_of(
    st.builds(lambda m, n: Module(LINEAR, m, (n,)), sides, sides),
    st.builds(lambda m, n: Module(EMBEDDING, m, (n,)), sides, sides),
    st.builds(
        lambda m, n, kernel: Module(CONV, m, (n, *kernel)),
        st.integers(1, 300),
        st.integers(1, 300),
        st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
    ),
)
few_ranks = st.integers(1, 40)
shard_sizes = st.one_of(st.none(), st.integers(1, 2**22))


@st.composite
def cases(draw: Callable[..., Any], pairs: tuple[str, ...] = PAIRS) -> Case:
    made = draw(st.lists(modules, min_size=1, max_size=6).map(tuple))
    pair = draw(st.sampled_from(pairs))
    method, space = chosen(pair)["method"], chosen(pair).get("space")
    count = draw(st.integers(1, most(pair) or 5))
    common = [draw(few_ranks) for _ in made]
    equal = SPACES[space_of(pair)].equal_ranks
    ranks = [
        tuple(
            None
            if i and draw(st.integers(0, 4)) == 0
            else (common[t] if equal else draw(few_ranks))
            for t in range(len(made))
        )
        for i in range(count)
    ]
    present = [r for r in ranks if any(rank is not None for rank in r)]
    return Case(
        modules=made,
        ranks=tuple(present),
        dtypes=tuple(draw(st.integers(0, len(DTYPES) - 1)) for _ in present),
        method=method,
        rank=draw(st.one_of(st.none(), few_ranks)),
        dtype=draw(st.sampled_from(["auto", "float64", "float32", "float16", "bfloat16"])),
        max_shard_bytes=draw(shard_sizes),
        threads=draw(st.integers(1, 6)),
        space=space,
    )


# ---------------------------------------------------------------------------------------------
# Tiles


def check_cover(tiles: list[tuple[int, int]], length: int) -> list[int]:
    """Check that tiles cover a length once, in order; return their own lengths."""
    assert (tiles[0][0], tiles[-1][1]) == (0, length)
    assert all(left[1] == right[0] for left, right in itertools.pairwise(tiles))
    return [stop - start for start, stop in tiles]


@given(m=st.integers(1, 2**21), n=st.integers(1, 2**21))
@example(m=1, n=1)
@example(m=2, n=2**20)
@example(m=15, n=2**20)
@example(m=17, n=2**20)
def test_row_tiles(m: int, n: int) -> None:
    """None has a single row but that of a single one; none is much larger than meant."""
    heights = check_cover(row_tiles(m, n), m)
    assert min(heights) >= min(m, MIN_TILE_ROWS)
    assert max(heights) * n <= max(2 * TILE_ELEMENTS, 2 * MIN_TILE_ROWS * n)


@given(length=st.integers(1, 10**9), size=st.integers(2**14, 2**30))
@example(length=1, size=2**30)
def test_split(length: int, size: int) -> None:
    """Near-equal pieces, each at least as long as was asked."""
    lengths = check_cover(split(length, size), length)
    assert max(lengths) - min(lengths) <= 1
    assert min(lengths) >= min(size, length)


@given(elements=st.integers(1, 2**28))
def test_flat_tiles(elements: int) -> None:
    lengths = check_cover(flat_tiles(elements), elements)
    assert max(lengths) < 2 * TILE_ELEMENTS


@given(rows=st.integers(1, 2**16), width=st.integers(1, 2**20))
def test_factor_rows(rows: int, width: int) -> None:
    """They may have one row: what is read this way is only converted."""
    lengths = check_cover(factor_rows(rows, width), rows)
    assert max(lengths) * width <= max(2 * TILE_ELEMENTS, 2 * width)


# ---------------------------------------------------------------------------------------------
# Plans


@given(ranks=st.lists(st.integers(1, 512), min_size=1), sides=st.integers(2, 2**18))
def test_factor_groups(ranks: list[int], sides: int) -> None:
    """Every source once, in order; stacked as long as they are small."""
    groups = factor_groups(ranks, sides)
    assert [source for group in groups for source in group] == list(range(len(ranks)))
    sizes = [sum(ranks[i] for i in group) * sides for group in groups]
    for group, size in zip(groups, sizes, strict=True):
        assert size <= GROUP_ELEMENTS or len(group) == 1
    for (_, size), (after, _) in itertools.pairwise(zip(groups, sizes, strict=True)):
        assert size + ranks[after.start] * sides > GROUP_ELEMENTS


@given(count=st.integers(1, 10**6))
def test_panels(count: int) -> None:
    """Every tile once, in order, in no more panels than the memory for their sums is planned."""
    ranges = panels(count)
    assert len(ranges) <= PANELS
    edges = [0, *(panel.stop for panel in ranges)]
    assert [panel.start for panel in ranges] == edges[:-1]
    assert edges[-1] == count
    assert all(len(panel) for panel in ranges)


@given(step=st.integers(0, 10**6), width=st.integers(1, 10**6))
def test_a_step_that_visits_every_column(step: int, width: int) -> None:
    found = coprime_step(step, width)
    assert found >= max(1, step)
    assert math.gcd(found, width) == 1


@FAST
@given(case=cases())
def test_every_source_is_used_once(case: Case) -> None:
    plan = case.plan()
    columns = plan.sources
    assert [task.first for task in plan.tasks[1:]] == [task.last for task in plan.tasks[:-1]]
    assert (plan.tasks[0].first, plan.tasks[-1].last) == (0, len(columns))
    manifests = case.manifests()
    used = [
        (task.target, int(columns.adapter[i]), int(columns.row[i]))
        for task in plan.tasks
        for i in range(task.first, task.last)
    ]
    assert used == sorted(
        (adapter.target(row), i, row)
        for i, adapter in enumerate(manifests)
        for row in range(len(adapter))
    )
    assert plan.read_bytes == sum(
        adapter.factor(row, side).elements
        * ITEM_BYTES[TORCH_NAMES[adapter.factor(row, side).dtype]]
        for adapter in manifests
        for row in range(len(adapter))
        for side in "AB"
    )


@FAST
@given(case=cases())
def test_regions_cover_every_file_without_holes(case: Case) -> None:
    plan = case.plan()
    item = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}[plan.dtype]
    by_file: dict[int, list[Region]] = {number: [] for number in range(len(plan.files))}
    for task in plan.tasks:
        for region in task.regions:
            assert region.nbytes == region.elements * item
            by_file[region.file].append(region)
    for number, file in enumerate(plan.files):
        regions = by_file[number]
        ends = [0, *(region.offset + region.nbytes for region in regions)]
        assert [region.offset for region in regions] == ends[:-1]
        assert ends[-1] == file.data_bytes
    names = [region.name for regions in by_file.values() for region in regions]
    assert len(set(names)) == len(names) == 2 * len(plan.tasks)
    assert len({file.name for file in plan.files}) == len(plan.files)


@FAST
@given(case=cases())
def test_shards_are_full_but_never_too_large(case: Case) -> None:
    plan = case.plan()
    limit = case.max_shard_bytes
    pairs: dict[int, list[int]] = {}
    for task in plan.tasks:
        a, b = task.regions
        assert a.file == b.file
        pairs.setdefault(a.file, []).append(a.nbytes + b.nbytes)
    assert sorted(pairs) == list(range(len(plan.files)))
    if limit is None:
        assert len(plan.files) == 1
        return
    for sizes in pairs.values():
        assert sum(sizes) <= limit or len(sizes) == 1
    for number in range(len(plan.files) - 1):
        assert sum(pairs[number]) + pairs[number + 1][0] > limit, "the next would have fitted"


@FAST
@given(case=cases())
def test_the_ranks_of_the_output(case: Case) -> None:
    plan = case.plan()
    sources: dict[str, list[int]] = {}
    for adapter in case.manifests():
        for row in range(len(adapter)):
            sources.setdefault(adapter.target(row), []).append(int(adapter.columns.rank[row]))
    largest = max(itertools.chain.from_iterable(sources.values()))
    asked = case.recipe.rank or largest
    for task in plan.tasks:
        ranks = sources[task.target]
        expected = {
            "exact": sum(ranks),
            "factor": ranks[0],
        }.get(plan.space, min(asked, task.m, task.n))
        a, b = task.regions
        assert task.rank == a.shape[0] == b.shape[1] == expected
        assert (b.shape[0], math.prod(a.shape[1:])) == (task.m, task.n)


@FAST
@given(case=cases(), share=st.floats(0, 4), more=st.integers(0, 2**31))
def test_what_is_held_is_within_what_is_allowed(case: Case, share: float, more: int) -> None:
    """At the smallest budget, a little above it, and far above it."""
    smallest = smallest_budget(case)
    for allowed in (smallest, smallest + more, int(smallest * (1 + share)), PLENTY):
        plan = case.plan(allowed)
        assert plan.projected_bytes <= plan.allowed_bytes == allowed
        assert 1 <= plan.concurrency <= case.threads
        for task in plan.tasks:
            tiles = len(row_tiles(task.m, task.n))
            if task.route == "concatenate":
                tiles = len(factor_rows(task.m, task.rank))
            assert 0 <= task.resident <= tiles
            assert 0 <= task.factors <= task.last - task.first
            assert task.projected_bytes > 0
            assert 1 <= task.lanes <= plan.concurrency
            assert task.alone or task.lanes == 1
        # In flight are one task that is alone, or as many others as there are threads.
        room = allowed - plan.reserved_bytes
        together = [task.projected_bytes for task in plan.tasks if not task.alone]
        assert sum(sorted(together)[-plan.concurrency :]) <= room
        assert all(task.projected_bytes <= room for task in plan.tasks)


@FAST
@given(case=cases())
def test_a_refusal_names_a_budget_that_works(case: Case) -> None:
    with pytest.raises(BudgetError) as caught:
        case.plan(2**20)
    error = caught.value
    assert error.target in str(error)
    assert str(error.smallest_bytes) in str(error)
    assert error.allowed_bytes == 2**20
    assert error.target in {task.target for task in case.plan().tasks}
    assert case.plan(error.smallest_bytes).concurrency >= 1
    with pytest.raises(BudgetError):
        case.plan(error.smallest_bytes - 1)


@settings(max_examples=25)
@given(data=st.data(), more=st.integers(0, 2**32), threads=st.integers(1, 8))
@pytest.mark.parametrize("pair", PAIRS)
def test_a_budget_decides_what_is_kept_and_nothing_else(
    pair: str, data: st.DataObject, more: int, threads: int
) -> None:
    """Nor do workers. Tiles follow from m and n: the same of those means the same tiles."""
    case = data.draw(cases((pair,)))
    smallest = smallest_budget(case)
    plans = [case.plan(smallest), case.plan(smallest + more), case.plan(PLENTY)]
    plans.append(replace(case, threads=threads).plan(smallest + more))
    assert len({without_budget(plan) for plan in plans}) == 1


@FAST
@given(case=cases(tuple(pair for pair in PAIRS if space_of(pair) == "delta")))
def test_scratch_and_io_decide_no_more(case: Case) -> None:
    smallest = smallest_budget(case)
    plan = case.plan(smallest, io="pread", scratch="/scratch")
    assert without_budget(plan) == without_budget(case.plan(smallest))
    assert plan.projected_bytes <= smallest
    for task in plan.tasks:
        assert task.resident + task.spilled <= len(row_tiles(task.m, task.n))


def smallest_budget(case: Case) -> int:
    with pytest.raises(BudgetError) as caught:
        case.plan(1)
    return caught.value.smallest_bytes


def without_budget(plan: Plan) -> str:
    """What of a plan decides the output's bytes."""
    kept = {"resident": 0, "spilled": 0, "factors": 0, "stacked": False, "projected_bytes": 0}
    kept |= {"alone": False, "lanes": 1}
    tasks = tuple(replace(task, **kept) for task in plan.tasks)
    neutral = {"allowed_bytes": 0, "reserved_bytes": 0, "concurrency": 0, "allowed_origin": ""}
    return replace(plan, tasks=tasks, io="mmap", scratch=None, **neutral).to_json()


@FAST
@given(case=cases())
def test_more_memory_keeps_no_less(case: Case) -> None:
    smallest = smallest_budget(case)
    one = replace(case, threads=1)
    for less, more in itertools.pairwise((smallest, smallest + 2**22, smallest + 2**26, PLENTY)):
        for scarce, ample in zip(one.plan(less).tasks, one.plan(more).tasks, strict=True):
            assert scarce.resident <= ample.resident
            assert scarce.factors <= ample.factors


@FAST
@given(case=cases())
def test_json(case: Case) -> None:
    plan = case.plan()
    text = plan.to_json()
    again = Plan.from_json(text)
    assert again.to_json() == text
    assert (again.tasks, again.files, again.config) == (plan.tasks, plan.files, plan.config)
    assert Recipe.from_dict(again.recipe) == case.recipe
    for name, column in vars(plan.sources).items():
        found = getattr(again.sources, name)
        assert found.dtype == column.dtype
        assert found.tolist() == column.tolist()


def test_a_plan_is_equal_to_what_json_gives_back() -> None:
    case = Case(
        modules=(Module(LINEAR, 40, (30,)),) * 2,
        ranks=((4, 4), (4, None)),
        dtypes=(1, 1),
        method="svd",
        rank=None,
        dtype="auto",
        max_shard_bytes=None,
        threads=1,
    )
    plan = case.plan()
    assert Plan.from_json(plan.to_json()) == plan
    assert plan != replace(case, method="cat").plan()


# ---------------------------------------------------------------------------------------------
# Through the public call


def test_a_plan_of_files(tmp_path: Path) -> None:
    """The laws above are of manifests made by hand; those of a reader give the same."""
    targets = {
        "model.0.down": linear(400, 300, 4),
        "model.1.up": embedding(64, 5000, 4),
        "model.2.down": convolution(32, 16, (3, 3), 4),
    }
    case = Case(
        modules=(
            Module(LINEAR, 400, (300,)),
            Module(EMBEDDING, 64, (5000,)),
            Module(CONV, 32, (16, 3, 3)),
        ),
        ranks=((4, 4, 4), (4, 4, 4)),
        dtypes=(1, 1),
        method="ties_svd",
        rank=3,
        dtype="auto",
        max_shard_bytes=10_000,
        threads=1,
    )
    adapters = [write_adapter(tmp_path / f"{i}", targets, seed=i) for i in range(2)]
    found = streammerge.plan(
        adapters, method="ties_svd", density=0.3, rank=3, max_shard_size=10_000, workers=1
    )
    expected = case.plan()
    assert found.tasks == expected.tasks
    assert found.files == expected.files
    assert found.sources.scaling.tolist() == [2.0] * 6


def test_a_budget_in_words(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "in", {"up": linear(30, 20, 4)})
    plan = streammerge.plan([adapter], max_memory="1.5GiB", workers=1)
    assert (plan.allowed_bytes, plan.allowed_origin) == (3 * 2**29, "max_memory")
    assert 0 < plan.reserved_bytes < plan.projected_bytes <= plan.allowed_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        pytest.param(12345, 12345, id="bytes"),
        pytest.param("12345", 12345, id="bytes in words"),
        pytest.param("512MiB", 2**29, id="MiB"),
        pytest.param("512m", 2**29, id="m"),
        pytest.param("2 GB", 2 * 10**9, id="GB"),
        pytest.param("1.5g", 3 * 2**29, id="g"),
        pytest.param("1kB", 1000, id="kB"),
        pytest.param("1TiB", 2**40, id="TiB"),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text, option="max_memory") == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "1,5GiB", "2GiBs", "0.1", "nan", 0, -5])
def test_what_is_no_size(text: str | int) -> None:
    with pytest.raises(RecipeError, match="max_memory"):
        parse_size(text, option="max_memory")


@given(size=st.integers(1, 2**50))
def test_a_size_that_is_shown_is_near(size: int) -> None:
    assert parse_size(format_size(size).replace(" B", ""), option="size") == pytest.approx(
        size, rel=0.06
    )
