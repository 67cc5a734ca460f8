"""Methods side by side: figures against dense formulas, one reading, memory, refusals."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

import streammerge
from capped import MIB, run_cli
from making import CONFIG, PREFIX, WEIGHTS, Layer, embedding, linear, write_adapter
from names import chosen, rule_of
from oracle.files import random_source
from oracle.files import write_adapter as write_sources
from oracle.restated import Source
from streammerge import errors, events
from streammerge.budget import Budget
from streammerge.cli import main
from streammerge.comparison import ComparedMethod, Comparison
from streammerge.planner.sample import kind_of, sample_targets

Matrix = npt.NDArray[np.float64]

LAYERS = {
    "model.layers.0.q": linear(300, 200, 4),
    "model.layers.0.up": linear(90, 300, 4),
    "model.layers.1.q": linear(300, 200, 4),
    "model.layers.1.up": linear(90, 300, 4),
}
METHODS = (
    "svd",
    "cat",
    "linear",
    "ties",
    "ties_svd",
    "dare_linear_svd",
    "breadcrumbs",
    "model_stock",
    "karcher",
    "tsv",
    "sce",
    "della_linear",
    "consensus",
    "ties@core",
    "dare_ties@knots",
)
WEIGHTS_GIVEN = (1.0, -0.5, 0.75)


def make(folder: Path, layers: dict[str, Layer] = LAYERS, count: int = 3, **base: Any) -> list[str]:
    return [
        str(write_adapter(folder / f"in{i}", layers, seed=i, lora_alpha=8, **base))
        for i in range(count)
    ]


def compared(found: Comparison, method: str) -> ComparedMethod:
    return next(one for one in found.methods if one.method == method)


def deltas_of(path: str | Path) -> dict[str, tuple[Matrix, Matrix]]:
    """Each target's delta and its A, in float64."""
    config = json.loads((Path(path) / CONFIG).read_text())
    scaling = config["lora_alpha"] / config["r"]
    tensors = load_file(Path(path) / WEIGHTS)
    found = {}
    for name, tensor in tensors.items():
        if ".lora_A." in name:
            a, b = (x.astype(float) for x in (tensor, tensors[name.replace("lora_A", "lora_B")]))
            pattern = config["rank_pattern"].get(target_of(name))
            own = 1.0 if pattern else scaling
            found[target_of(name)] = (b @ a * own, a)
    return found


def target_of(name: str) -> str:
    return name.removeprefix(PREFIX).partition(".lora_A")[0]


def norm(matrices: Sequence[Matrix]) -> float:
    return math.sqrt(sum(float((matrix**2).sum()) for matrix in matrices))


# ---------------------------------------------------------------------------------------------
# What it says


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_against_dense_formulas_on_what_merge_writes(dtype: str, tmp_path: Path) -> None:
    sources = make(tmp_path)
    options: dict[str, Any] = {"weights": WEIGHTS_GIVEN, "seed": 5, "dtype": dtype}
    found = streammerge.compare(sources, methods=METHODS, density=0.3, **options)
    assert [one.method for one in found.methods] == list(METHODS)
    assert found.refused == ()
    assert found.targets == tuple(LAYERS)
    own = [deltas_of(path) for path in sources]
    assert found.norms == pytest.approx([norm([d for d, _ in each.values()]) for each in own])
    for name in METHODS:
        one, out = compared(found, name), tmp_path / name
        density = 0.3 if rule_of(name).needs_density else None
        result = streammerge.merge(sources, out, density=density, **chosen(name), **options)
        merged = pairs_of(out, dtype)
        for i, deltas in enumerate(own):
            apart = {t: merged[t] - delta for t, (delta, _) in deltas.items()}
            seen = {t: apart[t] @ projector(a) for t, (_, a) in deltas.items()}
            whole = norm([delta for delta, _ in deltas.values()])
            assert one.distances[i] == pytest.approx(norm([*apart.values()]) / whole, rel=1e-6)
            assert one.interference[i] == pytest.approx(norm([*seen.values()]) / whole, rel=1e-6)
            for module in one.modules:
                size = norm([deltas[module.target][0]])
                distance, interference = norm([apart[module.target]]), norm([seen[module.target]])
                assert module.distances[i] == pytest.approx(distance / size, rel=1e-6)
                assert module.interference[i] == pytest.approx(interference / size, rel=1e-6)
        assert one.norm == pytest.approx(norm([*merged.values()]), rel=1e-9)
        reports = {report.target: report for report in result.modules}
        for module in one.modules:
            report = reports[module.target]
            assert (module.rank, module.route) == (report.rank, report.route)
            assert module.relative_error == report.relative_error
            assert module.norm == pytest.approx(norm([merged[module.target]]), rel=1e-9)


def pairs_of(out: Path, dtype: str) -> dict[str, Matrix]:
    """Each target's B·A as written, in float64."""
    import torch
    from safetensors.torch import load_file as load_torch

    tensors = load_torch(out / WEIGHTS)
    assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{dtype}"}
    return {
        target_of(name): (
            tensors[name.replace("lora_A", "lora_B")].to(torch.float64).numpy()
            @ tensor.to(torch.float64).numpy()
        )
        for name, tensor in tensors.items()
        if ".lora_A." in name
    }


def projector(a: Matrix) -> Matrix:
    return np.linalg.pinv(a) @ a


def test_one_adapter_is_itself(tmp_path: Path) -> None:
    (source,) = make(tmp_path, count=1)
    found = streammerge.compare([source], methods=["cat", "svd"])
    for one in found.methods:
        assert one.distances[0] < 1e-6
        assert one.interference[0] < 1e-6
        assert one.norm == pytest.approx(found.norms[0], rel=1e-6)


def test_what_lies_beside_an_adapters_inputs_is_no_interference(tmp_path: Path) -> None:
    """Two adapters that read different inputs: their sum is each of them where it looks."""
    sources = make(tmp_path, {"up": linear(40, 60, 3)}, count=2)
    for i, path in enumerate(sources):
        tensors = load_file(Path(path) / WEIGHTS)
        name = f"{PREFIX}up.lora_A.weight"
        tensors[name][:, (30 * i) : (30 * i + 30)] = 0.0
        save(tensors, Path(path))
    found = streammerge.compare(sources, methods=["cat"])
    (one,) = found.methods
    assert max(one.interference) < 1e-6
    others = (found.norms[1] / found.norms[0], found.norms[0] / found.norms[1])
    assert one.distances == pytest.approx(others, rel=1e-6)


def save(tensors: dict[str, npt.NDArray[Any]], folder: Path) -> None:
    from safetensors.numpy import save_file

    save_file(tensors, folder / WEIGHTS)


def test_an_adapter_that_changes_nothing_has_no_distance(tmp_path: Path) -> None:
    sources = make(tmp_path, {"up": linear(40, 60, 3)}, count=2)
    tensors = load_file(Path(sources[1]) / WEIGHTS)
    tensors[f"{PREFIX}up.lora_B.weight"][:] = 0.0
    save(tensors, Path(sources[1]))
    found = streammerge.compare(sources, methods=["svd"])
    assert found.methods[0].distances[0] < 1e-5
    assert math.isnan(found.methods[0].distances[1])
    assert found.to_dict()["methods"][0]["distances"][1] is None
    assert found.norms[1] == 0.0


def test_factors_with_directions_to_spare(tmp_path: Path) -> None:
    """A row of A twice: its space has one direction less, and no small number is divided by."""
    sources = make(tmp_path, {"up": linear(40, 60, 3)}, count=2)
    tensors = load_file(Path(sources[0]) / WEIGHTS)
    a = tensors[f"{PREFIX}up.lora_A.weight"]
    a[2] = a[1]
    save(tensors, Path(sources[0]))
    found = streammerge.compare(sources, methods=["cat"])
    own = [deltas_of(path)["up"] for path in sources]
    merged = own[0][0] + own[1][0]
    expected = norm([(merged - own[0][0]) @ projector(own[0][1])]) / norm([own[0][0]])
    assert found.methods[0].interference[0] == pytest.approx(expected, rel=1e-6)


def test_what_is_not_said_is_that_of_all_inputs(tmp_path: Path) -> None:
    """The rank is the largest of all modules, not of those that are sampled."""
    layers = {"low": linear(64, 64, 2), "high": linear(64, 64, 8)}
    sources = make(tmp_path, layers, count=2, r=2, rank_pattern={"high": 8})
    found = streammerge.compare(sources, methods=["svd"], sample=1, seed=seed_for("low", layers))
    assert found.targets == ("low",)
    assert found.methods[0].modules[0].rank == 8
    assert found.of == 2


def seed_for(target: str, layers: dict[str, Layer]) -> int:
    return next(s for s in range(100) if sample_targets(list(layers), 1, s) == [target])


@pytest.mark.parametrize("rank", ["energy:0.6,max:12", "error:0.5,max:3"])
def test_ranks_by_policy_are_those_of_a_merge(rank: str, tmp_path: Path) -> None:
    sources = make(tmp_path)
    found = streammerge.compare(sources, methods=["svd", "ties_svd"], density=0.3, rank=rank)
    for one in found.methods:
        density = 0.3 if rule_of(one.method).needs_density else None
        out = tmp_path / one.method
        asked: dict[str, Any] = {"method": one.method, "density": density, "rank": rank}
        result = streammerge.merge(sources, out, on_event=events.ignore, **asked)
        assert [module.rank for module in one.modules] == [each.rank for each in result.modules]
        merged = pairs_of(out, "float32")
        assert one.norm == pytest.approx(norm([*merged.values()]), rel=1e-9)


def test_the_same_twice(tmp_path: Path) -> None:
    sources = make(tmp_path)
    asked: dict[str, Any] = {"methods": ["svd", "dare_ties_svd"], "density": 0.3, "sample": 2}

    def figures(**more: Any) -> Any:
        found = streammerge.compare(sources, **asked, **more).to_dict()
        return json.loads(re.sub(r'"seconds": [^,}]+', '"seconds": 0', json.dumps(found)))

    assert figures() == figures()
    assert figures(seed=1) != figures(seed=2)


# ---------------------------------------------------------------------------------------------
# The sample


def names(layers: int, kinds: Sequence[str]) -> list[str]:
    return sorted(f"model.layers.{i}.{kind}" for i in range(layers) for kind in kinds)


def test_a_sample_is_even_over_kinds_and_depth() -> None:
    kinds = ("attn.q_proj", "attn.v_proj", "mlp.up", "mlp.down")
    targets = names(32, kinds)
    for seed in range(20):
        taken = sample_targets(targets, 16, seed)
        assert len(set(taken)) == 16
        assert taken == sorted(taken, key=targets.index)
        counts = {kind: sum(target.endswith(kind) for target in taken) for kind in kinds}
        assert set(counts.values()) == {4}
        layers = sorted(int(target.split(".")[2]) for target in taken)
        quarters = [sum(8 * q <= layer < 8 * q + 8 for layer in layers) for q in range(4)]
        assert quarters == [4, 4, 4, 4]
        gaps = np.diff([-1, *layers, 32])
        assert gaps.max() <= 6


@pytest.mark.parametrize("count", [1, 3, 7, 16, 100])
def test_a_sample_takes_what_there_is(count: int) -> None:
    targets = [*names(3, ("q", "k")), "lm_head", "model.embed"]
    for seed in range(10):
        taken = sample_targets(targets, count, seed)
        assert len(taken) == len(set(taken)) == min(count, len(targets))
        assert taken == sample_targets(targets[::-1], count, seed)[::-1] or count < len(targets)


def test_numbers_in_names_are_no_kinds() -> None:
    assert kind_of("model.layers.11.experts.3.w1") == "model.layers.*.experts.*.w1"
    assert kind_of("up2.0.conv1") == "up2.*.conv1"
    assert kind_of("0.weight") == "*.weight"


def test_include_and_exclude(tmp_path: Path) -> None:
    sources = make(tmp_path)
    found = streammerge.compare(sources, methods=["svd"], include="q$", exclude=r"layers\.0")
    assert found.targets == ("model.layers.1.q",)
    assert found.of == 1


# ---------------------------------------------------------------------------------------------
# What it takes


def test_every_factor_of_the_sample_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = make(tmp_path, LAYERS | {"model.words": embedding(24, 9_000, 4)})
    reads: list[tuple[int, int, int]] = []
    original = os.preadv

    def counted(descriptor: int, buffers: Any, offset: int) -> int:
        read = original(descriptor, buffers, offset)
        reads.append((os.fstat(descriptor).st_ino, offset, read))
        return read

    def mapped(*_: Any, **__: Any) -> Any:
        raise AssertionError("a map would read again")

    monkeypatch.setattr("streammerge.readers.windows.os.preadv", counted)
    monkeypatch.setattr("streammerge.readers.windows.mmap.mmap", mapped)
    found = streammerge.compare(sources, methods=METHODS, density=0.3, sample=3)
    layers = LAYERS | {"model.words": embedding(24, 9_000, 4)}
    sizes = [sum(math.prod(s) for s in (layers[t].a, layers[t].b)) * 4 for t in found.targets]
    assert len(found.targets) == 3
    assert sum(read for *_, read in reads) == found.read_bytes == 3 * sum(sizes)
    assert len({place[:2] for place in reads}) == len(reads)


@pytest.mark.parametrize(
    "layers",
    [
        pytest.param({"up": linear(3072, 2048, 16)}, id="tiles", marks=pytest.mark.long),
        pytest.param({"emb": embedding(512, 40_000, 32)}, id="factors"),
    ],
)
def test_it_stays_within_the_smallest_budget(layers: dict[str, Layer], tmp_path: Path) -> None:
    sources = make(tmp_path, layers, count=4, dtype="BF16")
    # In factor space, where the whole embedding's delta would only take time.
    methods = ["ties_svd", "svd", "cat"] if "up" in layers else ["ties", "svd", "cat"]
    smallest = 0
    for method in methods:
        with pytest.raises(errors.BudgetError) as refused:
            streammerge.compare(sources, methods=[method], density=0.2, max_memory="1MiB")
        reserved = Budget(0, "", threads=1).reserved_bytes
        smallest = max(smallest, refused.value.projected_bytes + reserved)
    asked = ["compare", *sources, "--methods", ",".join(methods), "--density", "0.2", "--json"]
    free = run_cli(asked)
    capped = run_cli([*asked, "--max-memory", str(smallest)], cap_bytes=smallest)
    assert capped.returncode == 0, capped.stderr
    assert capped.peak_bytes <= smallest
    figures = [json.loads(run.stdout)["methods"] for run in (free, capped)]
    assert [[one["distances"] for one in each] for each in figures[:1]] == [
        [one["distances"] for one in each] for each in figures[1:]
    ]
    less = run_cli([*asked, "--max-memory", str(smallest - 1)])
    assert len(json.loads(less.stdout)["methods"]) < len(methods)


def test_what_it_holds_is_what_was_projected(tmp_path: Path) -> None:
    """Beside a task: the stored factors, the pair and what it is measured in are counted."""
    sources = make(tmp_path, {"up": linear(2048, 2048, 32)}, count=8)
    found = streammerge.compare(sources, methods=["cat"], max_memory="8GiB")
    plan = streammerge.plan(sources, method="cat", max_memory="8GiB")
    stored, pair = 8 * 32 * 4096 * 4, 256 * 4096 * 4
    more = found.methods[0].projected_bytes - plan.tasks[0].projected_bytes
    assert stored + pair <= more < stored + pair + 24 * MIB


# ---------------------------------------------------------------------------------------------
# What cannot be done


def test_what_cannot_be_done_is_listed_with_its_reason(tmp_path: Path) -> None:
    sources = make(tmp_path, {"up": linear(64, 48, 4)}, count=1)
    sources += [str(write_adapter(tmp_path / "other", {"up": linear(64, 48, 6)}, seed=9))]
    found = streammerge.compare(sources, methods=["ties_svd", "svd", "linear", "ties@exact"])
    assert [one.method for one in found.methods] == ["svd"]
    reasons = {one.method: one.why for one in found.refused}
    assert list(reasons) == ["ties_svd", "ties@exact", "linear"]
    assert "needs a density" in reasons["ties_svd"]
    assert "needs equal ranks" in reasons["linear"]
    assert "ties does not go with space exact" in reasons["ties@exact"]


def test_ranks_that_differ_outside_of_the_sample_are_seen(tmp_path: Path) -> None:
    layers = {"low": linear(64, 64, 2), "high": linear(64, 64, 4)}
    other = {"low": linear(64, 64, 2), "high": linear(64, 64, 8)}
    sources = [
        str(write_adapter(tmp_path / "a", layers, seed=0, r=2, rank_pattern={"high": 4})),
        str(write_adapter(tmp_path / "b", other, seed=1, r=2, rank_pattern={"high": 8})),
    ]
    seed = seed_for("low", layers)
    found = streammerge.compare(sources, methods=["linear", "svd"], sample=1, seed=seed)
    assert found.targets == ("low",)
    assert [one.method for one in found.refused] == ["linear"]


def test_where_nothing_can_be_done_it_is_refused(tmp_path: Path) -> None:
    sources = make(tmp_path)
    with pytest.raises(errors.RecipeError, match="needs a density") as refused:
        streammerge.compare(sources, methods=["ties", "ties_svd"])
    assert "nor by ties_svd: " in refused.value.__notes__[0]


def test_a_method_that_fails_leaves_the_others(tmp_path: Path) -> None:
    """What does not fit float16: the factors of cat, which take the whole weight on one side."""
    sources = make(tmp_path)
    weights = (1e6, 1e6, 1e6)
    found = streammerge.compare(
        sources, methods=["cat", "svd"], weights=weights, dtype="float16", clamp=None
    )
    assert [one.method for one in found.methods] == ["svd"]
    assert [one.method for one in found.refused] == ["cat"]
    assert "float16" in found.refused[0].why
    with pytest.raises(errors.OutputOverflowError):
        streammerge.compare(sources, methods=["cat"], weights=weights, dtype="float16")


def test_what_has_not_come_to_rest_is_told(tmp_path: Path) -> None:
    """Of the method and the modules that it is true of, as in the record of the merge."""
    around = np.eye(30) - 0.99 / 30
    sources = [
        str(
            write_sources(
                tmp_path / f"{i}",
                {
                    "around": Source(around[i, None], np.eye(5, 1), 1.0),
                    "apart": random_source(i, 20, 30, 2),
                },
            )
        )
        for i in range(len(around))
    ]
    weights = [1 + 0.5 * math.sin(i) for i in range(len(sources))]
    found = streammerge.compare(sources, methods=["svd", "karcher"], weights=weights)
    merged = streammerge.merge(
        sources, tmp_path / "out", method="karcher", weights=weights, on_event=events.ignore
    )
    reports = {module.target: (module.settled, module.last_step) for module in merged.modules}
    assert not reports["around"][0]
    modules = {name: compared(found, name).modules for name in ("svd", "karcher")}
    assert {one.target: (one.settled, one.last_step) for one in modules["karcher"]} == reports
    assert all(one.settled for one in modules["svd"])
    (told,) = [notice for notice in found.notices if "come to rest" in notice]
    assert all(words in told for words in ("in 1 targets", "karcher", "(in around)"))


def test_modules_that_nobody_wants_are_told(tmp_path: Path) -> None:
    sources = make(tmp_path, {"both": linear(20, 30, 2)}, 2)
    sources += make(tmp_path / "more", {"both": linear(20, 30, 2), "own": linear(20, 20, 2)}, 1)
    found = streammerge.compare(sources, methods=["svd", "karcher"], weights=(1.0, 0.5, 0.0))
    (told,) = [notice for notice in found.notices if "weight 0" in notice]
    assert told.startswith("in 1 of 2 targets all adapters that have them have the weight 0")
    assert "(such as own)" in told


@pytest.mark.parametrize(
    ("options", "option", "why"),
    [
        ({"methods": []}, "methods", "a list of one name at least"),
        ({"methods": "svd"}, "methods", "a list of one name at least"),
        ({"methods": ["svd", "tise"]}, "method", "did you mean ties"),
        ({"methods": ["svd@nowhere"]}, "space", "unknown space 'nowhere'"),
        ({"methods": ["svd"], "sample": 0}, "sample", "at least 1"),
        ({"methods": ["svd"], "weights": [1.0]}, "weights", "3 adapters but 1 weights"),
        ({"methods": ["svd"], "parameters": {"gama": 1}}, "parameters", "takes gama"),
        (
            {"methods": ["svd"], "weights": [[0.0, 1.0], 1.0, 1.0]},
            "weights",
            "no first and last layer",
        ),
        (
            {"methods": ["ties"], "density": [[0.1, 0.2], 0.1, 0.1]},
            "density",
            "no first and last layer",
        ),
    ],
)
def test_what_is_wrong_for_all_is_refused(
    options: dict[str, Any], option: str, why: str, tmp_path: Path
) -> None:
    with pytest.raises(errors.RecipeError, match=re.escape(why)) as refused:
        streammerge.compare(make(tmp_path), **options)
    assert refused.value.option == option


def test_options_go_to_the_methods_that_take_them(tmp_path: Path) -> None:
    """The same as asking for each of them with its own."""
    sources = make(tmp_path)
    shared: dict[str, Any] = {
        "density": 0.4,
        "parameters": {"gamma": 0.1},
        "rank": 2,
        "majority_sign": "frequency",
        "normalize": True,
    }
    own: dict[str, dict[str, Any]] = {
        "linear": {"normalize": True},
        "svd": {"normalize": True, "rank": 2},
        "breadcrumbs": {
            "normalize": True,
            "rank": 2,
            "density": 0.4,
            "parameters": {"gamma": 0.1},
        },
        "ties_svd": {"rank": 2, "density": 0.4, "majority_sign": "frequency"},
    }
    together = streammerge.compare(sources, methods=list(own), **shared)
    assert together.refused == ()
    for method, options in own.items():
        (alone,) = streammerge.compare(sources, methods=[method], **options).methods
        assert compared(together, method).distances == alone.distances


def test_a_nan_fails_all(tmp_path: Path) -> None:
    sources = make(tmp_path)
    path = Path(sources[0]) / WEIGHTS
    tensors = load_file(path)
    tensors[f"{PREFIX}model.layers.0.q.lora_A.weight"][0, 0] = np.nan
    save(tensors, Path(sources[0]))
    with pytest.raises(errors.NonFiniteError):
        streammerge.compare(sources, methods=["svd", "cat"])


# ---------------------------------------------------------------------------------------------
# The command


def command(*arguments: str, expected: int = 0, width: int | None = None) -> Any:
    env = {"COLUMNS": str(width)} if width else {}
    result = CliRunner().invoke(main, ["compare", *arguments], env=env)
    assert result.exit_code == expected, result.output
    return result


def test_the_command_shows_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = make(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shown = command(*sources, "--methods", "svd,ties_svd,cat", "--sample", "2")
    assert "not compared: ties_svd: " in shown.stderr
    lines = shown.stdout.splitlines()
    assert any(line.split() == ["modules", "2", "of", "4"] for line in lines)
    heads = [line.split()[0] for line in lines if line]
    assert [head for head in heads if head in ("svd", "ties_svd", "cat")] == ["svd", "cat"]
    assert all(any(line.startswith(path) for line in lines) for path in sources)
    assert not list((tmp_path / "here").iterdir())


def test_the_command_takes_what_the_call_takes() -> None:
    options = {str(parameter.name) for parameter in main.commands["compare"].params}
    arguments = set(inspect.signature(streammerge.compare).parameters)
    assert options - {"as_json"} == arguments - {"on_event", "on_module"}


def test_the_command_for_machines(tmp_path: Path) -> None:
    sources = make(tmp_path)
    options = ["--weights", "1,-0.5,0.75", "--rank", "3", "--sample", "2", "--seed", "4"]
    shown = json.loads(command(*sources, "--methods", "svd,ties", *options, "--json").stdout)
    found = streammerge.compare(
        sources, methods=["svd", "ties"], weights=WEIGHTS_GIVEN, rank=3, sample=2, seed=4
    ).to_dict()
    assert shown["methods"][0]["distances"] == found["methods"][0]["distances"]
    assert shown["refused"] == found["refused"]
    assert shown["adapters"] == sources


def test_the_command_refuses_with_2(tmp_path: Path) -> None:
    sources = make(tmp_path)
    told = command(*sources, "--methods", "ties,ties_svd", expected=2).stderr
    assert "needs a density" in told
    assert "nor by ties_svd" in told
    assert "did you mean svd" in command(*sources, "--methods", "svdd", expected=2).stderr
    command(*sources, expected=2)


def test_it_shows_itself_in_a_notebook(tmp_path: Path) -> None:
    sources = make(tmp_path)
    found = streammerge.compare(sources, methods=["svd", "ties"], sample=2)
    assert repr(found) == "Comparison(svd: 3 adapters, 2 of 4 modules)"
    shown = found._repr_html_()
    assert "<td>svd</td>" in shown
    assert "needs a density" in shown
    assert "<summary>methods</summary>" in shown
