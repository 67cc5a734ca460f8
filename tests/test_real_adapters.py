"""Real uploads by many authors: merged and verified, or refused with the right words."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import streammerge
from making import CONFIG, PREFIX, WEIGHTS, linear, make_config
from streammerge import errors, events
from streammerge.catalog import METHODS, RULES, SPACES
from streammerge.readers.header import read_header
from streammerge.tiling import row_tiles

WORKERS = 2
ON_FACTORS = [name for name, method in METHODS.items() if SPACES[method.space].equal_ranks]
ON_DELTAS = [name for name in METHODS if name not in ON_FACTORS]


@dataclass(frozen=True)
class Group:
    """Adapters of one base, and what a merge of them has to be told."""

    adapters: tuple[str, ...]
    targets: int
    """Of the output."""
    options: Mapping[str, Any] = field(default_factory=dict)
    few: str | None = None
    """A pattern for a few targets, for the methods that take long."""
    refused: tuple[str, ...] = ()
    """Words with which the methods on factors are refused; empty where they are not."""
    notices: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32


def folder(name: str, *adapters: str) -> tuple[str, ...]:
    return tuple(f"{name}/{adapter}" for adapter in adapters)


def twice(adapter: str) -> tuple[str, ...]:
    return (f"_loners/{adapter}",) * 2


GPT2 = folder(
    "gpt2-causal",
    "abrhaley-tigrinya",
    "laziestcactus-c_attn-ckpt7500",
    "moizishere-c_attn-fifo-false",
    "mycguo-fifo-false",
    "si-rui126-layers01-only",
)
NESTED = "gpt2-causal/dyurtaev-triple-nested-keys"
TINYLLAMA = folder(
    "tinyllama-1.1b", "justbautista-emotion", "justbautista-keywords", "justbautista-therapist"
)
ROBERTA = folder("roberta-base", "armishjaved-r7-a32", "wx2327-r7-a16")
BIASED = "roberta-base/aguleon-agnews-biasall-ckpt1200"
DISTILBERT = folder(
    "distilbert-base-uncased", "dayanidhi04-emotion", "khajaphysist-qkv", "tashu014-imdb"
)
T5 = folder("t5-small", "apurvandroid-r8", "rajpreet-r16-NOCONFIG")
HEADS = {"extras": "drop"}
UNEQUAL = ("needs equal ranks", "_svd form")

GROUPS = {
    "tinyllama": Group(TINYLLAMA, 44, few=r"layers\.0\."),
    "gpt2": Group(GPT2, 36, few=r"h\.0\.attn", notices=("fan_in_fan_out", "34 of 36 targets")),
    "gpt2 with nested keys": Group(
        (*GPT2, NESTED),
        48,
        {"scaling": "tensor"},
        few=r"h\.0\.attn",
        refused=(*UNEQUAL, "h.0.attn.c_attn", "rank 8", "4 in"),
        notices=("different base models", "None", "'gpt2'"),
    ),
    "roberta": Group(ROBERTA, 36, HEADS, few=r"layer\.0\.", notices=("4 extra tensors dropped",)),
    "roberta with biases": Group(
        (*ROBERTA, BIASED),
        36,
        HEADS,
        few=r"layer\.0\.",
        refused=(*UNEQUAL, "rank 7", "4 in"),
        notices=("105 extra tensors dropped", "SEQ_CLS"),
    ),
    "distilbert": Group(
        DISTILBERT,
        18,
        HEADS,
        few=r"layer\.0\.",
        notices=(
            "'distilbert-base-uncased'",
            "'distilbert/distilbert-base-uncased'",
            "6 of 18 targets",
        ),
    ),
    "t5": Group(
        T5,
        36,
        {"scaling": 2.0},
        few=r"decoder\.block\.0\.",
        refused=(*UNEQUAL, "rank 8", "16 in"),
        notices=(f"no {CONFIG}",),
    ),
    "vit, all B zero": Group(("vit-base-patch16/athanimadhu-in21k-r8",) * 2, 24, few=r"layer\.0\."),
    "opt, bfloat16": Group(
        twice("opt-125m-bf16-guilhermme"), 24, few=r"layers\.0\.", dtype=torch.bfloat16
    ),
    "open-calm, float16": Group(
        twice("open-calm-1b-r1-f16"), 24, few=r"layers\.0\.", dtype=torch.float16
    ),
    "bert, rank 1": Group(twice("bert-base-cased-r1-dup-mts"), 24, HEADS, few=r"layer\.0\."),
    "bert-tiny": Group(twice("bert-tiny-causallm"), 4),
    "distilbert, string for targets": Group(
        twice("distilbert-lora-on-classifier-string-target"), 3, HEADS
    ),
}


def paths(real_adapters: Path, group: Group, most: int | None = None) -> list[Path]:
    return [real_adapters / name for name in group.adapters[:most]]


def options_for(group: Group, method: str) -> dict[str, Any]:
    """What the group and the method need; slow methods get a few targets only."""
    spec = METHODS[method]
    options = {"method": method, **group.options}
    if RULES[spec.rule].needs_density:
        options["density"] = 0.3
    if SPACES[spec.space].truncates and spec.rule != "linear":
        options["include"] = group.few
    return options


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", GROUPS)
def test_a_group_merges_or_is_refused(
    name: str, method: str, real_adapters: Path, tmp_path: Path
) -> None:
    group = GROUPS[name]
    rule = RULES[METHODS[method].rule]
    sources = paths(real_adapters, group, rule.most_adapters)
    options = options_for(group, method)
    out = tmp_path / "out"
    if group.refused and method in ON_FACTORS:
        with pytest.raises(errors.IncompatibleError) as caught:
            streammerge.merge(sources, out, workers=WORKERS, **options)
        assert all(word in str(caught.value) for word in group.refused)
        assert not any(tmp_path.iterdir())
        return
    result = streammerge.merge(sources, out, workers=WORKERS, on_event=events.ignore, **options)
    assert streammerge.verify(out).checksums
    assert all(module.converged for module in result.modules)
    expected = expected_targets(sources, METHODS[method].space)
    if len(sources) == len(group.adapters):
        # What is said of a group is so of all of it.
        for word in group.notices if not options.get("include") else ():
            assert any(word in notice for notice in result.notices), word
        assert len(expected) == group.targets
    assert held(out) == {
        target: shape
        for target, shape in expected.items()
        if re.search(options.get("include") or "", target)
    }
    check_files(out, group.dtype)


Shape = tuple[int, int, int]
"""Rows, columns and rank of a target."""


def expected_targets(sources: list[Path], space: str) -> dict[str, Shape]:
    """The union of the sources' targets, each with the rank that the space gives it."""
    sizes: dict[str, tuple[int, int]] = {}
    ranks: dict[str, list[int]] = {}
    for source in sources:
        for target, (m, n, rank) in held(source).items():
            sizes[target] = m, n
            ranks.setdefault(target, []).append(rank)
    largest = max(map(max, ranks.values()))
    rank_of = {
        "exact": lambda target: sum(ranks[target]),
        "factor": lambda target: ranks[target][0],
        "delta": lambda target: min(largest, *sizes[target]),
        "ctm": lambda target: min(largest, *sizes[target]),
    }
    return {target: (*sizes[target], rank_of[space](target)) for target in sizes}


def held(path: Path) -> dict[str, Shape]:
    adapter = streammerge.open_adapter(path)
    columns = adapter.columns
    rows = zip(columns.m.tolist(), columns.n.tolist(), columns.rank.tolist(), strict=True)
    return {adapter.target(row): shape for row, shape in enumerate(rows)}


def check_files(out: Path, dtype: torch.dtype) -> None:
    """One plain LoRA of scaling 1, of finite values."""
    config = json.loads((out / CONFIG).read_text())
    assert config["lora_alpha"] == config["r"]
    assert config["alpha_pattern"] == config["rank_pattern"]
    check_named(config["target_modules"], sorted(held(out)))
    tensors = load_file(out / WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    assert all(key.count(PREFIX) == 1 for key in tensors)


def check_named(named: str | list[str], targets: list[str]) -> None:
    """All targets and no other module: by name, or by a pattern where names would match more."""
    if isinstance(named, str):
        assert all(re.fullmatch(named, target) for target in targets)
        assert not any(re.fullmatch(named, f"{target}.{target}") for target in targets)
    else:
        assert named == targets


@pytest.mark.parametrize(
    ("name", "told", "error", "words"),
    [
        pytest.param(
            "gpt2 with nested keys",
            "scaling",
            errors.UnknownScalingError,
            (NESTED, "attn.c_proj", "rank 8", "config says 4", "--scaling tensor"),
            id="gpt2: a rank that the config does not explain",
        ),
        pytest.param(
            "t5",
            "scaling",
            errors.UnknownScalingError,
            (T5[1], CONFIG, "--scaling"),
            id="t5: no config",
        ),
        pytest.param(
            "roberta with biases",
            "extras",
            errors.ExtraTensorsError,
            (ROBERTA[0], "classifier", "--extras drop"),
            id="roberta: heads",
        ),
        pytest.param(
            "distilbert",
            "extras",
            errors.ExtraTensorsError,
            (DISTILBERT[0], "classifier", "--extras drop"),
            id="distilbert: heads",
        ),
    ],
)
def test_a_group_that_has_to_be_told(
    name: str,
    told: str,
    error: type[errors.RefusedError],
    words: tuple[str, ...],
    real_adapters: Path,
    tmp_path: Path,
) -> None:
    group = GROUPS[name]
    options = {option: value for option, value in group.options.items() if option != told}
    with pytest.raises(error) as caught:
        streammerge.merge(paths(real_adapters, group), tmp_path / "out", **options)
    assert all(word in str(caught.value) for word in words)
    assert not any(tmp_path.iterdir())


def test_the_ways_to_tell_a_scaling_differ(real_adapters: Path) -> None:
    """Alpha 8 over the config's rank of 4, over the tensor's of 8, or as it is given."""
    for scaling, value in {"config": 2.0, "tensor": 1.0, 0.25: 0.25}.items():
        plan = streammerge.plan([real_adapters / NESTED], scaling=scaling)
        found = dict(zip([task.target for task in plan.tasks], plan.sources.scaling, strict=True))
        explained = {target for target in found if target.endswith("c_attn")}
        assert {found[target] for target in explained} == {2.0}
        assert {found[target] for target in found.keys() - explained} == {value}


def test_one_adapter_keeps_its_delta(real_adapters: Path, tmp_path: Path) -> None:
    """`cat` of one is its own factors, A times the scaling, which is a power of two here."""
    source = real_adapters / TINYLLAMA[0]
    streammerge.merge([source], tmp_path / "out", method="cat", workers=WORKERS)
    theirs, ours = load_file(source / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        scaling = 2.0 if "lora_A" in key else 1.0
        assert torch.equal(ours[key], tensor.float() * scaling)


def test_several_tiles_are_met(real_adapters: Path) -> None:
    """The groups are of a size at which a target is more than one tile."""
    plan = streammerge.plan([real_adapters / name for name in TINYLLAMA])
    assert max(len(row_tiles(task.m, task.n)) for task in plan.tasks) > 8


IN_OTHER_FORMATS = {
    "gpt2-causal/yoonyerin-be-great-bin": ("peft", 12),
    "mlx-lm/arjun254-step100": ("mlx", 8),
    "mlx-lm/arjun254-step400": ("mlx", 8),
    "sd15-unet/timohavdk-2100-diffusers": ("diffusers", 128),
    "sd15-unet/timohavdk-new-kohya": ("kohya", 128),
}
"""What they are merged to is in the tests of formats."""


@pytest.mark.parametrize("name", IN_OTHER_FORMATS)
def test_other_formats_are_told_by_content(name: str, real_adapters: Path) -> None:
    adapter = streammerge.open_adapter(real_adapters / name)
    assert (adapter.dialect, len(adapter)) == IN_OTHER_FORMATS[name]
    assert not adapter.extras


REFUSED = {
    "_loners/bloomz-prompt-tuning-NOTLORA": (errors.UnsupportedAdapterError, "PROMPT_TUNING"),
    "lycoris-lokr/smart-falcon-4": (errors.UnsupportedAdapterError, "LoKr"),
    "lycoris-lokr/smart-falcon-8": (errors.UnsupportedAdapterError, "LoKr"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_format_is_refused_by_name(name: str, real_adapters: Path, tmp_path: Path) -> None:
    error, word = REFUSED[name]
    with pytest.raises(error) as caught:
        streammerge.merge([real_adapters / name], tmp_path / "out")
    assert word in str(caught.value)
    assert str(real_adapters / name) in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_every_real_adapter_is_in_a_table(real_adapters: Path) -> None:
    listed = {adapter for group in GROUPS.values() for adapter in group.adapters}
    listed |= REFUSED.keys() | IN_OTHER_FORMATS.keys()
    here = {
        f"{folder.parent.name}/{folder.name}"
        for folder in real_adapters.glob("*/*")
        if folder.is_dir()
    }
    assert listed == here


def test_an_adapter_of_another_base_does_not_fit(real_adapters: Path, tmp_path: Path) -> None:
    """Two models that share names of modules, but not their shapes."""
    names = ("bert-tiny-causallm", "bert-base-cased-r1-dup-mts")
    adapters = [real_adapters / "_loners" / name for name in names]
    with pytest.raises(errors.IncompatibleError) as caught:
        streammerge.merge(adapters, tmp_path / "out", method="cat", extras="drop")
    assert all(str(adapter) in str(caught.value) for adapter in adapters)
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------
# Broken and adversarial files

SAMPLES = ("b", "d", "e", "f", "h", "i", "overall", "upper_B", "upper_H", "upper_I")
NO_FACTORS = (errors.CorruptFileError, "no LoRA tensors")
HOSTILE = {
    "crlf_2_bytes": (errors.CorruptFileError, "2 bytes"),
    "lfs_pointer_adapter_model": (errors.CorruptFileError, "git lfs pull"),
    "modelaudit_multiple_patterns": NO_FACTORS,
    "runai_empty_header": NO_FACTORS,
    "syoyo_abuse_attempt_1": (errors.CorruptFileError, "truncated inside its header"),
    "truncated_real_262144": (errors.CorruptFileError, "262144 bytes"),
} | {f"hf_sample_{name}": NO_FACTORS for name in SAMPLES}


def hostile_file(real_adapters: Path, name: str) -> Path:
    return real_adapters / "_hostile" / f"{name}.safetensors"


def test_every_hostile_file_is_in_a_table(real_adapters: Path) -> None:
    here = {path.stem for path in (real_adapters / "_hostile").glob("*.safetensors")}
    assert here == HOSTILE.keys()


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused(
    name: str, with_config: bool, real_adapters: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    shutil.copyfile(hostile_file(real_adapters, name), adapter / WEIGHTS)
    if with_config:
        own = real_adapters / "_hostile" / f"{name}.adapter_config.json"
        text = own.read_text() if own.exists() else json.dumps(make_config({"up": linear(2, 2, 8)}))
        (adapter / CONFIG).write_text(text)
    error, words = HOSTILE[name]
    with pytest.raises(error, match=words) as caught:
        streammerge.merge([adapter], tmp_path / "out")
    assert str(adapter) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert "http" not in str(caught.value), "metadata are not to be repeated"


@pytest.mark.parametrize(
    "name", [name for name, outcome in HOSTILE.items() if outcome is NO_FACTORS]
)
def test_a_sound_file_is_read_as_safetensors_reads_it(name: str, real_adapters: Path) -> None:
    """Samples by early writers: data that are not aligned, and dtypes that no adapter has."""
    path = hostile_file(real_adapters, name)
    header = read_header(path)
    data = path.read_bytes()
    with safe_open(path, "pt") as theirs:
        assert {entry.name for entry in header.entries} == set(theirs.keys())
        assert header.metadata == (theirs.metadata() or {})
        for entry in header.entries:
            tensor = theirs.get_tensor(entry.name)
            assert tuple(tensor.shape) == entry.shape
            stored = data[entry.offset : entry.offset + entry.nbytes]
            assert tensor.numpy().tobytes() == stored
