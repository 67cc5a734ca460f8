"""What is read of adapters and what merges give, fuzzed; a case is a function of its number."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
