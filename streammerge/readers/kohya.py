"""Adapters of kohya's scripts: `lora_unet_<module_path>.lora_down.weight`, and `.alpha` beside it.

A target is named as in diffusers' layout, so that the two copies of an adapter meet in it. The
scaling is alpha/r; where there is no alpha it is the rank, so that the scaling is 1.
https://github.com/kohya-ss/sd-scripts/blob/main/networks/lora.py
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from streammerge.adapter import KOHYA
from streammerge.errors import CorruptFileError, UnsupportedAdapterError
from streammerge.readers.alphas import read_alphas, split_alphas
from streammerge.readers.contents import (
    Content,
    Scale,
    Source,
    columns_of,
    extras_of,
    keys_of,
)
from streammerge.readers.kohya_names import Module, Restored, restore
from streammerge.readers.pairs import Factors, Name, pair_up

_KEY = re.compile(r"(lora_(?:unet|te[0-9]?|transformer)_.+)[._]lora_(down|up)\.weight")
_STEM = re.compile(r"lora_(unet|te[0-9]?|transformer)_(.+)")


def read_kohya(source: Source) -> Content:
    """Return the content of an adapter in kohya's layout.

    Raises:
        CorruptFileError, UnsupportedAdapterError: it cannot be used.
    """
    path = Path(source.headers[0].file.path)
    stems, extras = pair_up(source.places, _name)
    alphas, rest = split_alphas(extras)
    lost = min(alphas.keys() - stems.keys(), default=None)
    if lost is not None:
        raise CorruptFileError(
            "is the alpha of a module without factors", path=str(path), tensor=f"{lost}.alpha"
        )
    numbers = read_alphas(alphas)
    pairs, scales = {}, {}
    for stem, pair in stems.items():
        rank = pair.both()[0][2].shape[0]
        for target, part in _targets(path, stem, pair).items():
            if target in pairs:
                raise CorruptFileError(
                    f"{target} stands under two names", path=str(path), tensor=stem
                )
            pairs[target], scales[target] = part, Scale(rank, numbers.get(stem, rank))
    notices: tuple[str, ...] = ()
    if source.config is not None:
        notices = ("adapter_config.json is not looked at: the tensors are in kohya's layout",)
    return Content(
        columns_of(pairs, source.table, scales.__getitem__),
        KOHYA,
        extras_of(rest, source.table),
        keys=keys_of(pairs),
        notices=notices,
        from_headers=not alphas,
    )


def _name(name: str) -> Name | None:
    match = _KEY.fullmatch(name)
    return None if match is None else Name(match[1], "a" if match[2] == "down" else "b")


def _targets(path: Path, stem: str, pair: Factors) -> Mapping[str, Factors]:
    """Return the targets that a name stands for, each with its rows of B."""
    match = _STEM.fullmatch(stem)
    restored = None if match is None else restore(match[1], match[2])
    (_, _, a), (_, _, b) = pair.both()
    if restored is None or not _fits(restored, a.shape, b.shape):
        raise UnsupportedAdapterError(
            "which module of a model this is cannot be told from its name without doubt; such "
            "adapters are read in diffusers' layout, to which its tools convert them",
            path=str(path),
            tensor=a.name,
            variant="kohya of an unknown model",
        )
    shares = restored.height or 1
    return {
        module.path: replace(pair, rows=_rows(module, b.shape[0] // shares))
        for module in restored.modules
    }


def _fits(restored: Restored, a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether the shapes are those of the layer that the name stands for."""
    return restored.height is None or (len(a) == 2 and b[0] == restored.height * a[1])


def _rows(module: Module, share: int) -> tuple[int, int] | None:
    if module.rows is None:
        return None
    return module.first * share, (module.first + module.rows) * share
