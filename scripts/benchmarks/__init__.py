"""Benchmarks: streammerge, its peers and the machine's limits, on the same files, in turn.

The parent (`__main__`) measures nothing itself. Each measurement is a process of its own: a module
of `sides`, which prints one line of JSON.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Inputs, capped runs and dense restatements are those of the tests.
sys.path.insert(0, str(ROOT / "tests"))
