"""The memory promise: real runs under a hard cap, tasks against their projections, refusals."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import forking
import streammerge
from capped import MIB, run_cli, task_peaks
from dialects import pairs, write_mlx
from making import PREFIX, Layer, embedding, encode, linear, write_adapter
from names import PAIRS, chosen, most, rule_of, space_of
from streammerge import draw, errors
from streammerge.budget import PROCESS_BYTES, Budget, granted_by_machine, parse_size
from streammerge.kernels.thresholds import PANEL_GATHERED
from streammerge.planner.memory import buffers
from streammerge.tiling import PANELS

WEIGHTS = "adapter_model.safetensors"


def make(folder: Path, count: int, layers: dict[str, Layer], dtype: str = "BF16") -> list[str]:
    """Write adapters and return their paths."""
    return [
        str(write_adapter(folder / f"adapter{i:03d}", layers, seed=i, dtype=dtype))
        for i in range(count)
    ]


def options(method: str) -> dict[str, object]:
    """What a method needs; bases of few columns are found in less time."""
    density = {"density": 0.2} if rule_of(method).needs_density else {}
    return {**chosen(method), **density} | ({"rank": 12} if space_of(method) == "ctm" else {})


def flags(method: str) -> list[str]:
    """The same for the command line."""
    return [f"--{name}={value}" for name, value in options(method).items()]


@pytest.mark.parametrize(
    ("method", "count", "layers", "route"),
    [
        pytest.param("ties_svd", 4, {"up": linear(6144, 4096, 16)}, "krylov", id="merged 96 MiB"),
        pytest.param("svd", 30, {"up": linear(2048, 2048, 64)}, "sum", id="factors 30 MiB"),
        pytest.param("svd", 3, {"emb": embedding(1024, 50000, 16)}, "gram", id="an embedding"),
        pytest.param("dare_ties", 4, {"emb": embedding(2048, 60000, 32)}, "fold", id="tiles"),
        pytest.param("cat", 4, {"emb": embedding(2048, 60000, 32)}, "concatenate", id="copied"),
        pytest.param("ties@knots", 30, {"up": linear(1024, 2048, 16)}, "left_basis", id="a basis"),
    ],
)
def test_a_merge_under_a_hard_cap(
    method: str, count: int, layers: dict[str, Layer], route: str, tmp_path: Path
) -> None:
    """It ends well inside the smallest budget, which is the cap, with the bytes of a free run."""
    adapters = make(tmp_path / "in", count, layers)
    smallest = smallest_budget(adapters, method)
    free = streammerge.merge(adapters, tmp_path / "free", workers=1, **options(method))
    assert {task.route for task in free.plan.tasks} == {route}
    arguments = ["merge", *adapters, "-o", str(tmp_path / "out"), *flags(method)]
    capped = run_cli([*arguments, "--max-memory", str(smallest)], cap_bytes=smallest)
    assert capped.returncode == 0, capped.stderr
    assert capped.peak_bytes <= smallest
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "free" / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("ties_svd", marks=pytest.mark.long),
        pytest.param("ctm", marks=pytest.mark.long),
        "tsv",
        "karcher",
    ],
)
def test_targets_of_many_shapes_under_a_hard_cap(method: str, tmp_path: Path) -> None:
    """What one target has left in the heap is room for the next one, not beside it."""
    shapes = (linear(768, 2048, 80), linear(2048, 512, 80), linear(1536, 2048, 16))
    layers = {f"layers.{i}.up{j}": shape for i in range(2) for j, shape in enumerate(shapes)}
    adapters = make(tmp_path / "in", 5, layers)
    smallest = smallest_budget(adapters, method)
    arguments = ["merge", *adapters, "-o", str(tmp_path / "out"), *flags(method), "--workers=1"]
    capped = run_cli([*arguments, "--max-memory", str(smallest)], cap_bytes=smallest)
    assert capped.returncode == 0, capped.stderr
    assert capped.peak_bytes <= smallest


def smallest_budget(adapters: list[str], method: str, **more: Any) -> int:
    """Return the smallest budget of a fresh process, which reserves less than this one."""
    with pytest.raises(errors.BudgetError) as refused:
        streammerge.plan(adapters, max_memory="1MiB", **{**options(method), **more})
    return refused.value.projected_bytes + Budget(0, "", threads=1).reserved_bytes


def test_a_process_that_holds_more_reserves_more(tmp_path: Path) -> None:
    """What a process has taken before the merge is measured; in this one a fixture keeps it low."""
    adapters = make(tmp_path / "in", 2, {"layer": linear(64, 64, 4)})
    code = f"""
import streammerge

def reserved():
    return streammerge.plan({adapters!r}, max_memory="4GiB", workers=1).reserved_bytes

least = reserved()
held = b"1" * (500 * {MIB})
print(least, reserved())
"""
    run = forking.run(["-c", code])
    assert run.returncode == 0, run.stderr
    least, more = map(int, run.stdout.split())
    assert least == Budget(0, "", threads=1).reserved_bytes
    assert 400 * MIB < more - PROCESS_BYTES < 600 * MIB


def test_the_named_budget_is_that_of_a_fresh_process(tmp_path: Path) -> None:
    adapters = make(tmp_path / "in", 2, {"up": linear(2048, 1024, 8)})
    refused = run_cli(["plan", *adapters, *flags("ties_svd"), "--max-memory", "1MiB"])
    assert refused.returncode == 2
    named = re.search(r"\((\d+) bytes\) at least", refused.stderr)
    assert named, refused.stderr
    assert int(named[1]) == smallest_budget(adapters, "ties_svd")


def test_one_byte_less_is_refused(tmp_path: Path) -> None:
    adapters = make(tmp_path / "in", 2, {"up": linear(2048, 1024, 8)})
    smallest = smallest_budget(adapters, "ties_svd")
    arguments = ["merge", *adapters, "-o", str(tmp_path / "out"), *flags("ties_svd")]
    refused = run_cli([*arguments, "--max-memory", str(smallest - 1)])
    assert refused.returncode == 2
    assert str(smallest) in refused.stderr
    assert not (tmp_path / "out").exists()
    done = run_cli([*arguments, "--max-memory", str(smallest)], cap_bytes=smallest)
    assert done.returncode == 0, done.stderr


def test_the_refusal_names_the_target_that_needs_most(tmp_path: Path) -> None:
    layers = {"small": linear(512, 512, 8), "large": linear(4096, 4096, 8)}
    adapters = make(tmp_path / "in", 2, layers)
    with pytest.raises(errors.BudgetError) as refused:
        streammerge.plan(adapters, max_memory="2MiB", **options("ties_svd"))
    assert refused.value.target == "large"
    assert refused.value.allowed_bytes == 2 * MIB
    assert refused.value.smallest_bytes > refused.value.projected_bytes > 0


LARGE = {"wide": linear(1536, 4096, 16), "tall": linear(4096, 1024, 16)}
"""Of tiles: most of what is held of them."""
STEEP = {"wide": linear(768, 2048, 80), "tall": linear(2048, 512, 80)}
"""Of high ranks, whose factors and Gram matrices are most of what is held."""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return make(tmp_path_factory.mktemp("large"), 6, LARGE)


@pytest.fixture(scope="module")
def steep(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return make(tmp_path_factory.mktemp("steep"), 4, STEEP)


def check_projections(adapters: list[str], method: str, room: str, workers: int) -> None:
    """Measure task by task, by resetting VmHWM before each."""
    allowed = smallest_budget(adapters, method) if room == "least" else 4096 * MIB
    measured = task_peaks(adapters, max_memory=allowed, workers=workers, **options(method))
    if room == "ample" and method in ("ties_svd", "dare_linear_svd"):
        assert {task["lanes"] for task in measured["tasks"]} == {workers}
    for task in measured["tasks"]:
        assert task["peak_bytes"] <= task["projected_bytes"], (room, workers, task)


@pytest.mark.parametrize("method", PAIRS)
def test_every_task_keeps_its_projection(method: str, steep: list[str]) -> None:
    for room, workers in (("least", 1), ("ample", 3)):
        check_projections(steep[: most(method)], method, room, workers)


@pytest.mark.parametrize(
    ("method", "room", "workers"),
    [
        *itertools.product(
            ("linear", "cat", "svd", "ties", "dare_ties", "ties_svd", "dare_linear_svd", "karcher"),
            ("least", "ample"),
            (1, 3),
        ),
        *((method, "least", 3) for method in ("consensus", "della_linear", "sce", "tsv")),
        *((method, "ample", 3) for method in ("ties@core", "dare_ties@knots", "ctm")),
    ],
)
def test_tasks_of_many_tiles_keep_their_projection(
    method: str, room: str, workers: int, large: list[str]
) -> None:
    check_projections(large, method, room, workers)


@pytest.mark.parametrize(
    ("method", "count", "shape", "more"),
    [
        ("tsv", 16, (4096, 4096, 32), {}),
        ("tsv", 16, (4096, 4096, 32), {"workers": 2, "max_memory": 4096 * MIB}),
        ("svd", 2, (4096, 4096, 128), {"workers": 2, "max_memory": 4096 * MIB}),
        ("tsv", 8, (256, 16384, 64), {}),
        ("tsv", 8, (4096, 4096, 32), {"compute_dtype": "float64"}),
        ("tsv", 40, (4096, 4096, 32), {"rank": 16}),
        ("ctm", 32, (768, 768, 8), {"rank": 256}),
        ("slerp", 2, (8192, 8192, 512), {"rank": 16}),
        ("karcher", 6, (8192, 8192, 256), {"space": "exact"}),
        ("ties@knots", 8, (400_000, 64, 8), {}),
        ("ties@core", 8, (400_000, 64, 8), {}),
        ("ties@knots", 8, (64_000, 4096, 32), {"workers": 4, "max_memory": 4096 * MIB}),
    ],
)
def test_rules_on_wholes_keep_their_projection(
    method: str, count: int, shape: tuple[int, int, int], more: dict[str, Any], tmp_path: Path
) -> None:
    """So many columns that what is held of them is most of what is held."""
    adapters = make(tmp_path / "in", count, {"up": linear(*shape)}, dtype="BF16")
    chosen = {**options(method), **more}
    if "max_memory" not in chosen:
        chosen["max_memory"] = smallest_budget(adapters, method, **more)
    measured = task_peaks(adapters, **chosen)
    for task in measured["tasks"]:
        assert task["lanes"] == chosen.get("workers", 1)
        assert task["peak_bytes"] <= task["projected_bytes"], task


@pytest.mark.parametrize("method", ["cat", "ties_svd"])
def test_factors_that_lie_transposed_keep_the_projection(method: str, tmp_path: Path) -> None:
    """They are picked out of what is read, which is more than what is wanted."""
    shapes = {"wide": (768, 4096, 16), "tall": (4096, 512, 16)}
    adapters = [str(write_mlx(tmp_path / f"{i}", pairs(shapes, seed=i), 16, 2.0)) for i in range(4)]
    allowed = smallest_budget(adapters, method)
    measured = task_peaks(adapters, max_memory=allowed, io="pread", **options(method))
    for task in measured["tasks"]:
        assert task["peak_bytes"] <= task["projected_bytes"], task


@pytest.mark.parametrize("policy", ["first", "mean"])
def test_a_head_keeps_its_projection(policy: str, tmp_path: Path) -> None:
    """However large: it is gone over tile by tile."""
    head = {f"{PREFIX}lm_head.weight": encode(np.ones((4096, 2048), np.float32))}
    layers = {"up": linear(64, 64, 4)}
    paths = [str(write_adapter(tmp_path / f"{i}", layers, seed=i, extra=head)) for i in range(2)]
    asked = {"method": "cat", "extras": policy, "max_memory": 4096 * MIB}
    for io in ("mmap", "pread"):
        measured = task_peaks(paths, io=io, **asked)
        head_task = measured["tasks"][-1]
        assert head_task["route"] == ("copy" if policy == "first" else "mean")
        assert head_task["peak_bytes"] <= head_task["projected_bytes"] < 20 * MIB, head_task


@pytest.mark.parametrize(
    ("route", "count", "layer", "asked"),
    [
        ("core", 4, linear(2048, 2048, 128), {"method": "svd", "compute_dtype": "float64"}),
        ("krylov", 2, linear(1024, 1024, 128), {"method": "ties_svd", "density": 0.2}),
    ],
)
def test_small_matrices_of_high_ranks_are_counted(
    route: str, count: int, layer: Layer, asked: dict[str, Any], tmp_path: Path
) -> None:
    """Cores and triangles, which are a trifle where ranks are low, and here a quarter of it all."""
    adapters = make(tmp_path / "in", count, {"up": layer})
    measured = task_peaks(adapters, max_memory=4096 * MIB, **asked)
    (task,) = measured["tasks"]
    assert task["route"] == route
    assert task["peak_bytes"] <= task["projected_bytes"], task
    assert task["peak_bytes"] >= 0.4 * task["projected_bytes"], task


def test_the_formula_has_the_sizes_that_are_allocated() -> None:
    """Numbers that stand in the planner, which may not import the maths, and in the maths."""
    assert buffers.DRAWN == draw.CHUNK
    assert buffers.GATHERED == PANELS * PANEL_GATHERED


def test_memory_that_is_there_is_used(tmp_path: Path) -> None:
    """With room for the merged matrix, tiles are held, and the projection is no idle number."""
    adapters = make(tmp_path / "in", 4, {"up": linear(4096, 4096, 16)})
    smallest = smallest_budget(adapters, "magnitude_prune_svd")
    allowed = smallest + 80 * MIB
    measured = task_peaks(adapters, max_memory=allowed, **options("magnitude_prune_svd"))
    (task,) = measured["tasks"]
    assert task["peak_bytes"] / (allowed - measured["reserved_bytes"]) >= 0.3


def test_many_adapters_under_few_descriptors(tmp_path: Path) -> None:
    adapters = make(tmp_path / "in", 300, {"up": linear(64, 48, 2)})
    arguments = ["merge", *adapters, "-o", str(tmp_path / "out"), *flags("ties")]
    done = run_cli(arguments, open_files=100)
    assert done.returncode == 0, done.stderr


def test_alike_adapters_share_their_columns(tmp_path: Path) -> None:
    """A thousand manifests of one shape take the memory of one."""
    from streammerge.adapter import NameTable
    from streammerge.readers import read_adapter, read_adapters

    layers = {f"layers.{i}.up": linear(8, 6, 2) for i in range(50)}
    paths = make(tmp_path / "in", 3, layers)
    odd = str(write_adapter(tmp_path / "odd", layers, lora_alpha=7.0))
    table = NameTable()
    first, second, third, other = read_adapters([*paths, odd], table)
    assert first.columns is second.columns is third.columns
    assert other.columns is not first.columns
    alone = read_adapter(odd, NameTable())
    assert (alone.columns.alpha == other.columns.alpha).all()
    assert first.factor(3, "A").file.path != second.factor(3, "A").file.path


@pytest.mark.parametrize(
    ("files", "environ", "expected"),
    [
        pytest.param(
            {
                "proc/self/cgroup": "0::/user/job\n",
                "sys/fs/cgroup/user/memory.max": "536870912\n",
                "sys/fs/cgroup/user/job/memory.max": "max\n",
            },
            {},
            (512 * MIB, "memory cgroup v2"),
            id="cgroup v2, set on the parent",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "5:cpu:/\n4:memory:/job\n0::/\n",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "268435456\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            {},
            (256 * MIB, "memory cgroup v1"),
            id="cgroup v1",
        ),
        pytest.param(
            {}, {"SLURM_MEM_PER_NODE": "128"}, (128 * MIB, "SLURM_MEM_PER_NODE"), id="node"
        ),
        pytest.param(
            {},
            {"SLURM_MEM_PER_CPU": "32", "SLURM_CPUS_ON_NODE": "4"},
            (128 * MIB, "SLURM_MEM_PER_CPU"),
            id="SLURM, for each CPU",
        ),
    ],
)
def test_what_the_machine_grants(
    files: dict[str, str], environ: dict[str, str], expected: tuple[int, str], tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    least = min(granted_by_machine(tmp_path, environ))
    assert (least.nbytes, least.origin) == expected


def test_whose_a_grant_is(tmp_path: Path) -> None:
    """Processes in groups of their own have what is granted to the group above together."""

    def holders(group: str) -> dict[int, str]:
        (tmp_path / "proc/self").mkdir(parents=True, exist_ok=True)
        (tmp_path / "proc/self/cgroup").write_text(f"0::{group}\n")
        return {grant.nbytes: grant.holder for grant in granted_by_machine(tmp_path, {})}

    limits = {
        "job": "536870912",
        "job/task_0": "1048576",
        "job/task_1": "1048576",
        "other": "536870912",
    }
    for group, limit in limits.items():
        (tmp_path / "sys/fs/cgroup" / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys/fs/cgroup" / group / "memory.max").write_text(limit)
    first, second, other = holders("/job/task_0"), holders("/job/task_1"), holders("/other")
    assert first[512 * MIB] == second[512 * MIB] != other[512 * MIB]
    assert first[MIB] != second[MIB]


def test_the_plan_says_where_its_budget_comes_from(tmp_path: Path) -> None:
    adapters = make(tmp_path / "in", 1, {"up": linear(64, 48, 2)})
    assert streammerge.plan(adapters, max_memory="8GiB").allowed_origin == "max_memory"
    assert "%" in streammerge.plan(adapters).allowed_origin


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MiB", 512 * MIB), ("2 GB", 2 * 10**9), ("1.5g", 1536 * MIB), ("7", 7), (7, 7)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text, option="max_memory") == size


@pytest.mark.parametrize("text", ["", "much", "-1", "0", "5 bananas", 0, True])
def test_what_is_no_size(text: str | int) -> None:
    with pytest.raises(errors.RecipeError, match="max_memory"):
        parse_size(text, option="max_memory")


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output's size is known, so a full disk is seen before any work."""
    import shutil

    adapters = make(tmp_path / "in", 1, {"up": linear(64, 48, 2)})
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _place: usage._replace(free=100))
    with pytest.raises(errors.DiskSpaceError) as refused:
        streammerge.merge(adapters, tmp_path / "out")
    assert refused.value.free_bytes == 100
    assert not (tmp_path / "out").exists()


def test_scratch_that_is_memory(tmp_path: Path) -> None:
    adapters = make(tmp_path / "in", 1, {"up": linear(64, 48, 2)})
    if not Path("/dev/shm").is_dir():
        pytest.skip("there is no /dev/shm here")
    with pytest.raises(errors.RecipeError, match="tmpfs"):
        streammerge.plan(adapters, scratch="/dev/shm")
