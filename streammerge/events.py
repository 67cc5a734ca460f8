"""What a run says while it goes: frozen facts, for progress bars and logs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Downloading:
    """Files of adapters are brought from the Hub into its cache; those that are there are not."""

    files: int
    nbytes: int


@dataclass(frozen=True)
class Downloaded:
    """One of them is there."""

    path: str
    nbytes: int


@dataclass(frozen=True)
class Planned:
    """The plan is made; the work starts now."""

    tasks: int
    read_bytes: int
    write_bytes: int


@dataclass(frozen=True)
class Resumed:
    """An unfinished merge is gone on with; what it has done was read back and is right."""

    done: int
    targets: int


@dataclass(frozen=True)
class Counting:
    """A pass over all targets begins, in search of thresholds over whole adapters."""

    number: int
    """From 1 on."""
    passes: int
    """At most so many there are."""
    targets: int
    read_bytes: int


@dataclass(frozen=True)
class Counted:
    """A pass has been over one target."""

    target: str
    read_bytes: int


@dataclass(frozen=True)
class TaskDone:
    """One target is merged and its regions are written."""

    target: str
    read_bytes: int
    write_bytes: int
    seconds: float


@dataclass(frozen=True)
class Published:
    """The output lies at its name."""

    path: str
    write_bytes: int


@dataclass(frozen=True)
class Notice:
    """Something that the user should know and that stops nothing."""

    message: str


Event = (
    Downloading
    | Downloaded
    | Planned
    | Resumed
    | Counting
    | Counted
    | TaskDone
    | Published
    | Notice
)
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Take an event and do nothing: `merge(…, on_event=ignore)` is silent."""
