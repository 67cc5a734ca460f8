"""From three adapters to a merged one on the Hub, and from there into PEFT, as a user types it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, snapshot_download
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load
from transformers import LlamaForCausalLM

import hub_demo
import streammerge
from hub_here import hub_here
from hub_uploads import Hub

# huggingface_hub sends its commits in a way that the newest httpx does not like.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

hub = pytest.fixture(hub_here)


def test_the_seed_example(hub: Hub, tmp_path: Path) -> None:
    base = hub_demo.make_base(tmp_path)
    adapters = hub_demo.make_adapters(base, tmp_path)
    api = HfApi()
    for name, folder in adapters.items():
        api.create_repo(name)
        api.upload_folder(repo_id=name, folder_path=folder)
    hub_demo.run_merge(adapters, tmp_path / "OUT", hub.variables(tmp_path / "home"))

    pushed = hub.files(hub_demo.MERGED)
    assert b"tmp" not in pushed["README.md"] + pushed["streammerge.json"]
    written = hub_demo.generate(base, cache_dir=tmp_path / "cache")
    assert written.startswith("the adapters of ")
    assert len(written.split()) > 3

    # Downloaded it is an output like any other.
    snapshot = snapshot_download(hub_demo.MERGED, cache_dir=tmp_path / "cache")
    assert streammerge.verify(snapshot).checksums

    expected = merged_by_peft(base, adapters)
    found = load(pushed["adapter_model.safetensors"])
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def merged_by_peft(base: Path, adapters: dict[str, Path]) -> dict[str, torch.Tensor]:
    """What add_weighted_adapter makes of them, with the base in memory."""
    first, *others = adapters.values()
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), first, first.name)
    for folder in others:
        model.load_adapter(folder, folder.name)
    model.add_weighted_adapter(
        list(hub_demo.NAMES),
        list(hub_demo.WEIGHTS),
        "merged",
        combination_type="ties",
        density=hub_demo.DENSITY,
    )
    return dict(get_peft_model_state_dict(model, adapter_name="merged"))
