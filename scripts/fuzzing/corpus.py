"""Sound and real directories, from which the mutations start."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from fuzzing.directories import Directory, File, write_directory
from making import (
    CONFIG,
    INDEX,
    WEIGHTS,
    Layer,
    convolution,
    embedding,
    linear,
    make_config,
    make_factors,
    render,
)
from streammerge.adapter import NameTable
from streammerge.budget import Budget
from streammerge.output.header import metadata_of
from streammerge.output.record import write_config, write_record
from streammerge.output.writer import RegionReader, allocate
from streammerge.planner import make_plan
from streammerge.readers import read_adapter
from streammerge.recipe import Recipe
from streammerge.recipe_file import write_recipe

LAYERS = {
    "model.words": embedding(6, 40, 3),
    "model.patches": convolution(8, 3, (2, 2), 3),
    "model.0.up": linear(20, 12, 3),
    "model.0.down": linear(12, 20, 5),
}
ONE = {"up": linear(3, 2, 1)}
SHARDS = ("adapter_model-00001-of-00002.safetensors", "adapter_model-00002-of-00002.safetensors")

MOST_HEAD_BYTES = 2**17
"""Of real files so much is kept at most: the header, not the data."""


def synthetic() -> dict[str, Directory]:
    """Small sound directories by name: one file, shards, an output with its record."""
    plain = one_file(LAYERS, rank_pattern={"0.down": 5}, alpha_pattern={r".*\.up": 2.5, "words": 1})
    return {
        "plain": plain,
        "one": one_file(ONE),
        "no config": {WEIGHTS: plain[WEIGHTS]},
        "shards": sharded(LAYERS),
        "output": output(plain),
    }


def one_file(layers: Mapping[str, Layer], **config: object) -> dict[str, File]:
    """An adapter of one file."""
    return {
        CONFIG: as_json(make_config(layers, **config)),
        WEIGHTS: File(render(make_factors(layers))),
    }


def sharded(layers: Mapping[str, Layer]) -> dict[str, File]:
    """An adapter of two files and an index; A and B of a target lie in different ones."""
    factors = make_factors(layers)
    halves = [dict(list(factors.items())[i::2]) for i in range(2)]
    weight_map = {key: name for name, half in zip(SHARDS, halves, strict=True) for key in half}
    return {
        CONFIG: as_json(make_config(layers)),
        INDEX: as_json({"metadata": {"total_size": 1}, "weight_map": weight_map}),
        **{name: File(render(half)) for name, half in zip(SHARDS, halves, strict=True)},
    }


def output(source: Directory) -> Directory:
    """What a merge leaves behind, its tensors zeros; made without the libraries that compute."""
    with tempfile.TemporaryDirectory() as place:
        write_directory(Path(place) / "in", source)
        manifest = read_adapter(str(Path(place) / "in"), NameTable())
        recipe = Recipe(adapters=("in",), weights=(1.0,), method="cat")
        plan = make_plan([manifest], recipe, Budget(2**34, "fuzzing"))
        out = Path(place) / "out"
        out.mkdir()
        regions = plan.regions
        (start,) = allocate(out, plan.files, regions, metadata_of(plan))
        write_config(out, plan, write_recipe(plan.recipe))
        with RegionReader(out, (WEIGHTS,), (start,)) as reader:
            sums = {region.name: reader.checksum(region) for region in regions}
        write_record(out, plan, {"inputs": []}, sums)
        return {path.name: File(path.read_bytes()) for path in sorted(out.iterdir())}


def as_json(value: object) -> File:
    """A file that holds a value as JSON."""
    return File(json.dumps(value).encode())


def real() -> dict[str, Directory]:
    """Adapters by many authors and broken files from $STREAMMERGE_ADAPTERS; nothing without it.

    Of weights only the headers are taken.
    """
    beside = Path(__file__).resolve().parents[2].parent / "shared" / "adapters"
    folder = Path(os.environ.get("STREAMMERGE_ADAPTERS", beside))
    return dict(_found(folder)) if folder.is_dir() else {}


def _found(folder: Path) -> Iterator[tuple[str, Directory]]:
    for place in sorted(folder.glob("[!_]*/*")) + sorted(folder.glob("_loners/*")):
        found = {name: _head(place / name) for name in (CONFIG, WEIGHTS) if (place / name).exists()}
        yield f"{place.parent.name}/{place.name}", found
    sound = one_file(ONE)
    for path in sorted((folder / "_hostile").glob("*.safetensors")):
        yield path.name, sound | {WEIGHTS: _head(path)}
    for path in sorted((folder / "_hostile").glob("*_config.json")):
        yield path.name, sound | {CONFIG: _head(path)}


def _head(path: Path) -> File:
    with path.open("rb") as stream:
        return File(stream.read(MOST_HEAD_BYTES), path.stat().st_size)
