"""The model card: what it says, that the Hub can read it, and that nothing in it is taken for more
than text, whatever the files say."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

import streammerge
from making import linear, write_adapter
from streammerge.publishing.card import block, code, is_own_card, render_card
from streammerge.publishing.public import is_model_id, last_part, public_config, public_record

TARGETS = {"model.up": linear(20, 12, 3), "model.down": linear(12, 20, 3)}
BASES = ("org/base-7b", "other/base_7b", "/home/me/base")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """Record and config of a merge of adapters that name three bases."""
    folder = tmp_path_factory.mktemp("made")
    sources = [
        write_adapter(folder / f"adapter-{i}", TARGETS, seed=i, base_model_name_or_path=base)
        for i, base in enumerate(BASES)
    ]
    streammerge.merge(
        sources,
        folder / "out",
        method="dare_linear_svd",
        weights=[2, 0.3, -1],
        density=0.5,
        seed=7,
        workers=1,
        on_event=lambda _: None,
    )
    record, config = (
        json.loads((folder / "out" / f"{name}.json").read_text())
        for name in ("streammerge", "adapter_config")
    )
    return record, config


def front_matter(text: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n---\n", text, flags=re.DOTALL)
    assert found is not None
    return dict(yaml.safe_load(found[1]))


def test_the_front_matter(made: tuple[dict[str, Any], dict[str, Any]]) -> None:
    text = render_card(*made, "alice/merged")
    assert front_matter(text) == {
        "base_model": ["org/base-7b", "other/base_7b"],
        "base_model_relation": "adapter",
        "library_name": "peft",
        "tags": ["lora", "merge", "peft", "streammerge"],
    }
    card = ModelCard(text)
    assert card.data.library_name == "peft"
    assert card.data.base_model == ["org/base-7b", "other/base_7b"]
    assert card.data.license is None


def test_one_base_and_none(made: tuple[dict[str, Any], dict[str, Any]]) -> None:
    record, config = copy.deepcopy(made)
    for entry in record["inputs"]:
        entry["base_model"] = "org/base-7b"
    assert front_matter(render_card(record, config, "a/b"))["base_model"] == "org/base-7b"
    for entry in record["inputs"]:
        entry["base_model"] = "/srv/models/base"
    text = render_card(record, {**config, "base_model_name_or_path": "/srv/models/base"}, "a/b")
    assert "base_model" not in front_matter(text)
    assert "Base model: `base`." in text
    assert '"path/to/the/base/model"' in text


def test_what_it_says(made: tuple[dict[str, Any], dict[str, Any]]) -> None:
    record, config = made
    text = render_card(record, config, "alice/merged")
    assert "1. `adapter-0`: weight `2.0`, targets used `2`, xxh3 `" in text
    assert "3. `adapter-2`: weight `-1.0`" in text
    assert record["inputs"][1]["xxh3"] in text
    assert "method: `dare_linear_svd` (rule `dare_linear`, space `delta`)" in text
    assert "- `density`: `0.5`" in text
    assert "- `majority_sign`: `total`" in text
    assert "- `seed`: `7`" in text
    assert f"`{record['fingerprint']['torch']}`" in text
    assert f"- targets: 2; tensors: {len(record['tensors'])}" in text
    worst = max(record["modules"], key=lambda name: record["modules"][name]["relative_error"])
    assert f"  - `{worst}`: {record['modules'][worst]['relative_error']:.3g}" in text
    assert 'PeftModel.from_pretrained(base, "alice/merged")' in text
    assert 'AutoModelForCausalLM.from_pretrained("org/base-7b")' in text
    assert "/tmp" not in text
    assert "/home" not in text


def test_the_command_makes_the_recipe_again(
    made: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a reader would type it, with the adapters beside."""
    import shlex

    from click.testing import CliRunner

    from streammerge.cli import main

    record, config = made
    (line,) = re.findall(r"```sh\n(.*)\n```", render_card(record, config, "alice/merged"))
    for i, base in enumerate(BASES):
        write_adapter(tmp_path / f"adapter-{i}", TARGETS, seed=i, base_model_name_or_path=base)
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(main, [*shlex.split(line)[1:], "--workers", "1"])
    assert found.exit_code == 0, found.output
    again = json.loads((tmp_path / "OUT" / "streammerge.json").read_text())
    assert again["tensors"] == record["tensors"]
    assert again["files"] == record["files"]


def test_parameters_go_into_the_command(made: tuple[dict[str, Any], dict[str, Any]]) -> None:
    record, config = copy.deepcopy(made)
    record["recipe"] |= {"method": "breadcrumbs", "parameters": {"gamma": 0.02}}
    text = render_card(record, config, "alice/merged")
    assert "--parameters gamma=0.02 " in text
    assert "- `parameters`: `gamma=0.02`" in text


def test_a_card_knows_whether_it_was_edited(made: tuple[dict[str, Any], dict[str, Any]]) -> None:
    text = render_card(*made, "alice/merged")
    assert is_own_card(text)
    assert not is_own_card(text.replace("## How", "## Why"))
    assert not is_own_card(text + "\nMore.\n")
    assert not is_own_card("# mine\n")
    assert not is_own_card("")


HOSTILE = (
    "](https://evil.example) <script>alert(1)</script>",
    "`` ` ``` `",
    "`",
    "name\n---\nlicense: mit\n---\n# owned",
    "<!-- ",
    "a|b|c",
    "![x](javascript:alert(1))",
    "$(rm -rf ~)`id`';'",
    "\x1b[2J\u202eevil",
    "x" * 5000,
    "- *bold* __b__ {{ jinja }} {% x %}",
    "'\"; import os #",
    " ",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_are_only_text(
    text: str, made: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    record, config = copy.deepcopy(made)
    record["recipe"]["adapters"] = [text, f"/home/{text}/x", "C:\\Users\\me\\adapter"]
    record["modules"] = {text: record["modules"]["model.up"]}
    for entry in record["inputs"]:
        entry["base_model"] = text
    record["fingerprint"] = {text: text}
    record["recipe"] |= {"include": text, text: text}
    config |= {"base_model_name_or_path": text, "task_type": text, "r": text}
    card = render_card(record, config, "alice/merged")
    assert set(front_matter(card)) <= {"library_name", "tags", "base_model", "base_model_relation"}
    assert front_matter(card)["tags"] == ["lora", "merge", "peft", "streammerge"]
    assert ModelCard(card).data.license is None
    assert is_own_card(card)
    assert all(character.isprintable() or character == "\n" for character in card)
    assert len(card) < 20_000
    prose = outside_code(card.rpartition("<!--")[0])
    for sign in ("<", "](", "![", "evil", "owned", "alert", "jinja", "rm -rf", "import os"):
        assert sign not in prose, prose
    shown = [line for line in card.splitlines() if line.startswith("#")]
    assert shown == ["# merged", "## What was merged", "## How", "## Figures", *shown[4:]]
    assert shown[4:] == ["## How to load it", "## How to make it again"]


def outside_code(text: str) -> str:
    """What of a text is not in code, by the rules of CommonMark: a span ends at a run of backticks
    as long as the one that it began with."""
    text = re.sub(r"^(`{3,})\w*\n.*?\n\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", "", text)


def test_code_cannot_be_left() -> None:
    for text in HOSTILE:
        assert outside_code(f"a{code(text)}b") == "ab"
        assert outside_code(f"a\n{block('sh', text)}\nb") == "a\n\nb"


def test_a_card_of_what_was_not_merged() -> None:
    """Of shards by somebody else that were made one file."""
    record: dict[str, Any] = {
        "streammerge": "1.0",
        "consolidated": {"path": "/home/me/x", "files": {"a": 1, "b": 2}},
        "files": [{"name": "adapter_model.safetensors"}],
        "tensors": {"t": {}},
    }
    config = {"base_model_name_or_path": "org/base", "r": 8, "task_type": "SEQ_2_SEQ_LM"}
    card = render_card(record, config, "a/b")
    assert "whose files were made into one by streammerge `1.0`" in card
    assert "2 file(s) of weights were made into one afterwards" in card
    assert "AutoModelForSeq2SeqLM" in card
    assert "How it was trained or merged is not known" in card
    assert "/home" not in card
    record["files"] = [{"name": "pytorch_lora_weights.safetensors"}]
    card = render_card(record, None, "a/b")
    assert front_matter(card)["library_name"] == "diffusers"
    assert "load_lora_weights" in card


def test_figures_that_are_none() -> None:
    record: dict[str, Any] = {
        "recipe": {"adapters": ["a"], "weights": [float("nan")], "method": "svd"},
        "files": [{"name": "x"}],
        "tensors": {},
        "modules": {"m": {"kept_energy": "much", "relative_error": float("nan")}},
    }
    assert "kept energy" not in render_card(record, None, "a/b")


@pytest.mark.parametrize(
    ("field", "said"), [("converged", "truncated SVD: 1"), ("settled", "last step: 1")]
)
def test_what_fell_short_is_told(field: str, said: str) -> None:
    record: dict[str, Any] = {"files": [], "tensors": {}, "modules": {"a": {}, "b": {field: True}}}
    assert said not in render_card(record, None, "a/b")
    record["modules"]["c"] = {field: False}
    assert said in render_card(record, None, "a/b")


def test_adapters_of_the_hub_are_named_by_id_and_commit() -> None:
    names = ["u/a", "hf://u/b@v1", "/home/me/c", "u/d"]
    record = {
        "recipe": {"adapters": names, "weights": [1.0] * 4, "method": "svd"},
        "inputs": [{"commit": "12ab"}, {"commit": "34cd"}, {}, {"path": "u/d"}],
        "files": [{"name": "x"}],
        "tensors": {},
    }
    card = render_card(record, None, "a/b")
    assert "1. `u/a`: weight `1.0`, commit `12ab`\n2. `hf://u/b@v1`: weight `1.0`, commit" in card
    assert "streammerge merge u/a@12ab hf://u/b@34cd c d -o OUT" in card


def test_many_adapters_are_not_all_listed() -> None:
    names = [f"adapter-{i}" for i in range(1000)]
    record = {
        "recipe": {"adapters": names, "weights": [1.0] * 1000, "method": "svd"},
        "files": [{"name": "x"}],
        "tensors": {},
    }
    card = render_card(record, None, "a/b")
    assert "and 950 more" in card
    assert len(card) < 10_000


# ---------------------------------------------------------------------------------------------
# What may be published


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("gpt2", True),
        ("org/base-7b", True),
        ("org/base_7.b", True),
        ("a/b/c", False),
        ("/org/base", False),
        ("./base", False),
        ("a--b", False),
        ("a..b", False),
        ("org/base.git", False),
        ("org/", False),
        ("a b", False),
        ("é/b", False),
        ("a/b\n", False),
        ("x" * 97, False),
        ("", False),
    ],
)
def test_ids_of_models(text: str, is_one: bool) -> None:
    assert is_model_id(text) == is_one


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/home/me/x", "x"),
        ("/home/me/x/", "x"),
        ("C:\\Users\\me\\x", "x"),
        ("x", "x"),
        ("../..", "adapter"),
        ("/", "adapter"),
    ],
)
def test_last_parts(path: str, name: str) -> None:
    assert last_part(path) == name


def test_a_record_goes_without_places() -> None:
    record = {
        "recipe": {"adapters": ["/home/me/a", "u/b"], "include": "/x", "scaling": 2.0},
        "inputs": [
            {"path": "/home/me/a", "files": {"adapter_model.safetensors": 1}},
            {"path": "/cache/me/u/b", "commit": "1234", "more": ["~/x/y", {"z": "file:///a/q"}]},
        ],
        "consolidated": {"path": "shards/of-mine", "files": {}},
        "modules": {"/odd/name": {"route": "exact"}},
    }
    before = copy.deepcopy(record)
    assert public_record(record) == {
        "recipe": {"adapters": ["a", "u/b"], "include": "/x", "scaling": 2.0},
        "inputs": [
            {"path": "a", "files": {"adapter_model.safetensors": 1}},
            {"path": "u/b", "commit": "1234", "more": ["y", {"z": "q"}]},
        ],
        "consolidated": {"path": "of-mine", "files": {}},
        "modules": {"/odd/name": {"route": "exact"}},
    }
    assert record == before


def test_a_config_goes_without_the_place_of_its_base() -> None:
    assert public_config({"r": 1, "base_model_name_or_path": "org/base"}) == {
        "r": 1,
        "base_model_name_or_path": "org/base",
    }
    for place in ("/home/me/base", "~/base", "../base", "C:\\base", "file:///base", "\\\\srv\\x"):
        assert public_config({"base_model_name_or_path": place}) == {
            "base_model_name_or_path": None
        }
