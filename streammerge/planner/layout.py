"""Where each output tensor lies: files, offsets, shapes, all known before a byte is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from streammerge.adapter import DIFFUSERS, IMAGE_WEIGHTS_NAME, PREFIX, SUFFIXES, WEIGHTS_NAME
from streammerge.plans import OutputFile, Region


@dataclass(frozen=True)
class Pair:
    """The output factors of one target."""

    target: str
    kind: int
    rank: int
    m: int
    inner: tuple[int, ...]

    @property
    def a_shape(self) -> tuple[int, ...]:
        """Of A in the file."""
        return (self.rank, *self.inner)

    @property
    def b_shape(self) -> tuple[int, ...]:
        """Of B in the file."""
        return (self.m, self.rank, *(1,) * (len(self.inner) - 1))


def lay_out(
    pairs: Sequence[Pair], itemsize: int, max_shard_bytes: int | None, chosen: str
) -> tuple[tuple[OutputFile, ...], list[tuple[Region, Region]]]:
    """Give every tensor its place, in the order of `pairs`, the two of a target side by side.

    A shard is closed when the next target would make its data larger than `max_shard_bytes`; a
    target larger than that has a shard to itself. No shard is empty.

    Args:
        pairs: the output factors.
        itemsize: bytes of a number.
        max_shard_bytes: of a file's data; no limit when None.
        chosen: the output's format, which decides the names.
    """
    prefix = "" if chosen == DIFFUSERS else PREFIX
    regions: list[tuple[Region, Region]] = []
    sizes = [0]
    for pair in pairs:
        nbytes = [math.prod(shape) * itemsize for shape in (pair.a_shape, pair.b_shape)]
        if max_shard_bytes is not None and 0 < sizes[-1] > max_shard_bytes - sum(nbytes):
            sizes.append(0)
        places = []
        for suffix, shape, size in zip(
            SUFFIXES[pair.kind], (pair.a_shape, pair.b_shape), nbytes, strict=True
        ):
            name = prefix + pair.target + suffix
            places.append(Region(name, len(sizes) - 1, sizes[-1], shape, size))
            sizes[-1] += size
        regions.append((places[0], places[1]))
    names = [IMAGE_WEIGHTS_NAME] if chosen == DIFFUSERS else _names(len(sizes))
    return tuple(map(OutputFile, names, sizes)), regions


def _names(count: int) -> list[str]:
    if count == 1:
        return [WEIGHTS_NAME]
    stem, ending = WEIGHTS_NAME.rsplit(".", 1)
    return [f"{stem}-{i + 1:05d}-of-{count:05d}.{ending}" for i in range(count)]
