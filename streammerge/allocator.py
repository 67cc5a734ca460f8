"""How the process gets its memory: what glibc maps and keeps, and which pages are huge.

Where the allocator is not glibc's, or the system has no such pages, the calls do nothing.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from contextlib import suppress

import torch

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
"""mallopt(3)."""

_MADV_HUGEPAGE = 14
"""madvise(2), on Linux."""

MAPPED_BYTES = 4 * 1024**2
"""Tensors of at least this size are mapped: larger ones than the tiles, which come and go."""

KEPT_BYTES = 8 * 1024**2
"""So much free memory a heap keeps at its end: what goes back is faulted in at the next use."""

HUGE_PAGE_BYTES = 2 * 1024**2

ALIGNED_BYTES = 64
"""What the address of a buffer is a multiple of."""


def steady_allocator() -> None:
    """Have every large tensor mapped on its own, so that its memory goes back when it is freed.

    glibc raises the limit above which it maps after each large free, and then keeps and splinters
    aligned blocks: a task that holds 230 MiB has taken 380 MiB that way.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES)
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)


def give_back() -> None:
    """Give memory that is free, but held by the allocator for later, back to the system.

    What a task leaves in glibc's heaps can be 170 MiB: a process that lives longer than its tasks
    would hold it from others, and the next plan would take it for the process's own.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def new_slab(
    new_buffer: Callable[[int], torch.Tensor], size: int, count: int
) -> list[torch.Tensor]:
    """Return flat buffers that lie side by side, in huge pages where they are large together.

    The first touch of a page of 4 KiB costs 2 µs and more on a virtual machine, so that 16 MiB of
    them take 10 ms, and 2 ms of huge ones. What is not touched takes no memory, but for the rest
    of the last page; so buffers are to be used from the first one on.

    Args:
        new_buffer: returns an uninitialised flat tensor of so many elements.
        size: elements of a buffer.
        count: buffers.
    """
    probe = new_buffer(0)
    # As torch aligns what it allocates: products into other places may be rounded otherwise.
    step = -(-size * probe.itemsize // ALIGNED_BYTES) * ALIGNED_BYTES // probe.itemsize
    elements = step * count
    if probe.device.type == "cpu" and elements * probe.itemsize >= MAPPED_BYTES:
        slab = _in_huge_pages(new_buffer, elements)
    else:
        slab = new_buffer(elements)
    return [slab[start : start + size] for start in range(0, elements, step)]


def _in_huge_pages(new_buffer: Callable[[int], torch.Tensor], elements: int) -> torch.Tensor:
    """Return a flat buffer of so many elements."""
    probe = new_buffer(0)
    # Begun at such a page, whatever the system aligns: what lies before it is never touched.
    whole = new_buffer(elements + HUGE_PAGE_BYTES // probe.itemsize)
    skipped = -whole.data_ptr() % HUGE_PAGE_BYTES // probe.itemsize
    slab = whole[skipped : skipped + elements]
    if sys.platform != "linux":
        return slab
    with suppress(OSError, AttributeError):
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        madvise(slab.data_ptr(), slab.nbytes, _MADV_HUGEPAGE)
    return slab
