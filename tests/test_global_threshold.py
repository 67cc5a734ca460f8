"""`threshold_scope="global"`: one threshold over all of an adapter's tensors, exactly."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import forking
import streammerge
from capped import MIB, run_cli
from clusters import cluster_of
from forking import Forked
from making import CONFIG, WEIGHTS, linear
from making import write_adapter as write_random
from oracle import restated
from oracle.files import random_source, write_adapter
from oracle.peft_oracle import SavedTarget, read_adapter
from oracle.restated import Matrix, Source
from streammerge import errors, events
from streammerge.adapter import NameTable
from streammerge.budget import Budget
from streammerge.cli.progress import Progress
from streammerge.kernels import shared
from streammerge.kernels.census import Question, Standing, Tally, take_census
from streammerge.output.staging import MARK_NAME, journal_path, staging_path
from streammerge.planner import fit, make_plan
from streammerge.plans import Plan
from streammerge.readers import read_adapters
from streammerge.recipe import Recipe
from streammerge.select import DIGITS
from streammerge.worker import census as census_of_tasks

SAME = (WEIGHTS, CONFIG, MARK_NAME)
GIVEN = (1.0, -0.6, 0.3)
EXACT: dict[str, Any] = {"compute_dtype": "float64", "dtype": "float64"}
GLOBAL: dict[str, Any] = {"threshold_scope": "global"}

SHAPES = {"a.up": (40, 30, 4), "b.down": (24, 36, 4), "c.gate": (30, 50, 4)}
"""m, n and the rank of each target."""

RULES = ("ties", "magnitude_prune", "breadcrumbs")
SPACES = ("factor", "delta", "core", "knots")

Made = list[dict[str, Source]]


def make_sources(scales: Sequence[float] = (1.0, 2.5, 0.6)) -> Made:
    """Three adapters; their targets are of different sizes, so that no threshold fits each."""
    return [
        {
            name: random_source(10 * i + k, *shape, scaling=(1 + i / 2) * scales[k])
            for k, (name, shape) in enumerate(SHAPES.items())
        }
        for i in range(3)
    ]


def save(folder: Path, made: Made, **more: Any) -> list[Path]:
    return [write_adapter(folder / f"in{i}", one, **more) for i, one in enumerate(made)]


def merge(paths: Sequence[Path], out: Path, **options: Any) -> dict[str, SavedTarget]:
    chosen = {"weights": GIVEN[: len(paths)], "on_event": events.ignore, **GLOBAL, **options}
    streammerge.merge(paths, out, **chosen)
    return read_adapter(out)


def pruned_together(
    rule: str, seen: Mapping[str, Sequence[Sequence[Matrix]]], density: float
) -> dict[str, list[list[Matrix]]]:
    """By target and adapter, the tensors that a rule sees, pruned as one vector of each adapter."""
    gamma = {"gamma": 0.05} if rule == "breadcrumbs" else {}
    found: dict[str, list[list[Matrix]]] = {name: [] for name in seen}
    for i in range(len(next(iter(seen.values())))):
        flat = [x for name in seen for x in seen[name][i]]
        parts = iter(restated.prune_together(flat, density, **gamma))
        for name in seen:
            found[name].append([next(parts) for _ in seen[name][i]])
    return found


def expected_of(rule: str, space: str, made: Made, density: float) -> dict[str, Any]:
    """The dense restatement: (A, B) of each target in factor space, else its merged matrix."""
    targets = {name: [one[name] for one in made] for name in SHAPES}
    weights = GIVEN[: len(made)]
    if space == "factor":
        pruned = pruned_together(
            rule, {name: [(s.a, s.b) for s in of] for name, of in targets.items()}, density
        )
        answer = {}
        for name, sources in targets.items():
            q = [w * s.scaling for w, s in zip(weights, sources, strict=True)]
            roots = np.sqrt(np.abs(q))
            answer[name] = (
                restated.combine(rule, [a for a, _ in pruned[name]], np.copysign(roots, q)),
                restated.combine(rule, [b for _, b in pruned[name]], roots),
            )
        return answer
    coordinates = {}
    if space == "delta":
        seen = {name: [[s.delta] for s in of] for name, of in targets.items()}
    else:
        coordinates = {name: restated.in_coordinates(space, of) for name, of in targets.items()}
        seen = {name: [[x] for x in found.tensors] for name, found in coordinates.items()}
    pruned = pruned_together(rule, seen, density)
    merged = {
        name: restated.combine(rule, [x for (x,) in pruned[name]], weights) for name in targets
    }
    return {
        name: coordinates[name].back(answer) if coordinates else answer
        for name, answer in merged.items()
    }


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("density", [0.2, 0.7])
def test_the_formula(rule: str, space: str, density: float, tmp_path: Path) -> None:
    made = make_sources()
    options: dict[str, Any] = {"method": rule, "space": space, "density": density, **EXACT}
    if rule == "breadcrumbs":
        options["parameters"] = {"gamma": 0.05}
    if space != "factor":
        options["rank"] = 50
    found = merge(save(tmp_path, made), tmp_path / "out", **options)
    for name, expected in expected_of(rule, space, made, density).items():
        if space == "factor":
            np.testing.assert_allclose(found[name].a, expected[0], atol=1e-12)
            np.testing.assert_allclose(found[name].b, expected[1], atol=1e-12)
        else:
            np.testing.assert_allclose(found[name].delta, expected, atol=1e-10)


def test_it_is_another_merge(tmp_path: Path) -> None:
    """Targets of large values keep more than their share, and others less."""
    made = make_sources((1.0, 40.0, 1.0))
    paths = save(tmp_path, made[:1])
    found = merge(
        paths, tmp_path / "out", method="magnitude_prune_svd", density=0.2, rank=50, **EXACT
    )
    kept = {name: np.mean(np.abs(one.delta) > 1e-9) for name, one in found.items()}
    assert kept["b.down"] > 0.5
    assert kept["a.up"] < 0.1


# ---------------------------------------------------------------------------------------------
# Exactly so many, among masses of equals


def whole_numbers(folder: Path, levels: int = 2) -> tuple[Path, dict[str, Source]]:
    """One adapter of small whole numbers in bfloat16, of several tiles, and what it holds."""
    generator = np.random.default_rng(3)
    shapes = {"a.up": (40, 9000, 2), "b.words": (60, 200_000, 2), "c.gate": (300, 40, 2)}
    made = {
        name: Source(
            generator.integers(-levels, levels + 1, (rank, n)).astype(np.float64),
            generator.integers(-levels, levels + 1, (m, rank)).astype(np.float64),
            1.0,
        )
        for name, (m, n, rank) in shapes.items()
    }
    return write_adapter(folder / "in", made, dtype=torch.bfloat16), made


@pytest.mark.parametrize("density", [0.05, 0.3, 0.5, 0.77, 0.0, 1.0])
def test_equals_in_factors(density: float, tmp_path: Path) -> None:
    path, made = whole_numbers(tmp_path)
    found = merge([path], tmp_path / "out", method="magnitude_prune", density=density)
    seen = {name: [(s.a, s.b)] for name, s in made.items()}
    expected = pruned_together("magnitude_prune", seen, density)
    for name, one in found.items():
        a, b = expected[name][0]
        np.testing.assert_array_equal(one.a, a)
        np.testing.assert_array_equal(one.b, b)


@pytest.mark.parametrize("method", ["magnitude_prune_svd", "ties_svd"])
def test_equals_in_deltas(method: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    made = {
        name: Source(
            generator.integers(-2, 3, (2, n)).astype(np.float64),
            generator.integers(-2, 3, (m, 2)).astype(np.float64),
            1.0,
        )
        for name, (m, n) in {"a.up": (40, 9000), "b.down": (36, 50), "c.gate": (20, 30_000)}.items()
    }
    path = write_adapter(tmp_path / "in", made, dtype=torch.bfloat16)
    options = {"method": method, "density": 0.3, "rank": 40, "dtype": "float32"}
    found = merge([path], tmp_path / "out", **options)
    pruned = pruned_together("ties", {name: [[s.delta]] for name, s in made.items()}, 0.3)
    kept = 0
    for name, ((expected,),) in pruned.items():
        there = np.abs(found[name].delta) > 0.5
        np.testing.assert_array_equal(there, np.abs(expected) > 0.5)
        kept += int(there.sum())
    total = sum(s.delta.size for s in made.values())
    assert kept == int(0.3 * total)
    facts = json.loads((tmp_path / "out" / MARK_NAME).read_text())["inputs"][0]["pruning"]
    assert (facts["kept"], facts["elements"]) == (kept, total)
    values = np.sort(np.abs(np.concatenate([s.delta.ravel() for s in made.values()])))
    assert facts["threshold"] == values[total - kept]
    assert facts["share"] == kept / total


@pytest.mark.parametrize("space", ["delta", "core", "knots", "ctm"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("compute", ["float32", "float64"])
def test_of_one_target_it_is_the_tensor(
    rule: str, space: str, compute: str, tmp_path: Path
) -> None:
    paths = [
        write_random(
            tmp_path / f"{i}", {"up": linear(300, 1200, 4)}, seed=i, dtype="BF16", levels=2
        )
        for i in range(3)
    ]
    options = {"method": rule, "space": space, "density": 0.3, "compute_dtype": compute}
    streammerge.merge(paths, tmp_path / "tensor", **options)
    streammerge.merge(paths, tmp_path / "global", **options, **GLOBAL)
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "tensor" / name).read_bytes() == (
            tmp_path / "global" / name
        ).read_bytes()


def test_an_adapter_that_lacks_targets(tmp_path: Path) -> None:
    """Each has the threshold of what it has."""
    made = make_sources()
    del made[1]["b.down"]
    paths = save(tmp_path, made)
    merge(paths, tmp_path / "out", method="ties_svd", density=0.3, rank=50, **EXACT)
    inputs = json.loads((tmp_path / "out" / MARK_NAME).read_text())["inputs"]
    for one, facts in zip(made, inputs, strict=True):
        values = np.concatenate([s.delta.ravel() for s in one.values()])
        kept = int(0.3 * values.size)
        assert (facts["pruning"]["elements"], facts["pruning"]["kept"]) == (values.size, kept)
        expected = np.sort(np.abs(values))[-kept]
        assert facts["pruning"]["threshold"] == pytest.approx(expected, rel=1e-12)


def test_densities_by_adapter(tmp_path: Path) -> None:
    made = make_sources()
    paths = save(tmp_path, made)
    found = merge(
        paths, tmp_path / "out", method="magnitude_prune", density=(0.0, 0.5, 1.0), **EXACT
    )
    inputs = json.loads((tmp_path / "out" / MARK_NAME).read_text())["inputs"]
    assert [facts["pruning"]["share"] for facts in inputs] == [0.0, 0.5, 1.0]
    assert inputs[0]["pruning"]["threshold"] is inputs[2]["pruning"]["threshold"] is None
    second, third = (one["a.up"] for one in made[1:])
    roots = [np.sqrt(0.6 * second.scaling), np.sqrt(0.3 * third.scaling)]
    flat = [x for s in made[1].values() for x in (s.a, s.b)]
    expected = -roots[0] * restated.prune_together(flat, 0.5)[0] + roots[1] * third.a
    np.testing.assert_allclose(found["a.up"].a, expected, atol=1e-12)


def test_a_tensor_of_zeros(tmp_path: Path) -> None:
    """More is to be kept than is not zero; and a target of nothing has no coordinates."""
    made = make_sources()
    for one in made:
        one["b.down"] = replace(one["b.down"], b=np.zeros_like(one["b.down"].b))
    paths = save(tmp_path, made)
    for space in SPACES:
        found = merge(paths, tmp_path / space, method="ties", space=space, density=0.99, **EXACT)
        assert not found["b.down"].delta.any()
        assert found["a.up"].delta.any()


# ---------------------------------------------------------------------------------------------
# The same bytes


TARGETS = {
    "model.up": linear(700, 900, 6),
    "model.down": linear(270, 1000, 6),
    "model.small": linear(30, 40, 6),
    **{f"model.{i}": linear(50 + i, 60, 6) for i in range(8)},
}
CASES = (
    "ties@factor",
    "breadcrumbs@factor",
    "ties@delta",
    "breadcrumbs@delta",
    "ties@core",
    "magnitude_prune@knots",
    "ties@ctm",
)

Saved = Callable[[str], list[str]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Five adapters of normal values, or of whole numbers in bfloat16, of which many are equal."""
    made = {
        kind: [
            str(
                write_random(
                    tmp_path_factory.mktemp(kind) / f"{seed}",
                    TARGETS,
                    seed=seed,
                    dtype=dtype,
                    levels=levels,
                    lora_alpha=6,
                )
            )
            for seed in range(5)
        ]
        for kind, dtype, levels in (("normal", "F32", None), ("equals", "BF16", 2))
    }
    return made.__getitem__


def options_of(case: str) -> dict[str, Any]:
    rule, _, space = case.partition("@")
    return {"method": rule, "space": space, "density": 0.3, **GLOBAL}


def plan_in(paths: Sequence[str], options: dict[str, Any], room: int, workers: int) -> Plan:
    """The plan for so many bytes beyond what the process takes."""
    recipe = Recipe(adapters=tuple(paths), weights=(1.0,) * len(paths), **options)
    reserved = Budget(0, "", process_bytes=0, threads=workers).reserved_bytes
    budget = Budget(reserved + room, "the test", process_bytes=0, threads=workers)
    return make_plan(read_adapters(paths, NameTable()), recipe, budget)


def least_room(paths: Sequence[str], options: dict[str, Any]) -> int:
    with pytest.raises(errors.BudgetError) as caught:
        plan_in(paths, options, 0, 1)
    return caught.value.projected_bytes


def written(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in SAME}


@pytest.mark.parametrize("kind", ["normal", "equals"])
@pytest.mark.parametrize("case", CASES)
def test_same_bytes(
    kind: str, case: str, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever memory, on however many threads, in groups of one adapter or of all."""
    # Bases are found anew in every pass; how well they are found makes no difference here.
    monkeypatch.setattr(shared, "SWEEPS", 3)
    paths, options = saved(kind), options_of(case)
    least = least_room(paths, options)
    settings = {
        "least": (least, 1, 1),
        "two, little": (least + MIB, 2, 1),
        "two, ample": (2**30, 2, 2),
    }
    streammerge.merge(paths, tmp_path / "serial", workers=1, **options)
    outputs = {"serial": written(tmp_path / "serial")}
    for name, (room, workers, at_once) in settings.items():
        plan = plan_in(paths, options, room, workers)
        assert plan.census is not None
        assert plan.projected_bytes <= plan.allowed_bytes
        assert plan.census.adapters_at_once >= at_once
        plan = replace(plan, census=replace(plan.census, adapters_at_once=at_once))
        monkeypatch.setattr("streammerge.preparation.make_plan", lambda *_, made=plan, **__: made)
        streammerge.merge(paths, tmp_path / name, on_event=events.ignore, **options)
        outputs[name] = written(tmp_path / name)
    assert all(found == outputs["serial"] for found in outputs.values())


@pytest.fixture(scope="module", params=[1, 2])
def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, int]]:
    with cluster_of(tmp_path_factory.mktemp("cluster") / "it", request.param) as found:
        yield found.address, request.param


@pytest.mark.parametrize("kind", ["normal", "equals"])
def test_same_bytes_on_a_cluster(
    kind: str,
    cluster: tuple[str, int],
    saved: Saved,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two workers, that also share the largest target in delta space."""
    paths, (address, workers) = saved(kind), cluster
    monkeypatch.setattr(fit, "PASS_WORK", 10**5)
    for case in ("ties@factor", "breadcrumbs@delta", "ties@core"):
        options = options_of(case)
        heard: list[events.Event] = []
        streammerge.merge(paths, tmp_path / f"{case}-here", **options)
        result = streammerge.merge(
            paths, tmp_path / case, scheduler=address, on_event=heard.append, **options
        )
        assert max(task.team for task in result.plan.tasks) == (workers if "delta" in case else 1)
        assert written(tmp_path / case) == written(tmp_path / f"{case}-here")
        passes = sum(isinstance(event, events.Counting) for event in heard)
        assert passes == (3 if kind == "equals" and "core" not in case else 2)
        counted = [event.target for event in heard if isinstance(event, events.Counted)]
        assert len(counted) == passes * len(TARGETS)


# ---------------------------------------------------------------------------------------------
# Ended and gone on with


def ended_at(kind: type[events.Event], count: int, heard: list[events.Event]) -> events.OnEvent:
    def listen(event: events.Event) -> None:
        heard.append(event)
        if sum(isinstance(one, kind) for one in heard) == count and isinstance(event, kind):
            raise KeyboardInterrupt

    return listen


@pytest.mark.parametrize(
    ("moment", "count", "passes"),
    [
        (events.Counted, 4, 3),  # in the first pass: nothing is kept
        (events.Counting, 2, 2),  # between passes
        (events.Counted, 18, 2),
        (events.Counted, 30, 1),
        (events.TaskDone, 1, 0),
        (events.TaskDone, 9, 0),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_goes_on(
    moment: type[events.Event],
    count: int,
    passes: int,
    workers: int,
    saved: Saved,
    tmp_path: Path,
) -> None:
    """To the same bytes, and no pass is made again that had come to its end."""
    paths, options = saved("equals"), options_of("ties@delta")
    streammerge.merge(paths, tmp_path / "undisturbed", **options)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        streammerge.merge(
            paths, out, workers=workers, on_event=ended_at(moment, count, []), **options
        )
    assert staging_path(out).is_dir() == (passes < 3)
    heard: list[events.Event] = []
    streammerge.merge(
        paths, out, resume=True, on_event=heard.append, workers=3 - workers, **options
    )
    assert sum(isinstance(event, events.Counting) for event in heard) == passes
    assert written(out) == written(tmp_path / "undisturbed")


def test_ended_again_and_again(saved: Saved, tmp_path: Path) -> None:
    """Each run makes one pass more, or a target or two."""
    paths, options = saved("equals"), options_of("ties@factor")
    streammerge.merge(paths, tmp_path / "undisturbed", **options)
    out, runs = tmp_path / "out", 0
    while not out.exists():
        runs += 1
        heard: list[events.Event] = []
        stop = (
            ended_at(events.Counting, 2, heard) if runs < 3 else ended_at(events.TaskDone, 3, heard)
        )
        try:
            streammerge.merge(paths, out, resume=True, workers=1, on_event=stop, **options)
        except KeyboardInterrupt:
            continue
    assert runs > 4
    assert written(out) == written(tmp_path / "undisturbed")


def test_a_spoilt_line_of_the_journal_does_not_count(saved: Saved, tmp_path: Path) -> None:
    paths, options, out = saved("equals"), options_of("ties@factor"), tmp_path / "out"
    streammerge.merge(paths, tmp_path / "undisturbed", **options)
    with pytest.raises(KeyboardInterrupt):
        streammerge.merge(paths, out, on_event=ended_at(events.Planned, 1, []), **options)
    lines = journal_path(out).read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    lines[2] = lines[2].replace(b'"remaining":', b'"remaining":1', 1)
    journal_path(out).write_bytes(b"".join(lines))
    heard: list[events.Event] = []
    streammerge.merge(paths, out, resume=True, on_event=heard.append, **options)
    assert sum(isinstance(event, events.Counting) for event in heard) == 2
    assert written(out) == written(tmp_path / "undisturbed")


def test_another_scope_is_not_gone_on_with(saved: Saved, tmp_path: Path) -> None:
    paths, options, out = saved("normal"), options_of("ties@factor"), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        streammerge.merge(paths, out, on_event=ended_at(events.Planned, 1, []), **options)
    with pytest.raises(errors.UnfinishedError):
        streammerge.merge(paths, out, **options)
    with pytest.raises(errors.ResumeError, match="threshold_scope was global, and is tensor"):
        streammerge.merge(paths, out, resume=True, **{**options, "threshold_scope": "tensor"})


@dataclass(frozen=True)
class Command:
    """A merge whose census takes seconds: its command line but for the output, and what comes."""

    words: list[str]
    written: dict[str, bytes]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    folder = tmp_path_factory.mktemp("command")
    layers = {f"model.{i:02d}": linear(1000, 1000, 8) for i in range(8)}
    paths = [str(write_random(folder / f"{i}", layers, seed=i)) for i in range(3)]
    options = ["--method=ties_svd", "--density=0.3", "--threshold-scope=global", "--workers=1"]
    words = ["-m", "streammerge.cli", "merge", *paths, *options, "-o"]
    assert forking.run([*words, str(folder / "free")]).returncode == 0
    return Command(words, written(folder / "free"))


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL", "time limit"])
def test_stopped_in_the_census(how: str, command: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    limit = ["--time-limit", "0.3s"] if how == "time limit" else []
    with (
        (tmp_path / "said").open("w+b") as said,
        Forked([*command.words, str(out), *limit], stdout=said, stderr=said) as process,
    ):
        if not limit:
            while not journal_path(out).exists():
                assert process.poll() is None
            process.send_signal(getattr(signal, how))
        code = process.wait(timeout=60)
    assert code == (-signal.SIGKILL if how == "SIGKILL" else 75), (tmp_path / "said").read_text()
    assert not out.exists()
    assert forking.run([*command.words, str(out), "--resume"]).returncode == 0
    assert written(out) == command.written


def test_a_file_that_changes_between_two_passes(tmp_path: Path) -> None:
    paths = [
        str(write_random(tmp_path / f"{i}", {"up": linear(40, 30, 4)}, seed=i)) for i in range(2)
    ]

    def touch(event: events.Event) -> None:
        if isinstance(event, events.Counting) and event.number == 2:
            os.utime(Path(paths[1]) / WEIGHTS, ns=(1, 1))

    with pytest.raises(errors.InputChangedError):
        streammerge.merge(paths, tmp_path / "out", on_event=touch, **options_of("ties@delta"))


# ---------------------------------------------------------------------------------------------
# Refused, failed


@pytest.mark.parametrize("method", ["linear", "svd", "cat", "dare_ties", "dare_linear_svd"])
def test_rules_that_look_for_no_largest(method: str, saved: Saved) -> None:
    density = {"density": 0.5} if "dare" in method else {}
    with pytest.raises(errors.RecipeError, match="looks for no largest") as caught:
        streammerge.plan(saved("normal"), method=method, **density, **GLOBAL)
    assert caught.value.option == "threshold_scope"


def test_a_density_that_differs_by_target(saved: Saved) -> None:
    gradients = [[0.2, 0.5], 0.3, 0.3, 0.3, 0.3]
    with pytest.raises(errors.RecipeError, match="differs from target to target") as caught:
        streammerge.plan(saved("normal"), method="ties", density=gradients, **GLOBAL)
    assert caught.value.option == "threshold_scope"
    with pytest.raises(errors.RecipeError, match="tensor, global") as caught:
        streammerge.plan(saved("normal"), method="ties", density=0.3, threshold_scope="model")
    assert caught.value.option == "threshold_scope"


def test_deltas_that_overflow(tmp_path: Path) -> None:
    huge = Source(np.full((2, 30), 1e30), np.full((40, 2), 1e30), 1.0)
    small = random_source(1, 40, 30, 2)
    path = write_adapter(tmp_path / "in", {"a.small": small, "b.huge": huge})
    with pytest.raises(errors.ComputeOverflowError) as caught:
        streammerge.merge([path], tmp_path / "out", method="ties_svd", density=0.5, **GLOBAL)
    assert caught.value.target == "b.huge"


def test_nothing_is_said_of_thresholds_of_tensors(saved: Saved, tmp_path: Path) -> None:
    heard: list[events.Event] = []
    streammerge.merge(
        saved("normal"), tmp_path / "out", method="ties", density=0.3, on_event=heard.append
    )
    record = json.loads((tmp_path / "out" / MARK_NAME).read_text())
    assert not any("pruning" in facts for facts in record["inputs"])
    assert not any(isinstance(event, events.Counting | events.Counted) for event in heard)


def test_what_is_shown_of_passes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("streammerge.cli.progress.SECONDS_BETWEEN_LINES", 0.0)
    with Progress(quiet=False) as progress:
        for number in (1, 2):
            progress(events.Counting(number, 3, targets=2, read_bytes=200))
            progress(events.Counted("up", 50))
        progress(events.Planned(2, read_bytes=100, write_bytes=10))
        progress(events.TaskDone("up", 50, 5, seconds=0.1))
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.startswith("counting, pass 1 of 3: 25% of 200 bytes")
    assert second.startswith("counting, pass 2 of 3: 25% of 200 bytes")
    assert third.startswith("merging: 50% of 100 bytes")


# ---------------------------------------------------------------------------------------------
# What the plan says, and memory


def test_the_plan_says_what_it_takes(saved: Saved) -> None:
    paths = saved("normal")
    tensor = streammerge.plan(paths, method="ties_svd", density=0.3)
    made = streammerge.plan(paths, method="ties_svd", density=0.3, **GLOBAL)
    census = made.census
    assert tensor.census is None
    assert census is not None
    assert (census.adapters_at_once, census.passes) == (5, 3)
    assert census.read_bytes == 3 * made.read_bytes
    assert made.flops == tensor.flops + census.flops > tensor.flops
    assert made.seconds > tensor.seconds
    assert Plan.from_json(made.to_json()) == made
    double = streammerge.plan(
        paths, method="ties_svd", density=0.3, compute_dtype="float64", **GLOBAL
    )
    assert double.census is not None
    assert double.census.passes == 5


@pytest.mark.parametrize(
    "case",
    ["ties@factor", pytest.param("breadcrumbs@delta", marks=pytest.mark.long), "ties@knots"],
)
def test_a_merge_under_a_hard_cap(case: str, tmp_path: Path) -> None:
    """In the smallest budget, of which a group of adapters takes as much as there is."""
    layers = {"wide": linear(768, 2048, 16), "tall": linear(1536, 512, 16)}
    paths = [str(write_random(tmp_path / f"{i}", layers, seed=i, dtype="BF16")) for i in range(16)]
    options = options_of(case)
    with pytest.raises(errors.BudgetError) as refused:
        streammerge.plan(paths, max_memory="1MiB", **options)
    smallest = refused.value.projected_bytes + Budget(0, "", threads=1).reserved_bytes
    free = streammerge.merge(paths, tmp_path / "free", workers=1, **options)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    for name, budget in (("least", smallest), ("more", smallest + 12 * MIB)):
        arguments = ["merge", *paths, "-o", str(tmp_path / name), *flags, f"--max-memory={budget}"]
        capped = run_cli(arguments, cap_bytes=budget)
        assert capped.returncode == 0, capped.stderr
        assert capped.peak_bytes <= budget
        assert written(tmp_path / name) == written(tmp_path / "free")
    assert free.plan.census is not None
    assert free.plan.census.adapters_at_once == 16


def test_many_adapters(tmp_path: Path) -> None:
    """Counters of some of them at a time, under a cap that those of all would break."""
    layers = {f"{i}.up": linear(96, 64, 4) for i in range(3)}
    paths = [
        str(write_random(tmp_path / f"{i:04d}", layers, seed=i, dtype="BF16")) for i in range(300)
    ]
    budget = 360 * MIB
    with pytest.raises(errors.BudgetError) as refused:
        streammerge.plan(paths, method="ties", density=0.2, max_memory="1MiB", workers=1, **GLOBAL)
    least = refused.value.projected_bytes
    assert least + Budget(0, "", threads=1).reserved_bytes < budget
    arguments = [
        "merge", *paths, "-o", str(tmp_path / "out"), "--method=ties", "--density=0.2",
        "--threshold-scope=global", f"--max-memory={budget}", "--workers=1",
    ]  # fmt: skip
    capped = run_cli(arguments, cap_bytes=budget, open_files=256)
    assert capped.returncode == 0, capped.stderr
    assert capped.peak_bytes <= budget
    made = streammerge.plan(
        paths, method="ties", density=0.2, max_memory="3GiB", workers=1, **GLOBAL
    )
    assert made.census is not None
    assert made.census.adapters_at_once == 300
    streammerge.merge(paths, tmp_path / "ample", method="ties", density=0.2, **GLOBAL)
    assert written(tmp_path / "out") == written(tmp_path / "ample")


# ---------------------------------------------------------------------------------------------
# The search by itself


def counted(question: Question, tensors: Sequence[np.ndarray], dtype: torch.dtype) -> Tally:
    """What a pass over tensors counts, by numpy."""
    tally = Tally(question, -(-len(tensors) // 2), dtype)
    kind, bits = {torch.float32: (np.uint32, 32), torch.float64: (np.uint64, 64)}[dtype]
    for adapter, searches in question.searches.items():
        for place, search in enumerate(searches):
            for number, x in enumerate(tensors):
                values = np.abs(x).view(kind).astype(object)
                shift = bits - 16 * search.settled
                if search.settled == bits // 16:
                    tally.of(adapter, place)[number] = np.sum(values == search.prefix)
                    continue
                mine = [v for v in values if v >> shift == search.prefix]
                for v in mine:
                    tally.of(adapter, place)[v >> (shift - 16) & (DIGITS - 1)] += 1
    return tally


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [None, 1, 3])
def test_the_search(dtype: torch.dtype, levels: int | None) -> None:
    generator = np.random.default_rng(7)
    kind = np.float32 if dtype == torch.float32 else np.float64
    tensors = [
        (
            generator.standard_normal(size)
            if levels is None
            else generator.integers(-levels, levels + 1, size)
        ).astype(kind)
        for size in (50, 7, 120, 31)
    ]
    whole = np.concatenate(tensors)
    order = np.argsort(-np.abs(whole), kind="stable")
    for keep in (1, 20, 57, 58, 177, 207):
        share = (keep + 0.5) / whole.size
        (*_, (found,)) = take_census(
            [Standing(0, (share,))], 1, dtype, lambda q: counted(q, tensors, dtype)
        )
        assert found.keep == keep
        assert Standing.from_dict(json.loads(json.dumps(found.to_dict()))) == found
        kept = []
        for number, x in enumerate(tensors):
            quota = found.quota(number, dtype)
            equal = np.abs(x) == quota.value
            mine = np.abs(x) > quota.value
            mine[np.flatnonzero(equal)[: quota.equals]] = True
            kept.append(mine & (x != 0))
        expected = np.zeros(whole.size, bool)
        expected[order[:keep]] = True
        np.testing.assert_array_equal(np.concatenate(kept), expected & (whole != 0))


def test_no_factors_are_held_while_elements_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The projection of a census has no room for them; that of the merge has."""
    counted: list[int] = []
    work = census_of_tasks.Work

    def spy(job: Any, task: Any, *rest: Any) -> Any:
        counted.append(task.factors)
        return work(job, task, *rest)

    monkeypatch.setattr(census_of_tasks, "Work", spy)
    adapters = [
        str(write_random(tmp_path / str(i), {"up": linear(30, 40, 4)}, seed=i)) for i in range(3)
    ]
    options = {"method": "ties", "space": "knots", "density": 0.3, "threshold_scope": "global"}
    merged = streammerge.merge(adapters, tmp_path / "out", workers=1, **options)
    assert [task.factors for task in merged.plan.tasks] == [3]
    assert counted
    assert set(counted) == {0}
