"""Stored bytes on their way to a device: through pinned memory, so that copying overlaps computing.

A copy from pinned memory returns at once, and what is computed on the device afterwards waits for
it there. So the next piece is read while the one before is on its way, and while the device works.
"""

from __future__ import annotations

from functools import cached_property

import torch

from streammerge.planner.memory import PINNED_BYTES, PINNED_SLOTS


class Transfer:
    """The way to a device, for one thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._turn = 0

    def send(self, stored: torch.Tensor) -> torch.Tensor:
        """Return a flat tensor on the device, in the dtype that it is stored in: half the bytes.

        It may not be complete yet, but is when something is computed with it there.
        """
        moved = torch.empty_like(stored, device=self._device)
        source, target = stored.view(torch.uint8), moved.view(torch.uint8)
        for start in range(0, len(source), PINNED_BYTES):
            piece = source[start : start + PINNED_BYTES]
            slot = self._slots[self._turn]
            self._turn = (self._turn + 1) % len(self._slots)
            slot.send(piece, target[start : start + len(piece)])
        return moved

    @cached_property
    def _slots(self) -> list[_Slot]:
        return [_Slot(self._device) for _ in range(PINNED_SLOTS)]


class _Slot:
    """Pinned memory that is used again once the device has taken what was in it."""

    def __init__(self, device: torch.device) -> None:
        apart = device.type != "cpu"
        self._room = torch.empty(PINNED_BYTES, dtype=torch.uint8, pin_memory=apart)
        self._taken = torch.Event(device) if apart else None
        self._used = False

    def send(self, piece: torch.Tensor, target: torch.Tensor) -> None:
        """Bring some bytes to their place on the device."""
        if self._taken is not None and self._used:
            self._taken.synchronize()
        room = self._room[: len(piece)]
        room.copy_(piece)
        target.copy_(room, non_blocking=True)
        if self._taken is not None:
            # Of this device; that of the process may be another one.
            self._taken.record(torch.accelerator.current_stream(target.device))
        self._used = True
