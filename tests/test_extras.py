"""Tensors that are not LoRA factors, in files made by hand: what is taken, averaged and refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streammerge
from making import (
    CONFIG,
    INDEX,
    PREFIX,
    WEIGHTS,
    Tensor,
    contents,
    decode,
    embedding,
    encode,
    linear,
    put,
    write_adapter,
)
from streammerge import errors, events
from streammerge.readers.header import read_header
from streammerge.tiling import TILE_ELEMENTS
from streammerge.worker import Job

LAYERS = {"block.up": linear(12, 10, 2), "block.down": linear(10, 12, 2)}
HEAD, HEAD_BIAS = "classifier.weight", "classifier.bias"


def values(seed: int, *shape: int, dtype: str = "F32") -> Tensor:
    return encode(np.random.default_rng(seed).standard_normal(shape), dtype)


def make(
    folder: Path, *extras: Mapping[str, Tensor], prefix: str = PREFIX, **config: Any
) -> list[Path]:
    """Adapters, each with these tensors beside its factors."""
    return [
        write_adapter(
            folder / f"adapter{i}",
            LAYERS,
            seed=i,
            extra={prefix + name: tensor for name, tensor in extra.items()},
            **config,
        )
        for i, extra in enumerate(extras)
    ]


def merge(sources: Sequence[Path], out: Path, policy: str, **options: Any) -> dict[str, Tensor]:
    """Merge and return the extra tensors as they are written, without PEFT's prefix."""
    given = {"method": "cat", "workers": 1, "on_event": events.ignore} | options
    streammerge.merge(sources, out, extras=policy, **given)
    assert streammerge.verify(out).checksums
    return written(out)


def written(out: Path) -> dict[str, Tensor]:
    found = {}
    for file in out.glob("*.safetensors"):
        data = file.read_bytes()
        for entry in read_header(file).entries:
            if ".lora_A." not in entry.name and ".lora_B.weight" not in entry.name:
                assert (
                    entry.offset % min(8, max(1, entry.nbytes // max(1, int(np.prod(entry.shape)))))
                    == 0
                )
                found[entry.name.removeprefix(PREFIX)] = Tensor(
                    entry.dtype, entry.shape, data[entry.offset : entry.offset + entry.nbytes]
                )
    return found


def test_first_is_the_first_ones_bit_for_bit(tmp_path: Path) -> None:
    """Of any dtype, also an odd number of bytes, an empty tensor, a scalar, and several tiles."""
    first = {
        HEAD: values(1, 3, 10, dtype="BF16"),
        HEAD_BIAS: values(2, 3, dtype="F64"),
        "classifier.count": encode(np.array(7), "I32"),
        "classifier.empty": Tensor("F32", (0, 4), b""),
        "classifier.mask": Tensor("BOOL", (3,), b"\1\0\1"),
        "classifier.small": Tensor("F8_E4M3", (5,), b"\x01\x02\x7f\x80\x81"),
        "classifier.large": values(3, 3, TILE_ELEMENTS // 2 + 3, dtype="F16"),
    }
    other = {name: Tensor(t.dtype, t.shape, t.data[::-1]) for name, t in first.items()}
    sources = make(tmp_path, first, other, modules_to_save=["classifier"])
    assert merge(sources, tmp_path / "out", "first", dtype="float16") == first


@pytest.mark.parametrize("prefix", [PREFIX, PREFIX * 3])
def test_weight_and_bias_of_a_module_come_from_one_adapter(prefix: str, tmp_path: Path) -> None:
    """From the first that has both; not the weight of one and the bias of another."""
    half, whole = {HEAD: values(0, 3, 10)}, {HEAD: values(1, 3, 10), HEAD_BIAS: values(2, 3)}
    other = {"score.weight": values(3, 2, 10)}
    sources = make(tmp_path, half, whole, other, prefix=prefix)
    assert merge(sources, tmp_path / "out", "first") == whole | other
    record = json.loads((tmp_path / "out" / "streammerge.json").read_text())
    assert [(m["module"], m["kind"], m["done"], m["adapters"]) for m in record["extras"]] == [
        ("classifier", "trained module", "first", [1]),
        ("score", "trained module", "first", [2]),
    ]
    assert [i["targets_used"] for i in record["inputs"]] == [2, 2, 2]
    assert record["modules"].keys() == LAYERS.keys()


def test_layers_of_one_head_come_from_one_adapter(tmp_path: Path) -> None:
    """A head may have layers of its own; modules_to_save says where it begins."""
    names = ("score_head.dense.weight", "score_head.out.weight")
    half, whole = {names[0]: values(0, 4, 4)}, {name: values(1, 4, 4) for name in names}
    sources = make(tmp_path, half, whole, modules_to_save=["score_head"])
    assert merge(sources, tmp_path / "out", "first") == whole


@pytest.mark.parametrize("compute", ["float32", "float64"])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
def test_the_mean_is_by_the_weights(dtype: str, compute: str, tmp_path: Path) -> None:
    """Of those that have it, however they add up; a weight of 0 has no part."""
    given = [{HEAD: values(i, 3, 10, dtype=dtype)} for i in range(4)]
    given[1]["norm.bias"] = values(9, 5, dtype=dtype)
    sources = make(tmp_path, *given)
    found = merge(
        sources, tmp_path / "out", "mean", weights=(2.0, 0.3, 0.7, 0.0), compute_dtype=compute
    )
    assert found.keys() == {HEAD, "norm.bias"}
    assert found["norm.bias"] == given[1]["norm.bias"]
    assert found[HEAD].dtype == dtype
    parts = zip((2.0, 0.3, 0.7), given, strict=False)
    expected = sum(weight / 3.0 * decode(tensors[HEAD]) for weight, tensors in parts)
    digits = {"F16": 1e-3, "BF16": 8e-3, "F32": 1e-6}.get(
        dtype, 1e-6 if compute == "float32" else 1e-14
    )
    np.testing.assert_allclose(decode(found[HEAD]), expected, rtol=digits, atol=digits)


def test_the_mean_of_equal_values_is_that_value(tmp_path: Path) -> None:
    """To the bit, whatever the weights, so that what nobody trained stays as it is."""
    same = {"norm.bias": values(0, 5000), "norm.seen": encode(np.arange(7.0), "I32")}
    sources = make(tmp_path, same, same, same)
    assert merge(sources, tmp_path / "out", "mean", weights=(0.1, 0.7, 1e-3)) == same


def test_the_mean_has_the_dtype_asked_for_and_else_the_widest(tmp_path: Path) -> None:
    sources = make(
        tmp_path, {HEAD: values(0, 3, 4, dtype="F16")}, {HEAD: values(1, 3, 4, dtype="BF16")}
    )
    assert merge(sources, tmp_path / "auto", "mean")[HEAD].dtype == "F32"
    assert merge(sources, tmp_path / "asked", "mean", dtype="float16")[HEAD].dtype == "F16"
    assert merge(sources, tmp_path / "first", "first", dtype="float32")[HEAD].dtype == "F16"


def test_copies_of_what_stands_elsewhere_are_left_out(tmp_path: Path) -> None:
    kept = {HEAD: values(0, 3, 10), HEAD_BIAS: values(1, 3)}
    copies = {
        "classifier.modules_to_save.bias": kept[HEAD_BIAS],
        "classifier.original_module.bias": values(2, 3),
        "embed.token_adapter.trainable_tokens_original": values(3, 2, 4),
    }
    sources = make(tmp_path, kept | copies)
    assert merge(sources, tmp_path / "out", "first") == kept
    record = json.loads((tmp_path / "out" / "streammerge.json").read_text())
    dropped = [m["module"] for m in record["extras"] if m["done"] == "drop"]
    assert dropped == sorted(PREFIX + name for name in copies)


def test_a_wrappers_name_is_taken_out(tmp_path: Path) -> None:
    """As sharded training saves heads; PEFT looks for them under the module's own path."""
    tensors = {
        "classifier.modules_to_save.default.weight": values(0, 3, 10),
        "score.modules_to_save.weight": values(1, 3, 10),
    }
    found = merge(make(tmp_path, tensors), tmp_path / "out", "first")
    assert found.keys() == {HEAD, "score.weight"}


def test_a_bias_has_the_name_that_it_has_under_the_outputs_targets(tmp_path: Path) -> None:
    """LoRA moves a bias into its base layer, and the adapters have LoRA on different modules."""
    plain, inside = "block.side.bias", "block.side.base_layer.bias"
    mine = {"block.side": linear(6, 10, 2)}
    sources = [
        write_adapter(tmp_path / "a", mine, extra={PREFIX + inside: values(0, 6)}, bias="all"),
        write_adapter(tmp_path / "b", LAYERS, extra={PREFIX + plain: values(1, 6)}, bias="all"),
    ]
    found = merge(sources, tmp_path / "out", "mean")
    assert found.keys() == {inside}
    expected = (decode(values(0, 6)) + decode(values(1, 6))) / 2
    np.testing.assert_allclose(decode(found[inside]), expected, atol=1e-6)
    found = merge(sources, tmp_path / "without", "mean", exclude="side")
    assert found.keys() == {plain}


@pytest.mark.parametrize("odd", [{}, [], ["all"], {"all": 1}, 7, None])
def test_a_config_that_says_odd_things_of_biases(odd: Any, tmp_path: Path) -> None:
    """Only PEFT's words mean anything; no other is an error, whatever JSON can hold."""
    source = make(tmp_path, {"block.up.base_layer.bias": values(0, 12)}, bias=odd)
    assert "block.up.base_layer.bias" in merge(source, tmp_path / "out", "first")
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["bias"] == "none"


def test_biases_of_excluded_targets_go_with_them(tmp_path: Path) -> None:
    extra = {f"{target}.lora_B.bias": values(0, layer.b[0]) for target, layer in LAYERS.items()}
    found = merge(make(tmp_path, extra, lora_bias=True), tmp_path / "out", "first", include="down")
    assert found.keys() == {"block.down.lora_B.bias"}


TOKENS = "embed.token_adapter.trainable_tokens_delta"
INDICES = {"embed": [1, 4]}


def refusal(
    error: type[errors.StreammergeError],
    words: Sequence[str],
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    policies: Sequence[str] = ("first", "mean"),
    **config: Any,
) -> Any:
    return error, words, first, second, policies, config


REFUSALS = {
    "shapes": refusal(
        errors.IncompatibleError,
        ("{0}", "{1}", HEAD, "[3, 10]", "[5, 10]", "--extras first"),
        {HEAD: values(0, 3, 10)},
        {HEAD: values(0, 5, 10)},
        ["mean"],
    ),
    "a half of a head, in the mean": refusal(
        errors.IncompatibleError,
        ("{0}", "{1}", HEAD_BIAS, "--extras first"),
        {HEAD: values(0, 3, 10)},
        {HEAD: values(0, 3, 10), HEAD_BIAS: values(0, 3)},
        ["mean"],
    ),
    "two halves of a head": refusal(
        errors.IncompatibleError,
        ("{0}", "{1}", HEAD, HEAD_BIAS, "--extras"),
        {HEAD: values(0, 3, 10)},
        {HEAD_BIAS: values(0, 3)},
    ),
    "whole numbers and others": refusal(
        errors.IncompatibleError,
        ("classifier.steps", "I32", "F32", "--extras first"),
        {"classifier.steps": encode(np.ones(1), "I32")},
        {"classifier.steps": encode(np.ones(1), "F32")},
        ["mean"],
    ),
    "whole numbers that differ": refusal(
        errors.UnlikeExtrasError,
        ("{0}", "{1}", "classifier.steps", "I32", "--extras first"),
        {"classifier.steps": encode(np.ones(1), "I32")},
        {"classifier.steps": encode(np.zeros(1), "I32")},
        ["mean"],
    ),
    "a name outside the model": refusal(
        errors.ExtraTensorsError,
        ("{0}", "block.lora_mask.weight", "--extras drop"),
        {"block.lora_mask.weight": values(0, 3)},
        {},
    ),
    "a module that is a target": refusal(
        errors.IncompatibleError,
        ("{1}", "block.up", "--extras drop"),
        {},
        {"block.up.weight": values(0, 12, 10)},
    ),
    "the same twice": refusal(
        errors.CorruptFileError,
        ("{0}", "classifier", "twice"),
        {HEAD: values(0, 3, 10), "classifier.base_layer.weight": values(0, 3, 10)},
        {},
    ),
    "a bias of a delta without its factors": refusal(
        errors.CorruptFileError,
        ("{0}", "block.side.lora_B.bias", "B factor"),
        {"block.side.lora_B.bias": values(0, 3)},
        {},
    ),
    "a bias of a delta of another length": refusal(
        errors.CorruptFileError,
        ("{0}", "block.up.lora_B.bias", "[3]"),
        {"block.up.lora_B.bias": values(0, 3)},
        {},
    ),
    "trained tokens that the config does not name": refusal(
        errors.CorruptFileError,
        ("{0}", "trainable_token_indices"),
        {TOKENS: values(0, 2, 4)},
        {},
    ),
    "trained tokens of a module that is trained as a whole": refusal(
        errors.IncompatibleError,
        ("{0}", "embed", "token by token", "--extras drop"),
        {TOKENS: values(0, 2, 4)},
        {"embed.weight": values(0, 9, 4)},
        trainable_token_indices=INDICES,
    ),
    "too many modules_to_save": refusal(
        errors.CorruptFileError,
        ("{0}", "modules_to_save"),
        {HEAD: values(0, 3, 10)},
        {},
        modules_to_save=[f"m{i}" for i in range(2000)],
    ),
    "NaN": refusal(
        errors.NonFiniteError,
        ("{0}", f"{PREFIX}{HEAD}", "NaN"),
        {HEAD: put(values(0, 3, 10), 17, np.nan)},
        {},
    ),
    "infinity in the second": refusal(
        errors.NonFiniteError,
        ("{1}", f"{PREFIX}{HEAD}", "infinity"),
        {HEAD: values(0, 3, 10)},
        {HEAD: put(values(0, 3, 10, dtype="BF16"), 4, np.inf)},
        ["mean"],
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused(name: str, tmp_path: Path) -> None:
    error, words, first, second, policies, config = REFUSALS[name]
    sources = make(tmp_path / "in", first, second, **config)
    for policy in policies:
        with pytest.raises(error) as refused:
            merge(sources, tmp_path / "out", policy)
        message = str(refused.value)
        for word in words:
            assert word.format(*sources) in message, message
    assert not (tmp_path / "out").exists()


def test_weights_that_make_no_mean(tmp_path: Path) -> None:
    sources = make(tmp_path, {HEAD: values(0, 3, 10)}, {HEAD: values(1, 3, 10)}, {})
    for weights in ((1.0, -0.5, 1.0), (0.0, 0.0, 1.0)):
        with pytest.raises(errors.RecipeError, match=r"classifier.*--extras first or drop"):
            merge(sources, tmp_path / "out", "mean", weights=weights)
        merge(sources, tmp_path / f"{weights[1]}", "first", weights=weights)
    merge(sources, tmp_path / "other", "mean", weights=(1.0, 0.5, -1.0))


def test_a_mean_beyond_the_outputs_dtype(tmp_path: Path) -> None:
    sources = make(tmp_path, {HEAD: encode(np.full((3, 4), 1e6))}, {HEAD: encode(np.ones((3, 4)))})
    with pytest.raises(errors.OutputOverflowError, match=r"classifier\.weight.*float16"):
        merge(sources, tmp_path / "out", "mean", dtype="float16")


@pytest.mark.parametrize("policy", ["first", "mean"])
def test_trained_tokens_have_to_be_the_same(policy: str, tmp_path: Path) -> None:
    tensor = {PREFIX + TOKENS: values(0, 2, 4)}
    sources = [
        write_adapter(tmp_path / str(i), LAYERS, extra=tensor, trainable_token_indices=said)
        for i, said in enumerate((INDICES, {"embed": [1, 5]}))
    ]
    if policy == "mean":
        with pytest.raises(errors.IncompatibleError, match=r"trained tokens.*not the same"):
            merge(sources, tmp_path / "out", policy)
        return
    merge(sources, tmp_path / "out", policy)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["trainable_token_indices"] == INDICES


def test_biases_of_deltas_do_not_go_with_embeddings(tmp_path: Path) -> None:
    layers = LAYERS | {"embed": embedding(4, 9, 2)}
    bias = {f"{PREFIX}block.up.lora_B.bias": values(0, 12)}
    source = write_adapter(tmp_path / "in", layers, extra=bias, lora_bias=True)
    with pytest.raises(errors.ExtraTensorsError, match=r"embedding.*--extras drop"):
        merge([source], tmp_path / "out", "first")


def test_a_head_whose_module_is_a_target_is_none_for_peft(tmp_path: Path) -> None:
    """LoRA on a classifier: PEFT's own wrapper cannot be put around it, so no task asks for it."""
    layers = LAYERS | {"classifier": linear(3, 10, 2)}
    extra = {
        f"{PREFIX}classifier.base_layer.weight": values(0, 3, 10),
        f"{PREFIX}pre_classifier.weight": values(1, 10, 10),
    }
    more = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    source = write_adapter(tmp_path / "in", layers, extra=extra, **more)
    found = merge([source], tmp_path / "out", "first")
    assert found.keys() == {name.removeprefix(PREFIX) for name in extra}
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (config["task_type"], config["modules_to_save"]) == (None, None)


def test_error_says_which_kinds_there_are(tmp_path: Path) -> None:
    extra = {
        HEAD: values(0, 3),
        HEAD_BIAS: values(0, 3),
        "norm.bias": values(0, 3),
        TOKENS: values(0, 2),
    }
    with pytest.raises(errors.ExtraTensorsError) as refused:
        merge(make(tmp_path, extra), tmp_path / "out", "error")
    message = str(refused.value)
    for words in (
        "4 tensors",
        "2 of kind 'trained module'",
        "1 of kind 'bias'",
        "'trained tokens'",
    ):
        assert words in message
    assert "--extras drop" in message
    assert "mean" in message
    assert len(refused.value.names) == 4


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters with all kinds of tensors, one of them of several tiles."""
    extras = [
        {
            "lm_head.weight": values(seed, 700, 1201, dtype="BF16"),
            "norm.bias": values(seed, 33),
            "norm.seen": encode(np.ones(3), "I32"),
            "block.up.lora_B.bias": values(seed, 12),
            HEAD: values(seed, 3, 11, dtype="F16"),
            HEAD_BIAS: values(seed, 3, dtype="F64"),
        }
        for seed in range(3)
    ]
    return make(tmp_path_factory.mktemp("several"), *extras, lora_bias=True, bias="all")


SAME = (WEIGHTS, CONFIG, "streammerge.json")


def given(policy: str) -> dict[str, Any]:
    return {
        "method": "svd",
        "weights": (2.0, 0.3, 0.7),
        "extras": policy,
        "on_event": events.ignore,
    }


@pytest.mark.parametrize("policy", ["first", "mean"])
def test_same_bytes(policy: str, several: list[Path], tmp_path: Path) -> None:
    """However they are read, with how many threads, and whatever has stopped them."""
    ways = {"serial": {"workers": 1}, "threads": {"workers": 3}, "pread": {"io": "pread"}}
    for name, way in ways.items():
        streammerge.merge(several, tmp_path / name, **given(policy), **way)
    for count in (1, 4, 3):
        with pytest.raises(KeyboardInterrupt):
            streammerge.merge(
                several,
                tmp_path / "resumed",
                workers=1,
                overwrite=count == 1,
                **{**given(policy), "on_event": end_after(count)},
                resume=count > 1,
            )
    streammerge.merge(several, tmp_path / "resumed", resume=True, **given(policy))
    whole = [contents(tmp_path / name) for name in (*ways, "resumed")]
    for name in SAME:
        assert len({found[name] for found in whole}) == 1, name
    shards = merge(
        several,
        tmp_path / "shards",
        policy,
        max_shard_size="64KiB",
        **{k: v for k, v in given(policy).items() if k != "extras"},
    )
    assert shards == written(tmp_path / "serial")
    assert (tmp_path / "shards" / INDEX).is_file()


def end_after(count: int) -> Callable[[events.Event], None]:
    seen = []

    def listen(event: events.Event) -> None:
        seen.extend([event] if isinstance(event, events.TaskDone) else [])
        if len(seen) == count:
            raise KeyboardInterrupt

    return listen


@pytest.mark.parametrize("policy", ["first", "mean"])
def test_a_large_head_is_read_a_tile_at_a_time(
    policy: str, several: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    whole = Job.window

    def window(self: Job, file: Any, offset: int, nbytes: int) -> Any:
        sizes.append(nbytes)
        return whole(self, file, offset, nbytes)

    monkeypatch.setattr(Job, "window", window)
    plan = streammerge.plan(several, **{k: v for k, v in given(policy).items() if k != "on_event"})
    merge(several, tmp_path / "out", policy, method="svd")
    head = next(task for task in plan.tasks if "lm_head" in task.target)
    assert head.read_bytes == (1 if policy == "first" else 3) * 700 * 1201 * 2
    assert max(sizes) < 2 * TILE_ELEMENTS * 2 < head.write_bytes
    assert type(plan).from_json(plan.to_json()) == plan


def test_the_plan_says_what_is_written(several: list[Path], capsys: Any) -> None:
    from streammerge.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["plan", *map(str, several), "--method", "svd", "--extras", "first"])
    assert not ended.value.code
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("extra tensors")]
    assert "7 (first): reads 1.6 MiB, writes 1.6 MiB; 0 left out" in line
    assert "targets           2" in out
