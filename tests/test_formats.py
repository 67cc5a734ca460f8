"""Formats: the same adapter in the layouts of several tools is read as the same adapter."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

import dialects
import streammerge
from dialects import METADATA, Pair, agree, deltas, pairs, write_file, write_mlx
from making import CONFIG, WEIGHTS, Tensor, encode, write_files
from streammerge import errors
from streammerge.adapter import Factor, NameTable, TensorFile
from streammerge.readers import read_adapters
from streammerge.readers.kohya_names import restore
from streammerge.readers.windows import OpenFiles, mapped
from streammerge.worker.factors import FactorReader

TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
IMAGE = "pytorch_lora_weights.safetensors"


def read(path: Path) -> dict[str, np.ndarray]:
    return deltas(streammerge.open_adapter(path))


# ---------------------------------------------------------------------------------------------
# diffusers

SPELLINGS = {
    "current": ("lora_A", "lora_B"),
    "of 2023": ("lora.down", "lora.up"),
    "of text encoders": ("lora_linear_layer.down", "lora_linear_layer.up"),
    "with kohya's words": ("lora_down", "lora_up"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_diffusers(spelling: str, tmp_path: Path) -> None:
    made = pairs()
    path = write_file(tmp_path / "in" / IMAGE, dialects.diffusers(made, *SPELLINGS[spelling]))
    for place in (path, path.parent):
        adapter = streammerge.open_adapter(place)
        assert adapter.dialect == "diffusers"
        agree(deltas(adapter), made)
        assert adapter.factor(0, "A").key == f"{adapter.target(0)}.{SPELLINGS[spelling][0]}.weight"


def test_the_first_format_of_diffusers(tmp_path: Path) -> None:
    """Attention processors, named by the role of a module, with and without a component."""
    made = pairs({f"unet.mid_block.attn1.{m}": (6, 5, 2) for m in ("to_q", "to_out.0")})
    text = pairs(
        {f"text_encoder.layers.0.self_attn.{m}": (6, 5, 2) for m in ("q_proj", "out_proj")}
    )
    tensors = {}
    for role, name in (("to_q", "to_q"), ("to_out", "to_out.0")):
        for word, side in (("down", "a"), ("up", "b")):
            factor = getattr(made[f"unet.mid_block.attn1.{name}"], side)
            tensors[f"mid_block.attn1.processor.{role}_lora.{word}.weight"] = encode(factor)
    for role, name in (("to_q", "q_proj"), ("to_out", "out_proj")):
        for word, side in (("down", "a"), ("up", "b")):
            factor = getattr(text[f"text_encoder.layers.0.self_attn.{name}"], side)
            key = f"text_encoder.layers.0.self_attn.{role}_lora.{word}.weight"
            tensors[key] = encode(factor)
    agree(read(write_file(tmp_path / "old.safetensors", tensors)), made | text)


def test_alphas_beside_the_factors(tmp_path: Path) -> None:
    made = pairs(scaling=0.5)
    alphas = {
        f"{t}.alpha": encode(np.array([p.scaling * len(p.a)]), "F16") for t, p in made.items()
    }
    agree(read(write_file(tmp_path / IMAGE, dialects.diffusers(made) | alphas)), made)


def test_metadata_say_the_scaling(tmp_path: Path) -> None:
    """Each component has a config of its own, with patterns, and rslora where it says so."""
    shapes = {"unet.a.to_q": (6, 5, 4), "unet.b.to_q": (6, 5, 2), "text_encoder.c": (6, 5, 4)}
    made = pairs(shapes)
    scaling = {"unet.a.to_q": 8 / 4, "unet.b.to_q": 3 / 2, "text_encoder.c": 6 / 2}
    made = {t: Pair(p.b, p.a, scaling[t]) for t, p in made.items()}
    config = {
        "unet.r": 4,
        "unet.lora_alpha": 8,
        "unet.rank_pattern": {"b.to_q": 2},
        "unet.alpha_pattern": {"b.to_q": 3},
        "text_encoder.r": 4,
        "text_encoder.lora_alpha": 6,
        "text_encoder.use_rslora": True,
    }
    agree(read(write_file(tmp_path / IMAGE, dialects.diffusers(made), **{METADATA: config})), made)


# ---------------------------------------------------------------------------------------------
# kohya


@pytest.mark.parametrize("alphas", [True, False])
def test_kohya_is_diffusers_by_other_names(alphas: bool, tmp_path: Path) -> None:
    made = pairs(scaling=0.25 if alphas else 1.0)
    path = write_file(tmp_path / "kohya.safetensors", dialects.kohya(made, alphas=alphas))
    adapter = streammerge.open_adapter(path)
    assert adapter.dialect == "kohya"
    agree(deltas(adapter), made)
    assert adapter.factor(0, "A").key.endswith(".lora_down.weight")


NAMES = {
    "input_blocks_0_0": "unet.conv_in",
    "input_blocks_3_0_op": "unet.down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_1_transformer_blocks_0_attn1_to_q": (
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    ),
    "input_blocks_5_0_in_layers_2": "unet.down_blocks.1.resnets.1.conv1",
    "middle_block_1_proj_in": "unet.mid_block.attentions.0.proj_in",
    "middle_block_2_emb_layers_1": "unet.mid_block.resnets.1.time_emb_proj",
    "output_blocks_2_1_conv": "unet.up_blocks.0.upsamplers.0.conv",
    "output_blocks_5_2_conv": "unet.up_blocks.1.upsamplers.0.conv",
    "output_blocks_8_0_skip_connection": "unet.up_blocks.2.resnets.2.conv_shortcut",
    "output_blocks_3_1_transformer_blocks_1_ff_net_0_proj": (
        "unet.up_blocks.1.attentions.0.transformer_blocks.1.ff.net.0.proj"
    ),
    "label_emb_0_2": "unet.add_embedding.linear_2",
    "unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_out_0": (
        "unet.up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_out.0"
    ),
    "up_blocks_1_upsamplers_0_conv": "unet.up_blocks.1.upsamplers.0.conv",
    "double_blocks_18_img_mod_lin": "transformer.transformer_blocks.18.norm1.linear",
    "single_blocks_3_linear2": "transformer.single_transformer_blocks.3.proj_out",
    "joint_blocks_2_context_block_mlp_fc2": "transformer.transformer_blocks.2.ff_context.net.2",
    "time_in_in_layer": "transformer.time_text_embed.timestep_embedder.linear_1",
    "final_layer_adaLN_modulation_1": None,
    "input_blocks_2_0_op": None,
    "input_blocks_3_1_proj_in": None,
    "output_blocks_1_1_conv": None,
    "down_blocks_0_attentions_0_proj": "unet.down_blocks.0.attentions.0.proj",
    "down_blocks_0_attentions_0_proj_out_": None,
    "blocks_0_self_attn_q": None,
    "": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_names_are_restored_or_refused(name: str) -> None:
    restored = restore("unet", name)
    paths = [module.path for module in restored.modules] if restored else [None]
    assert paths == [NAMES[name]]


def test_of_three_layers_in_one_each_gets_its_rows(tmp_path: Path) -> None:
    """Flux's first authors have one layer for what are three, or four, in diffusers."""
    made = pairs(
        {"double_blocks_0_img_attn_qkv": (24, 8, 4), "single_blocks_1_linear1": (56, 8, 2)}
    )
    tensors = {}
    for name, pair in made.items():
        tensors[f"lora_unet_{name}.lora_down.weight"] = encode(pair.a)
        tensors[f"lora_unet_{name}.lora_up.weight"] = encode(pair.b)
        tensors[f"lora_unet_{name}.alpha"] = encode(np.array(1.0))
    (three, four), expected = made.values(), {}
    home = "transformer.transformer_blocks.0.attn"
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        expected[f"{home}.{name}"] = Pair(three.b[8 * i : 8 * i + 8], three.a, 1 / 4)
    home = "transformer.single_transformer_blocks.1"
    for i, name in enumerate(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")):
        rows = slice(8 * i, None if i == 3 else 8 * i + 8)
        expected[f"{home}.{name}"] = Pair(four.b[rows], four.a, 1 / 2)
    path = write_file(tmp_path / "flux.safetensors", tensors)
    agree(read(path), expected)
    streammerge.merge([path], tmp_path / "out", method="cat")
    agree(read(tmp_path / "out"), expected)


def test_plain_convolutions_are_read(tmp_path: Path) -> None:
    a, b = (np.random.default_rng(1).standard_normal(s) for s in ((2, 3, 3, 3), (5, 2, 1, 1)))
    stem = "lora_unet_down_blocks_0_resnets_0_conv1"
    tensors = {f"{stem}.lora_down.weight": encode(a), f"{stem}.lora_up.weight": encode(b)}
    adapter = streammerge.open_adapter(write_file(tmp_path / "k.safetensors", tensors))
    assert adapter.target(0) == "unet.down_blocks.0.resnets.0.conv1"
    assert [adapter.factor(0, side).shape for side in "AB"] == [a.shape, b.shape]


# ---------------------------------------------------------------------------------------------
# MLX

LANGUAGE = {"model.layers.0.self_attn.q_proj": (70, 40, 3), "model.layers.1.mlp.up": (300, 9, 3)}


def test_mlx_factors_lie_transposed(tmp_path: Path) -> None:
    made = pairs(LANGUAGE, scaling=0.1)
    adapter = streammerge.open_adapter(write_mlx(tmp_path / "in", made, 3, 0.1))
    assert (adapter.dialect, adapter.config.base_model) == ("mlx", "some/base")
    agree(deltas(adapter), made)


@pytest.mark.parametrize("method", ["cat", "svd", "linear", "ties", "ties_svd"])
def test_mlx_merges_as_peft_does(method: str, tmp_path: Path) -> None:
    """The same factors the other way round give the same bytes by every route."""
    options = {"method": method} | ({"density": 0.4} if "ties" in method else {})
    sources: dict[str, list[Path]] = {"mlx": [], "peft": []}
    for seed in range(2):
        made = pairs(LANGUAGE | {"big": (6000, 50, 3)}, seed=seed)
        sources["mlx"].append(write_mlx(tmp_path / f"mlx{seed}", made, 3, 2.0))
        config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]}
        files = write_files(tmp_path / f"peft{seed}", peft(made), config)
        sources["peft"].append(files)
    for name, paths in sources.items():
        streammerge.merge(paths, tmp_path / name, **options)
    merged = [(tmp_path / name / WEIGHTS).read_bytes() for name in sources]
    assert merged[0] == merged[1]


def peft(made: Mapping[str, Pair], prefix: str = "base_model.model.") -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in dialects.diffusers(made).items()}


@pytest.mark.parametrize(("rows", "columns"), [(8, 300), (300, 7), (9000, 3), (1, 5), (5, 1)])
def test_any_elements_of_what_lies_transposed(rows: int, columns: int, tmp_path: Path) -> None:
    """From any element to any other, by pieces of long lines or by many short ones."""
    generator = np.random.default_rng(rows)
    values = generator.standard_normal((rows, columns)).astype(np.float32)
    stored = np.ascontiguousarray(values.T).tobytes()
    path = tmp_path / "f"
    path.write_bytes(b"odd" + stored)
    status = path.stat()
    file = TensorFile(str(path), status.st_size, status.st_mtime_ns, status.st_ino)
    factor = Factor(file, "key", 3, "F32", (rows, columns), turned=True)
    window = mapped(OpenFiles())
    reader = FactorReader(window, factor, torch.float32, torch.device("cpu"), None)
    for _ in range(20):
        start, stop = sorted(generator.integers(0, rows * columns, 2).tolist())
        found = reader.elements(start, stop + 1).numpy()
        assert (found == values.reshape(-1)[start : stop + 1]).all()
    assert (reader.whole().numpy() == values).all()
    assert reader.checksum() == xxhash.xxh3_128_hexdigest(stored)


@pytest.mark.parametrize(("value", "name"), [(np.nan, "NaN"), (-np.inf, "infinity")])
def test_what_is_not_finite_is_named_where_it_lies(value: float, name: str, tmp_path: Path) -> None:
    made = pairs(LANGUAGE)
    made["model.layers.1.mlp.up"].b[200, 1] = value
    directory = write_mlx(tmp_path / "in", made, 3, 1.0)
    for method in ("cat", "svd"):
        with pytest.raises(
            errors.NonFiniteError, match=r"model\.layers\.1\.mlp\.up\.lora_b"
        ) as caught:
            streammerge.merge([directory], tmp_path / "out", method=method)
        assert caught.value.value == name


def test_what_mlx_trained_before_its_scale_was_the_scaling(tmp_path: Path) -> None:
    directory = write_mlx(tmp_path / "in", pairs(LANGUAGE), 3, 10.0)
    config = json.loads((directory / CONFIG).read_text())
    config["lora_parameters"]["alpha"] = 16
    (directory / CONFIG).write_text(json.dumps(config))
    (notice,) = streammerge.plan([directory]).notices
    assert "alpha is 16" in notice
    assert "scale 10" in notice


# ---------------------------------------------------------------------------------------------
# Which files


def test_one_other_file_of_weights(tmp_path: Path) -> None:
    made = pairs(LANGUAGE)
    path = write_file(tmp_path / "in" / "any_name.safetensors", peft(made, prefix=""))
    (path.parent / CONFIG).write_text(json.dumps(CONF))
    agree(read(path.parent), made)
    with pytest.raises(errors.UnknownScalingError):
        streammerge.plan([path])  # the config is not that of any file beside it
    shutil.copy(path, path.with_name("other.safetensors"))
    with pytest.raises(errors.CorruptFileError, match=r"2 files .*any_name.*, other"):
        read(path.parent)


CONF = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_modules": ["q_proj"]}


def test_a_config_counts_beside_the_file_that_is_named_for_it(tmp_path: Path) -> None:
    made = pairs(LANGUAGE)
    write_files(tmp_path / "in", peft(made), CONF)
    agree(read(tmp_path / "in" / WEIGHTS), made)


def test_what_mlx_saves_on_the_way_is_no_second_file(tmp_path: Path) -> None:
    made = pairs(LANGUAGE)
    directory = write_mlx(tmp_path / "in", made, 3, 1.0)
    write_file(directory / "0000100_adapters.safetensors", dialects.mlx(pairs(LANGUAGE, seed=5)))
    agree(read(directory), made)


def test_a_config_that_does_not_count_is_mentioned(tmp_path: Path) -> None:
    write_files(tmp_path / "in", dialects.kohya(pairs()), CONF)
    (notice,) = streammerge.plan([tmp_path / "in"]).notices
    assert "adapter_config.json is not looked at" in notice


@pytest.mark.parametrize("layout", ["kohya", "mlx"])
def test_what_a_worker_of_a_cluster_gets_is_the_same(layout: str, tmp_path: Path) -> None:
    """Some rows of a manifest, in another order, over another table."""
    if layout == "mlx":
        path = write_mlx(tmp_path / "in", pairs(LANGUAGE), 3, 1.0)
    else:
        path = write_file(tmp_path / "in.safetensors", dialects.kohya(pairs()))
    adapter = streammerge.open_adapter(path)
    rows = np.array([1, 0], np.int32)
    part = pickle.loads(pickle.dumps(adapter.take(rows, np.empty(0, np.int32), NameTable())))
    for new, old in enumerate(rows):
        assert part.target(new) == adapter.target(old)
        for side in "AB":
            assert part.factor(new, side) == adapter.factor(old, side)


def test_alphas_are_not_shared(tmp_path: Path) -> None:
    """Headers may be the same to the byte where the alphas, which lie behind them, are not."""
    made = [pairs(scaling=scaling) for scaling in (0.5, 2.0)]
    paths = [write_file(tmp_path / f"{i}", dialects.kohya(each)) for i, each in enumerate(made)]
    for adapter, each in zip(
        read_adapters([str(p) for p in paths], NameTable()), made, strict=True
    ):
        agree(deltas(adapter), each)


# ---------------------------------------------------------------------------------------------
# What is refused

C, U, R = errors.CorruptFileError, errors.UnsupportedAdapterError, errors.RefusedError


def changed(**tensors: Tensor | None) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda sound: {k: v for k, v in (sound | tensors).items() if v is not None}


KOHYA_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def number(value: float, dtype: str = "F64") -> Tensor:
    return encode(np.array(value), dtype)


KOHYA_WRONG = {
    "an alpha that is NaN": ({f"{KOHYA_Q}.alpha": number(np.nan)}, C, "alpha is nan"),
    "an alpha that is infinite": ({f"{KOHYA_Q}.alpha": number(np.inf)}, C, "alpha is inf"),
    "an alpha that is 0": ({f"{KOHYA_Q}.alpha": number(0)}, C, "other than 0"),
    "a huge alpha": ({f"{KOHYA_Q}.alpha": number(1e300)}, R, "leaves the range"),
    "an alpha of many numbers": ({f"{KOHYA_Q}.alpha": encode(np.ones(3))}, C, "one number"),
    "an alpha of bits": ({f"{KOHYA_Q}.alpha": Tensor("BOOL", (), b"\1")}, C, "one number"),
    "an alpha of nothing": ({"lora_unet_conv_in.alpha": number(1)}, C, "without factors"),
    "DoRA": ({f"{KOHYA_Q}.dora_scale": number(1)}, U, "DoRA"),
    "a Tucker core": ({f"{KOHYA_Q}.lora_mid.weight": number(1)}, U, "LoCon"),
    "LoKr beside it": ({"lora_te_x.lokr_w1": number(1)}, U, "LoKr"),
    "two names for a target": (
        {
            f"lora_unet_{KOHYA_Q.removeprefix('lora_')}.lora_{word}.weight": encode(np.ones(s))
            for word, s in (("down", (4, 12)), ("up", (20, 4)))
        },
        C,
        "under two names",
    ),
    "an unknown model": (
        {
            f"lora_unet_blocks_0_q.lora_{word}.weight": encode(np.ones((2, 2)))
            for word in ("up", "down")
        },
        U,
        "lora_unet_blocks_0_q",
    ),
    "a T5": (
        {
            f"lora_te3_encoder_q.lora_{word}.weight": encode(np.ones((2, 2)))
            for word in ("up", "down")
        },
        U,
        "lora_te3_encoder_q",
    ),
    "three in one that are not three": (
        {
            f"lora_unet_double_blocks_0_img_attn_qkv.lora_{word}.weight": encode(np.ones((4, 4)))
            for word in ("up", "down")
        },
        U,
        "img_attn_qkv",
    ),
    "half a pair": ({f"{KOHYA_Q}.lora_up.weight": None}, C, "no B factor"),
}


@pytest.mark.parametrize("name", KOHYA_WRONG)
def test_kohya_that_is_wrong(name: str, tmp_path: Path) -> None:
    change, error, words = KOHYA_WRONG[name]
    path = write_file(tmp_path / "in.safetensors", changed(**change)(dialects.kohya(pairs())))
    with pytest.raises(error, match=words) as caught:
        streammerge.plan([path])
    assert str(path) in str(caught.value)


DIFFUSERS_WRONG: dict[str, tuple[dict[str, Any], Any, Any, str]] = {
    "two spellings of a factor": (
        {f"{TO_Q}.lora.down.weight": encode(np.ones((4, 12)))},
        None,
        C,
        "two A",
    ),
    "alphas for some": ({f"{TO_Q}.alpha": number(1)}, None, C, "some modules only"),
    "alphas and metadata": ({f"{TO_Q}.alpha": number(1)}, {"unet.r": 4}, C, "says them too"),
    "metadata that are no JSON": ({}, "{", C, "not JSON"),
    "metadata that are no object": ({}, [1], C, "no JSON object"),
    "metadata of great depth": ({}, "[" * 100_000, C, "not JSON"),
    "metadata with a rank of text": ({}, {"unet.r": "4"}, C, "positive integer"),
    "metadata with NaN": ({}, '{"unet.lora_alpha": NaN}', C, "finite"),
    "metadata of DoRA": ({}, {"unet.use_dora": True}, U, "DoRA"),
    "metadata of another rank": ({}, {"unet.r": 16}, errors.UnknownScalingError, "config says"),
    "a pattern that takes for ever": ({}, {"unet.rank_pattern": {"(a+)+(?P=x)": 4}}, C, "regular"),
    "a module of no component": (
        {f"layers.0.lora.{word}.weight": encode(np.ones((2, 2))) for word in ("up", "down")},
        None,
        U,
        "which component",
    ),
    "DoRA": ({f"{TO_Q}.lora_magnitude_vector": number(1)}, None, U, "DoRA"),
    "an extra tensor": (
        {"unet.conv_in.bias": number(1)},
        None,
        errors.ExtraTensorsError,
        "conv_in",
    ),
}


@pytest.mark.parametrize("name", DIFFUSERS_WRONG)
def test_diffusers_that_is_wrong(name: str, tmp_path: Path) -> None:
    change, metadata, error, words = DIFFUSERS_WRONG[name]
    tensors = changed(**change)(dialects.diffusers(pairs()))
    more = {} if metadata is None else {METADATA: metadata}
    path = write_file(tmp_path / "in.safetensors", tensors, **more)
    with pytest.raises(error, match=words) as caught:
        streammerge.plan([path])
    assert str(path) in str(caught.value)


MLX_WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], Any, str]] = {
    "no scale": ({"scale": ...}, {}, C, "do not say the scale"),
    "a scale of text": ({"scale": "10"}, {}, C, "finite number"),
    "a scale beyond any number": ({"scale": 10**400}, {}, C, "finite number"),
    "a rank that is not the tensors'": ({"rank": 4}, {}, C, "has rank 3"),
    "DoRA": ({}, {"use_dora": True}, U, "DoRA"),
    "DoRA by its newer name": ({}, {"fine_tune_type": "dora"}, U, "DoRA"),
    "full weights": ({}, {"fine_tune_type": "full"}, U, "full"),
}


@pytest.mark.parametrize("name", MLX_WRONG)
def test_mlx_that_is_wrong(name: str, tmp_path: Path) -> None:
    parameters, fields, error, words = MLX_WRONG[name]
    directory = write_mlx(tmp_path / "in", pairs(LANGUAGE), 3, 1.0)
    config = json.loads((directory / CONFIG).read_text()) | fields
    changed_to = config["lora_parameters"] | parameters
    config["lora_parameters"] = {k: v for k, v in changed_to.items() if v is not ...}
    (directory / CONFIG).write_text(json.dumps(config))
    with pytest.raises(error, match=words) as caught:
        streammerge.plan([directory])
    assert str(directory / CONFIG) in str(caught.value) or error is C


def test_mlx_experts_are_refused(tmp_path: Path) -> None:
    tensors = {f"model.experts.lora_{s}": encode(np.ones((2, 3, 4))) for s in "ab"}
    path = write_file(tmp_path / "adapters.safetensors", tensors)
    with pytest.raises(U, match="many experts"):
        streammerge.plan([path])


# ---------------------------------------------------------------------------------------------
# Real ones


def test_real_mlx_merges_as_float64_does(real_adapters: Path, tmp_path: Path) -> None:
    sources = [real_adapters / "mlx-lm" / f"arjun254-step{step}" for step in (100, 400)]
    read_ones = [read(source) for source in sources]
    assert all(np.abs(delta).max() > 0 for delta in read_ones[1].values())
    with pytest.warns(match="scale 10"):
        streammerge.merge(sources, tmp_path / "out", method="cat", weights=[2.0, -0.5])
    for target, found in read(tmp_path / "out").items():
        expected = 2.0 * read_ones[0][target] - 0.5 * read_ones[1][target]
        assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


def test_real_kohya_and_diffusers_copies_are_one_adapter(
    real_adapters: Path, tmp_path: Path
) -> None:
    merged = []
    for name in ("timohavdk-new-kohya", "timohavdk-2100-diffusers"):
        streammerge.merge([real_adapters / "sd15-unet" / name], tmp_path / name, method="cat")
        merged.append((tmp_path / name / IMAGE).read_bytes())
    assert merged[0] == merged[1]


@pytest.mark.parametrize("name", ["smart-falcon-4", "smart-falcon-8"])
def test_real_lokr_is_refused(name: str, real_adapters: Path) -> None:
    with pytest.raises(U, match="LoKr") as caught:
        streammerge.plan([real_adapters / "lycoris-lokr" / name])
    assert caught.value.variant == "LoKr"
