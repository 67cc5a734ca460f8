"""DELLA: random elements, the likelier the larger they are in their row, in every space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import streammerge
from making import PREFIX, WEIGHTS, decode, linear, make_factors
from making import write_adapter as write_random
from oracle import restated
from oracle.files import random_source, write_adapter
from oracle.masks import draws
from oracle.peft_oracle import SavedTarget, read_adapter, relative_error
from oracle.restated import FactorMasks, Source
from streammerge.draw import Drawer, stream_key
from streammerge.kernels.ranks import drop_ranked_, rank_odds, rising
from streammerge.tiling import TILE_ELEMENTS, fold_tiles

GIVEN = (1.0, -0.6, 0.3)
EXACT: dict[str, Any] = {"compute_dtype": "float64", "dtype": "float64", "seed": 3}
SPACES = ("factor", "delta", "core", "knots")
RULES = ("della", "della_linear")
AS_DARE = {"della": "dare_ties", "della_linear": "dare_linear"}


def save(folder: Path, sources: Sequence[Source]) -> list[Path]:
    return [write_adapter(folder / f"in{i}", {"up": s}) for i, s in enumerate(sources)]


def merge(method: str, paths: Sequence[Path], out: Path, **options: Any) -> SavedTarget:
    chosen = {"method": method, "weights": GIVEN[: len(paths)], **EXACT, **options}
    streammerge.merge(paths, out, **chosen)
    return read_adapter(out)["up"]


def drawn_for(count: int, tensor: str, shape: tuple[int, ...]) -> list[Any]:
    return [draws(i, "up", tensor, shape, seed=3) for i in range(count)]


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("density", "epsilon"), [(0.3, 0.14), (0.5, 0.9), (0.9, 0.2)])
def test_the_formula(rule: str, space: str, density: float, epsilon: float, tmp_path: Path) -> None:
    sources = [random_source(i, 40, 30, 4, scaling=1 + i / 2) for i in range(3)]
    paths = save(tmp_path, sources)
    shares: dict[str, Any] = {"density": density, "parameters": {"epsilon": epsilon}}
    if space == "factor":
        found = merge(rule, paths, tmp_path / "out", space=space, **shares)
        shapes = sources[0].a.shape, sources[0].b.shape
        drawn = FactorMasks(*(drawn_for(3, t, s) for t, s in zip("AB", shapes, strict=True)))
        a, b = restated.merge_factors(rule, sources, GIVEN, masks=drawn, **shares)
        np.testing.assert_allclose(found.a, a, atol=1e-12)
        np.testing.assert_allclose(found.b, b, atol=1e-12)
        assert a.any()
        return
    found = merge(rule, paths, tmp_path / "out", space=space, rank=30, **shares)
    if space == "delta":
        deltas = [source.delta for source in sources]
        drawn_here = drawn_for(3, space, deltas[0].shape)
        expected = restated.apply_rule(rule, deltas, GIVEN, masks=drawn_here, **shares)
    else:
        shape = restated.in_coordinates(space, sources).tensors[0].shape
        drawn_here = drawn_for(3, space, shape)
        expected = restated.merge_in(space, rule, sources, GIVEN, masks=drawn_here, **shares)
    assert relative_error(found.delta, expected) < 1e-11


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("rule", RULES)
def test_with_no_width_it_is_dare(rule: str, space: str, tmp_path: Path) -> None:
    """The same bits decide, and so the same elements are kept."""
    paths = save(tmp_path, [random_source(i, 40, 30, 4) for i in range(3)])
    options = {"space": space, "density": 0.3}
    merge(rule, paths, tmp_path / "della", parameters={"epsilon": 0}, **options)
    merge(AS_DARE[rule], paths, tmp_path / "dare", **options)
    for name, tensor in load_file(tmp_path / "della" / WEIGHTS).items():
        torch.testing.assert_close(tensor, load_file(tmp_path / "dare" / WEIGHTS)[name])


def test_keeping_all_is_the_sum(tmp_path: Path) -> None:
    sources = [random_source(i, 40, 30, 4) for i in range(3)]
    paths = save(tmp_path, sources)
    shares: dict[str, Any] = {"density": 1.0, "parameters": {"epsilon": 0}}
    found = merge("della_linear", paths, tmp_path / "out", rank=30, **shares)
    expected = restated.weighted_sum([s.delta for s in sources], GIVEN)
    assert relative_error(found.delta, expected) < 1e-12


def test_the_authors_width_unless_told(tmp_path: Path) -> None:
    paths = save(tmp_path, [random_source(i, 40, 30, 4) for i in range(2)])
    merge("della", paths, tmp_path / "default", density=0.3)
    merge("della", paths, tmp_path / "given", density=0.3, parameters={"epsilon": 0.14})
    given = (tmp_path / "given" / WEIGHTS).read_bytes()
    assert (tmp_path / "default" / WEIGHTS).read_bytes() == given


# ---------------------------------------------------------------------------------------------
# Probabilities


def dropped(x: torch.Tensor, density: float, epsilon: float, seed: int) -> torch.Tensor:
    """The rows of x as they are kept under a seed."""
    flat, width = x.clone().view(-1), x.shape[1]
    drawer, key = Drawer(len(flat), x.device), stream_key(seed, 0, "up", "delta")
    odds = rank_odds(width, density, epsilon, flat)
    return drop_ranked_(flat, odds, drawer, key, 0, mask=torch.empty_like(flat)).view(x.shape)


def test_in_the_mean_nothing_changes() -> None:
    """Over seeds the mean of what is kept is x, and each rank is kept as often as it should be."""
    x = torch.randn(6, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    density, epsilon, seeds = 0.4, 0.6, 3000
    kept = torch.stack([dropped(x, density, epsilon, seed) for seed in range(seeds)])
    odds = torch.from_numpy(restated.odds_by_rank(x.numpy(), density, epsilon))
    error = (kept.mean(0) - x).abs() / (x.abs() * ((1 - odds) / odds / seeds).sqrt())
    assert error.max() < 5  # standard deviations
    often = (kept != 0).double().mean(0)
    assert ((often - odds).abs() / (odds * (1 - odds) / seeds).sqrt()).max() < 5
    assert odds.min() == pytest.approx(0.1)
    assert odds.max() == pytest.approx(0.7)


def test_masks_do_not_depend_on_where_tiles_end() -> None:
    x = torch.randn(40, 3000)
    whole = dropped(x, 0.3, 0.14, 5)
    drawer, key = Drawer(x.numel(), x.device), stream_key(5, 0, "up", "delta")
    odds = rank_odds(3000, 0.3, 0.14, x)
    for start, stop in ((0, 7), (7, 8), (8, 40)):
        part = x[start:stop].clone().view(-1)
        drop_ranked_(part, odds, drawer, key, start * 3000, mask=torch.empty_like(part))
        assert torch.equal(part.view(-1, 3000), whole[start:stop])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_rank_by_their_place(dtype: torch.dtype) -> None:
    x = torch.randint(-2, 3, (50, 200), generator=torch.Generator().manual_seed(0)).to(dtype)
    x[:, ::3] *= -0.0
    expected = np.argsort(np.abs(x.numpy()), axis=1, kind="stable")
    np.testing.assert_array_equal(rising(x).numpy(), expected)


def test_a_row_of_one_element_has_the_density() -> None:
    """Where others divide nothing by nothing."""
    odds = rank_odds(1, 0.3, 0.14, torch.ones(1))
    assert odds.probability.tolist() == [pytest.approx(0.3)]
    x = torch.ones(2000, 1)
    kept = dropped(x, 0.3, 0.14, 0)
    assert 0.25 < (kept != 0).double().mean() < 0.35


def test_the_smaller_of_two_has_the_least_probability() -> None:
    odds = rank_odds(2, 0.5, 0.3, torch.ones(1, dtype=torch.float64))
    assert odds.probability.tolist() == pytest.approx([0.35, 0.65])
    kept = dropped(torch.tensor([[2.0, -1.0]] * 3000), 0.5, 0.3, 0) != 0
    assert kept.double().mean(0).tolist() == pytest.approx([0.65, 0.35], abs=0.05)


# ---------------------------------------------------------------------------------------------
# Rows of factors


@pytest.mark.parametrize(("rows", "width"), [(4, 300_000), (6, 100_000), (3000, 500), (7, 3)])
def test_tiles_are_of_whole_rows(rows: int, width: int) -> None:
    tiles = fold_tiles(rows, width, whole_rows=True)
    ends = [0, *(stop for _, stop in tiles)]
    assert [start for start, _ in tiles] == ends[:-1]
    assert ends[-1] == rows * width
    assert all(end % width == 0 for end in ends)
    assert tiles.longest == max(stop - start for start, stop in tiles)
    assert tiles.longest < max(2 * TILE_ELEMENTS, width + 1)


@pytest.mark.parametrize("n", [300_000, 100_000])
def test_factors_of_several_tiles(n: int, tmp_path: Path) -> None:
    """Rows that are longer than a tile, too; whole numbers, of which many are equal."""
    layers = {"up": linear(70_000, n, 5)}
    made: dict[str, Any] = {"dtype": "BF16", "levels": 3, "seed": 1}
    path = write_random(tmp_path / "in", layers, lora_alpha=5, **made)
    shares: dict[str, Any] = {"density": 0.5, "parameters": {"epsilon": 0.5}}
    options = {"space": "factor", "seed": 3, "dtype": "float32", **shares}
    streammerge.merge([path], tmp_path / "out", method="della_linear", **options)
    found, factors = load_file(tmp_path / "out" / WEIGHTS), make_factors(layers, **made)
    for side in "AB":
        name = f"{PREFIX}up.lora_{side}.weight"
        x = decode(factors[name])
        drawn = draws(0, "up", side, x.shape, seed=3)
        expected = restated.prune_by_rank(x, drawn, 0.5, 0.5)
        np.testing.assert_allclose(found[name].numpy(), expected, rtol=1e-6)
