"""Breadcrumbs: what lies between two thresholds, in every space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streammerge
from making import PREFIX, WEIGHTS, decode, linear, make_factors
from making import write_adapter as write_random
from oracle import restated
from oracle.files import random_source, write_adapter
from oracle.peft_oracle import SavedTarget, read_adapter, relative_error
from oracle.restated import Source
from streammerge.tiling import row_tiles

GIVEN = (1.0, -0.6, 0.3)
EXACT: dict[str, Any] = {"compute_dtype": "float64", "dtype": "float64"}


def save(folder: Path, sources: Sequence[Source]) -> list[Path]:
    return [write_adapter(folder / f"in{i}", {"up": s}) for i, s in enumerate(sources)]


def merge(paths: Sequence[Path], out: Path, **options: Any) -> SavedTarget:
    chosen = {"method": "breadcrumbs", "weights": GIVEN[: len(paths)], **EXACT, **options}
    streammerge.merge(paths, out, **chosen)
    return read_adapter(out)["up"]


@pytest.mark.parametrize("space", ["factor", "delta", "core", "knots"])
@pytest.mark.parametrize(("density", "gamma"), [(0.3, 0.05), (0.8, 0.2), (0.4, 0.0), (0.0, 0.5)])
def test_the_formula(space: str, density: float, gamma: float, tmp_path: Path) -> None:
    sources = [random_source(i, 40, 30, 4, scaling=1 + i / 2) for i in range(3)]
    paths = save(tmp_path, sources)
    shares: dict[str, Any] = {"density": density, "parameters": {"gamma": gamma}}
    if space == "factor":
        found = merge(paths, tmp_path / "out", space=space, **shares)
        roots = [np.sqrt(abs(w * s.scaling)) for w, s in zip(GIVEN, sources, strict=True)]
        signed = np.copysign(roots, GIVEN)
        a = restated.apply_rule("breadcrumbs", [s.a for s in sources], signed, **shares)
        b = restated.apply_rule("breadcrumbs", [s.b for s in sources], roots, **shares)
        np.testing.assert_allclose(found.a, a, atol=1e-12)
        np.testing.assert_allclose(found.b, b, atol=1e-12)
        return
    found = merge(paths, tmp_path / "out", space=space, rank=30, **shares)
    if space == "delta":
        deltas = [source.delta for source in sources]
        expected = restated.apply_rule("breadcrumbs", deltas, GIVEN, **shares)
    else:
        expected = restated.merge_in(space, "breadcrumbs", sources, GIVEN, **shares)
    if density == 0:
        assert not found.delta.any()
    else:
        assert relative_error(found.delta, expected) < 1e-11


@pytest.mark.parametrize("space", ["delta", "knots"])
def test_without_outliers_it_is_pruning(space: str, tmp_path: Path) -> None:
    """Where others drop everything for a gamma of nothing, nothing more is dropped."""
    paths = save(tmp_path, [random_source(i, 40, 30, 4) for i in range(3)])
    merge(paths, tmp_path / "crumbs", space=space, density=0.3, parameters={"gamma": 0.0})
    merge(paths, tmp_path / "pruned", space=space, density=0.3, method="magnitude_prune")
    pruned = (tmp_path / "pruned" / WEIGHTS).read_bytes()
    assert (tmp_path / "crumbs" / WEIGHTS).read_bytes() == pruned
    # So few elements that a share of them is none.
    found = merge(paths, tmp_path / "few", space=space, density=0.3, parameters={"gamma": 1e-6})
    assert found.delta.any()


def test_one_in_a_hundred_unless_told(tmp_path: Path) -> None:
    paths = save(tmp_path, [random_source(i, 40, 30, 4) for i in range(2)])
    merge(paths, tmp_path / "default", density=0.3)
    merge(paths, tmp_path / "given", density=0.3, parameters={"gamma": 0.01})
    given = (tmp_path / "given" / WEIGHTS).read_bytes()
    assert (tmp_path / "default" / WEIGHTS).read_bytes() == given


def test_equals_at_both_thresholds(tmp_path: Path) -> None:
    """Whole numbers, in several tiles: of equals the first are outliers, the next are kept."""
    m, n = 40, 30_000
    layers = {"up": linear(m, n, 2)}
    options: dict[str, Any] = {"dtype": "BF16", "levels": 2, "seed": 0}
    path = write_random(tmp_path / "in", layers, lora_alpha=2, **options)
    factors = make_factors(layers, **options)
    a, b = (decode(factors[f"{PREFIX}up.lora_{side}.weight"]) for side in "AB")
    delta = b @ a
    kept = restated.prune_to_crumbs(delta, 0.3, 0.1) != 0
    sizes = np.abs(delta)
    for value in (sizes[kept].min(), sizes[kept].max()):
        equal = sizes == value
        assert 0 < (equal & kept).sum() < equal.sum()
        tiles = [equal[start:stop].any() for start, stop in row_tiles(m, n)]
        assert sum(tiles) > 1
    found = merge([path], tmp_path / "out", density=0.3, parameters={"gamma": 0.1}, rank=m).delta
    np.testing.assert_array_equal(np.abs(found) > 0.5, kept)
