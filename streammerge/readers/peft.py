"""PEFT's adapters: adapter_config.json beside tensors named as PEFT names them.

Keys are `base_model.model.<module path>.lora_A.weight` and the like; nested prefixes, which a
wrapper around a wrapper leaves behind, count as one, and files that were saved without any are
read too. The scaling is lora_alpha/r, or lora_alpha/√r with rslora, both by module.
https://github.com/huggingface/peft/blob/main/src/peft/tuners/lora/layer.py
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from streammerge.adapter import PEFT, PREFIX, AdapterConfig
from streammerge.errors import CorruptFileError
from streammerge.patterns import pattern_lookup
from streammerge.readers.contents import NO_SCALE, Content, Scale, Source, columns_of, extras_of
from streammerge.readers.pairs import Name, Side, pair_up

_KEY = re.compile(
    rf"((?:{re.escape(PREFIX)})*)(.+?)\.(?:lora_([AB])\.weight|lora_embedding_([AB]))"
)


def read_peft(source: Source) -> Content:
    """Return the content of an adapter in PEFT's layout.

    Raises:
        CorruptFileError, UnsupportedAdapterError: it cannot be used.
    """
    pairs, extras = pair_up(source.places, _name)
    prefixes = tuple(sorted({pair.prefix for pair in pairs.values()}))
    scale = scale_by(source.config, source.config_path)
    columns = columns_of(pairs, source.table, scale, prefixes)
    return Content(columns, PEFT, extras_of(extras, source.table), prefixes)


def _name(name: str) -> Name | None:
    match = _KEY.fullmatch(name)
    if match is None:
        return None
    prefix, target, plain, embedded = match.groups()
    side: Side = "a" if (plain or embedded) == "A" else "b"
    return Name(target, side, prefix, embedded is not None)


def scale_by(config: AdapterConfig | None, path: Path) -> Callable[[str], Scale]:
    """Return the function from a module's path to what a config says of its scaling.

    Args:
        config: PEFT's; None where there is none.
        path: of its file, for messages.
    """
    if config is None:
        return lambda _target: NO_SCALE
    rank = pattern_lookup(config.rank_pattern, config.rank)
    alpha = pattern_lookup(config.alpha_pattern, config.alpha)
    power = 0.5 if config.use_rslora else 1.0

    def scale(target: str) -> Scale:
        try:
            return Scale(rank(target), alpha(target), power)
        except re.error as error:
            raise CorruptFileError(
                f"a regular expression of rank_pattern or alpha_pattern is refused: {error}",
                path=str(path),
            ) from error

    return scale
