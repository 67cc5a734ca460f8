"""diffusers' format, written: one file that says by itself how it is to be loaded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors import safe_open

import streammerge
from dialects import METADATA, UNET, deltas, diffusers, kohya, pairs, write_file
from making import PREFIX, encode, linear, write_adapter
from streammerge import errors, events
from streammerge.errors import RecipeError
from streammerge.recipe import Recipe

IMAGE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of unequal ranks, one in either layout, side by side."""
    folder = tmp_path_factory.mktemp("merged")
    paths = [
        write_file(folder / "k.safetensors", kohya(pairs(scaling=0.5))),
        write_file(folder / "d.safetensors", diffusers(pairs(seed=1))),
    ]
    streammerge.merge(paths, folder / "out", method="cat", weights=[1.0, 2.0])
    return folder / "out"


def header(output: Path) -> tuple[dict[str, str], dict[str, list[int]]]:
    with safe_open(output / IMAGE, "np") as file:
        return file.metadata(), {k: file.get_slice(k).get_shape() for k in file.keys()}  # noqa: SIM118


def test_the_files(merged: Path) -> None:
    names = {path.name for path in merged.iterdir()}
    ours = ("streammerge.json", "streammerge-timings.json", "streammerge_config.yml")
    assert names == {IMAGE, *ours}
    metadata, shapes = header(merged)
    assert metadata["format"] == "pt"
    assert set(shapes) == {f"{target}.lora_{s}.weight" for target in UNET for s in "AB"}


def test_it_is_read_back_as_the_sum(merged: Path) -> None:
    first, second = pairs(scaling=0.5), pairs(seed=1)
    found = deltas(streammerge.open_adapter(merged))
    for target in UNET:
        expected = first[target].delta + 2.0 * second[target].delta
        assert abs(found[target] - expected).max() <= 1e-5 * abs(expected).max()
    assert streammerge.verify(merged).targets == len(UNET)


def test_peft_scales_it_by_1_as_diffusers_loads_it(merged: Path) -> None:
    """The metadata of a component are the arguments of a LoraConfig; diffusers injects by it."""
    metadata, shapes = header(merged)
    fields = json.loads(metadata[METADATA])
    assert {name.partition(".")[0] for name in fields} == {"unet", "text_encoder", "text_encoder_2"}
    mine = {k.removeprefix("unet."): v for k, v in fields.items() if k.startswith("unet.")}
    config = peft.LoraConfig(**mine)
    model = torch.nn.Module()
    for target, (m, n, _) in UNET.items():
        if target.startswith("unet."):
            add(model, target.removeprefix("unet."), torch.nn.Linear(n, m, bias=False))
    injected = peft.inject_adapter_in_model(config, model, adapter_name="default")
    layers = {n: x for n, x in injected.named_modules() if isinstance(x, peft.tuners.lora.Linear)}
    assert {f"unet.{name}" for name in layers} == {t for t in UNET if t.startswith("unet.")}
    for name, layer in layers.items():
        assert layer.scaling["default"] == 1.0
        assert layer.r["default"] == shapes[f"unet.{name}.lora_A.weight"][0]


def add(model: torch.nn.Module, path: str, layer: torch.nn.Module) -> None:
    *parents, last = path.split(".")
    for name in parents:
        if not hasattr(model, name):
            model.add_module(name, torch.nn.Module())
        model = getattr(model, name)
    model.add_module(last, layer)


def test_the_bytes_are_the_same_again(merged: Path, tmp_path: Path) -> None:
    paths = [merged.parent / "k.safetensors", merged.parent / "d.safetensors"]
    streammerge.merge(paths, tmp_path / "out", method="cat", weights=[1.0, 2.0], workers=2)
    assert (tmp_path / "out" / IMAGE).read_bytes() == (merged / IMAGE).read_bytes()


def test_an_output_is_an_input_and_may_be_overwritten(merged: Path, tmp_path: Path) -> None:
    streammerge.merge([merged], tmp_path / "out", method="cat")
    streammerge.merge([tmp_path / "out"], tmp_path / "out", method="cat", overwrite=True)
    found = deltas(streammerge.open_adapter(tmp_path / "out"))
    again = deltas(streammerge.open_adapter(merged))
    assert all((found[target] == again[target]).all() for target in again)


def test_a_change_is_found(merged: Path, tmp_path: Path) -> None:
    streammerge.merge([merged], tmp_path / "out", method="cat")
    path = tmp_path / "out" / IMAGE
    data = bytearray(path.read_bytes())
    place = data.index(b"lora_alpha")
    data[place + 5 : place + 10] = b"ALPHA"
    path.write_bytes(data)
    with pytest.raises(errors.VerificationError, match="another header"):
        streammerge.verify(tmp_path / "out")


def test_it_is_resumed(merged: Path, tmp_path: Path) -> None:
    from streammerge.output.staging import Staging

    class Stop(Exception):
        pass

    def stop(event: object) -> None:
        if type(event).__name__ == "TaskDone":
            raise Stop

    with pytest.raises(Stop):
        streammerge.merge([merged], tmp_path / "out", method="cat", workers=1, on_event=stop)
    assert Staging(tmp_path / "out").path.is_dir()
    streammerge.merge([merged], tmp_path / "out", method="cat", workers=1, resume=True)
    streammerge.merge([merged], tmp_path / "free", method="cat")
    assert (tmp_path / "out" / IMAGE).read_bytes() == (tmp_path / "free" / IMAGE).read_bytes()


def test_formats_that_are_asked_for(merged: Path, tmp_path: Path) -> None:
    streammerge.merge([merged], tmp_path / "peft", method="cat", format="peft", max_shard_size=999)
    assert len(list(tmp_path.glob("peft/adapter_model-*"))) > 1
    (target, *_) = sorted(UNET)
    assert streammerge.open_adapter(tmp_path / "peft").target(0) == target
    streammerge.merge([tmp_path / "peft"], tmp_path / "back", method="cat", format="diffusers")
    assert (tmp_path / "back" / IMAGE).read_bytes() == (merged.parent / "out" / IMAGE).read_bytes()


def test_formats_that_do_not_go(merged: Path, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "peft", {"up": linear(4, 3, 2)})
    with pytest.raises(errors.IncompatibleError, match="image model") as mixed:
        streammerge.plan([merged, other])
    assert mixed.value.paths == (str(merged), str(other))
    with pytest.raises(errors.RecipeError, match="up has none") as nameless:
        streammerge.plan([other], format="diffusers")
    assert nameless.value.option == "format"
    with pytest.raises(errors.RecipeError, match="one file") as sharded:
        streammerge.plan([merged], max_shard_size="1MB")
    assert sharded.value.option == "max_shard_size"
    with pytest.raises(errors.RecipeError, match="one of auto, peft, diffusers"):
        Recipe(adapters=("a",), weights=(1.0,), method="cat", format="kohya")


def test_a_head_does_not_go_into_a_file_for_diffusers(tmp_path: Path) -> None:
    path = write_adapter(
        tmp_path / "in",
        {"unet.mid.to_q": linear(8, 8, 2)},
        extra={f"{PREFIX}unet.head.weight": encode(np.ones((2, 2), np.float32))},
        modules_to_save=["head"],
    )
    options = {"format": "diffusers", "method": "cat", "on_event": events.ignore}
    with pytest.raises(RecipeError, match=r"holds LoRA factors alone, and .*head\.weight is none"):
        streammerge.plan([path], format="diffusers", method="cat", extras="first")
    streammerge.merge([path], tmp_path / "out", extras="drop", **options)
    assert streammerge.verify(tmp_path / "out").targets == 1


def test_the_usual_rank_is_that_of_targets(tmp_path: Path) -> None:
    """However many heads there are beside one target."""
    head = encode(np.ones((2, 2), np.float32))
    path = write_adapter(
        tmp_path / "in",
        {"q": linear(8, 8, 2)},
        extra={f"{PREFIX}head.{i}.weight": head for i in range(3)},
        modules_to_save=["head"],
    )
    assert streammerge.plan([path], extras="first").usual_rank == 2
