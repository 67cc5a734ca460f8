"""Consensus merging: an element stays where enough TALL masks hold it, in every space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streammerge
from making import WEIGHTS
from oracle import restated
from oracle.files import random_source, write_adapter
from oracle.peft_oracle import SavedTarget, read_adapter, relative_error
from oracle.restated import Source
from streammerge import events

GIVEN = (1.0, -0.6, 0.3)
EXACT: dict[str, Any] = {"compute_dtype": "float64", "dtype": "float64"}
SPACES = ("factor", "delta", "core", "knots")


def save(folder: Path, sources: Sequence[Source]) -> list[Path]:
    return [write_adapter(folder / f"in{i}", {"up": s}) for i, s in enumerate(sources)]


def merge(paths: Sequence[Path], out: Path, **options: Any) -> SavedTarget:
    chosen = {"method": "consensus", "weights": GIVEN[: len(paths)], **EXACT, **options}
    streammerge.merge(paths, out, **chosen)
    return read_adapter(out)["up"]


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(("tall_lambda", "agree"), [(0.4, 2), (1.0, 1), (0.2, 3), (2.0, 0)])
def test_the_formula(space: str, tall_lambda: float, agree: int, tmp_path: Path) -> None:
    sources = [random_source(i, 40, 30, 4, scaling=1 + i / 2) for i in range(3)]
    paths = save(tmp_path, sources)
    parameters = {"tall_lambda": tall_lambda, "agree": agree}
    if space == "factor":
        found = merge(paths, tmp_path / "out", space=space, parameters=parameters)
        a, b = restated.merge_factors("consensus", sources, GIVEN, parameters=parameters)
        assert 0 < np.count_nonzero(a) <= a.size
        np.testing.assert_allclose(found.a, a, atol=1e-12)
        np.testing.assert_allclose(found.b, b, atol=1e-12)
        return
    found = merge(paths, tmp_path / "out", space=space, rank=30, parameters=parameters)
    if space == "delta":
        deltas = [source.delta for source in sources]
        expected = restated.apply_rule("consensus", deltas, GIVEN, parameters=parameters)
        assert (agree == 0) == expected.all()
    else:
        expected = restated.merge_in(space, "consensus", sources, GIVEN, parameters=parameters)
    assert expected.any()
    assert relative_error(found.delta, expected) < 1e-11


def test_what_one_element_takes(tmp_path: Path) -> None:
    """Selfish elements, which matter to one alone, and those that cancel are dropped."""
    columns = np.array([[4.0, 4.0, 1.0, 1.0], [3.0, 0.5, -1.0, 0.0], [3.0, 0.5, 1.0, 0.0]])
    sources = [Source(row[None], np.ones((1, 1)), 1.0) for row in columns]
    paths = save(tmp_path, sources)
    found = merge(paths, tmp_path / "out", weights=(1, 1, 1), parameters={"tall_lambda": 0.5})
    # By column: 4 >= 3, 3 >= 3.5 not, so one mask; 4 >= .5; 1 >= 0, 1 >= 1; 1 >= 0.
    np.testing.assert_allclose(found.delta, [[0.0, 0.0, 1.0, 0.0]], atol=1e-15)
    found = merge(paths, tmp_path / "one", weights=(1, 1, 1), parameters={"agree": 1})
    np.testing.assert_allclose(found.delta, [[10.0, 5.0, 1.0, 1.0]], atol=1e-15)


def test_the_order_of_adapters_is_no_matter(tmp_path: Path) -> None:
    paths = save(tmp_path, [random_source(i, 40, 30, 4) for i in range(3)])
    first = merge(paths, tmp_path / "first", rank=30)
    turned = merge(paths[::-1], tmp_path / "turned", rank=30, weights=GIVEN[::-1])
    assert relative_error(turned.delta, first.delta) < 1e-12


@pytest.mark.parametrize("space", SPACES)
def test_one_adapter_alone_is_itself(space: str, tmp_path: Path) -> None:
    """No more masks have to agree than there are adapters that have the target."""
    (source,) = sources = [random_source(0, 40, 30, 4, scaling=1.5)]
    found = merge(save(tmp_path, sources), tmp_path / "out", space=space, weights=(0.7,))
    assert relative_error(found.delta, 0.7 * source.delta) < 1e-12


def test_a_target_of_two_of_three_adapters(tmp_path: Path) -> None:
    """All three of three, and both where there are two."""
    here = [random_source(i, 40, 30, 4) for i in range(2)]
    others = [{"up": source} for source in here]
    paths = [write_adapter(tmp_path / f"in{i}", held) for i, held in enumerate(others)]
    paths.append(write_adapter(tmp_path / "in2", {"down": random_source(2, 40, 30, 4)}))
    asked: dict[str, Any] = {"rank": 30, "parameters": {"agree": 3}}
    found = merge(paths, tmp_path / "out", on_event=events.ignore, **asked)
    parameters = {"tall_lambda": 0.4, "agree": 2}
    deltas = [source.delta for source in here]
    expected = restated.apply_rule("consensus", deltas, GIVEN[:2], parameters=parameters)
    assert relative_error(found.delta, expected) < 1e-11


@pytest.mark.parametrize("space", ["delta", "knots"])
def test_where_none_has_to_agree_it_is_the_sum(space: str, tmp_path: Path) -> None:
    paths = save(tmp_path, [random_source(i, 40, 30, 4) for i in range(3)])
    every = merge(paths, tmp_path / "all", space=space, rank=12, parameters={"agree": 0})
    total = merge(paths, tmp_path / "sum", method="svd", rank=12)
    assert relative_error(every.delta, total.delta) < 1e-11


def test_a_tiny_scale_changes_nothing(tmp_path: Path) -> None:
    sources = [random_source(i, 40, 30, 4) for i in range(3)]
    tiny = [Source(s.a * 2.0**-13, s.b * 2.0**-13, s.scaling) for s in sources]
    whole = merge(save(tmp_path / "whole", sources), tmp_path / "out", rank=30)
    small = merge(save(tmp_path / "tiny", tiny), tmp_path / "small", rank=30)
    assert relative_error(small.delta * 2.0**26, whole.delta) < 1e-11


def test_two_of_them_unless_told(tmp_path: Path) -> None:
    paths = save(tmp_path, [random_source(i, 40, 30, 4) for i in range(3)])
    merge(paths, tmp_path / "default")
    merge(paths, tmp_path / "given", parameters={"agree": 2, "tall_lambda": 0.4})
    merge(paths, tmp_path / "other", parameters={"agree": 1})
    default, given, other = (
        (tmp_path / name / WEIGHTS).read_bytes() for name in ("default", "given", "other")
    )
    assert default == given != other
