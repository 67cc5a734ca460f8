"""A few rounds of scripts/kill-test, which kills the command line at random moments."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from killing.rounds import Round, make_inputs, play


@pytest.mark.parametrize("number", [20, 40])
def test_killed_at_random_moments(number: int, tmp_path: Path) -> None:
    """On two threads; into a new output and over an earlier one."""
    found = play(Round.of(number, make_inputs(tmp_path), tmp_path / "round"), random.Random(number))
    assert found["kills"] >= 1
