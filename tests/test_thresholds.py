"""Thresholds over streams of tiles: exact, whatever the values, the tiles and the sample."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.kernels import thresholds
from streammerge.kernels.each import Here
from streammerge.kernels.thresholds import Stream, find_threshold
from streammerge.spaces.delta import delta_sample, delta_tile
from streammerge.tiling import panels, split


def stream_of(x: torch.Tensor, tile: int, sample: torch.Tensor | None = None) -> Stream:
    """A tensor as a stream of tiles of about so many elements."""
    spans = split(len(x), tile)

    def tiles(panel: range) -> Iterator[torch.Tensor]:
        for t in panel:
            yield x[slice(*spans[t])].clone()

    return Stream(spans, tiles, lambda: x[::3] if sample is None else sample)


def whole(stream: Stream) -> Here:
    """All panels of a stream, in this process."""
    return Here(stream, len(stream.spans), map)


def pruned(x: torch.Tensor, stream: Stream, density: float) -> torch.Tensor:
    """The tensor cut at its threshold, tile by tile."""
    cut = find_threshold(stream, density, whole(stream))
    return torch.cat(
        [cut.prune_(x[slice(*span)].clone(), t) for t, span in enumerate(stream.spans)]
    )


def expected(x: torch.Tensor, density: float) -> torch.Tensor:
    """By a stable sort: the largest, and among equals those of the lowest index."""
    order = np.argsort(-x.abs().numpy(), kind="stable")
    kept = torch.from_numpy(order[: int(density * len(x))].copy())
    result = torch.zeros_like(x)
    result[kept] = x[kept]
    return result


VALUES = {
    "gaussian": lambda rng, n: rng.standard_normal(n),
    "bfloat16": lambda rng, n: torch.from_numpy(rng.standard_normal(n)).bfloat16().double().numpy(),
    "few values": lambda rng, n: rng.integers(-2, 3, n),
    "all equal": lambda rng, n: rng.choice([-1.5, 1.5], n),
    "mostly zero": lambda rng, n: rng.standard_normal(n) * (rng.random(n) < 0.05),
    "sorted": lambda rng, n: np.sort(rng.standard_cauchy(n)),
    "subnormal": lambda rng, n: rng.standard_normal(n) * 1e-42,
}


@given(
    kind=st.sampled_from(sorted(VALUES)),
    count=st.integers(1, 3000),
    tile=st.integers(1, 700),
    density=st.floats(0, 1),
    seed=st.integers(0, 99),
    double=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_what_is_kept_is_what_a_sort_keeps(
    kind: str, count: int, tile: int, density: float, seed: int, double: bool
) -> None:
    values = VALUES[kind](np.random.default_rng(seed), count)
    x = torch.from_numpy(np.asarray(values, np.float64 if double else np.float32))
    assert torch.equal(pruned(x, stream_of(x, tile), density), expected(x, density))


@pytest.mark.parametrize("kind", sorted(VALUES))
@pytest.mark.parametrize("off", [0.0, 1e-3, 10.0, 1e9])
def test_a_sample_that_misleads_costs_passes_and_no_more(kind: str, off: float) -> None:
    x = torch.from_numpy(VALUES[kind](np.random.default_rng(1), 40_000).astype(np.float32))
    stream = stream_of(x, 1000, sample=x[:500] * off)
    assert torch.equal(pruned(x, stream, 0.2), expected(x, 0.2))


def test_brackets_that_hold_too_much_are_narrowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What may be gathered is little: strides, then a narrower bracket, and no digits."""
    monkeypatch.setattr("streammerge.select.GATHERED", 300)
    monkeypatch.setattr(thresholds, "_count_digits", None)
    x = torch.from_numpy(np.random.default_rng(2).standard_normal(200_000).astype(np.float32))
    assert torch.equal(pruned(x, stream_of(x, 5000), 0.3), expected(x, 0.3))


@pytest.mark.parametrize("kind", ["few values", "gaussian"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_may_not_be_gathered_is_counted(
    kind: str, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thresholds, "PANEL_GATHERED", 10)
    x = torch.from_numpy(VALUES[kind](np.random.default_rng(3), 50_000).astype(dtype))
    assert torch.equal(pruned(x, stream_of(x, 1000), 0.5), expected(x, 0.5))


def test_an_ordinary_tensor_takes_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    sift = thresholds.sift_panel
    monkeypatch.setattr(thresholds, "sift_panel", lambda *a: passes.append(a[1]) or sift(*a))
    x = torch.from_numpy(np.random.default_rng(4).standard_normal(300_000).astype(np.float32))
    stream = stream_of(x, 10_000)
    find_threshold(stream, 0.2, whole(stream))
    assert passes == panels(len(stream.spans))


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_a_threshold_that_is_not_finite_is_refused(value: str) -> None:
    stream = stream_of(torch.full((100,), float(value)), 10)
    with pytest.raises(FloatingPointError, match="not finite"):
        find_threshold(stream, 0.5, whole(stream))


def test_a_sample_of_a_small_delta_is_all_of_it() -> None:
    """And a sample of a large one comes by every row and column."""
    rng = torch.Generator().manual_seed(0)
    b, a = torch.randn(12, 3, generator=rng), torch.randn(3, 20, generator=rng)
    dense = (b @ a * 0.5).reshape(-1)
    whole_tile = delta_tile(b, a, 0.5, out=torch.empty(12, 20)).view(-1)
    assert torch.equal(delta_sample(b, a, 0.5, 240), whole_tile)
    some = delta_sample(b, a, 0.5, 120)
    assert len(some) == 120
    assert all(torch.isclose(dense, value).any() for value in some)


@pytest.mark.parametrize(
    "scales", ["alike", "of rows", "of columns", "of both", "of every other row and column"]
)
@pytest.mark.parametrize("shape", [(512, 2048), (3000, 700), (8192, 640), (5, 40_000), (40_000, 5)])
def test_a_sample_stands_for_a_delta(shape: tuple[int, int], scales: str) -> None:
    """So well that the bracket around a threshold holds it, whatever rows and columns are large."""
    rng = np.random.default_rng(1)
    b, a = rng.standard_normal((shape[0], 4)), rng.standard_normal((4, shape[1]))
    if scales in ("of rows", "of both"):
        b *= np.exp(2 * rng.standard_normal((shape[0], 1)))
    if scales in ("of columns", "of both"):
        a *= np.exp(2 * rng.standard_normal((1, shape[1])))
    if scales == "of every other row and column":
        b[::2] *= 9
        a[:, ::2] *= 9
    sample = delta_sample(torch.from_numpy(b), torch.from_numpy(a), 0.5, 2**15).abs().numpy()
    assert 0.9 * 2**15 < len(sample) < 1.01 * 2**15
    for share in (0.05, 0.3, 0.8):
        value = np.quantile(np.abs(b @ a * 0.5), 1 - share)
        margin = thresholds.DEVIATIONS * np.sqrt(share * (1 - share) / len(sample))
        assert abs(np.mean(sample > value) - share) < margin
