"""Random adapters and recipes: small, and odd wherever a merge may trip."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from making import (
    PREFIX,
    Layer,
    Tensor,
    convolution,
    decode,
    embedding,
    encode,
    linear,
    make_config,
    write_files,
)
from oracle.restated import Source
from streammerge.catalog import METHODS, RULES, SPACES, RuleSpec, SpaceSpec
from streammerge.ranks import RankLimit, RankPolicy

DTYPES = ("F32", "F32", "BF16", "F16", "F64")
OUTPUTS = ("auto", "auto", "float32", "float64", "float16", "bfloat16")
WEIGHTS = (1.0, 1.0, -1.0, 0.0, 0.5, -0.3, 2.0)
DENSITIES = (0.0, 1.0, 0.5, 0.25, 0.2, 0.75, 0.001, 0.999)
SIDES = (1, 2, 3, 8, 13, 40)
WIDE = ((300, 280), (280, 300), (264, 900))
"""Matrices that are not decomposed as a whole."""
MANY = 40
"""A rank of which a few adapters are iterated on."""


@dataclass(frozen=True)
class Held:
    """One adapter: its tensors, its layers, its config, and how its values were drawn."""

    layers: Mapping[str, Layer]
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    dtype: str
    whole: bool
    """Whether all values are small whole numbers, so that any arithmetic on them is exact."""

    def source(self, target: str) -> Source:
        """A target's factors as matrices in float64, with their scaling by PEFT's formula."""
        layer = self.layers[target]
        a, b = (
            decode(self.tensors[PREFIX + target + suffix]).reshape(shape)
            for suffix, shape in zip(
                layer.suffixes, ((layer.rank, -1), (-1, layer.rank)), strict=True
            )
        )
        root = math.sqrt(layer.rank) if self.config["use_rslora"] else layer.rank
        return Source(a, b, self.config["lora_alpha"] / root)


@dataclass(frozen=True)
class Case:
    """Adapters, the options of their merge, and what may make no difference to its bytes."""

    adapters: tuple[Held, ...]
    options: Mapping[str, Any]
    """Of a Recipe."""
    space: str
    rule: str
    io: str
    workers: int
    spare: float
    """Memory beyond the least that works, as a share of it."""
    scratch: bool

    def write(self, folder: Path) -> tuple[str, ...]:
        """Write the adapters; returns where they lie."""
        return tuple(
            str(write_files(folder / f"{i}", held.tensors, held.config))
            for i, held in enumerate(self.adapters)
        )


def make_case(random: Random) -> Case:
    """Draw a case."""
    method = random.choice(list(METHODS))
    rule = RULES[METHODS[method].rule]
    space = random.choice(rule.spaces) if random.random() < 0.25 else METHODS[method].space
    count = random.choice((1, 2, 2, 3, 3, 5))
    if rule.most_adapters and random.random() < 0.9:
        count = min(count, rule.most_adapters)
    adapters = _adapters(random, space, count)
    options: dict[str, Any] = {
        "method": method,
        "space": space if space != METHODS[method].space else None,
        "weights": tuple(random.choice((*WEIGHTS, random.gauss(0, 1))) for _ in range(count)),
        "seed": random.choice((0, 7, 2**64 - 1)),
        "dtype": random.choice(OUTPUTS),
        "compute_dtype": random.choice(("float32", "float32", "float64")),
        "max_shard_bytes": random.choice((None, None, None, 200)),
    }
    options |= _density(random, rule) | {"parameters": _parameters(random, rule, SPACES[space])}
    if rule.sparsity == "middle":
        options["density"] = min(options["density"], 1 - dict(options["parameters"])["gamma"])
    if rule.sparsity == "ranked":
        density = min(max(options["density"], 0.001), 1.0)
        width = 2 * min(density - 0.0005, 1 - density)
        epsilon = random.choice((0.0, random.random() * width, width))
        parameters = dict(options["parameters"]) | {"epsilon": epsilon}
        options |= {"density": density, "parameters": tuple(sorted(parameters.items()))}
    if random.random() < (0.4 if rule.sparsity in ("largest", "middle") else 0.02):
        options["threshold_scope"] = "global"
    if rule.elects:
        options["majority_sign"] = random.choice(("total", "frequency"))
    if SPACES[space].truncates:
        policy = _policy(random) if not rule.of_rank or random.random() < 0.2 else 3
        limit = RankLimit(random.choice((1, 3, 60)))
        options["rank"] = random.choice((None, None, 1, 2, 4, 60, limit, policy))
        # Where all singular values are one, no two ways have the same vectors to be clamped.
        seldom = 60 if rule.of_rank else 20
        options["clamp"] = random.choice((None,) * seldom + (1.0, 0.99, 0.7))
    return Case(
        adapters=adapters,
        options=options,
        space=space,
        rule=rule.name,
        io=random.choice(("mmap", "pread")),
        workers=random.choice((1, 2)),
        spare=random.choice((0.0, 0.01, 0.5, 100.0)),
        scratch=random.random() < 0.3,
    )


def _adapters(random: Random, space: str, count: int) -> tuple[Held, ...]:
    """Draw the adapters; seldom the last one is the first once more, or its opposite, or many times
    as large."""
    shapes = [_shape(random) for _ in range(random.choice((1, 1, 2, 3)))]
    common = [random.choice((1, 2, 3, 5, 9)) for _ in shapes]
    if SPACES[space].truncates and random.random() < 0.15:
        shapes = [("linear", *random.choice(WIDE), ())]
        # But not where a restatement iterates on all of them as long.
        common = [random.choice((*common, MANY)) if space != "ctm" else common[0]]
    mixed = not SPACES[space].equal_ranks or random.random() < 0.03
    adapters = tuple(_held(random, shapes, common, mixed=mixed) for _ in range(count))
    if count == 1 or random.random() < 0.85:
        return adapters
    first = adapters[0]
    times = random.choice((1, 1, -1, -1, -3, 1e3))
    config = {**first.config, "lora_alpha": first.config["lora_alpha"] * times}
    return (*adapters[:-1], replace(first, config=config))


def _density(random: Random, rule: RuleSpec) -> dict[str, Any]:
    if not rule.needs_density:
        return {}
    return {"density": random.choice((*DENSITIES, random.random()))}


def _parameters(random: Random, rule: RuleSpec, space: SpaceSpec) -> tuple[tuple[str, float], ...]:
    """Values of all that the rule and the space take, in the order of their names."""
    drawn: dict[str, float] = {
        "gamma": random.choice((0.01, 0.0, random.random())) if random.random() < 0.9 else 1.0,
        "epsilon": 0.0,  # there is more to it, which hangs on the density
        "tall_lambda": random.choice((0.4, 1.0, 0.0, random.random())),
        "agree": random.choice((0, 1, 2, 2, 3, 9)),
        "common": random.choice((0.8, 0.8, 0.5, 0.0, 1.0, random.random())),
        "beta": random.choice((0.25, 0.0, 1.0, random.random())),
    }
    return tuple(sorted((x.name, drawn[x.name]) for x in (*rule.parameters, *space.parameters)))


def _policy(random: Random) -> RankPolicy:
    largest = random.choice((None, 1, 3, 60))
    if random.random() < 0.5:
        return RankPolicy("energy", random.choice((1.0, 0.5, 0.99, 1 - random.random())), largest)
    return RankPolicy("error", random.choice((0.0, 0.1, random.random())), largest)


Shape = tuple[str, int, int, tuple[int, ...]]


def _shape(random: Random) -> Shape:
    kind = random.choice(("linear", "linear", "embedding", "convolution"))
    m, n = random.choice(SIDES), random.choice(SIDES)
    kernel = random.choice(((3,), (1, 1), (2, 3), (1, 2, 2)))
    return kind, m, n, kernel if kind == "convolution" else ()


def _layer(shape: Shape, rank: int) -> Layer:
    kind, m, n, kernel = shape
    if kind == "convolution":
        return convolution(m, n, kernel, rank)
    return embedding(m, n, rank) if kind == "embedding" else linear(m, n, rank)


def _held(random: Random, shapes: list[Shape], common: list[int], *, mixed: bool) -> Held:
    """An adapter that has all targets or some of them."""
    taken = [i for i in range(len(shapes)) if random.random() < 0.85] or [0]
    ranks = [random.choice((1, 2, 4, 7)) if mixed and random.random() < 0.5 else r for r in common]
    layers = {f"block.{i}.up": _layer(shapes[i], ranks[i]) for i in taken}
    dtype, way = random.choice(DTYPES), random.choice(("normal", "normal", "whole", "zero", "few"))
    generator = np.random.default_rng(random.getrandbits(32))
    tensors = {
        PREFIX + target + suffix: encode(_values(generator, shape, way), dtype)
        for target, layer in layers.items()
        for suffix, shape in zip(layer.suffixes, (layer.a, layer.b), strict=True)
    }
    config = make_config(layers)
    rank = config["r"]
    alpha = random.choice((rank, rank * 2, rank / 2, rank * 2, 16, 1, -rank, 0, 3.3))
    rslora = random.random() < 0.15
    config |= {"lora_alpha": alpha, "use_rslora": rslora}
    return Held(layers, tensors, config, dtype, whole=way in ("whole", "zero"))


def _values(generator: np.random.Generator, shape: tuple[int, ...], way: str) -> np.ndarray:
    if way == "whole":
        return generator.integers(-2, 3, shape).astype(np.float64)
    if way == "zero":
        return np.zeros(shape) if shape[0] % 2 or generator.random() < 0.5 else np.ones(shape)
    values = generator.standard_normal(shape)
    return np.where(generator.random(shape) < 0.2, values, 0.0) if way == "few" else values
