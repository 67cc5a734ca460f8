"""The whole way on one machine: a tiny Llama, three adapters on a Hub, merged, pushed, and loaded.

The Hub is the tests' own, on this machine; against the real one the same commands work as they are.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hub_uploads import Hub, serving

SENTENCES = (
    "the adapters of a model are merged into one",
    "a model is made of many layers",
    "one of the layers is not like the others",
)
NAMES = ("a", "b", "c")
WEIGHTS = (2.0, 0.3, 0.7)
DENSITY = 0.2
MERGED = "u/merged"
MERGE = (
    "streammerge merge {adapters} -o {output} --method ties --weights 2.0,0.3,0.7 --density 0.2 "
    "--push u/merged"
)


def make_base(folder: Path) -> Path:
    """Make a random Llama and a tokenizer, saved as any base model is."""
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = ["<unk>", "<s>", "</s>"]
    words.train_from_iterator(SENTENCES, trainers.WordLevelTrainer(special_tokens=specials))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder / "base"


def make_adapters(base: Path, folder: Path) -> dict[str, Path]:
    """Make three adapters of the base with random factors, saved by PEFT."""
    made = {}
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "v_proj", "down_proj"],
            task_type="CAUSAL_LM",
            init_lora_weights=False,
        )
        model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
        model.save_pretrained(folder / name)
        made[f"u/{name}"] = folder / name
    return made


def run_merge(adapters: Iterable[object], output: Path, variables: Mapping[str, str]) -> str:
    """Type the command that merges the adapters and pushes the result; return it."""
    listed = " ".join(shlex.quote(str(adapter)) for adapter in adapters)
    command = MERGE.format(adapters=listed, output=shlex.quote(str(output)))
    words = [sys.executable, "-m", "streammerge.cli", *shlex.split(command)[1:]]
    subprocess.run(words, check=True, env=os.environ | dict(variables))
    return command


def generate(base: Path, **where: Any) -> str:
    """Load the merged adapter from the Hub, as PEFT does, and let the model write."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), MERGED, **where)
    asked = tokenizer("the adapters of", return_tensors="pt")
    written = model.generate(**asked, max_new_tokens=8, do_sample=False, pad_token_id=2)
    return str(tokenizer.decode(written[0]))


def upload(hub: Hub, adapters: Mapping[str, Path]) -> None:
    """Put the adapters on the Hub."""
    for name, path in adapters.items():
        hub.add(name, path)


def main() -> None:
    """Go the whole way, and show it; with a base as argument, only load and generate."""
    if sys.argv[1:]:
        print(generate(Path(sys.argv[1])))
        return
    with tempfile.TemporaryDirectory() as name, serving() as hub:
        folder = Path(name)
        base = make_base(folder)
        adapters = make_adapters(base, folder)
        upload(hub, adapters)
        variables = hub.variables(folder / "home")
        print(f"$ {run_merge(adapters, folder / 'OUT', variables)}", flush=True)
        print(f"{MERGED}, loaded by PEFT, writes:", flush=True)
        loading = [sys.executable, __file__, str(base)]
        subprocess.run(loading, check=True, env=os.environ | variables)
        print(f"\nIts card:\n\n{hub.files(MERGED)['README.md'].decode()}")


if __name__ == "__main__":
    main()
