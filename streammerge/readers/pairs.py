"""Which tensors of an adapter's files are the two factors of a target, and whether they fit."""

from __future__ import annotations

import re
from dataclasses import dataclass

from streammerge.adapter import DTYPES, PREFIX
from streammerge.errors import CorruptFileError, UnsupportedAdapterError
from streammerge.readers.header import Entry, Header

_KEY = re.compile(rf"((?:{re.escape(PREFIX)})+)(.+?)\.(lora_[AB]\.weight|lora_embedding_[AB])")

MAX_SIDE = 2**31 - 1
"""No side of a factor is longer."""

_SIDES = {
    "lora_A.weight": "a",
    "lora_embedding_A": "a",
    "lora_B.weight": "b",
    "lora_embedding_B": "b",
}

Place = tuple[Header, int, Entry]
"""A tensor, the header that it stands in, and that file's number."""


@dataclass(slots=True)
class Factors:
    """Where the two factors of a target lie, as far as they are found."""

    prefix: str
    a: Place | None = None
    b: Place | None = None


def pair_up(places: list[Place]) -> tuple[dict[str, Factors], list[Place]]:
    """Sort tensors into the factors of each target, and the rest."""
    pairs: dict[str, Factors] = {}
    extras: list[Place] = []
    for place in places:
        name = place[2].name
        match = _KEY.fullmatch(name)
        if match is None or ".base_layer" in name:
            _refuse_variant_tensor(place)
        if match is None:
            extras.append(place)
            continue
        prefix, target, factor = match.groups()
        pair = pairs.get(target) or pairs.setdefault(target, Factors(prefix))
        if pair.prefix != prefix:
            raise CorruptFileError(
                f"{target} stands under two prefixes, {pair.prefix!r} and {prefix!r}",
                path=place[0].file.path,
                tensor=name,
            )
        side = _SIDES[factor]
        if getattr(pair, side) is not None:
            raise CorruptFileError(
                f"{target} has two {side.upper()} factors", path=place[0].file.path, tensor=name
            )
        setattr(pair, side, place)
    for pair in pairs.values():
        _check_pair(pair)
    return pairs, extras


def _refuse_variant_tensor(place: Place) -> None:
    header, _, entry = place
    if entry.name.endswith(
        (".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".dora_scale")
    ):
        raise UnsupportedAdapterError(
            "is a DoRA magnitude; DoRA adapters are not merged, for a sum of them is no LoRA",
            path=header.file.path,
            tensor=entry.name,
            variant="DoRA",
        )
    if ".base_layer.lora_" in entry.name:
        raise UnsupportedAdapterError(
            "is a factor inside another LoRA layer, as target_parameters makes them; such "
            "adapters are not merged",
            path=header.file.path,
            tensor=entry.name,
            variant="LoRA on parameters (target_parameters)",
        )


def _check_pair(pair: Factors) -> None:
    """Check that a target has both factors, and that their shapes make one delta."""
    place_a, place_b = pair.a, pair.b
    if place_a is None or place_b is None:
        found = place_a or place_b
        assert found is not None, "a pair is made for a factor"
        header, _, entry = found
        raise CorruptFileError(
            f"has no {'A' if place_a is None else 'B'} factor beside it",
            path=header.file.path,
            tensor=entry.name,
        )
    (header, _, a), (_, _, b) = place_a, place_b
    for entry in (a, b):
        if entry.dtype not in DTYPES:
            raise UnsupportedAdapterError(
                f"its dtype is {entry.dtype}; factors must be one of {', '.join(DTYPES)}",
                path=header.file.path,
                tensor=entry.name,
                variant=entry.dtype,
            )
    embedding = "lora_embedding_" in a.name
    if embedding != ("lora_embedding_" in b.name):
        raise CorruptFileError(f"is paired with {b.name}", path=header.file.path, tensor=a.name)
    _check_shapes(header, a, b)


def _check_shapes(header: Header, a: Entry, b: Entry) -> None:
    dimensions = (2,) if "lora_embedding_" in a.name else (2, 3, 4, 5)
    if len(a.shape) not in dimensions or len(b.shape) != len(a.shape) or 0 in a.shape + b.shape:
        raise CorruptFileError(
            f"shapes {list(a.shape)} of A and {list(b.shape)} of B make no delta",
            path=header.file.path,
            tensor=a.name,
        )
    if any(size != 1 for size in b.shape[2:]):
        raise CorruptFileError(
            f"shape {list(b.shape)}: the B of a convolution must be 1×1",
            path=header.file.path,
            tensor=b.name,
        )
    if max(a.shape + b.shape) > MAX_SIDE:
        raise CorruptFileError(
            f"shapes {list(a.shape)} of A and {list(b.shape)} of B are of no layer",
            path=header.file.path,
            tensor=a.name,
        )
    rank = a.shape[0]
    if b.shape[1] == rank:
        return
    if len(a.shape) > 2 and rank % b.shape[1] == 0:
        raise UnsupportedAdapterError(
            f"has {b.shape[1]} columns for a rank of {rank}: a grouped convolution "
            f"({rank // b.shape[1]} groups); these are not merged",
            path=header.file.path,
            tensor=b.name,
            variant="grouped convolution",
        )
    raise CorruptFileError(
        f"shape {list(b.shape)}: B must have as many columns as A has rows ({rank}, in {a.name})",
        path=header.file.path,
        tensor=b.name,
    )
