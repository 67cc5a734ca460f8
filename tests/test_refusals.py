"""Bad input: the right error, named file and tensor, the right exit code, and nothing written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import streammerge
from making import (
    CONFIG,
    INDEX,
    PREFIX,
    WEIGHTS,
    Tensor,
    contents,
    convolution,
    decode,
    embedding,
    encode,
    frame,
    linear,
    make_config,
    make_factors,
    put,
    render,
    write_adapter,
    write_files,
)
from streammerge import errors, events
from streammerge.catalog import METHODS, RULES, SPACES
from streammerge.cli import main

LAYERS = {"block.up": linear(12, 8, 2), "block.down": linear(8, 12, 2)}
UP_A, UP_B = (f"{PREFIX}block.up.lora_{side}.weight" for side in "AB")

Build = Callable[[Path], object]
"""Makes the directory of a bad adapter, whose path it is given."""

NEED_DENSITY = [name for name, method in METHODS.items() if RULES[method.rule].needs_density]
NEED_NONE = [name for name in METHODS if name not in NEED_DENSITY]
TRUNCATE = [name for name, method in METHODS.items() if SPACES[method.space].truncates]
ON_FACTORS = [name for name, method in METHODS.items() if SPACES[method.space].equal_ranks]


@dataclass(frozen=True)
class Refusal:
    """What goes wrong: a good adapter and a bad one, or options that do not go."""

    error: type[errors.RefusedError]
    words: tuple[str, ...]
    """All of them stand in the message; {bad} and {good} are the adapters' paths."""
    build: Build | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Attributes of the error."""


def run(command: str, adapters: list[Path], output: Path, options: Mapping[str, Any]) -> Result:
    """Run the command line as the installed script does."""
    flags = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, Mapping):
            value = [f"{key}={number}" for key, number in value.items()]  # noqa: PLW2901
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        flags.append(flag if value is True else f"{flag}={text}")
    arguments = [command, *map(str, adapters), f"--output={output}", *flags]
    return CliRunner().invoke(main, arguments)


# ---------------------------------------------------------------------------------------------
# Builders of bad adapters


def weights_of(data: bytes) -> Build:
    """A good config beside these bytes."""

    def build(bad: Path) -> None:
        write_adapter(bad, LAYERS, seed=1)
        (bad / WEIGHTS).write_bytes(data)

    return build


def cut(size: int) -> Build:
    """A good adapter whose weights end after `size` bytes, or `-size` bytes before the end."""

    def build(bad: Path) -> None:
        write_adapter(bad, LAYERS, seed=1)
        data = (bad / WEIGHTS).read_bytes()
        (bad / WEIGHTS).write_bytes(data[:size])

    return build


def config_text(text: bytes) -> Build:
    """Good weights beside a config of these bytes."""

    def build(bad: Path) -> None:
        write_adapter(bad, LAYERS, seed=1)
        (bad / CONFIG).write_bytes(text)

    return build


def config(**more: Any) -> Build:
    """Good weights beside a config in which some fields differ."""
    return lambda bad: write_adapter(bad, LAYERS, seed=1, **more)


def extra(name: str, shape: tuple[int, ...] = (12,), dtype: str = "F32", **more: Any) -> Build:
    """A good adapter with one more tensor, or another in place of a factor."""
    tensor = encode(np.ones(shape), dtype)
    return lambda bad: write_adapter(bad, LAYERS, seed=1, extra={name: tensor}, **more)


def tensors_alone(config: Mapping[str, Any] | None, *names: str) -> Build:
    """Only these tensors."""
    tensors = {name: encode(np.ones((2, 2))) for name in names}
    return lambda bad: write_files(bad, tensors, config)


def without(*names: str) -> Build:
    """A good adapter that lacks some tensors."""

    def build(bad: Path) -> None:
        factors = make_factors(LAYERS, seed=1)
        write_files(bad, {n: t for n, t in factors.items() if n not in names}, make_config(LAYERS))

    return build


def layers(**others: Any) -> Build:
    """An adapter of other layers; __ in a name stands for a dot."""
    named = {name.replace("__", "."): layer for name, layer in others.items()}
    return lambda bad: write_adapter(bad, named, seed=1)


def only(*names: str) -> Build:
    """A directory with nothing but these files, all of them empty."""

    def build(bad: Path) -> None:
        for name in names:
            (bad / name).parent.mkdir(parents=True, exist_ok=True)
            (bad / name).touch()
        bad.mkdir(exist_ok=True)

    return build


def no_config(bad: Path) -> None:
    write_files(bad, make_factors(LAYERS, seed=1), None)


def config_alone(bad: Path) -> None:
    write_adapter(bad, LAYERS)
    (bad / WEIGHTS).unlink()


def nothing(bad: Path) -> None:
    """Not even a directory."""


def a_file(bad: Path) -> None:
    bad.write_text("not a directory")


def weights_are_a_directory(bad: Path) -> None:
    write_adapter(bad, LAYERS)
    (bad / WEIGHTS).unlink()
    (bad / WEIGHTS).mkdir()


def two_prefixes(bad: Path) -> None:
    factors = make_factors(LAYERS) | make_factors(LAYERS, prefix=PREFIX + PREFIX)
    write_files(bad, factors, make_config(LAYERS))


def index_text(text: str) -> Build:
    """A directory with this index in place of weights."""

    def build(bad: Path) -> None:
        write_adapter(bad, LAYERS)
        (bad / WEIGHTS).rename(bad / "shard.safetensors")
        (bad / INDEX).write_text(text)

    return build


def map_to(file: str) -> str:
    return json.dumps({"weight_map": {UP_A: file}})


def header_of(**facts: Any) -> bytes:
    """A file of one tensor with these facts in its header, and 16 bytes of data."""
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | facts
    return frame(json.dumps({UP_A: entry}).encode(), bytes(16))


GOOD_HEADER = json.dumps({UP_A: {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}})
TWICE = GOOD_HEADER[:-1] + "," + GOOD_HEADER[1:]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2962192\n"
WITHOUT_TENSORS = render({})
GROUPED = {UP_A: (6, 4, 3), UP_B: (12, 3, 1)}
HUGE = 10**400
"""Larger than any float, and still a sound JSON number."""

C = errors.CorruptFileError
M = errors.MissingFileError
U = errors.UnsupportedAdapterError
R = errors.RecipeError

FILES = {
    "nothing": Refusal(M, ("{bad}", "no such file or directory"), nothing),
    "a file that is none of weights": Refusal(C, ("{bad}", "safetensors header"), a_file),
    "an empty directory": Refusal(M, ("{bad}", WEIGHTS), only()),
    "a config alone": Refusal(M, ("{bad}", WEIGHTS), config_alone),
    "adapters one level down": Refusal(
        M, ("{bad}", "did you mean {bad}/poems"), only(f"poems/{CONFIG}", f"poems/{WEIGHTS}")
    ),
    "pickled weights that are none": Refusal(
        C, ("{bad}/adapter_model.bin", "is not a file of torch.save"), only("adapter_model.bin")
    ),
    "weights that are a directory": Refusal(C, (f"{{bad}}/{WEIGHTS}",), weights_are_a_directory),
    "no bytes": Refusal(C, (f"{{bad}}/{WEIGHTS}", "0 bytes"), cut(0)),
    "two bytes": Refusal(C, (f"{{bad}}/{WEIGHTS}", "2 bytes", "too short"), cut(2)),
    "truncated in the header": Refusal(C, (f"{{bad}}/{WEIGHTS}", "truncated"), cut(40)),
    "truncated in the data": Refusal(
        C, (f"{{bad}}/{WEIGHTS}", "truncated", "download it again"), cut(-1)
    ),
    "bytes beyond the data": Refusal(
        C, (f"{{bad}}/{WEIGHTS}", "3 bytes"), weights_of(render(make_factors(LAYERS)) + b"abc")
    ),
    "git-lfs pointer": Refusal(
        C, (f"{{bad}}/{WEIGHTS}", "git-lfs pointer", "git lfs pull"), weights_of(LFS)
    ),
    "git-lfs pointer for a config": Refusal(C, (f"{{bad}}/{CONFIG}", "JSON"), config_text(LFS)),
    "text for weights": Refusal(
        C, (f"{{bad}}/{WEIGHTS}", "header"), weights_of(b"<html><body>404</body></html>")
    ),
    "a header that is no JSON": Refusal(
        C, (f"{{bad}}/{WEIGHTS}", "not JSON"), weights_of(frame(b'{"a": '))
    ),
    "a header that is no UTF-8": Refusal(
        C, (f"{{bad}}/{WEIGHTS}", "not JSON"), weights_of(frame(b'{"\xff": 1}'))
    ),
    "a header that is a list": Refusal(
        C, (f"{{bad}}/{WEIGHTS}", "not a JSON object"), weights_of(frame(b"[1, 2]"))
    ),
    "a header too deep": Refusal(
        C, (f"{{bad}}/{WEIGHTS}", "not JSON"), weights_of(frame(b"[" * 200_000))
    ),
    "a tensor named twice": Refusal(
        C, (f"{{bad}}/{WEIGHTS}", UP_A, "twice"), weights_of(frame(TWICE.encode(), bytes(16)))
    ),
    "metadata that are no strings": Refusal(
        C,
        (f"{{bad}}/{WEIGHTS}", "__metadata__"),
        weights_of(frame(b'{"__metadata__": {"a": 1}}')),
    ),
    "a shape that its bytes do not fill": Refusal(
        C, (f"{{bad}}/{WEIGHTS}: {UP_A}", "[2, 3]"), weights_of(header_of(shape=[2, 3]))
    ),
    "a negative size": Refusal(
        C, (f"{{bad}}/{WEIGHTS}: {UP_A}",), weights_of(header_of(shape=[-2, -2]))
    ),
    "a size beyond all floats": Refusal(
        C, (f"{{bad}}/{WEIGHTS}: {UP_A}",), weights_of(header_of(shape=[HUGE, 2]))
    ),
    "an unknown dtype": Refusal(
        C, (f"{{bad}}/{WEIGHTS}: {UP_A}", "F33"), weights_of(header_of(dtype="F33"))
    ),
    "offsets that leave a hole": Refusal(
        C, (f"{{bad}}/{WEIGHTS}: {UP_A}",), weights_of(header_of(data_offsets=[16, 32]))
    ),
    "an entry without offsets": Refusal(
        C, (f"{{bad}}/{WEIGHTS}: {UP_A}",), weights_of(header_of(data_offsets=None))
    ),
    "a config that is no JSON": Refusal(
        C, (f"{{bad}}/{CONFIG}", "not JSON"), config_text(b'{"peft_type": "LORA",')
    ),
    "a config that is no UTF-8": Refusal(
        C, (f"{{bad}}/{CONFIG}", "not JSON"), config_text(b'{"peft_type": "\xff"}')
    ),
    "a config that is a list": Refusal(
        C, (f"{{bad}}/{CONFIG}", "not a JSON object"), config_text(b"[]")
    ),
    "a config too deep": Refusal(C, (f"{{bad}}/{CONFIG}", "not JSON"), config_text(b"[" * 200_000)),
    "an index that is no JSON": Refusal(C, (f"{{bad}}/{INDEX}",), index_text("{")),
    "an index without a map": Refusal(C, (f"{{bad}}/{INDEX}",), index_text("{}")),
    "an index that names nothing": Refusal(
        C, (f"{{bad}}/{INDEX}", "weight_map"), index_text('{"weight_map": {}}')
    ),
    "an index that names a path outside": Refusal(
        C, (f"{{bad}}/{INDEX}", "same directory"), index_text(map_to("../good/" + WEIGHTS))
    ),
    "an index that names an absolute path": Refusal(
        C, (f"{{bad}}/{INDEX}", "same directory"), index_text(map_to("/etc/passwd"))
    ),
    "an index that names the directory above": Refusal(C, ("{bad}",), index_text(map_to(".."))),
    "an index that names a missing shard": Refusal(
        M, ("{bad}/gone.safetensors",), index_text(map_to("gone.safetensors"))
    ),
    "an index with a null byte in a name": Refusal(
        C, (f"{{bad}}/{INDEX}",), index_text(map_to("a\0b"))
    ),
    "an index with half a surrogate pair in a name": Refusal(
        C, (f"{{bad}}/{INDEX}",), index_text(map_to("\ud800"))
    ),
}

CONFIGS = (
    {
        "no peft_type": Refusal(U, (f"{{bad}}/{CONFIG}", "peft_type"), config_text(b"{}")),
        "rank 0": Refusal(C, (f"{{bad}}/{CONFIG}", "r must be", "0"), config(r=0)),
        "a rank in quotes": Refusal(C, (f"{{bad}}/{CONFIG}", "r must be", "'8'"), config(r="8")),
        "alpha is NaN": Refusal(
            C, (f"{{bad}}/{CONFIG}", "lora_alpha"), config(lora_alpha=math.nan)
        ),
        "alpha beyond all floats": Refusal(
            C, (f"{{bad}}/{CONFIG}", "lora_alpha"), config(lora_alpha=HUGE)
        ),
        "rank_pattern is a list": Refusal(
            C, (f"{{bad}}/{CONFIG}", "rank_pattern"), config(rank_pattern=[1])
        ),
        "rank_pattern with a rank of 0": Refusal(
            C, (f"{{bad}}/{CONFIG}", "rank_pattern", "up"), config(rank_pattern={"up": 0})
        ),
        "alpha_pattern that is no regular expression": Refusal(
            C, (f"{{bad}}/{CONFIG}", "alpha_pattern", "up("), config(alpha_pattern={"up(": 1})
        ),
        "rank_pattern with a flag in its middle": Refusal(
            C, (f"{{bad}}/{CONFIG}", "rank_pattern", "(?i)up"), config(rank_pattern={"(?i)up": 2})
        ),
        "DoRA": Refusal(
            U,
            (f"{{bad}}/{CONFIG}", "use_dora", "DoRA"),
            config(use_dora=True),
            facts={"variant": "DoRA"},
        ),
        "target_parameters": Refusal(
            U, (f"{{bad}}/{CONFIG}", "target_parameters"), config(target_parameters=["experts.up"])
        ),
        "layer_replication": Refusal(
            U,
            (f"{{bad}}/{CONFIG}", "layer_replication"),
            config(layer_replication=[[0, 4], [2, 5]]),
        ),
        "QALoRA": Refusal(U, (f"{{bad}}/{CONFIG}", "use_qalora"), config(use_qalora=True)),
        "activated LoRA": Refusal(
            U, (f"{{bad}}/{CONFIG}", "alora_invocation_tokens"), config(alora_invocation_tokens=[1])
        ),
    }
    | {
        f"initialised by {init}": Refusal(
            U,
            (f"{{bad}}/{CONFIG}", "init_lora_weights", init, "Convert"),
            config(init_lora_weights=init),
            facts={"variant": init},
        )
        for init in ("pissa", "pissa_niter_16", "PiSSA", "olora", "corda", "lora_ga")
    }
    | {
        f"peft_type {kind}": Refusal(
            U,
            (f"{{bad}}/{CONFIG}", kind, "only LORA"),
            config(peft_type=kind),
            facts={"variant": kind},
        )
        for kind in (
            "IA3",
            "ADALORA",
            "LOHA",
            "LOKR",
            "VERA",
            "OFT",
            "PROMPT_TUNING",
            "PREFIX_TUNING",
        )
    }
)

MLX_CONFIG = {"lora_parameters": {"rank": 8, "scale": 10.0}, "lora_layers": 4}

TENSORS = (
    {
        "no tensors": Refusal(C, ("{bad}", "no LoRA tensors"), weights_of(WITHOUT_TENSORS)),
        "no LoRA tensors": Refusal(
            C, ("{bad}", "no LoRA tensors"), tensors_alone(make_config(LAYERS), "model.norm.weight")
        ),
        "A without B": Refusal(C, (f"{{bad}}/{WEIGHTS}: {UP_A}", "no B"), without(UP_B)),
        "B without A": Refusal(C, (f"{{bad}}/{WEIGHTS}: {UP_B}", "no A"), without(UP_A)),
        "A and B of different ranks": Refusal(
            C, (f"{{bad}}/{WEIGHTS}: {UP_B}", "[12, 3]", UP_A), extra(UP_B, (12, 3))
        ),
        "A of one dimension": Refusal(
            C, (f"{{bad}}/{WEIGHTS}: {UP_A}", "[16]"), extra(UP_A, (16,))
        ),
        "A without rows": Refusal(C, (f"{{bad}}/{WEIGHTS}: {UP_A}",), extra(UP_A, (0, 8))),
        "factors of whole numbers": Refusal(
            U, (f"{{bad}}/{WEIGHTS}: {UP_A}", "I32", "BF16"), extra(UP_A, (2, 8), "I32")
        ),
        "factors of eight bits": Refusal(
            U,
            (f"{{bad}}/{WEIGHTS}: {UP_A}", "F8_E4M3"),
            lambda bad: write_adapter(
                bad, LAYERS, extra={UP_A: Tensor("F8_E4M3", (2, 8), bytes(16))}
            ),
        ),
        "a target under two prefixes": Refusal(
            C, (f"{{bad}}/{WEIGHTS}", "block.", "two prefixes"), two_prefixes
        ),
        "a DoRA magnitude": Refusal(
            U,
            (f"{{bad}}/{WEIGHTS}: {PREFIX}block.up.lora_magnitude_vector", "DoRA"),
            extra(f"{PREFIX}block.up.lora_magnitude_vector"),
            facts={"variant": "DoRA"},
        ),
        "a factor inside a LoRA layer": Refusal(
            U,
            (f"{{bad}}/{WEIGHTS}: {PREFIX}experts.base_layer.lora_A.weight", "target_parameters"),
            extra(f"{PREFIX}experts.base_layer.lora_A.weight", (2, 8)),
        ),
        "a grouped convolution": Refusal(
            U,
            (f"{{bad}}/{WEIGHTS}: {UP_B}", "2 groups", "grouped convolution"),
            lambda bad: write_adapter(
                bad, LAYERS, extra={n: encode(np.ones(s)) for n, s in GROUPED.items()}
            ),
        ),
        "a convolution's B with a kernel": Refusal(
            C,
            (f"{{bad}}/{WEIGHTS}: {UP_B}", "1×1"),
            lambda bad: write_adapter(
                bad,
                LAYERS,
                extra={UP_A: encode(np.ones((2, 4, 3))), UP_B: encode(np.ones((12, 2, 3)))},
            ),
        ),
        "lora_bias": Refusal(
            errors.ExtraTensorsError,
            ("{bad}", f"{PREFIX}block.up.lora_B.bias", "--extras drop"),
            extra(f"{PREFIX}block.up.lora_B.bias", lora_bias=True),
            facts={"names": (f"{PREFIX}block.up.lora_B.bias",)},
        ),
        "a trained head": Refusal(
            errors.ExtraTensorsError,
            ("{bad}", f"{PREFIX}classifier.weight", "--extras drop"),
            extra(f"{PREFIX}classifier.weight", modules_to_save=["classifier"]),
            facts={"names": (f"{PREFIX}classifier.weight",)},
        ),
        "an MLX config beside PEFT's tensors": Refusal(
            C,
            (f"{{bad}}/{WEIGHTS}", "layout of peft", "of mlx"),
            tensors_alone(MLX_CONFIG, UP_A, UP_B),
        ),
        "PEFT's config beside MLX's tensors": Refusal(
            C,
            (f"{{bad}}/{WEIGHTS}", "layout of mlx", "of peft"),
            tensors_alone(make_config(LAYERS), "up.lora_a", "up.lora_b"),
        ),
    }
    | {
        f"{layout} tensors": Refusal(
            U, ("{bad}", name, layout), tensors_alone(None, name), facts={"variant": layout}
        )
        for layout, name in {
            "LoKr": "lora_te_text_model_encoder_layers_0_mlp_fc1.lokr_w1",
            "LoHa": f"{PREFIX}block.up.hada_w1_a",
            "IA3": f"{PREFIX}block.up.ia3_l",
            "AdaLoRA": f"{PREFIX}block.up.lora_E",
            "raw PEFT state dict": f"{PREFIX}block.up.lora_A.default.weight",
            "LoCon": "lora_unet_down_blocks_0_resnets_0_conv1.lora_mid.weight",
            "ComfyUI": "diffusion_model.blocks.0.attn.lora_A.weight",
        }.items()
    }
    | {
        f"half of a pair of {layout}": Refusal(
            C, (f"{{bad}}/{WEIGHTS}", name, "no B factor"), tensors_alone(None, name)
        )
        for layout, name in {
            "MLX": "model.layers.0.self_attn.q_proj.lora_a",
            "kohya": "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
            "diffusers": "unet.down_blocks.0.attentions.0.to_k.lora.down.weight",
        }.items()
    }
)

TOGETHER = {
    "shapes that disagree": Refusal(
        errors.IncompatibleError,
        ("block.up", "{good}", "{bad}", "[2, 8]", "[2, 9]"),
        layers(block__up=linear(12, 9, 2)),
        facts={"target": "block.up"},
    ),
    "heights that disagree": Refusal(
        errors.IncompatibleError,
        ("block.up", "{good}", "{bad}", "[12, 2]", "[13, 2]"),
        layers(block__up=linear(13, 8, 2)),
        facts={"target": "block.up"},
    ),
    "an embedding and a linear layer": Refusal(
        errors.IncompatibleError,
        ("block.up", "{good}", "{bad}"),
        layers(block__up=embedding(12, 8, 2)),
        facts={"target": "block.up"},
    ),
    "a convolution and a linear layer": Refusal(
        errors.IncompatibleError,
        ("block.up", "{good}", "{bad}", "[2, 4, 2]"),
        layers(block__up=convolution(12, 4, (2,), 2)),
        facts={"target": "block.up"},
    ),
    "different bases, when strict": Refusal(
        errors.IncompatibleError,
        ("{good}", "{bad}", "some/base", "another/base"),
        config(base_model_name_or_path="another/base"),
        {"strict_base": True},
    ),
    "a rank that the config does not explain": Refusal(
        errors.UnknownScalingError,
        ("{bad}", "block.", "rank 2", "4", "--scaling"),
        config(r=4),
        facts={"declared_rank": 4, "found_rank": 2},
    ),
    "no config": Refusal(
        errors.UnknownScalingError,
        ("{bad}", CONFIG, "--scaling"),
        no_config,
        facts={"declared_rank": None, "found_rank": 2},
    ),
    "no config, and its scaling asked for": Refusal(
        errors.UnknownScalingError, ("{bad}", CONFIG, "--scaling"), no_config, {"scaling": "config"}
    ),
} | {
    f"unequal ranks, {method}": Refusal(
        errors.IncompatibleError,
        ("block.up: rank 2 in {good}", "3 in {bad}", "_svd"),
        layers(block__up=linear(12, 8, 3)),
        {"method": method} | ({"density": 0.5} if method in NEED_DENSITY else {}),
        facts={"target": "block.up"},
    )
    for method in ON_FACTORS
}

OPTIONS = (
    {
        "an unknown method": Refusal(
            R,
            ("'tise'", "did you mean ties?"),
            options={"method": "tise"},
            facts={"option": "method"},
        ),
        "a method that only ends in svd": Refusal(
            R, ("'foosvd'", "ties_svd"), options={"method": "foosvd"}
        ),
        "an unknown space": Refusal(R, ("'nots'", "delta"), options={"space": "nots"}),
        "a space that does not go": Refusal(
            R, ("exact", "ties"), options={"method": "ties", "density": 0.5, "space": "exact"}
        ),
        "too few weights": Refusal(R, ("2 adapters", "1 weights"), options={"weights": [1.0]}),
        "too many weights": Refusal(
            R, ("2 adapters", "3 weights"), options={"weights": [1.0, 2.0, 3.0]}
        ),
        "a weight that is NaN": Refusal(
            R, ("weight 2", "nan"), options={"weights": [1.0, math.nan]}
        ),
        "an infinite weight": Refusal(
            R, ("weight 1", "inf"), options={"weights": [-math.inf, 1.0]}
        ),
        "a weight beyond float32": Refusal(
            R, ("1e+80", "float32"), options={"weights": [1e80, 1.0]}
        ),
        "rank 0": Refusal(R, ("rank", "0"), options={"rank": 0}, facts={"option": "rank"}),
        "a negative rank": Refusal(R, ("rank", "-3"), options={"rank": -3}),
        "clamp 0": Refusal(R, ("clamp", "0"), options={"clamp": 0.0}),
        "clamp above 1": Refusal(R, ("clamp", "1.5"), options={"clamp": 1.5}),
        "clamp NaN": Refusal(R, ("clamp", "nan"), options={"clamp": math.nan}),
        "a negative seed": Refusal(R, ("seed", "-1"), options={"seed": -1}),
        "a seed too large": Refusal(R, ("seed", str(2**64)), options={"seed": 2**64}),
        "an unknown dtype": Refusal(R, ("dtype", "'int8'", "bfloat16"), options={"dtype": "int8"}),
        "an unknown compute dtype": Refusal(
            R, ("compute_dtype", "'float16'"), options={"compute_dtype": "float16"}
        ),
        "an unknown vote": Refusal(
            R,
            ("majority_sign", "'most'", "frequency"),
            options={"method": "ties", "density": 0.5, "majority_sign": "most"},
        ),
        "extras that are not known": Refusal(R, ("extras", "'keep'"), options={"extras": "keep"}),
        "a scaling that is NaN": Refusal(R, ("scaling", "nan"), options={"scaling": math.nan}),
        "include that is no regular expression": Refusal(
            R, ("include", "'('"), options={"include": "("}
        ),
        "exclude that is no regular expression": Refusal(
            R, ("exclude", "'['"), options={"exclude": "["}
        ),
        "include that leaves nothing": Refusal(
            R, ("include", "no target"), options={"include": "head"}
        ),
        "memory that is no size": Refusal(
            R, ("max_memory", "'lots'"), options={"max_memory": "lots"}
        ),
        "no memory": Refusal(R, ("max_memory", "'0'"), options={"max_memory": "0"}),
        "no workers": Refusal(R, ("workers", "0"), options={"workers": 0}),
        "shards of nothing": Refusal(R, ("max_shard_size", "'0'"), options={"max_shard_size": "0"}),
        "too little memory": Refusal(
            errors.BudgetError, ("block.", "at least", "1.0 MiB"), options={"max_memory": "1MiB"}
        ),
    }
    | {
        f"no density, {method}": Refusal(
            R, ("density", RULES[METHODS[method].rule].name), options={"method": method}
        )
        for method in NEED_DENSITY
    }
    | {
        f"density {density}": Refusal(
            R,
            ("density", "[0, 1]", str(density)),
            options={"method": "ties", "density": density},
            facts={"option": "density"},
        )
        for density in (-0.1, 1.01, 20.0, math.nan, math.inf)
    }
    | {
        f"gamma {gamma}": Refusal(
            R,
            ("gamma", "number" if math.isnan(gamma) else "[0, 1]", str(gamma)),
            options={"method": "breadcrumbs", "density": 0.5, "parameters": {"gamma": gamma}},
            facts={"option": "parameters"},
        )
        for gamma in (-0.1, 1.01, math.nan)
    }
    | {
        "gamma and density above 1": Refusal(
            R,
            ("0.9", "0.2", "at most 1"),
            options={"method": "breadcrumbs", "density": 0.9, "parameters": {"gamma": 0.2}},
            facts={"option": "parameters"},
        ),
        "a gamma that does not go": Refusal(
            R,
            ("gamma", "ties"),
            options={"method": "ties", "density": 0.9, "parameters": {"gamma": 0.01}},
            facts={"option": "parameters"},
        ),
        "densities of what is kept of all": Refusal(
            R,
            ("sce", "same for all", "0.2", "0.5"),
            options={"method": "sce", "density": [0.2, 0.5]},
            facts={"option": "density"},
        ),
        "odds of nothing": Refusal(
            R,
            ("della", "probability 0:", "(0, 1]"),
            options={"method": "della", "density": 0.25, "parameters": {"epsilon": 0.5}},
            facts={"option": "parameters"},
        ),
        "odds of less than nothing": Refusal(
            R,
            ("della_linear", "probability -0.06", "(0, 1]"),
            options={"method": "della_linear", "density": [0.5, 0.01]},
            facts={"option": "parameters"},
        ),
        "odds above one": Refusal(
            R,
            ("della", "probability 1.07", "(0, 1]"),
            options={"method": "della", "density": 1.0},
            facts={"option": "parameters"},
        ),
        "parameters that are no mapping": Refusal(
            R,
            ("parameters", "mapping"),
            options={"method": "breadcrumbs", "density": 0.5, "parameters": [0.1]},
            facts={"option": "parameters"},
        ),
        "a parameter that is no number": Refusal(
            R,
            ("gamma", "number", "much"),
            options={"method": "breadcrumbs", "density": 0.5, "parameters": {"gamma": "much"}},
            facts={"option": "parameters"},
        ),
    }
    | {
        f"a density that does not go, {method}": Refusal(
            R, ("density",), options={"method": method, "density": 0.5}
        )
        for method in NEED_NONE
    }
    | {
        f"a {option} that does not go, {method}": Refusal(
            R,
            (option, METHODS[method].space),
            options={"method": method, option: value}
            | ({"density": 0.5} if method in NEED_DENSITY else {}),
            facts={"option": option},
        )
        for method in METHODS
        if method not in TRUNCATE
        for option, value in (("rank", 4), ("clamp", 0.9))
    }
)

REFUSALS = {
    f"{table}: {name}": refusal
    for table, refusals in {
        "file": FILES,
        "config": CONFIGS,
        "tensors": TENSORS,
        "together": TOGETHER,
        "option": OPTIONS,
    }.items()
    for name, refusal in refusals.items()
}


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    return tmp_path / "bad"


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "good", LAYERS, seed=0)


def make_bad(refusal: Refusal, bad: Path) -> None:
    if refusal.build is None:
        write_adapter(bad, LAYERS, seed=1)
    else:
        refusal.build(bad)


def check_words(refusal: Refusal, message: str, good: Path, bad: Path) -> None:
    for word in refusal.words:
        assert word.replace("{good}", str(good)).replace("{bad}", str(bad)) in message


@pytest.mark.parametrize("name", REFUSALS)
def test_the_command_refuses(name: str, good: Path, bad: Path, tmp_path: Path) -> None:
    refusal = REFUSALS[name]
    make_bad(refusal, bad)
    before = contents(tmp_path)
    for command in ("merge", "plan"):
        result = run(command, [good, bad], tmp_path / "out", refusal.options)
        assert result.exit_code == 2, result.output
        assert isinstance(result.exception, SystemExit), repr(result.exception)
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        check_words(refusal, result.stderr, good, bad)
        assert contents(tmp_path) == before


@pytest.mark.parametrize("name", REFUSALS)
def test_the_call_refuses(name: str, good: Path, bad: Path, tmp_path: Path) -> None:
    refusal = REFUSALS[name]
    make_bad(refusal, bad)
    before = contents(tmp_path)
    with pytest.raises(errors.RefusedError) as merging:
        streammerge.merge([good, bad], tmp_path / "out", on_event=events.ignore, **refusal.options)
    with pytest.raises(errors.RefusedError) as planning:
        streammerge.plan([good, bad], **refusal.options)
    assert contents(tmp_path) == before
    for caught in (merging, planning):
        assert caught.type is refusal.error
        check_words(refusal, str(caught.value), good, bad)
        for fact, value in refusal.facts.items():
            assert getattr(caught.value, fact) == value
        if isinstance(caught.value, errors.AdapterError):
            assert Path(caught.value.path).is_relative_to(bad)


# ---------------------------------------------------------------------------------------------
# What only one of the two ways in can be asked

USAGE = {
    "no adapters": ([], ["-o", "{out}"], "ADAPTERS"),
    "no output": (["{good}"], [], "--output"),
    "weights that are no numbers": (["{good}"], ["-o", "{out}", "--weights=1,two"], "1,two"),
    "an empty weight": (["{good}", "{bad}"], ["-o", "{out}", "--weights=1,"], "1,"),
    "a rank that is no whole number": (["{good}"], ["-o", "{out}", "--rank=1.5"], "1.5"),
    "a density that is no number": (["{good}"], ["-o", "{out}", "--density=half"], "half"),
    "a scaling that is no number": (["{good}"], ["-o", "{out}", "--scaling=auto"], "auto"),
    "an unknown option": (["{good}"], ["-o", "{out}", "--densty=0.2"], "--densty"),
}


@pytest.mark.parametrize("name", USAGE)
def test_usage(name: str, good: Path, bad: Path, tmp_path: Path) -> None:
    write_adapter(bad, LAYERS, seed=1)
    before = contents(tmp_path)
    adapters, options, word = USAGE[name]
    names = {"good": good, "bad": bad, "out": tmp_path / "out"}
    arguments = [argument.format(**names) for argument in (*adapters, *options)]
    result = CliRunner().invoke(main, ["merge", *arguments])
    assert result.exit_code == 2
    assert word in result.stderr
    assert contents(tmp_path) == before


CALLS = {
    "no adapters": ([], {}, "adapters"),
    "one path for a list": ("good", {}, "adapters"),
    "a rank that is true": (["good"], {"rank": True}, "rank"),
    "a rank that is a float": (["good"], {"rank": 4.0}, "rank"),
    "weights that are words": (["good"], {"weights": ["one"]}, "weights"),
    "weights that are nothing": (["good"], {"weights": [None]}, "weights"),
    "a density that is a word": (["good"], {"method": "ties", "density": "0.2"}, "density"),
    "a scaling that is a word": (["good"], {"scaling": "auto"}, "scaling"),
    "a size that is true": (["good"], {"max_memory": True}, "max_memory"),
    "a seed that is a float": (["good"], {"seed": 1.0}, "seed"),
}


@pytest.mark.parametrize("name", CALLS)
def test_arguments(name: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(good.parent)
    adapters, options, option = CALLS[name]
    before = contents(tmp_path)
    with pytest.raises(errors.RecipeError, match=option) as caught:
        streammerge.merge(adapters, tmp_path / "out", **options)
    assert caught.value.option == option
    assert contents(tmp_path) == before


# ---------------------------------------------------------------------------------------------
# The output's name


def a_full_directory(out: Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")


def a_link_to_nothing(out: Path) -> None:
    out.symlink_to(out.parent / "nowhere")


def a_link_to_an_empty_directory(out: Path) -> None:
    (out.parent / "empty").mkdir()
    out.symlink_to(out.parent / "empty")


def an_adapter(out: Path) -> None:
    write_adapter(out, LAYERS)


EXISTING = {
    "a directory with files": a_full_directory,
    "a file": lambda out: out.write_text("years of work"),
    "a link to nothing": a_link_to_nothing,
    "a link to an empty directory": a_link_to_an_empty_directory,
    "an adapter of another's": an_adapter,
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", EXISTING)
def test_an_existing_output(name: str, overwrite: bool, good: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    EXISTING[name](out)
    before = contents(tmp_path)
    options = {"overwrite": True} if overwrite else {}
    for command in ("merge", "plan"):
        result = run(command, [good], out, options)
        assert result.exit_code == 2
        assert f"error: {out}: exists" in result.stderr
    with pytest.raises(errors.OutputExistsError, match="another name"):
        streammerge.merge([good], out, overwrite=overwrite)
    with pytest.raises(errors.OutputExistsError, match="another name"):
        streammerge.plan([good], out, overwrite=overwrite)
    assert contents(tmp_path) == before


# ---------------------------------------------------------------------------------------------
# What only the work itself finds

SMALL = {"block.up": linear(12, 8, 2), "block.down": linear(8, 12, 2)}
LARGE = {"block.up": linear(300, 280, 2), "block.down": linear(12, 280, 2)}
ROUTES = {
    "concatenate": (SMALL, {"method": "cat"}),
    "fold, linear": (SMALL, {"method": "linear"}),
    "fold, ties": (SMALL, {"method": "ties", "density": 0.5}),
    "fold, dare_ties": (SMALL, {"method": "dare_ties", "density": 0.5}),
    "core": (SMALL, {"method": "svd"}),
    "dense": (SMALL, {"method": "ties_svd", "density": 0.5}),
    "krylov, magnitude_prune": (LARGE, {"method": "magnitude_prune_svd", "density": 0.5}),
    "krylov, dare_linear": (LARGE, {"method": "dare_linear_svd", "density": 0.5}),
}
NAMES = {"nan": "NaN", "inf": "infinity", "-inf": "infinity"}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("side", "value", "dtype"),
    [("A", "nan", "F32"), ("B", "inf", "BF16"), ("B", "nan", "F16"), ("A", "-inf", "F64")],
)
def test_values_that_are_not_finite(
    side: str, value: str, dtype: str, route: str, workers: int, tmp_path: Path
) -> None:
    targets, options = ROUTES[route]
    tensor = f"{PREFIX}block.up.lora_{side}.weight"
    good = write_adapter(tmp_path / "good", targets, seed=0, dtype=dtype)
    sound = make_factors(targets, seed=1, dtype=dtype)
    spoilt = put(sound[tensor], 13, float(value))
    bad = write_adapter(tmp_path / "bad", targets, seed=1, dtype=dtype, extra={tensor: spoilt})
    before = contents(tmp_path)
    with pytest.raises(errors.NonFiniteError) as caught:
        streammerge.merge([good, bad], tmp_path / "out", workers=workers, **options)
    assert caught.value.tensor == tensor
    assert caught.value.path == str(bad / WEIGHTS)
    assert caught.value.value == NAMES[value]
    result = run("merge", [good, bad], tmp_path / "out", {"workers": workers, **options})
    assert result.exit_code == 1
    assert f"error: {bad / WEIGHTS}: {tensor}: holds {NAMES[value]}" in result.stderr
    assert result.stdout == ""
    assert contents(tmp_path) == before


@pytest.mark.parametrize("route", ROUTES)
def test_values_too_large_for_float16(route: str, tmp_path: Path) -> None:
    targets, options = ROUTES[route]
    good = write_adapter(tmp_path / "good", targets, seed=0)
    before = contents(tmp_path)
    options = {**options, "weights": [1e12], "dtype": "float16"}
    with pytest.raises(errors.OutputOverflowError) as caught:
        streammerge.merge([good], tmp_path / "out", workers=1, **options)
    assert caught.value.dtype == "float16"
    assert caught.value.value > 65504
    assert caught.value.tensor.startswith(PREFIX + "block.")
    result = run("merge", [good], tmp_path / "out", {"workers": 1, **options})
    assert result.exit_code == 1
    assert f"{caught.value.tensor}: a merged value of magnitude" in result.stderr
    assert f"{caught.value.value:.6g}" in result.stderr
    assert "bfloat16" in result.stderr
    assert contents(tmp_path) == before


def test_the_value_that_is_too_large_is_named(tmp_path: Path) -> None:
    factors = make_factors({"up": linear(6, 5, 2)}, seed=3)
    key = f"{PREFIX}up.lora_A.weight"
    largest = float(np.abs(decode(factors[key])).max())
    write_files(tmp_path / "in", factors, make_config({"up": linear(6, 5, 2)}))
    with pytest.raises(errors.OutputOverflowError) as caught:
        streammerge.merge(
            [tmp_path / "in"], tmp_path / "out", method="cat", weights=[1e5], dtype="float16"
        )
    assert caught.value.tensor == key
    # alpha is twice the rank, so that the scaling is 2.
    assert caught.value.value == pytest.approx(2e5 * largest, rel=1e-6)


@pytest.mark.parametrize("route", ROUTES)
def test_values_too_large_for_float32(route: str, tmp_path: Path) -> None:
    """Of the arithmetic or of the output: either way it is an error with a name."""
    targets, options = ROUTES[route]
    adapters = []
    for seed in range(2):
        factors = make_factors(targets, seed=seed)
        large = {name: encode(decode(tensor) * 1e30) for name, tensor in factors.items()}
        adapters.append(write_adapter(tmp_path / f"{seed}", targets, extra=large))
    before = contents(tmp_path)
    for workers in (1, 2):
        with pytest.raises(errors.MergeFailedError, match=r"block\..*(range|magnitude)"):
            streammerge.merge(
                adapters, tmp_path / "out", workers=workers, weights=[1e20, -1e20], **options
            )
        assert contents(tmp_path) == before


def test_a_float64_value_beyond_float32_is_no_infinity(tmp_path: Path) -> None:
    factors = make_factors(SMALL, seed=0, dtype="F64")
    large = {UP_A: put(factors[UP_A], 3, 1e300)}
    good = write_adapter(tmp_path / "good", SMALL, dtype="F64", extra=large, lora_alpha=1)
    streammerge.merge([good], tmp_path / "exact", method="cat", compute_dtype="float64")
    with pytest.raises(errors.MergeFailedError) as caught:
        streammerge.merge([good], tmp_path / "out", method="cat")
    assert UP_A in str(caught.value)
    assert "infinity" not in str(caught.value)
    assert "1e+300" in str(caught.value)


def test_a_failed_merge_leaves_an_earlier_output_alone(tmp_path: Path) -> None:
    good = write_adapter(tmp_path / "good", SMALL, seed=0)
    spoilt = {UP_A: put(make_factors(SMALL)[UP_A], 0, math.nan)}
    bad = write_adapter(tmp_path / "bad", SMALL, extra=spoilt)
    streammerge.merge([good], tmp_path / "out", method="cat")
    before = contents(tmp_path)
    with pytest.raises(errors.NonFiniteError):
        streammerge.merge([good, bad], tmp_path / "out", method="cat", overwrite=True)
    assert contents(tmp_path) == before


# ---------------------------------------------------------------------------------------------
# Names that would do something to a terminal

ESCAPE = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e"
SHOWN = r"\x1b[2J\x1b]0;owned\x07\x9b31m\u202e"

ESCAPES = {
    "a factor alone": (
        "merge",
        lambda bad: write_adapter(
            bad, LAYERS, extra={f"{PREFIX}{ESCAPE}.lora_A.weight": encode(np.ones((2, 2)))}
        ),
        {},
        2,
    ),
    "an extra tensor": ("merge", extra(f"{PREFIX}{ESCAPE}"), {}, 2),
    "a tensor of an odd entry": (
        "merge",
        weights_of(frame(json.dumps({ESCAPE: {"dtype": "F32"}}).encode())),
        {},
        2,
    ),
    "a tensor named twice": (
        "merge",
        weights_of(frame(f"{{{json.dumps(ESCAPE)}: 1, {json.dumps(ESCAPE)}: 2}}".encode())),
        {},
        2,
    ),
    "a dtype": ("merge", weights_of(header_of(dtype=ESCAPE)), {}, 2),
    "a base": ("merge", config(base_model_name_or_path=ESCAPE), {"strict_base": True}, 2),
    "a base, in a note": ("merge", config(base_model_name_or_path=ESCAPE), {}, 0),
    "a peft_type": ("merge", config(peft_type=ESCAPE), {}, 2),
    "a pattern": ("merge", config(rank_pattern={ESCAPE + "(": 1}), {}, 2),
    "a target, in a note": (
        "merge",
        lambda bad: write_adapter(bad, {ESCAPE: linear(4, 4, 2)}),
        {},
        0,
    ),
    "a target, in a plan": (
        "plan",
        lambda bad: write_adapter(bad, {ESCAPE: linear(400, 400, 2)}),
        {},
        0,
    ),
    "a target without memory": (
        "merge",
        lambda bad: write_adapter(bad, {ESCAPE: linear(400, 400, 2)}),
        {"max_memory": "1MiB"},
        2,
    ),
    "a target with infinity": (
        "merge",
        lambda bad: write_files(
            bad,
            {n: put(t, 0, math.inf) for n, t in make_factors({ESCAPE: linear(4, 4, 2)}).items()},
            make_config({ESCAPE: linear(4, 4, 2)}),
        ),
        {},
        1,
    ),
}


@pytest.mark.parametrize("name", ESCAPES)
def test_escape_sequences_are_shown_not_sent(
    name: str, good: Path, bad: Path, tmp_path: Path
) -> None:
    command, build, options, code = ESCAPES[name]
    build(bad)
    result = run(command, [good, bad], tmp_path / "out", options)
    assert result.exit_code == code, result.output
    assert_harmless(result.output)
    assert SHOWN in result.output


def test_escape_sequences_in_paths(good: Path, tmp_path: Path) -> None:
    odd = write_adapter(tmp_path / ESCAPE.replace("/", ""), LAYERS, seed=1)
    out = tmp_path / (ESCAPE + "out")
    for arguments in (
        ["merge", str(odd / "gone"), "-o", str(out)],
        ["merge", str(good), str(odd), "-o", str(out), "--method=cat"],
        ["merge", str(good), str(odd), "-o", str(out), "--method=cat"],
        ["inspect", str(odd)],
        ["verify", str(out)],
        ["verify", str(odd)],
        ["verify", str(odd / "gone")],
    ):
        result = CliRunner().invoke(main, arguments)
        assert_harmless(result.output)
        assert SHOWN in result.output


def test_escape_sequences_in_what_inspect_shows(tmp_path: Path) -> None:
    targets = {f"block.{ESCAPE}": linear(4, 4, 2)}
    odd = write_adapter(
        tmp_path / "odd",
        targets,
        prefix=PREFIX,
        extra={ESCAPE: encode(np.ones(3))},
        base_model_name_or_path=ESCAPE,
        task_type=ESCAPE,
    )
    for flags in ([], ["--json"]):
        result = CliRunner().invoke(main, ["inspect", str(odd), *flags])
        assert result.exit_code == 0
        assert_harmless(result.output)
    facts = json.loads(result.stdout)[0]
    assert facts["base model"] == ESCAPE


def assert_harmless(text: str) -> None:
    odd = {c for c in text if c != "\n" and not c.isprintable()}
    assert not odd


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_half_a_surrogate_pair_in_a_name(method: str, tmp_path: Path) -> None:
    odd = write_adapter(tmp_path / "odd", {"block.\ud800": linear(4, 4, 2)})
    before = contents(tmp_path)
    with pytest.raises(errors.CorruptFileError):
        streammerge.merge([odd], tmp_path / "out", method=method)
    assert contents(tmp_path) == before


def test_bytes_that_are_no_text_in_a_path(tmp_path: Path) -> None:
    odd = write_adapter(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")), LAYERS)
    out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/out\xfe"))
    streammerge.merge([odd], out, method="cat")
    assert streammerge.verify(out).checksums
    result = CliRunner().invoke(main, ["inspect", str(odd)])
    assert result.exit_code == 0
    assert_harmless(result.output)
