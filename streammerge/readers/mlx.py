"""mlx-lm's adapters: adapters.safetensors beside an adapter_config.json with lora_parameters.

Factors lie transposed, `<module path>.lora_a` as inputs × rank and `.lora_b` as rank × outputs,
and `scale` is the scaling itself, whatever the rank.
https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/tuner/lora.py
"""

from __future__ import annotations

import re

from streammerge.adapter import MLX
from streammerge.errors import CorruptFileError, UnsupportedAdapterError, shorten
from streammerge.readers.contents import (
    NO_SCALE,
    Content,
    Scale,
    Source,
    columns_of,
    extras_of,
    keys_of,
)
from streammerge.readers.pairs import Name, Place, pair_up

_KEY = re.compile(r"(.+)\.lora_([ab])")

_EMBEDDINGS = ("embed_tokens", "tok_embeddings", "word_embeddings", "wte")
"""What embeddings are called in mlx-lm's models; their factors' names do not tell."""


def read_mlx(source: Source) -> Content:
    """Return the content of an adapter in mlx-lm's layout.

    Raises:
        CorruptFileError, UnsupportedAdapterError: it cannot be used.
    """
    pairs, extras = pair_up(map(_turned, source.places), _name)
    config = source.config
    notices: tuple[str, ...] = ()
    if config is None:
        scale = NO_SCALE
    else:
        scale = Scale(config.rank, config.alpha, 0.0)
        facts = config.raw["lora_parameters"]
        old = facts.get("alpha")
        if isinstance(old, int | float) and old != config.rank:
            said = (
                f"lora_parameters.alpha is {shorten(old)}: mlx-lm before June 2024 multiplied the "
                f"scale by alpha/rank, later ones do not; scale {config.alpha:g} is taken as it is"
            )
            notices = (said,)
    columns = columns_of(pairs, source.table, lambda _target: scale)
    if config is not None and (columns.rank != config.rank).any():
        row = int((columns.rank != config.rank).argmax())
        raise CorruptFileError(
            f"has rank {columns.rank[row]}, but lora_parameters say {config.rank}",
            path=source.headers[0].file.path,
            tensor=keys_of(pairs)[row][0],
        )
    return Content(
        columns, MLX, extras_of(extras, source.table), keys=keys_of(pairs), notices=notices
    )


def _name(name: str) -> Name | None:
    match = _KEY.fullmatch(name)
    if match is None:
        return None
    target, side = match.groups()
    embedding = target.rpartition(".")[2] in _EMBEDDINGS
    return Name(target, "a" if side == "a" else "b", embedding=embedding)


def _turned(place: Place) -> Place:
    """Return a factor with the shape that it has when it is turned."""
    header, number, entry = place
    if _KEY.fullmatch(entry.name) is None:
        return place
    if len(entry.shape) == 3:
        raise UnsupportedAdapterError(
            "is a factor of a layer with many experts (LoRASwitchLinear), which is not merged",
            path=header.file.path,
            tensor=entry.name,
            variant="MLX mixture of experts",
        )
    return header, number, entry._replace(shape=entry.shape[::-1])
