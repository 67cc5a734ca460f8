"""The model card of a merged adapter: README.md as the Hub takes it, made from record and config.

All that comes out of files is hostile until it is here: it stands in code spans and code blocks
that it cannot leave, and only what can be the id of a model gets into the front matter. Of paths
only the last part is shown. A license is not known, so none is stated.

The front matter's fields: https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import xxhash
import yaml

from streammerge.errors import printable
from streammerge.publishing.public import (
    adapter_names,
    is_model_id,
    last_part,
    pinned_names,
    public_recipe,
)

CARD_NAME = "README.md"

SHOWN_ADAPTERS, SHOWN_MODULES, SHOWN_BASES = 50, 5, 20
"""Of each so many are listed; streammerge.json has them all."""

SHOWN_CHARACTERS = 200
"""Of a name; a card is read by people."""

_DIFFUSERS = "pytorch_lora_weights"
"""How diffusers names a file of weights."""

_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""The class of transformers that loads the base of a PEFT task type."""

_QUIET = ("adapters", "weights", "method", "max_shard_bytes")
"""Of the recipe; they are said elsewhere, or do not matter."""

_FOOT = re.compile(r"<!-- streammerge card ([0-9a-f]{32}) -->\n?")


def render_card(record: Mapping[str, Any], config: Mapping[str, Any] | None, repo: str) -> str:
    """Return README.md for an output that is published as `repo`.

    Args:
        record: what its streammerge.json says.
        config: what its adapter_config.json says, None where it has none.
        repo: the id under which it will be found, a checked one.
    """
    bases = _bases(record, config)
    if "recipe" in record:
        record = {**record, "recipe": public_recipe(record["recipe"])}
    sections = [
        _front_matter(record, bases),
        f"# {repo.rsplit('/', 1)[-1]}\n\n{_introduction(record)}",
        "## What was merged\n\n" + "\n".join(_merged(record, bases)),
        "## How\n\n" + "\n".join(_how(record, config)),
        "## Figures\n\n" + "\n".join(_figures(record)),
        "## How to load it\n\n" + _loading(record, config, bases, repo),
        "## How to make it again\n\n" + _again(record),
    ]
    text = "\n\n".join(section for section in sections if section) + "\n\n"
    return f"{text}<!-- streammerge card {_digest(text)} -->\n"


def is_own_card(text: str) -> bool:
    """Return whether a README.md is a card as `render_card` made it, and nobody has edited it."""
    found = _FOOT.search(text)
    return (
        found is not None
        and found.end() == len(text)
        and found.group(1) == _digest(text[: found.start()])
    )


def _digest(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())


def _bases(record: Mapping[str, Any], config: Mapping[str, Any] | None) -> list[str]:
    """Return every base model that is named, each once, the output's own first."""
    named = [(config or {}).get("base_model_name_or_path")]
    named += [record.get("recipe", {}).get("base_model")]
    named += [entry.get("base_model") for entry in record.get("inputs", ())]
    return list(dict.fromkeys(name for name in named if isinstance(name, str) and name))


def _front_matter(record: Mapping[str, Any], bases: Sequence[str]) -> str:
    ids = [base for base in bases if is_model_id(base)][:SHOWN_BASES]
    library = _library(record)
    fields: dict[str, Any] = {}
    if ids:
        # The Hub refuses a card whose base is a path, and takes several bases for a merge of
        # models unless it is told.
        fields["base_model"] = ids[0] if len(ids) == 1 else ids
        fields["base_model_relation"] = "adapter"
    fields["library_name"] = library
    fields["tags"] = sorted({"lora", "merge", "streammerge", library})
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def _library(record: Mapping[str, Any]) -> str:
    files = [str(file["name"]) for file in record["files"]]
    return "diffusers" if any(name.startswith(_DIFFUSERS) for name in files) else "peft"


def _introduction(record: Mapping[str, Any]) -> str:
    version = code(record.get("streammerge", "of unknown version"))
    if "recipe" not in record:
        return f"A LoRA adapter whose files were made into one by streammerge {version}."
    count = len(record["recipe"]["adapters"])
    return (
        f"A LoRA adapter, merged from {count} LoRA adapter{'s' * (count != 1)} by streammerge "
        f"{version}, without the base model. No license is stated: those of the base model and of "
        "the merged adapters apply."
    )


def _merged(record: Mapping[str, Any], bases: Sequence[str]) -> Iterator[str]:
    shown = [code(base if is_model_id(base) else last_part(base)) for base in bases[:SHOWN_BASES]]
    yield f"Base model: {', '.join(shown) if shown else 'not stated'}.\n"
    if "recipe" not in record:
        return
    names, weights = adapter_names(record), record["recipe"]["weights"]
    inputs = record.get("inputs") or [{}] * len(names)
    rows = list(zip(names, weights, inputs, strict=True))
    for position, (name, weight, entry) in enumerate(rows[:SHOWN_ADAPTERS], 1):
        facts = [f"weight {code(weight)}"]
        for label, key in (
            ("commit", "commit"),
            ("targets used", "targets_used"),
            ("xxh3", "xxh3"),
        ):
            if entry.get(key) is not None:
                facts.append(f"{label} {code(entry[key])}")
        yield f"{position}. {code(name)}: {', '.join(facts)}"
    if len(rows) > SHOWN_ADAPTERS:
        yield f"\nand {len(rows) - SHOWN_ADAPTERS} more, listed in `streammerge.json`."


def _how(record: Mapping[str, Any], config: Mapping[str, Any] | None) -> Iterator[str]:
    recipe = record.get("recipe", {})
    if recipe:
        rule, space = code(record.get("rule", "")), code(record.get("space", ""))
        brought = f" of {code(record['rule_origin'])}" if record.get("rule_origin") else ""
        yield f"- method: {code(recipe['method'])} (rule {rule}{brought}, space {space})"
    if config is not None:
        ranks = sorted(set((config.get("rank_pattern") or {}).values()))
        others = f"; elsewhere {code(ranks[0])} to {code(ranks[-1])}" if ranks else ""
        yield f"- rank of the result: {code(config.get('r'))}{others}"
    if "dtype" in record:
        yield f"- dtype of the result: {code(record['dtype'])}"
    for name, value in _options(recipe):
        yield f"- {code(name)}: {code(value if isinstance(value, str) else json.dumps(value))}"
    for name, value in record.get("fingerprint", {}).items():
        yield f"- computed with {code(name)}: {code(value)}"
    if "consolidated" in record:
        files = record["consolidated"]["files"]
        yield f"- {len(files)} file(s) of weights were made into one afterwards"


def _figures(record: Mapping[str, Any]) -> Iterator[str]:
    modules = record.get("modules", {})
    yield f"- targets: {len(modules)}; tensors: {len(record['tensors'])}"
    kept = _numbers(modules, "kept_energy")
    if kept:
        mean, (least, name) = sum(e for e, _ in kept) / len(kept), min(kept)
        yield f"- kept energy: {mean:.4%} on average, {least:.4%} at least ({code(name)})"
    errors = _numbers(modules, "relative_error")
    if errors:
        yield f"- relative error of the truncation: {sum(e for e, _ in errors) / len(errors):.3g} "
        yield "  on average; the worst modules:"
    for error, name in sorted(errors, reverse=True)[:SHOWN_MODULES]:
        yield f"  - {code(name)}: {error:.3g}"
    missed = sum(m.get("converged") is False for m in modules.values())
    if missed:
        yield f"- targets that did not reach the tolerance of the truncated SVD: {missed}"
    unsettled = sum(m.get("settled") is False for m in modules.values())
    if unsettled:
        yield f"- targets whose iteration had not come to rest at its last step: {unsettled}"


def _loading(
    record: Mapping[str, Any], config: Mapping[str, Any] | None, bases: Sequence[str], repo: str
) -> str:
    base = next((base for base in bases if is_model_id(base)), "path/to/the/base/model")
    if _library(record) == "diffusers":
        lines = [
            "from diffusers import DiffusionPipeline",
            "",
            f"pipeline = DiffusionPipeline.from_pretrained({base!r})",
            f"pipeline.load_lora_weights({repo!r})",
        ]
        return block("python", "\n".join(lines))
    task = str((config or {}).get("task_type"))
    name = _CLASSES.get(task, "AutoModel")
    lines = [
        "from peft import PeftModel",
        f"from transformers import {name}",
        "",
        f'base = {name}.from_pretrained("{base}")',
        f'model = PeftModel.from_pretrained(base, "{repo}")',
    ]
    text = block("python", "\n".join(lines))
    if len(record["files"]) > 1:
        text = (
            "Its weights are in shards, which PEFT does not load: `streammerge consolidate` makes "
            f"them one file.\n\n{text}"
        )
    return text


def _again(record: Mapping[str, Any]) -> str:
    if "recipe" not in record:
        return "How it was trained or merged is not known; `streammerge.json` has its checksums."
    recipe = record["recipe"]
    names = adapter_names(record)
    if len(names) > SHOWN_ADAPTERS:
        return "The recipe is in `streammerge.json`, with all of its adapters and weights."
    if not _fits_a_line(recipe):
        return "With `streammerge_config.yml`, which lies beside this card:\n\n" + block(
            "sh", "streammerge run streammerge_config.yml -o OUT"
        )
    words = ["streammerge", "merge", *map(_word, pinned_names(record)), "-o", "OUT"]
    words += ["--method", _word(recipe["method"])]
    words.append("--weights=" + ",".join(_word(weight) for weight in recipe["weights"]))
    for name, value in _options(recipe):
        option = "--" + name.replace("_", "-")
        words += [_word(option)] if value is True else [_word(option), _word(value)]
    return (
        "The weights come out equal to the byte where torch, BLAS and the kind of processor are "
        f"those named above.\n\n{block('sh', ' '.join(words))}"
    )


def _options(recipe: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Yield what a recipe says beside adapters, weights and method, in the command line's words."""
    for name, value in recipe.items():
        if name in _QUIET or value is None or value is False or value == {}:
            continue
        numbers = value.items() if isinstance(value, Mapping) else ()
        yield str(name), ",".join(f"{key}={number}" for key, number in numbers) or value


def _fits_a_line(recipe: Mapping[str, Any]) -> bool:
    """Whether options say it all: weights and densities that differ by target do not fit there."""
    density = recipe.get("density")
    return not any(isinstance(value, list) for value in (*recipe["weights"], density))


def _word(value: object) -> str:
    """Return a word as a shell takes it, on one line."""
    return shlex.quote(printable(value)[:SHOWN_CHARACTERS])


def _numbers(modules: Mapping[str, Any], key: str) -> list[tuple[float, str]]:
    """Return a figure of those modules that have it, with their names."""
    found = [(_number(module.get(key)), name) for name, module in modules.items()]
    return [(number, name) for number, name in found if number is not None]


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def code(value: object) -> str:
    """Return text in a code span, which it cannot leave, on one line and not too long."""
    text = printable(value)
    if len(text) > SHOWN_CHARACTERS:
        text = text[: SHOWN_CHARACTERS - 1] + "…"
    fence = "`" * (_longest_run(text) + 1)
    # With blanks, for a backtick at an end; these are taken off again.
    blank = " " if not text or "`" in (text[0], text[-1]) or text[0] == text[-1] == " " else ""
    return f"{fence}{blank}{text or 'nothing'}{blank}{fence}"


def block(language: str, text: str) -> str:
    """Return text in a fenced code block, which it cannot leave."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
