"""A sample of the fuzzing that scripts/fuzz and scripts/fuzz-merges do at length."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import pytest

from streammerge.catalog import RULES, SPACES

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from fuzzing import merges, outcomes
from fuzzing.judge import CLEAN, FAULT, READ
from fuzzing.parsers import run_batch
from fuzzing.recipes import make_case
from fuzzing.refusals import UNEQUAL, reasons

CASES, PARTS = 600, 4
MERGES = 180


@pytest.mark.parametrize("part", range(PARTS))
def test_directories_are_read_or_refused(part: int) -> None:
    """From what lies in the repository alone, so that each case is the same everywhere."""
    found = run_batch(1, range(part, CASES, PARTS), with_real=False)
    faults = [f"case {c.number} ({c.kind}): {c.verdict.words}" for c in found]
    assert not [text for c, text in zip(found, faults, strict=True) if c.verdict.outcome == FAULT]
    assert {CLEAN, READ} <= {case.verdict.outcome for case in found}


@pytest.mark.parametrize("part", range(PARTS))
def test_merges_are_what_the_formulas_give(part: int) -> None:
    """And the same bytes in whatever way they are run."""
    found = outcomes.Found()
    for number in range(part, MERGES, PARTS):
        merges.run_case(1, number, found)
    assert not found.failures
    assert found.targets.total() > 3 * found.targets[outcomes.UNDECIDED]


def test_all_is_drawn() -> None:
    """Every rule in every space that it goes with, both scopes, and what has to be refused."""
    cases = [make_case(Random(f"1/{number}")) for number in range(1500)]
    drawn = {(case.rule, case.space) for case in cases}
    assert {(name, space) for name, rule in RULES.items() for space in rule.spaces} == drawn
    assert {case.space for case in cases if outcomes.is_global(case)} == set(SPACES)
    due = set().union(*map(reasons, cases))
    assert due == {"weights", "rank", "method", "threshold_scope", UNEQUAL}
