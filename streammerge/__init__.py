"""streammerge: merge LoRA adapters, files in, one file out, inside a memory limit.

The names below are loaded when they are first used, so that the command line can show its help
without loading anything heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streammerge.adapter import Adapter
    from streammerge.api import (
        MergeResult,
        compress,
        consolidate,
        merge,
        open_adapter,
        plan,
        push,
        verify,
    )
    from streammerge.comparing import compare
    from streammerge.comparison import Comparison
    from streammerge.errors import StreammergeError
    from streammerge.measuring import Measured, measure
    from streammerge.plans import Plan
    from streammerge.reporting import Report, report

_HOME = {
    "Adapter": "streammerge.adapter",
    "Comparison": "streammerge.comparison",
    "Measured": "streammerge.measuring",
    "MergeResult": "streammerge.api",
    "Plan": "streammerge.plans",
    "Report": "streammerge.reporting",
    "StreammergeError": "streammerge.errors",
    "compare": "streammerge.comparing",
    "compress": "streammerge.api",
    "consolidate": "streammerge.api",
    "measure": "streammerge.measuring",
    "merge": "streammerge.api",
    "open_adapter": "streammerge.api",
    "plan": "streammerge.api",
    "push": "streammerge.api",
    "report": "streammerge.reporting",
    "verify": "streammerge.api",
}

__all__ = [
    "Adapter",
    "Comparison",
    "Measured",
    "MergeResult",
    "Plan",
    "Report",
    "StreammergeError",
    "compare",
    "compress",
    "consolidate",
    "measure",
    "merge",
    "open_adapter",
    "plan",
    "push",
    "report",
    "verify",
]


def __getattr__(name: str) -> object:
    """Load a public name from the module that defines it (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'streammerge' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
