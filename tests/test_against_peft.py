"""streammerge, on files, gives what PEFT gives; where PEFT fails, what the formulas give."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import streammerge
from oracle import cases, restated
from oracle import peft_oracle as peft
from oracle.cases import Setting
from oracle.files import random_source, write_adapter
from oracle.masks import stream_masks
from oracle.restated import Matrix, Source
from streammerge import events
from streammerge.draw import keep_limit, random_bits, stream_key

ELEMENTS = 1e-5
"""Relative error of elements, before anything is truncated."""
TRUNCATED = 1e-4
"""Relative error of a residual, and of a delta whose rank is well separated."""
SEPARATED = 1.1
"""sigma_R / sigma_(R+1) from which two truncated results can be compared by their elements."""

FACTOR_NAMES = ("cat", *restated.FACTOR_METHODS)
Saved = Callable[[str, Setting], list[Path]]


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


def merge_files(
    directories: Sequence[Path],
    output: Path,
    setting: Setting,
    method: str,
    majority_sign: str = "total",
    **more: Any,
) -> dict[str, peft.SavedTarget]:
    """streammerge's merge of a setting, read back from its output directory."""
    if restated.uses_density(method):
        more["density"] = setting.density
    if restated.uses_majority_sign(method):
        more["majority_sign"] = majority_sign
    weights = setting.weights
    streammerge.merge(
        directories, output, method=method, weights=weights, on_event=events.ignore, **more
    )
    merged = peft.read_adapter(output)
    assert all(target.scaling == 1.0 for target in merged.values())
    return merged


def report_of(output: Path) -> dict[str, Any]:
    """What the output's record says of its only target."""
    (report,) = json.loads((output / "streammerge.json").read_text())["modules"].values()
    assert isinstance(report, dict)
    return report


def merge_in_peft(
    layers: peft.Layers,
    directories: Sequence[Path],
    setting: Setting,
    method: str,
    majority_sign: str = "total",
    kind: str = "linear",
    **more: Any,
) -> peft.PeftMerge:
    """PEFT's merge of the same files under the same masks."""
    model = peft.load_adapters(layers, directories)
    targets = cases.present(peft.sources(model, len(directories)))
    return peft.merge(
        model,
        setting.weights,
        method,
        masks=cases.masks_for_peft(method, targets, kind, stream_masks(setting.density)),
        density=setting.density,
        majority_sign_method=majority_sign,
        **more,
    )


def untruncated_delta(
    kind: str, directories: Sequence[Path], setting: Setting, method: str, majority_sign: str
) -> Matrix:
    """PEFT's merged matrix before its SVD, or the restated one where PEFT cannot make it."""
    if peft.KINDS[kind].peft_has_svd:
        layers = peft.one_layer(kind)
        merged = merge_in_peft(layers, directories, setting, method, majority_sign, kind)
        (delta,) = merged.untruncated.values()
        return delta
    (here,) = cases.saved_sources(directories).values()
    return cases.expected_delta(method, here, setting, majority_sign, stream_masks(setting.density))


def assert_best_rank(found: Matrix, delta: Matrix, rank: int) -> None:
    """`found` is as near to `delta` as a matrix of that rank can be."""
    distance = float(np.linalg.norm(delta - found))
    nothing_left = ELEMENTS * float(np.linalg.norm(delta))
    assert distance <= max(restated.residual(delta, rank) * (1 + TRUNCATED), nothing_left)


@pytest.mark.parametrize(("method", "majority_sign"), cases.majority_signs(FACTOR_NAMES))
@pytest.mark.parametrize(("kind", "setting"), cases.KINDS_AND_SETTINGS)
def test_factors(
    kind: str, method: str, majority_sign: str, setting: str, saved: Saved, tmp_path: Path
) -> None:
    case = cases.SETTINGS[setting]
    directories = saved(kind, case)
    theirs = merge_in_peft(peft.one_layer(kind), directories, case, method, majority_sign, kind)
    ours = merge_files(directories, tmp_path / "out", case, method, majority_sign)
    assert ours.keys() == theirs.factors.keys()
    for target, (a, b) in theirs.factors.items():
        assert peft.relative_error(ours[target].a, a) < ELEMENTS
        assert peft.relative_error(ours[target].b, b) < ELEMENTS


@pytest.mark.parametrize(("method", "majority_sign"), cases.majority_signs(restated.DELTA_METHODS))
@pytest.mark.parametrize(("kind", "setting"), cases.KINDS_AND_SETTINGS)
def test_delta_before_truncation(
    kind: str, method: str, majority_sign: str, setting: str, saved: Saved, tmp_path: Path
) -> None:
    case = cases.SETTINGS[setting]
    directories = saved(kind, case)
    expected = untruncated_delta(kind, directories, case, method, majority_sign)
    merged = merge_files(
        directories, tmp_path / "out", case, method, majority_sign, rank=min(expected.shape)
    )
    (ours,) = merged.values()
    assert peft.relative_error(ours.delta, expected) < ELEMENTS


@pytest.mark.parametrize("method", restated.DELTA_METHODS)
@pytest.mark.parametrize("kind", peft.KINDS)
def test_truncated(kind: str, method: str, saved: Saved, tmp_path: Path) -> None:
    case = cases.SIGNS
    directories = saved(kind, case)
    delta = untruncated_delta(kind, directories, case, method, "total")
    clearest, ratio = cases.clearest_rank(delta)
    assert ratio >= SEPARATED
    for rank in sorted({1, 2, 5, clearest}):
        (ours,) = merge_files(
            directories, tmp_path / f"rank{rank}", case, method, rank=rank
        ).values()
        assert ours.rank == rank
        assert_best_rank(ours.delta, delta, rank)
        if rank == clearest:
            best = restated.best_rank(delta, rank)
            assert peft.relative_distance(ours.delta, best) < TRUNCATED


@pytest.mark.parametrize("quantile", [1.0, 0.99, 0.8])
@pytest.mark.parametrize("method", restated.DELTA_METHODS)
@pytest.mark.parametrize("kind", ["linear", "gpt2_conv1d", "embedding", "conv2d", "conv3d"])
def test_clamp(kind: str, method: str, quantile: float, saved: Saved, tmp_path: Path) -> None:
    """At a rank that keeps every pair apart, so that each is the same in any SVD."""
    case = cases.PLAIN
    directories = saved(kind, case)
    delta = untruncated_delta(kind, directories, case, method, "total")
    merged = merge_files(directories, tmp_path / "out", case, method, rank=2, clamp=quantile)
    (ours,) = merged.values()
    sigma = np.linalg.svd(delta, compute_uv=False)
    assert (sigma[:2] / sigma[1:3]).min() > 1.02
    a, b = restated.clamped_factors(delta, 2, quantile, like_a=ours.a)
    assert peft.relative_error(ours.a, a) < TRUNCATED
    assert peft.relative_error(ours.b, b) < TRUNCATED


def test_clamp_is_pefts_up_to_signs(saved: Saved, tmp_path: Path) -> None:
    """Both clamp by one rule; its quantile is of signed entries, and each SVD has its own signs."""
    case = cases.SIGNS
    directories = saved("linear", case)
    theirs = merge_in_peft(peft.one_layer("linear"), directories, case, "svd", svd_clamp=0.9)
    ours = merge_files(directories, tmp_path / "out", case, "svd", clamp=0.9)
    (here,) = cases.saved_sources(directories).values()
    delta = cases.expected_delta("svd", here, case)
    for a, b in (
        *theirs.factors.values(),
        *((target.a, target.b) for target in ours.values()),
    ):
        expected_a, expected_b = restated.clamped_factors(delta, 3, 0.9, like_a=a)
        assert peft.relative_error(a, expected_a) < TRUNCATED
        assert peft.relative_error(b, expected_b) < TRUNCATED


@pytest.mark.parametrize(("setting", "method"), cases.TWO_LAYER_CASES)
def test_two_layers(setting: str, method: str, tmp_path: Path) -> None:
    """Layers that only some adapters have, patterns of ranks and alphas, unequal ranks."""
    case = cases.TWO_LAYER_SETTINGS[setting]
    directories = cases.save(tmp_path, cases.TWO_LAYERS, case)
    theirs = merge_in_peft(cases.TWO_LAYERS, directories, case, method)
    more = {"rank": 9} if method in restated.DELTA_METHODS else {}
    ours = merge_files(directories, tmp_path / "out", case, method, **more)
    assert ours.keys() == theirs.factors.keys()
    for target, found in ours.items():
        if method in restated.DELTA_METHODS:
            delta = theirs.untruncated[target]
            if min(delta.shape) == 9:
                assert peft.relative_error(found.delta, delta) < ELEMENTS
            else:
                assert_best_rank(found.delta, delta, 9)
        else:
            assert peft.relative_error(found.delta, theirs.delta(target)) < ELEMENTS


@pytest.mark.parametrize("method", ["cat", "ties", "svd", "dare_ties_svd"])
@pytest.mark.parametrize("kind", peft.KINDS)
def test_peft_loads_what_is_written(
    kind: str, method: str, saved: Saved, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    case = cases.SIGNS
    (ours,) = merge_files(saved(kind, case), tmp_path / "out", case, method).values()
    model = peft.load_adapters(peft.one_layer(kind), [tmp_path / "out"])
    (layer,) = peft.lora_layers(model).values()
    a, b = peft.as_matrices(*peft.factors_of(layer, "a0"))
    np.testing.assert_array_equal(a, ours.a)
    np.testing.assert_array_equal(b, ours.b)
    assert layer.scaling["a0"] == 1.0
    assert not recwarn.list


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["cat", "linear", *restated.DELTA_METHODS])
def test_half_precision_sources(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """PEFT reads half precision into float32; so does streammerge."""
    layers = peft.one_layer("linear")
    directories = [
        peft.save_adapter(tmp_path / f"{i}", layers, seed=i, dtype=dtype, r=3, lora_alpha=4 + i)
        for i in range(2)
    ]
    case = cases.PLAIN
    theirs = merge_in_peft(layers, directories, case, method)
    more: dict[str, Any] = {"rank": 10} if method in restated.DELTA_METHODS else {}
    ours = merge_files(directories, tmp_path / "out", case, method, dtype="float32", **more)
    target = "block.layer"
    expected = theirs.untruncated[target] if theirs.untruncated else theirs.delta(target)
    assert peft.relative_error(ours[target].delta, expected) < ELEMENTS


LARGE = Setting((), (1.0, 0.6, -0.4, 0.8), density=0.2)
TALL, WIDE = (1100, 520), (520, 1100)
FLAT, DECAYING = 1.0, 0.7
FLOAT32_SAFE = 2e-7
"""Gap above which float32 prunes and elects as float64 does; the seeds are chosen for it."""


def write_sources(directory: Path, sources: Sequence[Source]) -> list[Path]:
    """One adapter for each source of the target "layer"."""
    return [
        write_adapter(directory / f"source{i}", {"layer": source})
        for i, source in enumerate(sources)
    ]


def integer_sources(m: int, n: int, rank: int, count: int) -> tuple[Source, ...]:
    """Factors of small integers: exact in any dtype, and tied at every threshold."""
    generator = np.random.default_rng(0)
    return tuple(
        Source(
            generator.integers(-3, 4, (rank, n)).astype(float),
            generator.integers(-3, 4, (m, rank)).astype(float),
            1.0,
        )
        for _ in range(count)
    )


@pytest.mark.parametrize(
    ("method", "shape", "decay"),
    [
        ("ties_svd", TALL, FLAT),
        ("ties_svd", WIDE, DECAYING),
        ("magnitude_prune_svd", TALL, DECAYING),
        ("magnitude_prune_svd", WIDE, FLAT),
        ("dare_ties_svd", TALL, DECAYING),
        ("dare_ties_svd", WIDE, FLAT),
        ("dare_linear_svd", TALL, FLAT),
        ("dare_linear_svd", WIDE, DECAYING),
    ],
)
def test_large_targets(method: str, shape: tuple[int, int], decay: float, tmp_path: Path) -> None:
    """Several tiles, and too large for a dense SVD: block Krylov finds the truncation."""
    sources = tuple(
        random_source(900 + i, *shape, 8, scaling=1 + i / 4, decay=decay) for i in range(4)
    )
    if "dare" not in method:
        pruned = [restated.prune_by_magnitude(s.delta, LARGE.density) for s in sources]
        gaps = [restated.pruning_gap(s.delta, LARGE.density) for s in sources]
        assert min(*gaps, restated.election_gap(pruned)) > FLOAT32_SAFE
    here = cases.Present("layer", (0, 1, 2, 3), sources)
    delta = cases.expected_delta(method, here, LARGE, "total", stream_masks(LARGE.density))
    u, sigma, vt = np.linalg.svd(delta, full_matrices=False)
    ratios = sigma[:40] / sigma[1:41]
    assert ratios.max() >= SEPARATED or decay == FLAT
    directories = write_sources(tmp_path, sources)
    for rank in sorted({8, int(ratios.argmax()) + 1}):
        output = tmp_path / f"rank{rank}"
        found = merge_files(directories, output, LARGE, method, rank=rank)["layer"].delta
        assert report_of(output)["route"] == "krylov"
        distance = float(np.linalg.norm(delta - found))
        assert distance <= float(np.linalg.norm(sigma[rank:])) * (1 + TRUNCATED)
        if ratios[rank - 1] >= SEPARATED:
            best = (u[:, :rank] * sigma[:rank]) @ vt[:rank]
            assert peft.relative_distance(found, best) < TRUNCATED


@pytest.mark.parametrize("method", [m for m in restated.DELTA_METHODS if m != "svd"])
def test_large_target_of_lower_rank_than_asked_for(method: str, tmp_path: Path) -> None:
    """Then the iteration runs out of directions, and the result is the matrix itself."""
    source = random_source(0, *TALL, 4)
    case = Setting((), (-0.5,), density=1.0)
    found = merge_files(write_sources(tmp_path, [source]), tmp_path / "out", case, method, rank=9)
    assert report_of(tmp_path / "out")["route"] == "krylov"
    assert peft.relative_error(found["layer"].delta, -0.5 * source.delta) < ELEMENTS


@pytest.mark.parametrize("method", [m for m in restated.DELTA_METHODS if m != "svd"])
def test_large_target_of_zeros(method: str, tmp_path: Path) -> None:
    directories = write_sources(tmp_path, [random_source(0, *TALL, 4)])
    case = Setting((), (0.0,), density=0.5)
    found = merge_files(directories, tmp_path / "out", case, method, rank=9)["layer"]
    assert not found.delta.any()
    assert np.isfinite(found.a).all()
    assert np.isfinite(found.b).all()


TILED = Setting((), (1.0, 0.6, -0.4), density=0.25)
"""Over integer sources even DARE's quotients are exact, so that votes tie in any arithmetic."""


@pytest.mark.parametrize(("method", "majority_sign"), cases.majority_signs(FACTOR_NAMES))
def test_factors_of_several_tiles(method: str, majority_sign: str, tmp_path: Path) -> None:
    """Thresholds, their equals and masks run on from one tile to the next."""
    sources = integer_sources(20, 190_000, 3, 3)
    directories = write_sources(tmp_path, sources)
    ours = merge_files(directories, tmp_path / "out", TILED, method, majority_sign)["layer"]
    here = cases.Present("layer", (0, 1, 2), sources)
    a, b = cases.expected_factors(method, here, TILED, majority_sign, stream_masks(TILED.density))
    assert peft.relative_error(ours.a, a) < ELEMENTS
    assert peft.relative_error(ours.b, b) < ELEMENTS


@pytest.mark.parametrize(("method", "majority_sign"), cases.majority_signs(restated.DELTA_METHODS))
def test_deltas_of_several_tiles(method: str, majority_sign: str, tmp_path: Path) -> None:
    """A short side keeps the SVD dense, so that every element can be compared."""
    sources = integer_sources(40, 16_000, 2, 3)
    directories = write_sources(tmp_path, sources)
    here = cases.Present("layer", (0, 1, 2), sources)
    delta = cases.expected_delta(method, here, TILED, majority_sign, stream_masks(TILED.density))
    single, double = (
        merge_files(
            directories,
            tmp_path / dtype,
            TILED,
            method,
            majority_sign,
            rank=40,
            compute_dtype=dtype,
        )["layer"].delta
        for dtype in ("float32", "float64")
    )
    assert peft.relative_error(double, delta) < ELEMENTS
    # A float32 QR gathers its rounding, of the matrix's whole norm, in a few elements.
    assert peft.relative_distance(single, delta) < ELEMENTS


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 0.9])
def test_dare_keeps_the_density(density: float) -> None:
    count = 200_000
    for position in range(4):
        bits = random_bits(stream_key(7, position, "block.layer", "delta"), 0, count)
        kept = int((bits < keep_limit(density)).sum())
        assert abs(kept - density * count) < 5 * np.sqrt(count * density * (1 - density))


def test_dare_masks_of_different_streams_are_independent() -> None:
    """Adapters, targets, tensors and seeds: no two masks agree more than chance makes them."""
    count, density = 100_000, 0.5
    streams = [
        (seed, position, target, tensor)
        for seed in (0, 1)
        for position in (0, 1)
        for target in ("a", "b")
        for tensor in ("A", "B", "delta")
    ]
    limit = keep_limit(density)
    masks = np.stack([(random_bits(stream_key(*s), 0, count) < limit).numpy() for s in streams])
    signs = 2.0 * masks - 1
    correlations = (signs @ signs.T)[np.triu_indices(len(streams), k=1)]
    assert np.abs(correlations).max() < 5 * np.sqrt(count)


def test_dare_rescales_what_it_keeps(tmp_path: Path) -> None:
    source = random_source(0, 200, 300, 8)
    directory = write_adapter(tmp_path / "in", {"layer": source})
    streammerge.merge([directory], tmp_path / "out", method="dare_linear", density=0.3, seed=5)
    ours = peft.read_adapter(tmp_path / "out")["layer"]
    for found, whole in ((ours.a, source.a), (ours.b, source.b)):
        kept = found != 0
        spread = np.sqrt(whole.size * 0.3 * 0.7)
        assert abs(int(kept.sum()) - 0.3 * whole.size) < 5 * spread
        assert peft.relative_error(found[kept], whole[kept] / 0.3) < ELEMENTS


@pytest.mark.parametrize("method", ["dare_linear", "dare_linear_svd"])
def test_dare_is_linear_on_average(method: str, tmp_path: Path) -> None:
    """Over many seeds the mean of B A is the undropped one, within its standard error."""
    seeds, case = 200, Setting((), (1.0, -0.5), density=0.5)
    sources = [random_source(i, 6, 8, 2, scaling=1.5) for i in range(2)]
    directories = [
        write_adapter(tmp_path / f"in{i}", {"layer": source}) for i, source in enumerate(sources)
    ]
    deltas = np.empty((seeds, 6, 8))
    for seed in range(seeds):
        output = tmp_path / f"out{seed}"
        more = {"rank": 6} if method == "dare_linear_svd" else {}
        ours = merge_files(directories, output, case, method, seed=seed, **more)
        deltas[seed] = ours["layer"].delta
    if method == "dare_linear_svd":
        expected = restated.merge_delta("svd", sources, case.weights)
    else:
        a, b = restated.merge_factors("linear", sources, case.weights)
        expected = b @ a
    standard_error = deltas.std(axis=0, ddof=1) / np.sqrt(seeds)
    z = (deltas.mean(axis=0) - expected) / standard_error
    assert np.abs(z).max() < 5
    assert 0.5 < (z**2).mean() < 2


@pytest.mark.parametrize("method", restated.DELTA_METHODS)
def test_float64_arithmetic(method: str, saved: Saved, tmp_path: Path) -> None:
    """In float64 the agreement with the formulas is to rounding of the float64."""
    case = cases.SIGNS
    directories = saved("linear", case)
    (here,) = cases.saved_sources(directories).values()
    expected = cases.expected_delta(method, here, case, "total", stream_masks(case.density))
    more = {"rank": 10, "compute_dtype": "float64", "dtype": "float64"}
    (ours,) = merge_files(directories, tmp_path / "out", case, method, **more).values()
    assert peft.relative_error(ours.delta, expected) < 1e-11


@pytest.mark.parametrize(
    ("method", "space", "same_as"),
    [
        ("ties", "delta", "ties_svd"),
        ("ties_svd", "factor", "ties"),
        ("linear", "exact", "cat"),
        ("cat", "delta", "svd"),
    ],
)
def test_a_space_overrides_the_methods_own(
    method: str, space: str, same_as: str, saved: Saved, tmp_path: Path
) -> None:
    case = cases.SIGNS
    directories = saved("linear", case)
    ours = merge_files(directories, tmp_path / "space", case, method, space=space)
    same = merge_files(directories, tmp_path / "name", case, same_as)
    for target, found in ours.items():
        np.testing.assert_array_equal(found.a, same[target].a)
        np.testing.assert_array_equal(found.b, same[target].b)


def test_the_output_config_is_a_plain_one(saved: Saved, tmp_path: Path) -> None:
    merge_files(saved("gpt2_conv1d", cases.SIGNS), tmp_path / "out", cases.SIGNS, "svd")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 3
    assert config["use_rslora"] is False
    assert config["init_lora_weights"] is True
    assert config["target_modules"] == ["block.layer"]
    assert config["fan_in_fan_out"] is True
