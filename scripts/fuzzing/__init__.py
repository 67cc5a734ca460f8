"""Fuzzing: what is read of adapters, and what merges give. Every case is a function of its number."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
