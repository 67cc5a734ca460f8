"""SCE: what varies most is kept, counted by its squares, and minorities are erased."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import streammerge
from making import PREFIX, WEIGHTS, decode, linear, make_factors
from making import write_adapter as write_random
from oracle import restated
from oracle.files import random_source, write_adapter
from oracle.peft_oracle import SavedTarget, read_adapter, relative_error
from oracle.restated import Source
from streammerge import errors, events
from streammerge.kernels.each import Here
from streammerge.kernels.thresholds import Stream, find_cut
from streammerge.tiling import row_tiles, split

GIVEN = (1.0, -0.6, 0.3)
EXACT: dict[str, Any] = {"compute_dtype": "float64", "dtype": "float64"}
SPACES = ("factor", "delta", "core", "knots")


def save(folder: Path, sources: Sequence[Source]) -> list[Path]:
    return [write_adapter(folder / f"in{i}", {"up": s}) for i, s in enumerate(sources)]


def merge(paths: Sequence[Path], out: Path, **options: Any) -> SavedTarget:
    chosen = {"method": "sce", "weights": GIVEN[: len(paths)], **EXACT, **options}
    streammerge.merge(paths, out, on_event=events.ignore, **chosen)
    return read_adapter(out)["up"]


def of_one_row(*rows: Sequence[float]) -> list[Source]:
    """Adapters whose deltas are these, each in one row."""
    return [Source(np.array([row], float), np.ones((1, 1)), 1.0) for row in rows]


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("majority_sign", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.3, 1.0, 0.0])
def test_the_formula(space: str, majority_sign: str, density: float, tmp_path: Path) -> None:
    sources = [random_source(i, 40, 30, 4, scaling=1 + i / 2) for i in range(3)]
    paths = save(tmp_path, sources)
    options: dict[str, Any] = {"density": density, "majority_sign": majority_sign}
    if space == "factor":
        found = merge(paths, tmp_path / "out", space=space, **options)
        a, b = restated.merge_factors("sce", sources, GIVEN, **options)
        np.testing.assert_allclose(found.a, a, atol=1e-12)
        np.testing.assert_allclose(found.b, b, atol=1e-12)
        assert a.any() == b.any() == (density > 0)
        return
    found = merge(paths, tmp_path / "out", space=space, rank=30, **options)
    if space == "delta":
        expected = restated.apply_rule("sce", [s.delta for s in sources], GIVEN, **options)
    else:
        expected = restated.merge_in(space, "sce", sources, GIVEN, **options)
    if density == 0:
        assert not found.delta.any()
    else:
        assert relative_error(found.delta, expected) < 1e-11


def test_unequal_ranks_in_several_tiles(tmp_path: Path) -> None:
    """Samples of all deltas are of the same places, however many rows are read at once."""
    sources = [random_source(i, 700, 900, rank) for i, rank in enumerate((3, 8, 5))]
    assert len(row_tiles(700, 900)) > 1
    found = merge(save(tmp_path, sources), tmp_path / "out", rank=700, density=0.2)
    expected = restated.apply_rule("sce", [s.delta for s in sources], GIVEN, density=0.2)
    kept = np.abs(expected) > 0
    assert kept.mean() == pytest.approx(0.2, abs=0.01)
    assert relative_error(found.delta, expected) < 1e-6


def test_what_one_element_takes(tmp_path: Path) -> None:
    sources = of_one_row([8.0, 0.0, -1.0, 2.0], [-2.0, 0.0, -1.0, 2.0])
    paths = save(tmp_path, sources)
    # Variances are 25, 0, 0 and 0; of the equals the first is kept with the first element.
    found = merge(paths, tmp_path / "one", weights=(1, 1), density=0.5)
    np.testing.assert_allclose(found.delta, [[8.0, 0.0, 0.0, 0.0]], atol=1e-14)
    # All are kept, and count by their squares, 69 and 9; -2 is in the minority.
    found = merge(paths, tmp_path / "all", weights=(1, 0.5), density=1.0)
    mean = (69 + 0.5 * 9) / 78
    np.testing.assert_allclose(found.delta, [[8.0, 0.0, -mean, 2 * mean]], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("space", ["delta", "knots"])
def test_a_tiny_scale_changes_nothing(space: str, tmp_path: Path) -> None:
    """Where others count all tensors alike as soon as their squares are small."""
    sources = [Source(s.a * 4**i, s.b, 1.0) for i, s in enumerate(random_four())]
    tiny = [Source(s.a * 2.0**-10, s.b * 2.0**-10, 1.0) for s in sources]
    assert np.abs(tiny[0].delta).max() < 1e-5
    options: dict[str, Any] = {"space": space, "density": 0.5, "rank": 30}
    whole = merge(save(tmp_path / "whole", sources), tmp_path / "out", **options)
    small = merge(save(tmp_path / "tiny", tiny), tmp_path / "small", **options)
    assert relative_error(small.delta * 2.0**20, whole.delta) < 1e-12
    single = merge(
        save(tmp_path / "single", tiny), tmp_path / "f32", **options | {"compute_dtype": "float32"}
    )
    assert relative_error(single.delta, small.delta) < 1e-4


def random_four() -> list[Source]:
    return [random_source(i, 40, 30, 4) for i in range(3)]


def test_the_order_of_adapters_is_no_matter(tmp_path: Path) -> None:
    paths = save(tmp_path, random_four())
    options: dict[str, Any] = {"rank": 30, "density": 0.4}
    first = merge(paths, tmp_path / "first", **options)
    turned = merge(paths[::-1], tmp_path / "turned", **options | {"weights": GIVEN[::-1]})
    assert relative_error(turned.delta, first.delta) < 1e-12


def test_weights_scale_what_an_adapter_adds(tmp_path: Path) -> None:
    """Not how much it counts: twice the weights are twice the result, and 0 counts still."""
    paths = save(tmp_path, random_four())
    options: dict[str, Any] = {"rank": 30, "density": 0.4}
    once = merge(paths, tmp_path / "once", **options)
    twice = merge(paths, tmp_path / "twice", **options, weights=[2 * w for w in GIVEN])
    assert relative_error(twice.delta, 2 * once.delta) < 1e-12
    parts = [
        merge(paths, tmp_path / f"{i}", **options, weights=[w * (i == j) for j, w in of_given()])
        for i in range(3)
    ]
    assert relative_error(sum(part.delta for part in parts), once.delta) < 1e-12


def of_given() -> list[tuple[int, float]]:
    return list(enumerate(GIVEN))


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_one_adapter_alone_is_itself(space: str, density: float, tmp_path: Path) -> None:
    """It varies from nothing, so nothing is taken from it."""
    (source,) = sources = [random_source(0, 40, 30, 4, scaling=1.5)]
    options: dict[str, Any] = {"space": space, "density": density, "weights": (0.7,)}
    found = merge(save(tmp_path, sources), tmp_path / "out", **options)
    assert relative_error(found.delta, 0.7 * source.delta) < 1e-12


@pytest.mark.parametrize("space", SPACES)
def test_of_zeros_come_zeros(space: str, tmp_path: Path) -> None:
    sources = [Source(np.ones((4, 30)), np.zeros((40, 4)), 1.0) for _ in range(2)]
    found = merge(save(tmp_path, sources), tmp_path / "out", space=space, density=0.5)
    assert np.isfinite(found.a).all()
    assert not found.delta.any()


@pytest.mark.parametrize("density", [0.3, 0.9])
def test_equals_at_the_threshold(density: float, tmp_path: Path) -> None:
    """Whole numbers, in several tiles: exactly so many stay, of equals the first; at 0.9 these have
    no variance at all."""
    m, n = 40, 30_000
    layers = {"up": linear(m, n, 2)}
    options: list[dict[str, Any]] = [{"dtype": "BF16", "levels": 2, "seed": i} for i in (0, 1)]
    paths = [
        write_random(tmp_path / f"{i}", layers, lora_alpha=2, **made)
        for i, made in enumerate(options)
    ]
    deltas = []
    for made in options:
        factors = make_factors(layers, **made)
        a, b = (decode(factors[f"{PREFIX}up.lora_{side}.weight"]) for side in "AB")
        deltas.append(b @ a)
    varied = np.var(np.stack(deltas), axis=0)
    order = np.argsort(-varied.ravel(), kind="stable")
    last = varied.ravel()[order[int(density * varied.size) - 1]]
    assert (last == 0) == (density > 0.5)
    equal = varied == last
    assert sum(equal[start:stop].any() for start, stop in row_tiles(m, n)) > 1
    found = merge(paths, tmp_path / "out", density=density, weights=(1, 1), rank=m).delta
    expected = restated.apply_rule("sce", deltas, (1, 1), density=density)
    np.testing.assert_allclose(found, expected, atol=1e-8)
    others = restated.apply_rule("sce", deltas, (1, 1), density=density + 0.01)
    assert np.abs(expected - others).max() > 0.1


@pytest.mark.parametrize("kept", [1, 37, 500, 700, 999])
def test_zeros_are_kept_or_not_by_their_place(kept: int) -> None:
    values = torch.randint(0, 3, (1000,), generator=torch.Generator().manual_seed(1)).float()
    spans = split(1000, 90)

    def tiles(panel: range) -> Any:
        return (values[slice(*spans[t])].clone() for t in panel)

    stream = Stream(spans, tiles, values[::7].clone)
    cut = find_cut(stream, kept, Here(stream, len(spans), map), zeros=True)
    masks = [cut.mask_(values[slice(*span)].clone(), t) for t, span in enumerate(spans)]
    expected = np.zeros(1000)
    expected[np.argsort(-values.numpy(), kind="stable")[:kept]] = 1
    np.testing.assert_array_equal(torch.cat(masks).numpy(), expected)


def test_what_overflows_is_told(tmp_path: Path) -> None:
    sources = of_one_row([1e30, 1.0], [-1e30, 2.0])
    with pytest.raises(errors.MergeFailedError, match="leaves the range of float32"):
        merge(save(tmp_path, sources), tmp_path / "out", density=0.5, compute_dtype="float32")
    assert not (tmp_path / "out" / WEIGHTS).exists()
