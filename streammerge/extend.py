"""What the author of a rule needs that another distribution brings: see docs/add-a-rule.md.

A module that declares a rule takes `Declaration`, `Method`, `Parameter` and `RuleSpec` from here;
that loads nothing heavy. `Tile`, which a rule's function is given, is loaded, with torch, when it
is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge.catalog import Method, Parameter, RuleSpec
from streammerge.registry import Declaration

if TYPE_CHECKING:
    from streammerge.rules.tile import Tile

__all__ = ["Declaration", "Method", "Parameter", "RuleSpec", "Tile"]


def __getattr__(name: str) -> object:
    """Load what needs torch when it is first used (PEP 562)."""
    if name != "Tile":
        raise AttributeError(f"module 'streammerge.extend' has no attribute {name!r}")
    from streammerge.rules.tile import Tile  # noqa: PLC0415  # loads torch

    return Tile


def __dir__() -> list[str]:
    return __all__
