"""Weights and densities that differ by adapter, depth and module, and recipe files."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import MISSING, Field, fields
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import streammerge
from making import PREFIX, WEIGHTS, encode, linear, write_adapter
from streammerge import events
from streammerge.catalog import METHODS, RULES, SPACES
from streammerge.cli import main
from streammerge.errors import RecipeError, RecipeFileError
from streammerge.recipe import Recipe, make_density, make_parameters, make_weights
from streammerge.recipe_file import RecipeFile, read_recipe, write_recipe
from streammerge.schedule import as_json, depths, make_value, value_at

LAYERS = {
    f"model.layers.{i}.{name}": linear(24, 20, 4)
    for i in range(5)
    for name in ("self_attn.q_proj", "mlp.up_proj")
}
OUTSIDE = {"model.embed_tokens": linear(30, 20, 4), "lm_head": linear(30, 20, 4)}


@pytest.fixture
def adapters(tmp_path: Path) -> list[str]:
    return [
        str(write_adapter(tmp_path / f"in{seed}", {**LAYERS, **OUTSIDE}, seed=seed))
        for seed in range(2)
    ]


def weights_of(plan: streammerge.Plan, adapter: int = 0) -> dict[str, float]:
    """Each target's weight of one adapter."""
    s = plan.sources
    return {
        task.target: float(s.weight[row])
        for task in plan.tasks
        for row in range(task.first, task.last)
        if s.adapter[row] == adapter
    }


# ---------------------------------------------------------------------------------------------
# Schedules


def test_a_gradient_is_evenly_spaced_over_the_layers(adapters: list[str]) -> None:
    plan = streammerge.plan(adapters, weights=[[0.0, 1.0, 0.0], 1.0])
    found = weights_of(plan)
    for layer, expected in enumerate([0.0, 0.5, 1.0, 0.5, 0.0]):
        assert found[f"model.layers.{layer}.mlp.up_proj"] == expected
    assert set(weights_of(plan, 1).values()) == {1.0}


def test_what_lies_outside_of_layers() -> None:
    names = [
        "model.embed_tokens",
        "transformer.wte",
        "lm_head",
        "classifier",
        "layers.0",
        "layers.4",
    ]
    assert depths(names) == [0.0, 0.0, 1.0, 1.0, 0.0, 1.0]


def test_stacks_are_counted_apart() -> None:
    names = ["encoder.block.0.q", "encoder.block.4.q", "decoder.block.1.q", "decoder.block.2.q"]
    assert depths(names) == [0.0, 1.0, 0.5, 1.0]


def test_a_single_layer_is_the_first() -> None:
    assert depths(["model.layers.0.q_proj"]) == [0.0]


def test_the_first_filter_that_fits_holds(adapters: list[str]) -> None:
    choices = [
        {"filter": "mlp", "value": [0.0, 4.0]},
        {"filter": "layers", "value": 2.0},
        {"value": 3.0},
    ]
    found = weights_of(streammerge.plan(adapters, weights=[choices, 1.0]))
    assert found["model.layers.1.mlp.up_proj"] == 1.0
    assert found["model.layers.1.self_attn.q_proj"] == 2.0
    assert found["lm_head"] == found["model.embed_tokens"] == 3.0


def test_a_target_that_no_filter_fits_is_refused(adapters: list[str]) -> None:
    with pytest.raises(RecipeError, match=r"no filter fits lm_head.*without a filter"):
        streammerge.plan(adapters, weights=[[{"filter": "model", "value": 1.0}], 1.0])


def test_a_schedule_is_the_merge_of_its_parts(adapters: list[str], tmp_path: Path) -> None:
    """Merged with numbers, target by target, the tensors are the same to the byte."""
    density = [[{"filter": "mlp", "value": 0.3}, {"value": 0.6}], 0.5]
    streammerge.merge(
        adapters, tmp_path / "out", method="ties_svd", density=density,
        weights=[[{"filter": "mlp", "value": 2.0}, {"value": 0.5}], 1.0],
    )  # fmt: skip
    whole = load_file(tmp_path / "out" / WEIGHTS)
    for name, weight, kept in (("mlp", 2.0, 0.3), (r"q_proj|embed|head", 0.5, 0.6)):
        out = tmp_path / re.sub(r"\W", "", name)
        streammerge.merge(
            adapters, out, method="ties_svd", density=[kept, 0.5], weights=[weight, 1.0],
            include=name,
        )  # fmt: skip
        for key, tensor in load_file(out / WEIGHTS).items():
            np.testing.assert_array_equal(tensor, whole.pop(key))
    assert not whole


@pytest.mark.parametrize(
    "method",
    [n for n, m in METHODS.items() if RULES[m.rule].sparsity not in ("none", "varied")],
)
def test_a_density_for_each_adapter(method: str, adapters: list[str], tmp_path: Path) -> None:
    """One for all is one for each, to the byte; another one is not."""
    for name, density in (("all", 0.4), ("each", [0.4, 0.4]), ("other", [0.4, 0.7])):
        streammerge.merge(adapters, tmp_path / name, method=method, density=density)
    weights = [(tmp_path / name / WEIGHTS).read_bytes() for name in ("all", "each", "other")]
    assert weights[0] == weights[1] != weights[2]


def test_normalized_weights(adapters: list[str], tmp_path: Path) -> None:
    alone = str(write_adapter(tmp_path / "more", {"only.here": linear(9, 8, 4)}, seed=5))
    plan = streammerge.plan([*adapters, alone], method="cat", weights=[3, 1, 5], normalize=True)
    assert weights_of(plan)["lm_head"] == 0.75
    assert weights_of(plan, 1)["lm_head"] == 0.25
    assert weights_of(plan, 2)["only.here"] == 1.0


def test_weights_that_cannot_be_normalized(adapters: list[str]) -> None:
    for weights in ([1, -1], [0.3, -0.30000000000000004]):
        with pytest.raises(RecipeError, match="add up to zero"):
            streammerge.plan(adapters, weights=weights, normalize=True)
    plan = streammerge.plan(adapters, weights=[0, 0], normalize=True)
    assert weights_of(plan) == dict.fromkeys(weights_of(plan), 0.0)
    assert any("weight 0" in notice for notice in plan.notices)
    with pytest.raises(RecipeError, match="how many agree"):
        streammerge.plan(adapters, method="ties", density=0.5, normalize=True)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([[], 1], "1 to"),
        ([{"value": 1}, 1], "not a number"),
        ([[{"filter": "a"}], 1], "has a value"),
        ([[{"value": 1, "fliter": "a"}], 1], "nothing else"),
        ([[{"value": [{"value": 1}]}], 1], "not a number"),
        ([[{"filter": 3, "value": 1}], 1], "a filter is a text"),
        ([[{"value": 1}, 2], 1], "nothing else"),
        ([[1, "x"], 1], "not a number: 'x'"),
        ([[1, float("nan")], 1], "must be finite"),
        ([True, 1], "not a number"),
        ("12", "one for each adapter"),
        ({"a": 1}, "one for each adapter"),
    ],
)
def test_weights_that_are_none(weights: Any, said: str, adapters: list[str]) -> None:
    with pytest.raises(RecipeError, match=said):
        streammerge.plan(adapters, weights=weights)


@pytest.mark.parametrize("density", [[0.5], [0.5, 1.5], [[0.1, 2.0], 0.5], [0.1, 0.2, 0.3]])
def test_densities_that_are_none(density: Any, adapters: list[str]) -> None:
    with pytest.raises(RecipeError, match=r"densit"):
        streammerge.plan(adapters, method="ties", density=density)


# ---------------------------------------------------------------------------------------------
# Files


def recipe_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def made_by(read: RecipeFile) -> Recipe:
    """Return the recipe that a call with a file's options makes."""
    options = dict(read.options)
    return Recipe(
        adapters=read.adapters,
        weights=make_weights(options.pop("weights"), len(read.adapters)),
        density=make_density(options.pop("density")),
        parameters=make_parameters(options.pop("parameters")),
        max_shard_bytes=options.pop("max_shard_size", None),
        **options,
    )


def test_a_file_is_the_call(adapters: list[str], tmp_path: Path) -> None:
    """The file, the command line and the call make the same bytes and keep the same recipe."""
    path = recipe_file(
        tmp_path,
        f"""
        merge_method: dare_ties_svd
        models:
          - model: {adapters[0]}
            parameters: {{weight: 2.0, density: 0.4}}
          - model: {adapters[1]}
            parameters: {{weight: 0.5}}
        parameters: {{density: 0.7}}
        dtype: float16
        seed: 3
        rank: 3
        output: {tmp_path / "by-file"}
        """,
    )
    streammerge.merge(
        adapters, tmp_path / "by-call", method="dare_ties_svd", weights=[2.0, 0.5],
        density=[0.4, 0.7], dtype="float16", seed=3, rank=3,
    )  # fmt: skip
    options = "--method dare_ties_svd --weights 2,0.5 --density 0.4,0.7 --dtype float16 --seed 3"
    runs = (
        ["run", str(path), "--quiet"],
        ["merge", *adapters, "-o", str(tmp_path / "by-line"), *options.split(), "--rank", "3"],
    )
    for arguments in runs:
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, done.output
    for name in (WEIGHTS, "adapter_config.json", "streammerge.json"):
        files = [(tmp_path / way / name).read_bytes() for way in ("by-call", "by-file", "by-line")]
        assert files[0] == files[1] == files[2]


def test_an_output_holds_the_recipe_that_makes_it_again(
    adapters: list[str], tmp_path: Path
) -> None:
    streammerge.merge(
        adapters, tmp_path / "out", method="ties", density=[[0.2, 0.9], 0.5], scaling=2,
        weights=[[{"filter": "mlp", "value": 0.1}, {"value": [1, 2]}], -1e-7], exclude="head",
    )  # fmt: skip
    streammerge.verify(tmp_path / "out")
    read = read_recipe(tmp_path / "out" / "streammerge_config.yml")
    streammerge.merge(read.adapters, tmp_path / "again", **read.options)
    for path in (tmp_path / "out").iterdir():
        if "timings" not in path.name:
            assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    (tmp_path / "again" / "streammerge_config.yml").write_text("merge_method: svd\n")
    with pytest.raises(streammerge.StreammergeError, match=r"streammerge_config\.yml was changed"):
        streammerge.verify(tmp_path / "again")


finite = st.floats(allow_nan=False, allow_infinity=False)
values = st.one_of(finite, st.lists(finite, min_size=1, max_size=4))
words = st.text(max_size=8)
entries = st.lists(
    st.one_of(
        st.fixed_dictionaries({"value": values}),
        st.fixed_dictionaries({"filter": words, "value": values}),
    ),
    min_size=1,
    max_size=3,
)
shares = st.floats(0, 1)
gradients = st.lists(shares, min_size=2, max_size=3)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    count = draw(st.integers(1, 3))
    each = st.lists(st.one_of(values, entries), min_size=count, max_size=count)
    kept = st.one_of(
        st.none(),
        shares,
        st.lists(st.one_of(shares, gradients), min_size=count, max_size=count),
    )  # fmt: skip
    density = draw(kept)
    return Recipe(
        adapters=tuple(draw(st.lists(st.text(min_size=1), min_size=count, max_size=count))),
        method=draw(st.sampled_from(list(METHODS))),
        weights=tuple(make_value(w, option="weights") for w in draw(each)),
        density=tuple(make_value(d, option="density") for d in density)
        if isinstance(density, list)
        else density,
        normalize=draw(st.booleans()),
        rank=draw(st.none() | st.integers(1, 2**40)),
        space=draw(st.none() | st.sampled_from(list(SPACES))),
        scaling=draw(st.none() | st.just("tensor") | finite),
        seed=draw(st.integers(0, 2**64 - 1)),
        dtype=draw(st.sampled_from(["auto", "float16"])),
        include=draw(st.none() | words.map(re.escape)),
        base_model=draw(st.none() | words),
        strict_base=draw(st.booleans()),
        max_shard_bytes=draw(st.none() | st.integers(1, 2**60)),
    )


@settings(max_examples=60)
@given(recipes())
def test_what_is_written_reads_as_the_same_recipe(tmp_path_factory: Any, recipe: Recipe) -> None:
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    path = tmp_path_factory.getbasetemp() / "written.yml"
    path.write_bytes(write_recipe(recipe.to_dict()))
    assert made_by(read_recipe(path)) == recipe


EVERY_FIELD = Recipe(
    adapters=("a", "b"),
    method="ties_svd",
    weights=(make_value([1, 2], option="weights"), 0.5),
    normalize=True,
    space="delta",
    density=0.5,
    parameters=(("gamma", 0.2),),
    rank=3,
    majority_sign="frequency",
    threshold_scope="global",
    clamp=0.9,
    seed=7,
    dtype="float16",
    format="peft",
    compute_dtype="float64",
    extras="mean",
    scaling="tensor",
    include="up",
    exclude="down",
    base_model="org/base",
    strict_base=True,
    max_shard_bytes=12345,
)
"""No field is what it is by default."""


@pytest.mark.parametrize("field", fields(Recipe), ids=lambda field: field.name)
def test_every_field_goes_into_a_file_and_back(field: Field[Any], tmp_path: Path) -> None:
    """A new option needs a place in recipe files, and a value in EVERY_FIELD."""
    value = getattr(EVERY_FIELD, field.name)
    assert field.default is MISSING or value != field.default
    required = {"adapters": ("a", "b"), "method": "svd", "weights": (1.0, 1.0)}
    recipe = Recipe(**{**required, field.name: value})
    path = recipe_file(tmp_path, write_recipe(recipe.to_dict()).decode())
    assert made_by(read_recipe(path)) == recipe
    assert set(read_recipe(path).options) <= set(signature(streammerge.merge).parameters)


@pytest.mark.parametrize("end", ["\n", "\r", "\x85", "\u2028", "\u2029", "\ufeff", "\udcff"])
def test_names_in_which_yaml_sees_the_end_of_a_line(end: str, tmp_path: Path) -> None:
    """Directories can be called so; what is not UTF-8 in a name is a lone surrogate."""
    recipe = Recipe(adapters=(f"a{end}ü",), method="svd", weights=(1.0,), include=end)
    path = recipe_file(tmp_path, write_recipe(recipe.to_dict()).decode())
    assert made_by(read_recipe(path)) == recipe


def test_lambda_scales_every_weight(tmp_path: Path) -> None:
    read = read_recipe(
        recipe_file(
            tmp_path,
            "merge_method: svd\n"
            "models: [{model: A, parameters: {weight: [1, 2]}}, {model: B}]\n"
            "parameters: {lambda: 0.5}\n",
        )
    )
    assert read.options["weights"] == [[0.5, 1.0], 0.5]


def test_what_is_general_holds_where_a_model_says_nothing(tmp_path: Path) -> None:
    read = read_recipe(
        recipe_file(
            tmp_path,
            "merge_method: ties\n"
            "models:\n"
            "  - {model: A, parameters: {weight: [{filter: mlp, value: 2}], density: 0.1}}\n"
            "  - {model: B}\n"
            "parameters: {weight: 7, density: [0.2, 0.4]}\n",
        )
    )
    assert read.options["weights"] == [[{"filter": "mlp", "value": 2.0}, {"value": 7.0}], 7.0]
    assert read.options["density"] == [0.1, [0.2, 0.4]]


GOOD = "merge_method: svd\nmodels: [{model: A}]\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("- a", "must be a mapping"),
        ("merge_method: svd", "models is missing"),
        ("models: [{model: A}]", "merge_method is missing"),
        (GOOD + "merge_mehtod: svd", r"line 3: .*did you mean merge_method\?"),
        (GOOD + "rnak: 4", r"did you mean rank\?"),
        (GOOD + "weight: 4", "weight does not belong into a recipe"),
        (GOOD + "models: []", "models stands there twice"),
        (GOOD + "slices: []", "slices does not go with adapters"),
        (GOOD + "tokenizer_source: base", "have no tokenizer"),
        (GOOD + "parameters: {int8_mask: true}", "masks take no memory"),
        (GOOD + "parameters: {densty: 1}", r"did you mean density\?"),
        (GOOD + "parameters: {weight: x}", "line 3: weight: not a number"),
        (GOOD + "rank: many", "line 3: rank must be a positive integer, a limit"),
        (GOOD + "rank: 'energy:2'", r"line 3: rank: the energy to keep must be in \(0, 1\]"),
        (GOOD + "rank: true", "rank must be an integer or a text"),
        (GOOD + "include: [a]", "include must be a text"),
        (GOOD + "strict_base: 1", "strict_base must be true or false"),
        (GOOD + "dtype: float16\nout_dtype: float32", "dtype and out_dtype differ"),
        (GOOD + "parameters: {normalize: true, lambda: 2}", "lambda does not go with normalize"),
        (GOOD + "parameters: {normalize: 1}", "normalize must be true or false"),
        (GOOD + "a: &x [1]\nb: *x", "not followed"),
        (GOOD + "2: 3", "2 cannot be a key"),
        (GOOD + "rank: !!python/object/apply:os.system [id]", "rank must be an integer|cannot be"),
        (GOOD + "seed: !!python/name:os.system x", "cannot be read"),
        ("merge_method: svd\nmodels: []", "at least one entry"),
        ("merge_method: svd\nmodels: [A]", "a model must be a mapping"),
        ("merge_method: svd\nmodels: [{model: 3}]", "model must be a text"),
        ("merge_method: svd\nmodels: [{path: A}]", "a model has no key 'path'"),
        ("merge_method: [svd]\nmodels: [{model: A}]", "merge_method must be a text"),
        (
            "merge_method: ties\nmodels: [{model: A, parameters: {density: 1}}, {model: B}]",
            "B has no",
        ),
        ("[" * 5000, "nested too deeply"),
        ("a: [", "is not YAML"),
        ("\0", "is not YAML"),
    ],
)  # fmt: skip
def test_files_that_are_none(text: str, said: str, tmp_path: Path) -> None:
    path = recipe_file(tmp_path, text)
    with pytest.raises(RecipeFileError, match=said) as caught:
        read_recipe(path)
    assert str(path) in str(caught.value)
    done = CliRunner().invoke(main, ["run", str(path), "-o", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("merge_method: ü".encode("latin-1"))
    (tmp_path / "long").write_bytes(b"#" * 5_000_000)
    for name, said in (("none", "No such file"), ("latin", "UTF-8"), ("long", "limit")):
        with pytest.raises(RecipeFileError, match=said):
            read_recipe(tmp_path / name)


def test_a_file_without_an_output(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["run", str(recipe_file(tmp_path, GOOD))])
    assert done.exit_code == 2
    assert "give one with -o" in done.output


@settings(max_examples=200)
@given(st.recursive(st.one_of(st.none(), st.booleans(), finite, words), lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["models", "model", "parameters",
    "weight", "density", "filter", "value", "merge_method", "rank", "x"]), inner, max_size=4)),
    max_leaves=12))  # fmt: skip
def test_any_yaml_is_a_recipe_or_an_error(tmp_path_factory: Any, value: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yml"
    path.write_bytes(yaml.safe_dump(value).encode())
    with suppress(RecipeFileError):
        read_recipe(path)


def test_schedules_go_to_json_and_back() -> None:
    for given_value in (1.5, [1, 2], [{"filter": "a", "value": [1, 2]}, {"value": 3}]):
        value = make_value(given_value, option="weights")
        assert make_value(as_json(value), option="weights") == value
    assert value_at(make_value([1, 3], option="w"), "x", 0.5, option="w") == 2.0


def test_the_base_model_of_the_output(adapters: list[str]) -> None:
    plan = streammerge.plan(adapters, base_model="org/other")
    assert plan.config["base_model_name_or_path"] == "org/other"
    assert any("org/other" in notice for notice in plan.notices)


def test_heads_are_averaged_by_the_weights_of_their_module(tmp_path: Path) -> None:
    """The filter that holds for a head, not for the layers."""
    paths = [
        write_adapter(
            tmp_path / f"in{i}",
            {"model.layers.0.q_proj": linear(8, 8, 2)},
            extra={f"{PREFIX}score.weight": encode(np.full((2, 8), float(i), np.float32))},
            modules_to_save=["score"],
        )
        for i in range(2)
    ]
    streammerge.merge(
        paths, tmp_path / "out", extras="mean", on_event=events.ignore,
        weights=[[{"filter": "score", "value": 3.0}, {"value": 1.0}], 1.0],
    )  # fmt: skip
    head = load_file(tmp_path / "out" / WEIGHTS)[f"{PREFIX}score.weight"]
    np.testing.assert_array_equal(head, np.full((2, 8), 0.25, np.float32))
