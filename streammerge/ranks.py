"""What decides a truncated result's rank: a number, a limit, or what it has to keep."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from streammerge.errors import RecipeError

Measure = Literal["energy", "error"]

_LIMIT = re.compile(r"max:(\d+)", re.ASCII)
_POLICY = re.compile(r"(energy|error):([^,\s]+)(?:\s*,\s*max:(\d+))?", re.ASCII)


@dataclass(frozen=True)
class RankPolicy:
    """The smallest rank of each target that keeps enough of its merged matrix M.

    Raises:
        RecipeError: a bound is out of its range, on construction.
    """

    measure: Measure
    """energy: the share of ‖M‖²_F that has to be kept; error: the most that ‖M - M_k‖_F/‖M‖_F
    may be."""
    bound: float
    """Of the measure: an energy in (0, 1], an error in [0, 1)."""
    largest: int | None = None
    """The rank where no smaller one does; that of the largest input when None."""

    def __post_init__(self) -> None:
        if self.measure not in get_args(Measure):
            raise _refused(str(self))
        if self.measure == "energy" and not 0 < self.bound <= 1:
            raise RecipeError(
                f"rank: the energy to keep must be in (0, 1], not {self.bound!r}", option="rank"
            )
        if self.measure == "error" and not 0 <= self.bound < 1:
            raise RecipeError(
                f"rank: the error must be in [0, 1), not {self.bound!r}", option="rank"
            )
        if self.largest is not None and self.largest < 1:
            raise RecipeError(f"rank: max must be at least 1, not {self.largest}", option="rank")

    def __str__(self) -> str:
        """Return it as `parse_rank` takes it."""
        most = "" if self.largest is None else f",max:{self.largest}"
        return f"{self.measure}:{self.bound!r}{most}"

    @property
    def lost_share(self) -> float:
        """The share of ‖M‖²_F that may be lost."""
        return 1.0 - self.bound if self.measure == "energy" else self.bound**2


@dataclass(frozen=True)
class RankLimit:
    """This rank, but in each target no more than its sources span, where the result lies in that.

    Raises:
        RecipeError: it is less than 1, on construction.
    """

    largest: int

    def __post_init__(self) -> None:
        if self.largest < 1:
            raise RecipeError(f"rank must be a positive integer, not {self.largest}", option="rank")

    def __str__(self) -> str:
        """Return it as `parse_rank` takes it."""
        return f"max:{self.largest}"


Rank = int | RankPolicy | RankLimit


def parse_rank(text: str) -> Rank:
    """Return what a text like "16", "max:16", "energy:0.95,max:64" or "error:0.1" means.

    Raises:
        RecipeError: nothing, or a bound is out of its range.
    """
    text = text.strip()
    if re.fullmatch(r"[+-]?\d+", text, re.ASCII):
        return _whole(text)
    limit = _LIMIT.fullmatch(text)
    if limit is not None:
        return RankLimit(_whole(limit[1]))
    found = _POLICY.fullmatch(text)
    if found is None:
        raise _refused(text)
    try:
        bound = float(found[2])
    except ValueError as error:
        raise _refused(text) from error
    measure: Measure = "energy" if found[1] == "energy" else "error"
    return RankPolicy(measure, bound, None if found[3] is None else _whole(found[3]))


def _whole(digits: str) -> int:
    try:
        return int(digits)
    except ValueError as error:  # thousands of digits
        raise _refused(digits) from error


def _refused(text: str) -> RecipeError:
    shown = text if len(text) <= 80 else f"{text[:80]}…"
    return RecipeError(
        "rank must be a positive integer, a limit like max:64, or what is to be kept, like "
        f"energy:0.95,max:64 or error:0.1,max:64, not {shown!r}",
        option="rank",
    )
