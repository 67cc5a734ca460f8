"""Which files an adapter's path means."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from streammerge.adapter import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME
from streammerge.errors import CorruptFileError, MissingFileError
from streammerge.files import check_inside

MLX_WEIGHTS_NAME = "adapters.safetensors"
PICKLE_NAME = "adapter_model.bin"
PICKLE_NAMES = (PICKLE_NAME, "pytorch_lora_weights.bin")

WITH_CONFIG = (WEIGHTS_NAME, PICKLE_NAME, MLX_WEIGHTS_NAME)
"""Files that an adapter_config.json beside them speaks of, when they are named by themselves."""

_SAVED_ON_THE_WAY = re.compile(r"\d+_adapters\.safetensors")
"""What mlx-lm saves every so many steps, beside what it saves at the end."""


@dataclass(frozen=True)
class Found:
    """The files of an adapter."""

    config: Path
    """Which need not be there."""
    has_config: bool
    """Whether a config there would speak of these weights."""
    weights: Path | None = None
    index: Path | None = None
    """Instead of one file of weights."""
    notices: tuple[str, ...] = ()


def find_files(path: str) -> Found:
    """Return the files of the adapter at a path, a directory or a file of weights.

    Raises:
        MissingFileError: there is nothing there, or no weights.
        CorruptFileError: there are several, or one is a link out of the directory.
    """
    place = Path(path)
    try:
        is_directory, there = place.is_dir(), place.exists()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise MissingFileError(f"cannot be opened ({why})", path=path) from error
    if is_directory:
        return _in_directory(place)
    if not there:
        raise MissingFileError("no such file or directory", path=path)
    return Found(place.with_name(CONFIG_NAME), place.name in WITH_CONFIG, weights=place)


def _in_directory(directory: Path) -> Found:
    config = directory / CONFIG_NAME
    single, index = directory / WEIGHTS_NAME, directory / INDEX_NAME
    if single.exists():
        notices: tuple[str, ...] = ()
        if (directory / PICKLE_NAME).exists():
            notices = (f"{PICKLE_NAME} is not looked at: {WEIGHTS_NAME} is there too",)
        return _checked(Found(config, True, weights=single, notices=notices))
    if index.exists():
        return _checked(Found(config, True, index=index))
    return _checked(Found(config, True, weights=_only_weights(directory)))


def _checked(found: Found) -> Found:
    for path in (found.weights, found.index):
        if path is not None:
            check_inside(path)
    return found


def _only_weights(directory: Path) -> Path:
    """Return the one file of weights in a directory that has none by PEFT's name."""
    try:
        names = sorted(child.name for child in directory.iterdir())
    except OSError as error:
        raise MissingFileError(
            f"cannot be listed ({error.strerror})", path=str(directory)
        ) from error
    found = only_weights(names, str(directory))
    if found is not None:
        return directory / found
    nested = sorted(child.parent.name for child in directory.glob(f"*/{CONFIG_NAME}"))
    hint = (
        f"; did you mean {', '.join(str(directory / name) for name in nested)}?" if nested else ""
    )
    raise MissingFileError(f"there is no {WEIGHTS_NAME} in it{hint}", path=str(directory))


def only_weights(names: Sequence[str], path: str) -> str | None:
    """Return the one file of weights among a directory's, none of which has PEFT's name.

    Raises:
        CorruptFileError: there are several.
    """
    found = [name for name in names if name.endswith(".safetensors")]
    if MLX_WEIGHTS_NAME in found:
        found = [name for name in found if not _SAVED_ON_THE_WAY.fullmatch(name)]
    found = found or [name for name in names if name in PICKLE_NAMES]
    if len(found) > 1:
        shown = ", ".join(found[:4]) + (", …" if len(found) > 4 else "")
        raise CorruptFileError(
            f"holds {len(found)} files of weights ({shown}); name the one that is meant", path=path
        )
    return found[0] if found else None
