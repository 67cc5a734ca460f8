"""Merges on many workers: projected from plans and measured rates, and measured on two.

`makespan` is the model, pure arithmetic; `cases` makes the plans, without files; `calibration`
measures what the model is given; `overhead` and `speedup` are measurements of their own.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Clusters on loopback and adapters made by hand are those of the tests.
sys.path.insert(0, str(ROOT / "tests"))
