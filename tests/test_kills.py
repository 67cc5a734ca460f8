"""A few rounds of scripts/kill-test, which kills the command line at random moments."""

from __future__ import annotations

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from killing.rounds import Round, make_inputs, play


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """Where a moment comes too late there is no kill; rounds are played until there were some."""
    inputs, draw, kills = make_inputs(tmp_path), random.Random(0), 0
    for number in (40, 20, 4, 7, 10, 15):
        kills += play(Round.of(number, inputs, tmp_path / f"{number}"), draw)["kills"]
        if kills >= 2:
            return
    raise AssertionError(f"{kills} kills in all rounds")
