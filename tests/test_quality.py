"""A miniature of scripts/eval-quality: two tasks, few steps, and what its tables are made of."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from quality import merging, table
from quality.data import SIDE, TASKS, draw, load
from quality.merging import CANDIDATES, Candidate, Outcome, Setting, best, merge, settings_for
from quality.model import classify
from quality.training import Bench, Steps, make_bench, train_adapter
from quality.trial import Asked, Trial, run
from streammerge.catalog import METHODS, RULES, SPACES

MINIATURE = Steps(base=200, adapter=100)
PAIR = ("turned", "wine")
RANK = 4


@pytest.fixture(scope="module")
def bench() -> Bench:
    torch.set_num_threads(1)
    pretraining, tasks = load(0)
    return make_bench(pretraining, (tasks[name] for name in PAIR), 0, MINIATURE)


@pytest.fixture(scope="module")
def adapters(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [
        train_adapter(bench, [i], folder / name, rank=RANK, seed=i, steps=MINIATURE.adapter)
        for i, name in enumerate(PAIR)
    ]


def test_an_adapter_beats_the_base_in_its_own_task(bench: Bench, adapters: list[Path]) -> None:
    base = bench.accuracies(bench.base, "test")
    for number, path in enumerate(adapters):
        assert bench.accuracies(bench.load(path), "test")[number] > base[number] + 0.05


@pytest.mark.parametrize("method", ["svd", "cat", "linear"])
def test_one_adapter_merged_alone_is_what_it_was(
    method: str, bench: Bench, adapters: list[Path], tmp_path: Path
) -> None:
    candidate = CANDIDATES[method]
    alone = merge(candidate, Setting(1.0, None), adapters[:1], tmp_path / "alone", seed=0)
    before, after = bench.load(adapters[0]), bench.load(alone)
    pictures = bench.tasks[0].test.pictures
    with torch.no_grad():
        torch.testing.assert_close(
            classify(after, bench.heads[0], pictures),
            classify(before, bench.heads[0], pictures),
            rtol=0,
            atol=1e-3,
        )
    assert bench.accuracies(after, "test") == bench.accuracies(before, "test")


def test_the_setting_is_the_best_on_validation(
    bench: Bench, adapters: list[Path], tmp_path: Path
) -> None:
    own = [0.5, 2.0]
    candidate = CANDIDATES["svd"]
    found = best(candidate, bench, adapters, own, folder=tmp_path, seed=0)
    tried = {}
    for setting in settings_for(candidate, len(adapters)):
        output = merge(candidate, setting, adapters, tmp_path / f"{setting.weight}", seed=0)
        accuracies = bench.accuracies(bench.load(output), "validation")
        tried[setting] = sum(a / b for a, b in zip(accuracies, own, strict=True))
    assert len(tried) > 1
    assert found.setting is not None
    assert tried[found.setting] == max(tried.values())
    output = tmp_path / f"{found.setting.weight}"
    assert list(found.test) == bench.accuracies(bench.load(output), "test")
    assert found.rank == RANK


def test_what_is_refused_is_told(
    bench: Bench, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "DENSITIES", (3.0,))
    found = best(CANDIDATES["ties"], bench, adapters, [1, 1], folder=tmp_path, seed=0)
    assert found.refused is not None
    assert "density" in found.refused
    trial = Trial(0, (0.5, 0.5), (1.0, 1.0), (1.0, 1.0), (found,))
    assert f"ties: refused: {found.refused}" in table.report(PAIR, [trial])


def test_one_seed_from_the_data_to_the_tables() -> None:
    asked = Asked(("svd", "linear"), PAIR, RANK, steps=Steps(base=10, adapter=5))
    trial = run(asked, 1)
    assert [outcome.label for outcome in trial.outcomes] == ["svd", "linear"]
    for accuracies in (trial.base, trial.own, trial.joint, *(o.test for o in trial.outcomes)):
        assert len(accuracies) == len(PAIR)
        assert all(0 < accuracy <= 1 for accuracy in accuracies)
    shown = table.report(PAIR, [trial])
    assert shown.count("| `svd` | 4 |") == shown.count("| `linear` | 4 |") == 1


def test_every_method_of_the_catalog_is_tried() -> None:
    own = {candidate.method for candidate in CANDIDATES.values() if candidate.is_own}
    assert own == set(METHODS)
    assert {"ties@core", "ties@knots", "dare_ties@core", "dare_ties@knots"} < set(CANDIDATES)
    assert all(candidate.space in SPACES for candidate in CANDIDATES.values())


@pytest.mark.parametrize("candidate", CANDIDATES.values(), ids=CANDIDATES)
def test_every_method_has_the_same_weights(candidate: Candidate) -> None:
    settings = list(settings_for(candidate, 6))
    assert {setting.weight for setting in settings} == {1 / 6, 1 / 3, 0.5, 1.0}
    needs = RULES[METHODS[candidate.method].rule].needs_density
    assert {setting.density for setting in settings} == ({0.2, 0.5} if needs else {None})
    assert len(settings) == len(set(settings))


def test_no_example_is_both_trained_and_tested_on() -> None:
    pretraining, tasks = load(3)
    assert tuple(tasks) == TASKS
    upright = {
        "turned": lambda pictures: pictures.rot90(-1, (1, 2)),
        "mirrored": lambda pictures: pictures.flip(2),
        "inverted": lambda pictures: -pictures,
    }
    parts: dict[str, set[bytes]] = {"pretraining": as_bytes(pretraining.pictures)}
    for name, back in upright.items():
        for part in ("training", "validation", "test"):
            found = as_bytes(back(getattr(tasks[name], part).pictures))
            assert parts.setdefault(part, found) == found, "digits are split once for all tasks"
    sets = list(parts.values())
    for i, one in enumerate(sets):
        assert all(not one & other for other in sets[i + 1 :])


def as_bytes(pictures: torch.Tensor) -> set[bytes]:
    """Digits as what they are; -0.0 is 0.0, and no two digits of the data are the same."""
    found = [(picture + 0.0).numpy().tobytes() for picture in pictures]
    assert len(set(found)) == len(found)
    return set(found)


def test_a_table_is_drawn_as_blocks() -> None:
    rows = torch.tensor([[0.0, 9.0, 1.0], [2.0, 1.0, 1.0], [4.0, 5.0, 4.0]], dtype=torch.float64)
    drawn = draw(rows.numpy(), (2, 2))
    assert drawn.shape == (3, SIDE, SIDE)
    standard = ((rows - rows.mean(0)) / rows.std(0, correction=0) / 2.5).numpy()
    assert drawn[0, 0, 0] == drawn[0, 3, 3] == pytest.approx(standard[0, 0])
    assert drawn[0, 0, 4] == drawn[0, 3, 7] == pytest.approx(standard[0, 1])
    assert drawn[2, 4, 0] == pytest.approx(standard[2, 2])
    assert not drawn[:, 4:, 4:].any(), "a block without a feature is grey"


# ---------------------------------------------------------------------------------------------
# The tables


def trial(seed: int, **test: tuple[float, float]) -> Trial:
    outcomes = tuple(
        Outcome(label, None, Setting(0.5, None), 4 if label != "cat" else 8, accuracies)
        for label, accuracies in test.items()
    )
    return Trial(seed, (0.4, 0.2), (0.8, 0.5), (0.8, 0.5), outcomes)


def test_figures_are_of_the_own_adapter_and_over_seeds() -> None:
    trials = [
        trial(0, worse=(0.4, 0.2), better=(0.8, 0.3), cat=(0.8, 0.5)),
        trial(1, worse=(0.16, 0.2), better=(0.56, 0.3), cat=(0.8, 0.5)),
        trial(2, worse=(0.28, 0.2), better=(0.68, 0.3), cat=(0.8, 0.5)),
    ]
    labels = [row.label for row in table.rows(trials)]
    assert labels == ["cat", "better", "worse"]
    shown = table.report(PAIR, trials).splitlines()
    better = "| `better` | 4 | 0.5 |  | 85.0 ± 15.0 | 60.0 ± 0.0 | 72.5 ± 7.5 | ≈ |"
    worse = "| `worse` | 4 | 0.5 |  | 35.0 ± 15.0 | 40.0 ± 0.0 | 37.5 ± 7.5 |  |"
    cat = "| `cat` | 8 | 0.5 |  | 100.0 ± 0.0 | 100.0 ± 0.0 | 100.0 ± 0.0 |  |"
    assert {better, worse, cat} < set(shown)


def test_a_method_refused_with_one_seed_has_no_row() -> None:
    trials = [trial(0, a=(0.4, 0.4), b=(0.4, 0.4)), trial(1, a=(0.4, 0.4), b=(0.4, 0.4))]
    first, second = trials[1].outcomes
    refused = replace(second, refused="no", setting=None, test=())
    trials[1] = replace(trials[1], outcomes=(first, refused))
    assert [row.label for row in table.rows(trials)] == ["a"]
    assert table.refusals(trials) == [("b", "no")]


def test_tables_take_their_place_in_a_page() -> None:
    page = f"before\n{table.BEGINS}\nold\n{table.ENDS}\nafter\n"
    once = table.put_into(page, "new")
    assert once == f"before\n{table.BEGINS}\n\nnew\n\n{table.ENDS}\nafter\n"
    assert table.put_into(once, "new") == once
    for wrong in ("no marks", table.BEGINS, f"{table.ENDS}{table.BEGINS}", page + page):
        with pytest.raises(ValueError, match="once each"):
            table.put_into(wrong, "new")


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [
        ([0.8], [0.1], False),
        ([0.8, 0.7, 0.9], [0.8, 0.7, 0.9], False),
        ([0.8, 0.7, 0.9], [0.7, 0.61, 0.79], True),  # spread over seeds is shared by both
        ([0.8, 0.7, 0.9], [0.7, 0.9, 0.7], False),
        ([0.5, 0.5], [0.25, 0.25], True),
    ],
)
def test_rows_are_compared_seed_by_seed(one: list[float], other: list[float], apart: bool) -> None:
    assert table.told_apart(one, other) is apart
