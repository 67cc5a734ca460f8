"""Rank policies: what they choose, against the dense SVD, and that nothing else depends on it."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file

import forking
import streammerge
from capped import MIB, task_peaks
from clusters import LocalCluster, cluster_of
from making import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    Tensor,
    convolution,
    embedding,
    encode,
    linear,
    make_config,
    make_factors,
    write_files,
)
from making import write_adapter as write_random
from names import most, rule_of
from oracle import restated
from oracle.files import random_source, write_adapter
from oracle.masks import stream_masks
from oracle.peft_oracle import read_adapter
from oracle.restated import Matrix, Source
from streammerge import errors, events
from streammerge.budget import resident_bytes
from streammerge.catalog import METHODS, SPACES
from streammerge.cli import main
from streammerge.errors import RecipeError
from streammerge.lowrank import Truncation, cut, smallest_rank
from streammerge.output.staging import MARK_NAME, draft_path, journal_path, staging_path
from streammerge.plans import Plan
from streammerge.publishing.card import render_card
from streammerge.ranks import Rank, RankLimit, RankPolicy, parse_rank
from streammerge.recipe import Recipe
from streammerge.recipe_file import read_recipe, write_recipe

SAME = (WEIGHTS, CONFIG, MARK_NAME, "streammerge_config.yml")
DENSITY = 0.4

# ---------------------------------------------------------------------------------------------
# What is said


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("16", 16),
        (" 4 ", 4),
        ("energy:0.95,max:16", RankPolicy("energy", 0.95, 16)),
        ("energy:0.95", RankPolicy("energy", 0.95)),
        ("energy:1", RankPolicy("energy", 1.0)),
        ("error:0.1, max:64", RankPolicy("error", 0.1, 64)),
        ("error:0", RankPolicy("error", 0.0)),
        ("error:1e-05,max:3", RankPolicy("error", 1e-5, 3)),
        ("max:64", RankLimit(64)),
    ],
)
def test_texts(text: str, means: Rank) -> None:
    assert parse_rank(text) == means
    assert parse_rank(str(means)) == means


@pytest.mark.parametrize("text", ["energy:0.95,max:16", "error:0.1,max:64", "energy:0.5", "max:8"])
def test_a_policy_is_written_as_it_was_given(text: str) -> None:
    assert str(parse_rank(text)) == text


NONE = {
    "nothing": "",
    "a word": "large",
    "no number": "energy:",
    "a word for a number": "energy:most",
    "no measure": "0.95",
    "another measure": "norm:0.9",
    "two": "energy:0.9,error:0.1",
    "the limit first": "max:8,energy:0.9",
    "a limit of nothing": "energy:0.9,max:",
    "a limit alone, of nothing": "max:",
    "a limit alone, of zero": "max:0",
    "a limit alone that is no whole number": "max:1.5",
    "a limit of zero": "energy:0.9,max:0",
    "a negative limit": "energy:0.9,max:-1",
    "a limit that is no whole number": "energy:0.9,max:1.5",
    "a limit of ten thousand digits": "energy:0.9,max:" + "9" * 10_000,
    "energy of 0": "energy:0",
    "energy above 1": "energy:1.01",
    "negative energy": "energy:-0.5",
    "energy that is no number": "energy:nan",
    "an error of 1": "error:1",
    "a negative error": "error:-0.1",
    "an endless error": "error:inf",
    "zero": "0",
    "negative": "-3",
    "more": "energy:0.9,max:8,",
}


@pytest.mark.parametrize("text", NONE.values(), ids=NONE)
def test_texts_that_mean_nothing(text: str, tmp_path: Path) -> None:
    """By whatever way they come, before anything is read."""
    with pytest.raises(RecipeError) as caught:
        streammerge.plan(["no such adapter"], rank=text)
    assert caught.value.option == "rank"
    assert len(str(caught.value)) < 300
    told = CliRunner().invoke(main, ["plan", "no such adapter", f"--rank={text}"])
    assert told.exit_code == 2
    assert "rank" in told.output
    path = tmp_path / "recipe.yml"
    path.write_text(f"merge_method: svd\nmodels: [{{model: A}}]\nrank: '{text}'\n")
    if text not in ("0", "-3"):  # numbers are the recipe's to judge
        with pytest.raises(RecipeError, match="line 3: rank"):
            read_recipe(path)


@pytest.mark.parametrize("method", ["cat", "linear", "ties"])
def test_what_truncates_nothing_takes_no_policy(method: str) -> None:
    more = {"density": 0.5} if method == "ties" else {}
    with pytest.raises(RecipeError, match="truncates nothing") as caught:
        streammerge.plan(["A"], method=method, rank="energy:0.9", **more)
    assert caught.value.option == "rank"


def test_recipes_say_it_in_the_same_words(tmp_path: Path) -> None:
    policy = RankPolicy("energy", 0.95, 16)
    recipe = Recipe(adapters=("A",), method="svd", weights=(1.0,), rank=policy)
    fields = json.loads(json.dumps(recipe.to_dict()))
    assert fields["rank"] == "energy:0.95,max:16"
    assert Recipe.from_dict(fields) == recipe
    path = tmp_path / "recipe.yml"
    path.write_bytes(write_recipe(fields))
    assert "\nrank: energy:0.95,max:16\n" in path.read_text()
    assert read_recipe(path).options["rank"] == "energy:0.95,max:16"


# ---------------------------------------------------------------------------------------------
# The decision, on numbers


def triples(values: Sequence[float], beyond: float = 0.0, dtype: Any = torch.float32) -> Truncation:
    s = torch.tensor(values, dtype=torch.float64)
    eye = torch.eye(len(values), dtype=dtype)
    energy = float(s.square().sum()) + beyond
    return Truncation(u=eye, s=s, v=eye.clone(), energy=energy, lost=beyond)


@pytest.mark.parametrize(
    ("values", "beyond", "share", "chosen"),
    [
        ((2, 1, 1), 0.0, 2 / 6, (1, True)),
        ((2, 1, 1), 0.0, 1.99 / 6, (2, True)),
        ((2, 1, 1), 0.0, 0.99 / 6, (3, True)),
        ((2, 1, 1), 0.0, 0.0, (3, True)),
        ((2, 1, 1), 2.0, 2 / 8, (3, True)),
        ((2, 1, 1), 2.0, 1.9 / 8, (3, False)),
        ((2, 1, 0), 0.0, 0.0, (2, True)),
        ((1, 1e-6, 1e-7), 0.0, 0.0, (1, True)),
        ((1, 1e-4, 1e-7), 0.0, 0.0, (2, True)),
        ((2, 1), 0.0, 1.0, (1, True)),
        ((0, 0), 0.0, 0.0, (1, True)),
    ],
)
def test_the_smallest_rank(
    values: tuple[float, ...], beyond: float, share: float, chosen: tuple[int, bool]
) -> None:
    assert smallest_rank(triples(values, beyond), share) == chosen


def test_in_float64_less_is_rounding() -> None:
    assert smallest_rank(triples((1, 1e-6)), 0.0) == (1, True)
    assert smallest_rank(triples((1, 1e-6), dtype=torch.float64), 0.0) == (2, True)


def test_terms_that_cancel_have_rank_1() -> None:
    """What is left of them is rounding, whose directions say nothing."""
    nothing = replace(triples((1e-9, 1e-9)), energy=0.0, lost=0.0)
    assert smallest_rank(nothing, 0.0) == (1, True)


def test_what_is_cut_off_is_lost() -> None:
    short = cut(triples((3, 2, 1), beyond=0.5), 1)
    assert short.u.shape == short.v.shape == (3, 1)
    assert short.lost == pytest.approx(2**2 + 1 + 0.5)
    assert short.energy == triples((3, 2, 1), beyond=0.5).energy


# ---------------------------------------------------------------------------------------------
# The decision, against the dense SVD in float64


def smallest_by_svd(merged: Matrix, policy: RankPolicy, largest: int) -> tuple[int, float]:
    """The rank as the documentation has it; and how near another one is, as a share of ‖M‖²."""
    squares = np.linalg.svd(merged, compute_uv=False) ** 2
    lost = [squares[k:].sum() / squares.sum() for k in range(1, largest + 1)]
    if policy.measure == "energy":
        good = [1 - share >= policy.bound for share in lost]
        edge = 1 - policy.bound
    else:
        good = [share**0.5 <= policy.bound for share in lost]
        edge = policy.bound**2
    chosen = 1 + good.index(True) if any(good) else largest
    return chosen, min(abs(share - edge) for share in lost)


ROUTES: dict[str, tuple[dict[str, Any], tuple[int, int], int, int]] = {
    "core": ({"method": "svd", "compute_dtype": "float64"}, (40, 30), 3, 6),
    "gram": ({"method": "svd"}, (60, 50), 3, 6),
    "sum": ({"method": "svd"}, (300, 280), 120, 2),
    "dense": ({"method": "magnitude_prune_svd"}, (60, 50), 3, 6),
    "krylov": ({"method": "dare_ties_svd"}, (320, 300), 3, 6),
    "left_basis": ({"method": "ties", "space": "knots"}, (40, 70), 3, 6),
    "both_bases": ({"method": "dare_linear", "space": "core"}, (70, 40), 3, 6),
}
"""Options, the shape of the target, how many sources, and of which rank."""
ESTIMATED = 0.02
"""Share of the lost energy that `sum` may be off by: what no pass has seen it estimates."""
POLICIES = (
    "energy:0.3,max:12",
    "energy:0.5,max:12",
    "energy:0.9,max:12",
    "energy:0.99,max:5",
    "error:0.25,max:12",
)


def sources_of(route: str) -> list[Source]:
    _, (m, n), count, rank = ROUTES[route]
    decay = 0.7 if count < 10 else 0.5
    return [
        random_source(i, m, n, rank, scaling=(1 + i) ** -1.5, decay=decay) for i in range(count)
    ]


def options_of(route: str) -> dict[str, Any]:
    options = dict(ROUTES[route][0])
    if options["method"] != "svd":
        options["density"] = DENSITY
    return options


def merged_of(route: str) -> Matrix:
    """The matrix that is truncated, from the formulas."""
    sources, options = sources_of(route), options_of(route)
    method, space = options["method"], options.get("space", "delta")
    ones = [1.0] * len(sources)
    if space == "delta":
        shape = sources[0].delta.shape
        more: dict[str, Any] = {} if method == "svd" else {"density": DENSITY}
        if restated.uses_masks(method):
            more["masks"] = [
                stream_masks(DENSITY)(i, "layer", space, shape) for i in range(len(sources))
            ]
        return restated.merge_delta(method, sources, ones, **more)
    seen = restated.in_coordinates(space, sources)
    shape = seen.tensors[0].shape
    masks = None
    if restated.uses_masks(method):
        masks = [stream_masks(DENSITY)(i, "layer", space, shape) for i in range(len(sources))]
    return restated.merge_in(space, method, sources, ones, density=DENSITY, masks=masks)


def run_route(route: str, folder: Path, rank: str | int, **more: Any) -> streammerge.MergeResult:
    paths = [folder / f"in{i}" for i in range(len(sources_of(route)))]
    for path, source in zip(paths, sources_of(route), strict=True):
        if not path.exists():
            write_adapter(path, {"layer": source})
    options = options_of(route) | {"workers": 1, "on_event": events.ignore} | more
    return streammerge.merge(paths, folder / f"out {rank}", rank=rank, **options)


@pytest.mark.parametrize("route", ROUTES)
def test_the_rank_is_that_of_the_dense_svd(route: str, tmp_path: Path) -> None:
    merged = merged_of(route)
    seen = set()
    for text in POLICIES:
        policy = parse_rank(text)
        assert isinstance(policy, RankPolicy)
        result = run_route(route, tmp_path, text)
        (module,) = result.modules
        assert module.route == route
        expected, distance = smallest_by_svd(merged, policy, policy.largest or 0)
        close = ESTIMATED if route == "sum" else 1e-3
        assert distance > close * policy.lost_share, "too near to the edge to be told"
        assert module.rank == expected, text
        seen.add(expected)
        tail = restated.residual(merged, expected)
        share = tail / np.linalg.norm(merged)
        found = read_adapter(result.output)["layer"].delta
        assert np.linalg.norm(merged - found) <= tail * (1 + 2e-4) + 2e-6 * np.linalg.norm(merged)
        assert module.relative_error == pytest.approx(share, rel=close, abs=1e-5)
        assert module.kept_energy == pytest.approx(1 - share**2, abs=close * share**2 + 1e-6)
        assert module.rank_reached is bool(share**2 <= policy.lost_share)
    assert len(seen) >= 3


@pytest.mark.parametrize("route", ROUTES)
def test_the_pair_is_that_of_the_rank(route: str, tmp_path: Path) -> None:
    """As if that rank had been asked for, but for rounding and the iteration's tolerance."""
    late = run_route(route, tmp_path, "energy:0.9,max:12")
    fixed = run_route(route, tmp_path, late.modules[0].rank)
    assert fixed.modules[0].rank == late.modules[0].rank
    deltas = [read_adapter(result.output)["layer"].delta for result in (late, fixed)]
    assert np.linalg.norm(deltas[0] - deltas[1]) <= 2e-3 * np.linalg.norm(deltas[1])
    assert late.modules[0].relative_error == pytest.approx(fixed.modules[0].relative_error, 1e-3)


@pytest.mark.parametrize("route", ["core", "gram", "both_bases", "left_basis"])
def test_all_of_the_energy_is_the_numerical_rank(route: str, tmp_path: Path) -> None:
    """Of sources that share directions it is less than the sum of their ranks."""
    sources = sources_of(route)
    doubled = [*sources[:2], sources[0]]
    paths = [
        write_adapter(tmp_path / f"{i}", {"layer": source}) for i, source in enumerate(doubled)
    ]
    for text in ("energy:1,max:30", "error:0,max:30"):
        options = options_of(route) | {"method": "svd", "density": None, "on_event": events.ignore}
        result = streammerge.merge(paths, tmp_path / text, rank=text, **options)
        assert result.modules[0].rank == 12
        assert result.modules[0].rank_reached


@pytest.mark.parametrize("route", ROUTES)
def test_the_more_is_to_be_kept_the_higher_the_rank(route: str, tmp_path: Path) -> None:
    shares = (1e-9, 0.3, 0.6, 0.8, 0.9, 0.97)
    energies = [run_route(route, tmp_path, f"energy:{x},max:9").modules[0].rank for x in shares]
    wrong = [run_route(route, tmp_path, f"error:{1 - x},max:9").modules[0].rank for x in shares]
    for ranks in (energies, wrong):
        assert ranks == sorted(ranks)
        assert ranks[0] == 1
        assert ranks[-1] > 2


def test_an_error_is_an_energy(tmp_path: Path) -> None:
    for error in (0.1, 0.3, 0.6):
        energy = 1 - error**2
        found = [
            run_route("gram", tmp_path, text).modules[0].rank
            for text in (f"energy:{energy},max:18", f"error:{error},max:18")
        ]
        assert found[0] == found[1]


# ---------------------------------------------------------------------------------------------
# What a merge of several targets makes of it

LAYERS = {
    "model.up": linear(120, 90, 6),
    "model.down": linear(70, 130, 6),
    "model.words": embedding(24, 900, 6),
    "model.patches": convolution(50, 6, (3, 3), 6),
    **{f"model.{i}": linear(40 + i, 60, 6) for i in range(6)},
    "model.narrow": linear(3, 50, 6),
}
HEAD = {f"{PREFIX}classifier.weight": (7, 30), f"{PREFIX}classifier.bias": (7,)}
ASKED = "energy:0.8,max:9"
MERGE: dict[str, Any] = {"method": "ties_svd", "density": 0.5, "extras": "mean", "rank": ASKED}


def decaying(seed: int) -> dict[str, Tensor]:
    """Factors whose components fall, by another ratio in each layer, and a head."""
    factors = make_factors(LAYERS, seed=seed)
    for number, (target, layer) in enumerate(LAYERS.items()):
        name = PREFIX + target + layer.suffixes[0]
        values = np.frombuffer(factors[name].data, "<f4").reshape(layer.a)
        ratio = (0.15 + 0.1 * number) ** np.arange(layer.rank)
        shaped = values * ratio.reshape(-1, *(1,) * (values.ndim - 1))
        factors[name] = encode(shaped, "F32")
    drawn = np.random.default_rng(seed)
    return factors | {n: encode(drawn.standard_normal(s), "F16") for n, s in HEAD.items()}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    config = make_config(LAYERS, task_type="SEQ_CLS", modules_to_save=["classifier"])
    return [write_files(folder / f"{seed}", decaying(seed), config) for seed in range(3)]


@pytest.fixture(scope="module")
def plain(adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The merge that all others are compared with."""
    out = tmp_path_factory.mktemp("plain") / "out"
    merge(adapters, out, workers=1)
    return out


def merge(adapters: Sequence[Path], out: Path, **options: Any) -> streammerge.MergeResult:
    return streammerge.merge(adapters, out, **{"on_event": events.ignore, **MERGE, **options})


def written(out: Path, names: Sequence[str] = SAME) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in names}


def ranks_in(out: Path) -> dict[str, int]:
    """Of the pairs in an output's files, whatever config and record say."""
    ranks = {}
    for file in out.glob("*.safetensors"):
        with safe_open(str(file), "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # it is no mapping
                for suffix in (".lora_A.weight", ".lora_embedding_A"):
                    if name.endswith(suffix):
                        target = name.removeprefix(PREFIX).removesuffix(suffix)
                        ranks[target] = opened.get_slice(name).get_shape()[0]
    return ranks


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_files_config_record_and_result_agree(adapters: list[Path], tmp_path: Path) -> None:
    planned = streammerge.plan(adapters, tmp_path / "out", **MERGE)
    result = merge(adapters, tmp_path / "out")
    ranks = ranks_in(tmp_path / "out")
    assert len(set(ranks.values())) >= 4
    assert max(ranks.values()) == 9
    assert ranks == {module.target: module.rank for module in result.modules}
    record = json.loads((tmp_path / "out" / MARK_NAME).read_text())
    assert ranks == {name: facts["rank"] for name, facts in record["modules"].items()}
    assert record["recipe"]["rank"] == ASKED
    assert {task.target: task.rank for task in result.plan.targets} == ranks
    assert planned.late
    assert not result.plan.late
    assert result.plan.write_bytes < planned.write_bytes
    weights = (tmp_path / "out" / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(weights[:8], "little")
    assert len(weights) - start == result.plan.write_bytes
    loaded = load_file(tmp_path / "out" / WEIGHTS)
    assert sum(t.numel() * t.element_size() for t in loaded.values()) == result.plan.write_bytes
    assert streammerge.verify(tmp_path / "out").checksums
    assert left(tmp_path) == []


def header_of(out: Path) -> tuple[int, dict[str, Any]]:
    """Where the data of an output begin, and its tensors, in the order of the header."""
    data = (out / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    del header["__metadata__"]
    return 8 + size, header


def test_tensors_lie_without_a_hole_in_the_plan_s_order(
    adapters: list[Path], plain: Path, tmp_path: Path
) -> None:
    start, header = header_of(plain)
    spans = sorted(entry["data_offsets"] for entry in header.values())
    assert spans[0][0] == 0
    assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))
    assert start + spans[-1][1] == (plain / WEIGHTS).stat().st_size
    merge(adapters, tmp_path / "fixed", rank=2)
    _, fixed = header_of(tmp_path / "fixed")

    def order(tensors: dict[str, Any]) -> list[str]:
        return sorted(tensors, key=lambda name: tensors[name]["data_offsets"])

    assert list(header) == list(fixed)
    assert order(header) == order(fixed)


def test_the_report_says_where_the_largest_rank_is_not_enough(
    adapters: list[Path], tmp_path: Path
) -> None:
    notices: list[str] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.Notice):
            notices.append(event.message)

    result = merge(adapters, tmp_path / "out", rank="energy:0.8,max:2", on_event=listen)
    short = [module for module in result.modules if not module.rank_reached]
    assert 0 < len(short) < len(result.modules)
    assert all(m.rank == 2 and (m.kept_energy or 0) < 0.8 for m in short)
    assert all(m.kept_energy is not None and m.kept_energy >= 0.8 for m in result.modules
               if m not in short)  # fmt: skip
    (said,) = [notice for notice in notices if "energy:0.8,max:2" in notice]
    assert said in result.notices
    assert short[0].target in said
    record = json.loads((tmp_path / "out" / MARK_NAME).read_text())["modules"]
    assert {t for t, facts in record.items() if not facts["rank_reached"]} == {
        module.target for module in short
    }


def test_without_a_limit_it_is_the_largest_rank_of_the_inputs(
    adapters: list[Path], tmp_path: Path
) -> None:
    result = merge(adapters, tmp_path / "out", rank="energy:1")
    narrow = {module.target: module.rank for module in result.modules}.pop("model.narrow")
    assert narrow == 3
    assert max(module.rank for module in result.modules) == 6


def test_a_plan_has_no_more_than_the_result_can(adapters: list[Path]) -> None:
    """A sum is of no higher rank than its sources together; what a rule makes may be."""

    def ranks(**options: Any) -> set[int]:
        asked = {**MERGE, "rank": "energy:0.9,max:40", "exclude": "narrow|words", **options}
        return {task.rank for task in streammerge.plan(adapters, **asked).targets}

    assert ranks(method="svd", density=None) == {18}
    assert ranks(method="ties", space="core") == ranks(method="ties", space="knots") == {18}
    assert ranks() == {40}


def test_a_limit_is_no_more_than_the_sources_have(adapters: list[Path], tmp_path: Path) -> None:
    """And a number is that number, as in PEFT; both are known before the work."""
    asked: dict[str, Any] = {"method": "svd", "density": None, "exclude": "narrow|words"}

    def ranks(rank: int | str, **more: Any) -> set[int]:
        planned = streammerge.plan(adapters, **{**MERGE, **asked, "rank": rank, **more})
        assert not planned.late
        return {task.rank for task in planned.targets}

    assert ranks(25) == {25}
    assert ranks("max:25") == {18}
    assert ranks("max:5") == {5}
    assert ranks("max:25", method="ties", space="core", density=0.5) == {18}
    assert ranks("max:25", method="ties_svd", density=0.5) == {25}
    assert ranks("max:25", method="iso_c") == {25}
    merge(adapters, tmp_path / "limited", **asked, rank="max:25")
    merge(adapters, tmp_path / "number", **asked, rank=18)
    files = [written(tmp_path / name, (WEIGHTS, CONFIG)) for name in ("limited", "number")]
    assert files[0] == files[1]
    (tmp_path / "again.yml").write_bytes((tmp_path / "limited" / SAME[-1]).read_bytes())
    assert read_recipe(tmp_path / "again.yml").options["rank"] == "max:25"


def test_the_plan_says_at_most(adapters: list[Path]) -> None:
    words = ["--method=ties_svd", "--density=0.5", "--extras=mean"]
    told = CliRunner().invoke(main, ["plan", *map(str, adapters), *words, "--rank", ASKED])
    assert told.exit_code == 0, told.output
    assert "at most 9 (10 targets), 3 (1 targets); energy:0.8,max:9" in told.output
    assert any(line.startswith("writes") and "at most" in line for line in told.output.splitlines())
    fixed = CliRunner().invoke(main, ["plan", *map(str, adapters), *words, "--rank", "9"])
    assert not any(
        "at most" in line
        for line in fixed.output.splitlines()
        if line.startswith(("writes", "output rank"))
    )
    plan = streammerge.plan(adapters, **MERGE)
    assert "at most" in plan._repr_html_()
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    "more",
    [
        {"clamp": 0.9},
        {"method": "svd", "density": None, "normalize": True},
        {"compute_dtype": "float64", "dtype": "float64"},
        {"dtype": "bfloat16"},
        {"method": "ties", "space": "core"},
        {"method": "breadcrumbs", "density": 0.3},
        {"device": "cpu", "io": "pread"},
    ],
    ids=str,
)
def test_goes_with_other_options(
    more: dict[str, Any], adapters: list[Path], tmp_path: Path
) -> None:
    result = merge(adapters, tmp_path / "out", **more)
    ranks = ranks_in(tmp_path / "out")
    assert len(set(ranks.values())) > 2
    assert ranks == {module.target: module.rank for module in result.modules}
    assert streammerge.verify(tmp_path / "out").tensors == 2 * len(LAYERS) + 2


def test_what_is_clamped_is_the_pair_of_the_rank(adapters: list[Path], tmp_path: Path) -> None:
    """PEFT's split of that pair, and the quantile of its own entries."""
    options = {"compute_dtype": "float64", "dtype": "float64", "extras": "drop", "clamp": 0.9}
    late = merge(adapters, tmp_path / "late", **options)
    ranks = {module.target: module.rank for module in late.modules}
    rank = ranks["model.up"]
    assert rank < 9
    merge(adapters, tmp_path / "fixed", rank=rank, **options)
    found, expected = (load_file(tmp_path / name / WEIGHTS) for name in ("late", "fixed"))
    for side in "AB":
        name = f"{PREFIX}model.up.lora_{side}.weight"
        torch.testing.assert_close(found[name].abs(), expected[name].abs(), rtol=1e-6, atol=1e-9)


def test_every_truncating_method_takes_one(adapters: list[Path], tmp_path: Path) -> None:
    """But for those that make another matrix for each rank."""
    for name, method in METHODS.items():
        if SPACES[method.space].truncates and not rule_of(name).of_rank:
            density = 0.4 if rule_of(name).needs_density else None
            chosen = adapters[: most(name)]
            result = merge(chosen, tmp_path / name, method=name, density=density)
            assert ranks_in(tmp_path / name) == {m.target: m.rank for m in result.modules}


def test_ranks_that_differ_in_the_inputs(adapters: list[Path], tmp_path: Path) -> None:
    """A sum of adapters with patterns of their own, and of one that has some targets alone."""
    layers = {target: replace(layer, **_of_rank(layer, 2 + i % 4))
              for i, (target, layer) in enumerate(LAYERS.items())}  # fmt: skip
    other = write_random(tmp_path / "other", layers, seed=9)
    alone = write_random(tmp_path / "alone", {"model.own": linear(30, 20, 5)}, seed=8)
    asked = {"method": "svd", "density": None, "extras": "drop", "rank": "energy:1,max:30"}
    result = merge([adapters[0], other, alone], tmp_path / "out", **asked)
    expected = {
        target: min(6 + layers[target].rank, *_sides(layer)) for target, layer in LAYERS.items()
    }
    assert ranks_in(tmp_path / "out") == expected | {"model.own": 5}
    assert all(module.rank_reached for module in result.modules)


def _of_rank(layer: Any, rank: int) -> dict[str, tuple[int, ...]]:
    return {"a": (rank, *layer.a[1:]), "b": (layer.b[0], rank, *layer.b[2:])}


def _sides(layer: Any) -> tuple[int, int]:
    return layer.b[0], int(np.prod(layer.a[1:]))


def test_a_file_for_diffusers(tmp_path: Path) -> None:
    """Its config stands in the header, which is written when the ranks are known."""
    layers = {f"unet.blocks.{i}.to_q": linear(30 + i, 40, 4) for i in range(5)}
    paths = [write_random(tmp_path / f"{i}", layers, seed=i) for i in range(2)]
    asked: dict[str, Any] = {"format": "diffusers", "rank": "error:0.5,max:7"}
    result = streammerge.merge(paths, tmp_path / "out", on_event=events.ignore, **asked)
    streammerge.verify(tmp_path / "out")
    with safe_open(str(tmp_path / "out" / "pytorch_lora_weights.safetensors"), "pt") as opened:
        config = json.loads(opened.metadata()["lora_adapter_metadata"])
        shapes = {
            name: opened.get_slice(name).get_shape()
            for name in opened.keys()  # noqa: SIM118  # it is no mapping
        }
    found = {}
    for module in result.modules:
        inner = module.target.removeprefix("unet.")
        found[module.target] = config["unet.rank_pattern"].get(inner, config["unet.r"])
        assert shapes[f"{module.target}.lora_A.weight"][0] == module.rank
    assert found == {module.target: module.rank for module in result.modules}
    assert len(set(found.values())) > 1
    assert config["unet.alpha_pattern"] == config["unet.rank_pattern"]
    assert config["unet.lora_alpha"] == config["unet.r"]
    again = streammerge.merge([tmp_path / "out"], tmp_path / "again", method="cat")
    assert {m.target: m.rank for m in again.modules} == found


# ---------------------------------------------------------------------------------------------
# The same bytes


@pytest.mark.parametrize(
    "more",
    [
        {"workers": 2},
        {"workers": 3, "io": "pread", "max_memory": "2GiB"},
        {"workers": 1, "max_memory": "little", "scratch": "none"},
    ],
    ids=str,
)
def test_whatever_the_machine(
    more: dict[str, Any], adapters: list[Path], plain: Path, tmp_path: Path
) -> None:
    if more.get("max_memory") == "little":
        # What fits hangs on what this process, which runs other tests too, has grown to.
        more = {**more, "max_memory": resident_bytes() + 400 * 2**20}
    merge(adapters, tmp_path / "out", **more)
    assert written(tmp_path / "out") == written(plain)


def test_another_process(adapters: list[Path], plain: Path, tmp_path: Path) -> None:
    words = ["--method=ties_svd", "--density=0.5", "--extras=mean", "--rank", ASKED, "--quiet"]
    command = ["-m", "streammerge.cli", "merge", *map(str, adapters), *words]
    done = forking.run([*command, "-o", str(tmp_path / "out")])
    assert done.returncode == 0, done.stderr
    assert f"cut to ranks {min(ranks_in(plain).values())} to 9 ({ASKED})" in done.stdout
    assert written(tmp_path / "out") == written(plain)


def test_the_recipe_file_makes_it_again(plain: Path, tmp_path: Path) -> None:
    recipe = read_recipe(plain / "streammerge_config.yml")
    assert recipe.options["rank"] == ASKED
    streammerge.merge(recipe.adapters, tmp_path / "out", on_event=events.ignore, **recipe.options)
    assert written(tmp_path / "out") == written(plain)


def test_shards_are_cut_by_what_there_is(adapters: list[Path], plain: Path, tmp_path: Path) -> None:
    whole = load_file(plain / WEIGHTS)
    for out, workers in (("shards", 1), ("again", 2)):
        merge(adapters, tmp_path / out, max_shard_size="12KiB", workers=workers)
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 2
    assert f"-of-{len(files):05d}" in files[0].name
    sizes, parts = [], {}
    for file in files:
        part = load_file(file)
        sizes.append(sum(t.numel() * t.element_size() for t in part.values()))
        parts |= part
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    # A shard is closed only when the next pair would not fit: with the largest ranks there would
    # be more of them.
    planned = streammerge.plan(adapters, **MERGE, max_shard_size="12KiB")
    assert len(files) < len(planned.files)
    names = [file.name for file in files]
    assert written(tmp_path / "again", names) == written(tmp_path / "shards", names)
    streammerge.verify(tmp_path / "shards")
    streammerge.consolidate(tmp_path / "shards", tmp_path / "one")
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (plain / WEIGHTS).read_bytes()


def test_shards_of_a_policy_are_those_of_its_ranks(tmp_path: Path) -> None:
    """With one rank in all targets that is the layout of that rank, asked for as a number."""
    layers = {f"{i}.up": linear(40, 60, 4) for i in range(9)}
    paths = [write_random(tmp_path / f"in{i}", layers, seed=i) for i in range(2)]
    more: dict[str, Any] = {"max_shard_size": "3KiB", "on_event": events.ignore}
    late = streammerge.merge(paths, tmp_path / "late", rank="energy:1e-6,max:8", **more)
    fixed = streammerge.merge(paths, tmp_path / "fixed", rank=1, **more)
    assert late.plan.files == fixed.plan.files
    assert late.plan.regions == fixed.plan.regions
    assert late.plan.config == fixed.plan.config
    for name in (CONFIG, "adapter_model.safetensors.index.json"):
        assert (tmp_path / "late" / name).read_bytes() == (tmp_path / "fixed" / name).read_bytes()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with cluster_of(tmp_path_factory.mktemp("cluster") / "two", 2) as cluster:
        yield cluster


def test_on_a_cluster(adapters: list[Path], plain: Path, two: LocalCluster, tmp_path: Path) -> None:
    merge(adapters, tmp_path / "out", scheduler=two.address)
    assert written(tmp_path / "out") == written(plain)
    assert left(tmp_path) == []


# ---------------------------------------------------------------------------------------------
# Ended at any moment

KILLED = """
import os, signal, sys, json
import streammerge
from streammerge import {module}

left, call = int(sys.argv[1]), {module}.{function}

def killed(*args, **options):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return call(*args, **options)

{module}.{function} = killed
adapters, out, options = json.loads(sys.argv[2])
streammerge.merge(adapters, out, on_event=lambda _: None, **options)
"""

MOMENTS = {
    "before the first target": ("run", "_execute", 0),
    "before a file of the output is made": ("assembly", "allocate", 0),
    "before the first region is copied": ("assembly", "carry", 0),
    "in the middle of the assembly": ("assembly", "carry", 9),
    "at the last region": ("assembly", "carry", 2 * len(LAYERS) + 1),
    "before config and record are written": ("finish", "write_config", 0),
    "before the record is written": ("finish", "write_record", 0),
    "before it is published": ("api", "write_timings", 0),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed(moment: str, adapters: list[Path], plain: Path, tmp_path: Path) -> None:
    module, function, count = MOMENTS[moment]
    out = tmp_path / "out"
    source = KILLED.format(module=module, function=function)
    given = json.dumps([list(map(str, adapters)), str(out), MERGE | {"workers": 1}])
    done = forking.run(["-c", source, str(count), given])
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    assert draft_path(out).is_dir()
    heard: list[events.Event] = []
    merge(adapters, out, resume=True, workers=2, on_event=heard.append)
    taken = sum(event.done for event in heard if isinstance(event, events.Resumed))
    assert taken == (0 if module == "run" else len(LAYERS) + len(HEAD))
    assert written(out) == written(plain)
    assert left(tmp_path) == []


def test_stopped_among_the_targets(adapters: list[Path], plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        merge(adapters, out, workers=1, on_event=ending(4))
    heard: list[events.Event] = []
    merge(adapters, out, resume=True, workers=2, io="pread", on_event=heard.append)
    assert [event.done for event in heard if isinstance(event, events.Resumed)] == [4]
    assert written(out) == written(plain)
    assert left(tmp_path) == []


def ending(count: int) -> Callable[[events.Event], None]:
    seen = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.TaskDone):
            seen.append(event)
            if len(seen) == count:
                raise KeyboardInterrupt

    return listen


def test_ended_in_one_place_and_gone_on_with_on_a_cluster(
    adapters: list[Path], plain: Path, two: LocalCluster, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        merge(adapters, tmp_path / "out", workers=1, on_event=ending(5))
    merge(adapters, tmp_path / "out", resume=True, scheduler=two.address)
    assert written(tmp_path / "out") == written(plain)


def test_what_was_spoilt_meanwhile_is_made_again(
    adapters: list[Path], plain: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        merge(adapters, out, workers=1, on_event=ending(6))
    draft = draft_path(out) / WEIGHTS
    data = bytearray(draft.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    first = streammerge.plan(adapters, **MERGE).tasks[0].regions[0]
    data[start + first.offset + 1] ^= 4
    draft.write_bytes(data)
    heard: list[events.Event] = []
    merge(adapters, out, resume=True, on_event=heard.append)
    assert [event.done for event in heard if isinstance(event, events.Resumed)] == [5]
    assert written(out) == written(plain)


def test_a_draft_that_changes_before_it_is_copied(
    adapters: list[Path], plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails, what is right is kept, and the merge can be gone on with."""
    out = tmp_path / "out"
    from streammerge import run

    assemble = run.assemble

    def spoilt(plan: Plan, receipts: Any, draft: Path, starts: Any, *args: Any, **more: Any) -> Any:
        with (draft / WEIGHTS).open("r+b") as stream:
            stream.seek(starts[0] + plan.tasks[3].regions[1].offset)
            stream.write(b"\x7f\x7f")
        return assemble(plan, receipts, draft, starts, *args, **more)

    with monkeypatch.context() as patched:
        patched.setattr(run, "assemble", spoilt)
        with pytest.raises(errors.VerificationError, match="does not read back"):
            merge(adapters, out)
    assert not out.exists()
    heard: list[events.Event] = []
    merge(adapters, out, resume=True, on_event=heard.append)
    done = [event.done for event in heard if isinstance(event, events.Resumed)]
    assert done == [len(LAYERS) + len(HEAD) - 1]
    assert written(out) == written(plain)


def test_a_lost_draft_is_made_again(adapters: list[Path], plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        merge(adapters, out, workers=1, on_event=ending(6))
    shutil.rmtree(draft_path(out))
    merge(adapters, out, resume=True)
    assert written(out) == written(plain)


def test_another_policy_is_another_merge(adapters: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        merge(adapters, out, workers=1, on_event=ending(6))
    with pytest.raises(errors.ResumeError, match=r"rank was energy:0\.8,max:9, and is energy:0\.9"):
        merge(adapters, out, resume=True, rank="energy:0.9,max:9")
    merge(adapters, out, overwrite=True, rank=3)
    assert set(ranks_in(out).values()) == {3}
    assert left(tmp_path) == []


def test_a_failure_that_nothing_can_go_on_from_leaves_nothing(
    adapters: list[Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(adapters[0], bad)
    data = bytearray((bad / WEIGHTS).read_bytes())
    data[-4:] = b"\x00\x00\xc0\x7f"
    (bad / WEIGHTS).write_bytes(data)
    with pytest.raises(errors.NonFiniteError):
        merge([bad, adapters[1]], tmp_path / "out")
    assert left(tmp_path) == []


def test_over_an_earlier_output(adapters: list[Path], plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(adapters, out, rank=2)
    merge(adapters, out, overwrite=True)
    assert written(out) == written(plain)
    assert left(tmp_path) == []
    assert not staging_path(out).exists()
    assert not journal_path(out).exists()


def test_a_flipped_bit_is_found(plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(plain, out)
    data = bytearray((out / WEIGHTS).read_bytes())
    for place in (len(data) - 1, len(data) // 2, 40):
        data[place] ^= 1
        (out / WEIGHTS).write_bytes(data)
        with pytest.raises(errors.VerificationError):
            streammerge.verify(out)
        data[place] ^= 1
    (out / WEIGHTS).write_bytes(data)
    streammerge.verify(out)


# ---------------------------------------------------------------------------------------------
# Disk and memory


def test_there_is_to_be_room_for_draft_and_output(
    adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = streammerge.plan(adapters, **MERGE)
    usage = shutil.disk_usage(tmp_path)
    free = 2 * planned.write_bytes - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _place: usage._replace(free=free))
    with pytest.raises(errors.DiskSpaceError) as caught:
        merge(adapters, tmp_path / "out")
    assert caught.value.needed_bytes == 2 * planned.write_bytes
    merge(adapters, tmp_path / "fixed", rank=9)
    free += 1
    merge(adapters, tmp_path / "out")


@pytest.mark.parametrize(
    "more",
    [
        {"method": "ties_svd", "density": 0.3},
        {"method": "svd", "dtype": "float16", "clamp": 0.99},
        {"method": "ties", "space": "core", "density": 0.3},
    ],
    ids=str,
)
def test_tasks_keep_their_projection(more: dict[str, Any], tmp_path: Path) -> None:
    layers = {"wide": linear(700, 2048, 32), "tall": linear(4096, 600, 32)}
    paths = [str(write_random(tmp_path / f"{i}", layers, seed=i)) for i in range(3)]
    asked = {**more, "rank": "energy:0.7,max:64", "max_memory": 4096 * MIB}
    measured = task_peaks(paths, **asked)
    for task in measured["tasks"]:
        assert task["peak_bytes"] <= task["projected_bytes"], task


# ---------------------------------------------------------------------------------------------
# One adapter


def test_compress_is_a_merge_of_one(adapters: list[Path], tmp_path: Path) -> None:
    more: dict[str, Any] = {"rank": "energy:0.9", "extras": "first", "on_event": events.ignore}
    result = streammerge.compress(adapters[0], tmp_path / "out", **more)
    streammerge.merge([adapters[0]], tmp_path / "merged", method="svd", weights=[1.0], **more)
    assert written(tmp_path / "out") == written(tmp_path / "merged")
    words = ["--rank=energy:0.9", "--extras=first"]
    told = CliRunner().invoke(
        main, ["compress", str(adapters[0]), "-o", str(tmp_path / "cli"), *words]
    )
    assert told.exit_code == 0, told.output
    assert written(tmp_path / "cli") == written(tmp_path / "out")
    kept = {module.target: module.kept_energy or 0.0 for module in result.modules}
    worst = min(kept, key=kept.__getitem__)
    assert f"{kept[worst]:.2%} at least ({worst})" in told.output
    assert f"cut to ranks 1 to {max(m.rank for m in result.modules)} (energy:0.9)" in told.output
    before, after = load_file(adapters[0] / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(after[name], before[name]) for name in HEAD)
    deltas = [read_linear(path) for path in (adapters[0], tmp_path / "out")]
    for target, delta in deltas[0].items():
        error = np.linalg.norm(delta - deltas[1][target]) / np.linalg.norm(delta)
        assert error == pytest.approx((1 - kept[target]) ** 0.5, rel=1e-3)
        assert error <= 0.1**0.5 + 1e-6


def read_linear(path: Path) -> Mapping[str, Matrix]:
    """The deltas of the linear layers of an adapter whose scaling is the same in all."""
    config, tensors = json.loads((path / CONFIG).read_text()), load_file(path / WEIGHTS)
    found = {}
    for target in LAYERS:
        name = f"{PREFIX}{target}.lora_A.weight"
        if name in tensors and tensors[name].ndim == 2:
            a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]
            rank = config["rank_pattern"].get(target, config["r"])
            assert rank == len(a)
            alpha = config["alpha_pattern"].get(target, config["lora_alpha"])
            found[target] = (b.double() @ a.double()).numpy() * alpha / rank
    return found


def test_compressed_losslessly_it_is_the_same_adapter(tmp_path: Path) -> None:
    """Components that were never trained, of every module its own number, are left out."""
    generator = np.random.default_rng(5)
    sources = {}
    for i in range(4):
        source = random_source(i, 40, 30, 8, scaling=0.5)
        source.b[:, 3 + i :] = 0.0
        sources[f"layer{i}"] = source
    path = write_adapter(tmp_path / "in", sources)
    result = streammerge.compress(path, tmp_path / "out", rank="energy:1")
    assert [module.rank for module in result.modules] == [3, 4, 5, 6]
    found = read_adapter(tmp_path / "out")
    for name, source in sources.items():
        x = generator.standard_normal(30)
        np.testing.assert_allclose(found[name].delta @ x, source.delta @ x, rtol=0, atol=1e-5)


def test_compressed_to_a_number_no_module_grows(tmp_path: Path) -> None:
    """Each has the number or its own rank, and PEFT's config says which."""
    ranks = {"one": 1, "two": 2, "four": 4, "six": 6}
    sources = {
        name: random_source(i, 40, 30, rank, scaling=0.5)
        for i, (name, rank) in enumerate(ranks.items())
    }
    path = write_adapter(tmp_path / "in", sources)
    result = streammerge.compress(path, tmp_path / "out", rank=4, on_event=events.ignore)
    assert {module.target: module.rank for module in result.modules} == ranks | {"six": 4}
    assert ranks_in(tmp_path / "out") == ranks | {"six": 4}
    assert result.plan.write_bytes == 4 * (40 + 30) * (1 + 2 + 4 + 4)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    assert config["rank_pattern"] == config["alpha_pattern"] == {"one": 1, "two": 2}
    found = read_adapter(tmp_path / "out")
    for name in ("one", "two", "four"):
        np.testing.assert_allclose(found[name].delta, sources[name].delta, rtol=0, atol=1e-5)
    words = ["compress", str(path), "--rank=64"]
    told = CliRunner().invoke(main, [*words, "-o", str(tmp_path / "cli")])
    assert told.exit_code == 0, told.output
    assert "4 targets cut to ranks 1 to 6 (max:64)" in told.output
    assert ranks_in(tmp_path / "cli") == ranks
    shown = CliRunner().invoke(main, [*words, "-o", str(tmp_path / "shown"), "--dry-run"])
    assert "output rank" in shown.output
    assert "64 (" not in shown.output
    streammerge.merge([path], tmp_path / "merged", rank=20, on_event=events.ignore)
    assert set(ranks_in(tmp_path / "merged").values()) == {20}


@pytest.mark.parametrize("rank", [0, -3, 2.5, "0", True])
def test_compressed_to_no_number(rank: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="rank") as caught:
        streammerge.compress(tmp_path, tmp_path / "out", rank=rank)
    assert caught.value.option == "rank"


def test_compress_as_json_and_to_a_number(adapters: list[Path], tmp_path: Path) -> None:
    words = ["compress", str(adapters[1]), "-o", str(tmp_path / "out"), "--extras=drop"]
    told = CliRunner().invoke(main, [*words, "--rank=2", "--json", "--quiet"])
    assert told.exit_code == 0, told.output
    facts = json.loads(told.stdout)
    assert {module["rank"] for module in facts["modules"]} == {2}
    assert facts["write_bytes"] < facts["read_bytes"]
    words[3] = str(tmp_path / "other")
    shown = CliRunner().invoke(main, [*words, "--rank=energy:0.5", "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert "at most 6" in shown.output
    bare = CliRunner().invoke(main, words)
    assert bare.exit_code == 2
    assert "--rank" in bare.output


def test_a_page_and_a_card_tell_the_ranks(plain: Path, tmp_path: Path) -> None:
    streammerge.report(plain, tmp_path / "page.html")
    ranks = sorted(set(ranks_in(plain).values()))
    assert f"{ranks[0]}–{ranks[-1]}" in (tmp_path / "page.html").read_text()
    record, config = (json.loads((plain / name).read_text()) for name in (MARK_NAME, CONFIG))
    card = render_card(record, config, "alice/merged")
    others = sorted(set(config["rank_pattern"].values()))
    assert (
        f"- rank of the result: `{config['r']}`; elsewhere `{others[0]}` to `{others[-1]}`" in card
    )
    (command,) = re.findall(r"```sh\n(.*)\n```", card)
    assert f"--rank {ASKED}" in command
