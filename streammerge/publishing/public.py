"""What of an output's record, recipe and config may be published: not where things lie on the
machine that made it, which tells names of users, projects and disks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)

_PLACE = re.compile(r"/|~|\.\.?([/\\]|$)|\\\\|[A-Za-z]:[/\\]|file:")
"""How a text begins that is a place on a machine."""

_AS_THEY_ARE = ("include", "exclude", "files", "other_files", "tensors", "modules")
"""Fields that hold no paths: regular expressions, and names of files and tensors."""


def is_model_id(text: str) -> bool:
    """Return whether a text can be the id of a model on the Hub, by its rules for names.

    https://huggingface.co/docs/huggingface_hub/package_reference/utilities#huggingface_hub.utils.validate_repo_id
    """
    plain = len(text) <= 96 and _MODEL_ID.fullmatch(text) is not None
    return plain and not re.search(r"--|\.\.|[.-](/|$)|\.git$|\.ipynb$", text)


def last_part(path: str) -> str:
    """Return the last part of a path, of any system."""
    parts = [part for part in re.split(r"[/\\]+", path) if part not in ("", ".", "..", "~")]
    return parts[-1] if parts else "adapter"


def adapter_names(record: Mapping[str, Any]) -> list[str]:
    """Return what the merged adapters may be called: those of the Hub by their ids, others by the
    last part of their paths."""
    given = [str(name) for name in record["recipe"]["adapters"]]
    inputs = record.get("inputs") or [{}] * len(given)
    return [
        name if entry.get("commit") and not _PLACE.match(name) else last_part(name)
        for name, entry in zip(given, inputs, strict=True)
    ]


def pinned_names(record: Mapping[str, Any]) -> list[str]:
    """Return the adapters' names; those of the Hub with the commits that they had."""
    names = adapter_names(record)
    inputs = record.get("inputs") or [{}] * len(names)
    return [
        f"{name.partition('@')[0]}@{entry['commit']}" if entry.get("commit") else name
        for name, entry in zip(names, inputs, strict=True)
    ]


def public_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe, of a record or of a file, without places on a machine.

    A base model that lies at one is left out: its name alone would mean another on the Hub.
    """
    kept = {
        name: value
        for name, value in recipe.items()
        if not (name == "base_model" and isinstance(value, str) and is_place(value))
    }
    shown: dict[str, Any] = public_values(kept)
    return shown


def public_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record without places on a machine; nothing else of it is changed."""
    shown: dict[str, Any] = public_values(record)
    if "recipe" not in record:
        return shown
    names = adapter_names(record)
    shown["recipe"] = public_recipe(record["recipe"])
    shown["recipe"]["adapters"] = names
    for entry, name in zip(shown.get("inputs", ()), names, strict=False):
        entry["path"] = name
    return shown


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return an adapter's config without the place of its base model on a machine.

    A name alone would not do: PEFT would look for it on the Hub, where anybody may have taken it.
    """
    base = config.get("base_model_name_or_path")
    if isinstance(base, str) and is_place(base):
        return {**config, "base_model_name_or_path": None}
    return dict(config)


def is_place(text: str) -> bool:
    """Return whether a text is a place on a machine."""
    return _PLACE.match(text) is not None


def public_values(value: Any) -> Any:
    """Return what JSON or YAML holds with names where there are places on a machine."""
    return _public(None, value)


def _public(key: object, value: Any) -> Any:
    if key in _AS_THEY_ARE:
        return value
    if isinstance(value, Mapping):
        return {name: _public(name, inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_public(None, inner) for inner in value]
    if isinstance(value, str) and (key == "path" or is_place(value)):
        return last_part(value)
    return value
