"""Computed tensors out: cast to the output's dtype, checked, as bytes."""

from __future__ import annotations

import math
from typing import Protocol

import torch

from streammerge.errors import OutputOverflowError
from streammerge.worker.job import Job


class Sink(Protocol):
    """What takes a tensor's bytes from its start to its end: a region of a file, or memory."""

    @property
    def name(self) -> str:
        """The tensor's full name."""

    def shorten(self, nbytes: int) -> None:
        """End after so many bytes of those that were planned at most."""

    def append(self, data: memoryview) -> None:
        """Take the next bytes."""


def write(job: Job, writer: Sink, values: torch.Tensor) -> None:
    """Cast values to the output's dtype and append them to a region."""
    writer.append(bytes_of(cast_tile(job, writer.name, values)))


def cast_tile(job: Job, name: str, values: torch.Tensor) -> torch.Tensor:
    """Return values of the tensor of this name in the dtype of the output's factors.

    Raises:
        OutputOverflowError: one of them does not fit.
        FloatingPointError: one of them was not finite before.
    """
    return cast_to(job.output_dtype, name, values)


def cast_to(dtype: torch.dtype, name: str, values: torch.Tensor) -> torch.Tensor:
    """Return values of the tensor of this name in a dtype.

    Raises:
        OutputOverflowError: one of them does not fit.
        FloatingPointError: one of them was not finite before.
    """
    cast = values.to(dtype).contiguous()
    # A sum is finite only if all its terms are; it may overflow without them, hence the look.
    if not math.isfinite(float(cast.sum())):
        wrong = values[~torch.isfinite(cast)]
        if len(wrong) and not torch.isfinite(wrong).all():
            raise FloatingPointError("a merged value overflows on the way")
        if len(wrong):
            raise OutputOverflowError(
                tensor=name,
                value=float(wrong.abs().max()),
                dtype=str(dtype).removeprefix("torch."),
            )
    return cast


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor, of its copy where it lies on a device."""
    # Flat first: a column is contiguous whatever its last stride, and a view asks for 1.
    return memoryview(tensor.cpu().view(-1).view(torch.uint8).numpy().data).cast("B")
