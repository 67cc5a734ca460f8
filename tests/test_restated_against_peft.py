"""The float64 restatement agrees with PEFT wherever PEFT works."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oracle import cases, restated
from oracle import peft_oracle as peft
from oracle.cases import Setting
from oracle.restated import Mask

TOLERANCE = 1e-5
SVD_KINDS = [name for name, kind in peft.KINDS.items() if kind.peft_has_svd]
Saved = Callable[[str, Setting], list[Path]]


def numpy_mask(density: float) -> cases.MaskMaker:
    """Masks from numpy's generator, seeded by what they are for."""

    def make(position: int, target: str, tensor: str, shape: tuple[int, int]) -> Mask:
        seed = zlib.crc32(f"{position}/{target}/{tensor}".encode())
        return np.random.default_rng(seed).random(shape) < density

    return make


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Adapters of a setting on a kind of layer, saved once a module."""
    made: dict[tuple[str, int], list[Path]] = {}

    def get(kind: str, setting: Setting) -> list[Path]:
        key = (kind, id(setting))
        if key not in made:
            layers = peft.one_layer(kind)
            made[key] = cases.save(tmp_path_factory.mktemp(kind), layers, setting, kind)
        return made[key]

    return get


def run_peft(
    layers: peft.Layers,
    directories: list[Path],
    setting: Setting,
    method: str,
    majority_sign: str = "total",
    kind: str = "linear",
    **more: Any,
) -> tuple[dict[str, cases.Present], peft.PeftMerge]:
    """PEFT's merge of a setting, and the sources it merged."""
    model = peft.load_adapters(layers, directories)
    targets = cases.present(peft.sources(model, len(directories)))
    merged = peft.merge(
        model,
        setting.weights,
        method,
        masks=cases.masks_for_peft(method, targets, kind, numpy_mask(setting.density)),
        density=setting.density,
        majority_sign_method=majority_sign,
        **more,
    )
    return targets, merged


@pytest.mark.parametrize(
    ("method", "majority_sign"), cases.majority_signs(("cat", *restated.FACTOR_METHODS))
)
@pytest.mark.parametrize(("kind", "setting"), cases.KINDS_AND_SETTINGS)
def test_factors(kind: str, method: str, majority_sign: str, setting: str, saved: Saved) -> None:
    case = cases.SETTINGS[setting]
    targets, merged = run_peft(
        peft.one_layer(kind), saved(kind, case), case, method, majority_sign, kind
    )
    (here,) = targets.values()
    expected_a, expected_b = cases.expected_factors(
        method, here, case, majority_sign, numpy_mask(case.density)
    )
    a, b = merged.factors[here.target]
    assert peft.relative_error(a, expected_a) < TOLERANCE
    assert peft.relative_error(b, expected_b) < TOLERANCE
    assert merged.scaling[here.target] == 1.0


@pytest.mark.parametrize(("method", "majority_sign"), cases.majority_signs(restated.DELTA_METHODS))
@pytest.mark.parametrize(
    ("kind", "setting"), [pair for pair in cases.KINDS_AND_SETTINGS if pair[0] in SVD_KINDS]
)
def test_deltas(kind: str, method: str, majority_sign: str, setting: str, saved: Saved) -> None:
    case = cases.SETTINGS[setting]
    targets, merged = run_peft(
        peft.one_layer(kind), saved(kind, case), case, method, majority_sign, kind, svd_rank=4
    )
    (here,) = targets.values()
    expected = cases.expected_delta(method, here, case, majority_sign, numpy_mask(case.density))
    assert peft.relative_error(merged.untruncated[here.target], expected) < TOLERANCE
    distance = np.linalg.norm(expected - merged.delta(here.target))
    allowed = restated.residual(expected, 4) + TOLERANCE * np.linalg.norm(expected)
    assert distance <= allowed


@pytest.mark.parametrize("method", restated.DELTA_METHODS)
@pytest.mark.parametrize("kind", SVD_KINDS)
def test_truncated_delta_where_the_rank_is_well_separated(
    kind: str, method: str, saved: Saved
) -> None:
    directories = saved(kind, cases.SIGNS)
    (here,) = cases.saved_sources(directories).values()
    expected = cases.expected_delta(method, here, cases.SIGNS, "total", numpy_mask(0.5))
    rank, ratio = cases.clearest_rank(expected)
    assert ratio >= 1.1
    _, merged = run_peft(
        peft.one_layer(kind), directories, cases.SIGNS, method, kind=kind, svd_rank=rank
    )
    best = restated.best_rank(expected, rank)
    assert peft.relative_error(merged.delta(here.target), best) < 10 * TOLERANCE


@pytest.mark.parametrize("quantile", [0.99, 0.8])
@pytest.mark.parametrize("kind", SVD_KINDS)
def test_clamp(kind: str, quantile: float, saved: Saved) -> None:
    case = cases.SIGNS
    targets, merged = run_peft(
        peft.one_layer(kind), saved(kind, case), case, "ties_svd", kind=kind, svd_clamp=quantile
    )
    (here,) = targets.values()
    a, b = merged.factors[here.target]
    expected_a, expected_b = restated.clamped_factors(
        cases.expected_delta("ties_svd", here, case), a.shape[0], quantile, like_a=a
    )
    assert peft.relative_error(a, expected_a) < 10 * TOLERANCE
    assert peft.relative_error(b, expected_b) < 10 * TOLERANCE


@pytest.mark.parametrize(("setting", "method"), cases.TWO_LAYER_CASES)
def test_two_layers(setting: str, method: str, tmp_path: Path) -> None:
    case = cases.TWO_LAYER_SETTINGS[setting]
    directories = cases.save(tmp_path, cases.TWO_LAYERS, case)
    targets, merged = run_peft(cases.TWO_LAYERS, directories, case, method)
    assert set(merged.factors) == {"block.first", "block.second"}
    make_mask = numpy_mask(case.density)
    for target, here in targets.items():
        if method in restated.DELTA_METHODS:
            expected = cases.expected_delta(method, here, case, "total", make_mask)
            found = merged.untruncated[target]
        else:
            a, b = cases.expected_factors(method, here, case, "total", make_mask)
            expected, found = b @ a, merged.delta(target)
        assert peft.relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize(
    ("setting", "layers"),
    [(cases.PARTIAL, cases.TWO_LAYERS), (cases.UNEQUAL_RANKS, cases.TWO_LAYERS)],
    ids=["partial", "unequal_ranks"],
)
def test_files_hold_what_peft_loads(setting: Setting, layers: peft.Layers, tmp_path: Path) -> None:
    """The helper that reads a directory finds the factors and scalings that PEFT finds."""
    directories = cases.save(tmp_path, layers, setting)
    model = peft.load_adapters(layers, directories)
    loaded = cases.present(peft.sources(model, len(directories)))
    read = cases.saved_sources(directories)
    assert read.keys() == loaded.keys()
    for target, here in read.items():
        assert here.positions == loaded[target].positions
        for ours, theirs in zip(here.sources, loaded[target].sources, strict=True):
            np.testing.assert_array_equal(ours.a, theirs.a)
            np.testing.assert_array_equal(ours.b, theirs.b)
            assert ours.scaling == pytest.approx(theirs.scaling, rel=1e-12)
