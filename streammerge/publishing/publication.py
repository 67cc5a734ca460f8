"""What of an output is published: streammerge's own files, without places on this machine.

Weights, config, index, recipe, record, and a card. Record, recipe and config are changed where they
name places (see `public`), so that their checksums are other ones than those of the local files,
and as true. Timings, and what was carried over from elsewhere, stay.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from streammerge.adapter import CONFIG_NAME, INDEX_NAME
from streammerge.errors import CorruptFileError, shorten
from streammerge.files import check_inside, read_whole
from streammerge.output.record import (
    RECIPE_NAME,
    digest,
    read_record,
    reading_record,
    render_json,
    render_record,
)
from streammerge.output.staging import MARK_NAME, OWN_FILES
from streammerge.publishing.card import CARD_NAME, render_card
from streammerge.publishing.public import (
    is_place,
    pinned_names,
    public_config,
    public_recipe,
    public_record,
)

MAX_TEXT_BYTES = 2**24
"""Of a config, a recipe, or a card."""


@dataclass(frozen=True)
class Publication:
    """What of an output is to be uploaded: bytes, or the file that holds them, by name."""

    files: Mapping[str, bytes | Path]
    notices: tuple[str, ...]


def publication_of(output: Path, repo: str) -> Publication:
    """Return what of an output is to be uploaded.

    Args:
        output: its directory.
        repo: the id under which it will be found.

    Raises:
        AdapterError: record, recipe or config cannot be read, or is none.
    """
    record = read_record(output)
    with reading_record(output):
        others, notices = _others(output, record)
        shown = public_record(record)
        shown["other_files"] = {name: _digest(data) for name, data in others.items()}
        files: dict[str, bytes | Path] = {name: output / name for name in _weights(output, record)}
        files |= {**others, MARK_NAME: render_record(shown)}
        config = _config(output) if CONFIG_NAME in others else None
        own = output / CARD_NAME
        files[CARD_NAME] = own if own.is_file() else render_card(record, config, repo).encode()
    for data in files.values():
        if isinstance(data, Path):
            check_inside(data)  # what a link leads to is not meant to be published
    return Publication(files, tuple(notices))


def _weights(output: Path, record: Mapping[str, Any]) -> list[str]:
    """Return the names of the files of weights.

    Raises:
        CorruptFileError: one is no name of such a file; it may lead anywhere.
    """
    names = [str(facts["name"]) for facts in record["files"]]
    for name in names:
        if not OWN_FILES.fullmatch(name):
            raise CorruptFileError(
                f"names {shorten(name)} as a file of weights", path=str(output / MARK_NAME)
            )
    return names


def _others(output: Path, record: Mapping[str, Any]) -> tuple[dict[str, bytes | Path], list[str]]:
    """Return the files beside weights and record, and notices about what is left out of them."""
    found: dict[str, bytes | Path] = {}
    stay, notices = [], []
    for name in record["other_files"]:
        if name == CONFIG_NAME:
            found[name], more = _public_config(output)
            notices += more
        elif name == RECIPE_NAME:
            found[name] = _public_recipe(output, record)
        elif name == INDEX_NAME:
            found[name] = output / name
        elif name != CARD_NAME:
            stay.append(str(name))
    if stay:
        notices.append(f"{', '.join(stay)}: not uploaded, for a merge does not make them")
    return found, notices


def _public_config(output: Path) -> tuple[bytes | Path, list[str]]:
    """Return the config to upload: the file as it is, unless it names a place on this machine."""
    config = _config(output)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not is_place(base):
        return output / CONFIG_NAME, []
    notice = (
        f"{CONFIG_NAME}: its base model {base} is a place on this machine, and is left out of what "
        "is uploaded"
    )
    return render_json(public_config(config)), [notice]


def _public_recipe(output: Path, record: Mapping[str, Any]) -> bytes:
    """Return the recipe file without places; its comments, where it had some, stay here."""
    try:
        recipe = public_recipe(yaml.safe_load(read_whole(output / RECIPE_NAME, MAX_TEXT_BYTES)))
        models = recipe.get("models") if isinstance(recipe, dict) else None
        for model, name in zip(models or (), pinned_names(record), strict=False):
            model["model"] = name
        return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).encode()
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise CorruptFileError(
            f"cannot be read ({shorten(str(error))})", path=str(output / RECIPE_NAME)
        ) from error


def _config(output: Path) -> dict[str, Any]:
    try:
        config = json.loads(read_whole(output / CONFIG_NAME, MAX_TEXT_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptFileError(
            f"cannot be read ({error})", path=str(output / CONFIG_NAME)
        ) from error
    if not isinstance(config, dict):
        raise CorruptFileError("is not a JSON object", path=str(output / CONFIG_NAME))
    return config


def _digest(data: bytes | Path) -> str:
    return digest(data if isinstance(data, bytes) else data.read_bytes())
