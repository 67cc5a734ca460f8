"""Where each output tensor lies: files, offsets, shapes, all known before a byte is computed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from streammerge.adapter import DTYPE_BITS, PREFIX, SUFFIXES, WEIGHTS_NAME
from streammerge.plans import OutputFile, Region


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the output."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """As safetensors spells it."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class Pair:
    """The output factors of one target."""

    target: str
    kind: int
    rank: int
    m: int
    inner: tuple[int, ...]
    dtype: str
    """As safetensors spells it."""

    @property
    def a_shape(self) -> tuple[int, ...]:
        """Of A in the file."""
        return (self.rank, *self.inner)

    @property
    def b_shape(self) -> tuple[int, ...]:
        """Of B in the file."""
        return (self.m, self.rank, *(1,) * (len(self.inner) - 1))

    @property
    def tensors(self) -> tuple[OutputTensor, ...]:
        """A and B, as they lie in the file."""
        return tuple(
            OutputTensor(PREFIX + self.target + suffix, shape, self.dtype)
            for suffix, shape in zip(SUFFIXES[self.kind], (self.a_shape, self.b_shape), strict=True)
        )


def lay_out(
    units: Sequence[Sequence[OutputTensor]], max_shard_bytes: int | None
) -> tuple[tuple[OutputFile, ...], list[tuple[Region, ...]]]:
    """Give every tensor its place, in the order of `units`, those of a unit side by side.

    A unit, such as the pair of a target, is of one dtype. Those of wider dtypes lie before the
    others, so that every tensor begins at a multiple of its numbers' size, as readers want it.
    A shard is closed when the next unit would make its data larger than `max_shard_bytes`; a unit
    larger than that has a shard to itself. No shard is empty.
    """
    regions: list[tuple[Region, ...]] = [()] * len(units)
    sizes = [0]
    for place in sorted(range(len(units)), key=lambda i: -max(8, DTYPE_BITS[units[i][0].dtype])):
        unit = units[place]
        nbytes = sum(tensor.nbytes for tensor in unit)
        if max_shard_bytes is not None and 0 < sizes[-1] > max_shard_bytes - nbytes:
            sizes.append(0)
        regions[place] = _side_by_side(unit, len(sizes) - 1, sizes[-1])
        sizes[-1] += nbytes
    return tuple(map(OutputFile, _names(len(sizes)), sizes)), regions


def _side_by_side(unit: Sequence[OutputTensor], file: int, offset: int) -> tuple[Region, ...]:
    ends = list(itertools.accumulate((tensor.nbytes for tensor in unit), initial=offset))
    return tuple(
        Region(tensor.name, file, start, tensor.shape, tensor.nbytes, tensor.dtype)
        for tensor, start in zip(unit, ends, strict=False)
    )


def _names(count: int) -> list[str]:
    if count == 1:
        return [WEIGHTS_NAME]
    stem, ending = WEIGHTS_NAME.rsplit(".", 1)
    return [f"{stem}-{i + 1:05d}-of-{count:05d}.{ending}" for i in range(count)]
