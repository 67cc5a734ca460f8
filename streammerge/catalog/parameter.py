"""Numbers that only one rule or space takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Parameter:
    """A number that a rule or a space takes, besides the options that many share."""

    name: str
    default: float
    low: float
    high: float
    """Both bounds are allowed."""
    about: str
    whole: bool = False
    """Whether it is an integer."""

    def takes(self, value: float) -> bool:
        """Return whether it may have this value."""
        return self.low <= value <= self.high and not (self.whole and value % 1)
