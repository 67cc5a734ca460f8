"""What must hold of any merge, whoever computes it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import streammerge
from names import rule_of
from oracle import restated
from oracle.files import random_source, write_adapter
from oracle.peft_oracle import SavedTarget, read_adapter, relative_distance, relative_error
from oracle.restated import Source
from streammerge import events
from streammerge.catalog import METHODS

TOLERANCE = 1e-5
FEW = settings(max_examples=8, deadline=None, derandomize=True, database=None)

WITHOUT_DARE = [method for method in restated.METHODS if not restated.uses_masks(method)]
PRUNING = [method for method in restated.METHODS if restated.uses_density(method)]

weights_of = {
    count: st.tuples(*[st.sampled_from([1.0, -0.5, 0.3, 2.0, -1.2])] * count) for count in (2, 3)
}


@st.composite
def adapters(draw: st.DrawFn, count: int = 3, *, equal_ranks: bool = True) -> list[Source]:
    """A few small sources of one shape, with their own scalings."""
    m, n = draw(st.integers(2, 9)), draw(st.integers(2, 9))
    ranks = draw(st.tuples(*[st.integers(1, 4)] * count))
    seed = draw(st.integers(0, 2**20))
    return [
        random_source(seed + i, m, n, ranks[0 if equal_ranks else i], scaling=1 + i / 2)
        for i in range(count)
    ]


@contextmanager
def saved(sources: Sequence[Source]) -> Iterator[list[Path]]:
    """Each source as an adapter directory; the place goes away afterwards."""
    with tempfile.TemporaryDirectory() as place:
        yield [
            write_adapter(Path(place) / f"{i}", {"layer": source})
            for i, source in enumerate(sources)
        ]


def merge(
    sources: Sequence[Source], weights: Sequence[float], method: str, **options: Any
) -> SavedTarget:
    """Merge sources of one target through files."""
    if rule_of(method).needs_density:
        options.setdefault("density", 0.5)
    with saved(sources) as directories:
        output = directories[0].parent / "out"
        streammerge.merge(directories, output, method=method, weights=weights, **options)
        return read_adapter(output)["layer"]


def full_rank(sources: Sequence[Source], method: str) -> dict[str, int]:
    """The option under which nothing is cut off."""
    m, n = sources[0].b.shape[0], sources[0].a.shape[1]
    return {"rank": min(m, n)} if method in restated.DELTA_METHODS else {}


def undropped(method: str) -> dict[str, float]:
    """The option under which nothing is pruned."""
    return {"density": 1.0} if restated.uses_density(method) else {}


@pytest.mark.parametrize("weight", [1.0, -1.0, 2.5])
@pytest.mark.parametrize("method", restated.METHODS)
def test_one_adapter_gives_its_own_delta(method: str, weight: float) -> None:
    source = random_source(0, 8, 12, 3, scaling=1.5)
    merged = merge([source], [weight], method, **undropped(method))
    assert relative_error(merged.delta, weight * source.delta) < TOLERANCE
    assert merged.rank == 3


@pytest.mark.parametrize("method", restated.METHODS)
def test_one_adapter_of_weight_nothing_gives_nothing(method: str) -> None:
    source = random_source(0, 8, 12, 3, scaling=1.5)
    assert np.abs(merge([source], [0.0], method, **undropped(method)).delta).max() == 0


@pytest.mark.parametrize("method", METHODS)
def test_two_adapters_of_weight_nothing_give_nothing(method: str) -> None:
    first, second = (random_source(seed, 8, 12, 3, scaling=1.5) for seed in (0, 1))
    merged = merge([first, second], [0.0, 0.0], method, on_event=events.ignore)
    assert not merged.delta.any()


@pytest.mark.parametrize("method", restated.METHODS)
def test_an_adapter_less_itself_is_nothing(method: str) -> None:
    source = random_source(0, 8, 12, 3, scaling=1.5)
    merged = merge([source, source], [1.0, -1.0], method, **undropped(method))
    assert np.isfinite(merged.a).all()
    assert np.isfinite(merged.b).all()
    assert np.abs(merged.delta).max() < TOLERANCE * np.abs(source.delta).max()


@pytest.mark.parametrize(
    ("method", "weights", "factor"),
    [
        ("ties_svd", (0.5, 0.5), 0.5),
        ("ties_svd", (1.0, 1.0), 1.0),
        ("ties", (1.0, 1.0), 1.0),
        ("magnitude_prune_svd", (1.0, 1.0), 2.0),
        ("svd", (0.5, 0.5), 1.0),
        ("cat", (0.5, 0.5), 1.0),
        ("linear", (0.5, 0.5), 2.0),
    ],
)
def test_two_copies(method: str, weights: tuple[float, float], factor: float) -> None:
    """The mean of ties is over the count; linear in factor space squares its cross terms."""
    source = random_source(0, 8, 12, 3, scaling=1.5)
    merged = merge([source, source], weights, method, **undropped(method))
    assert relative_error(merged.delta, factor * source.delta) < TOLERANCE


@FEW
@given(adapters(equal_ranks=False), weights_of[3])
def test_cat_is_the_weighted_sum(sources: list[Source], weights: tuple[float, ...]) -> None:
    merged = merge(sources, weights, "cat")
    expected = restated.merge_delta("svd", sources, weights)
    assert relative_error(merged.delta, expected) < TOLERANCE
    assert merged.rank == sum(source.a.shape[0] for source in sources)


@FEW
@given(adapters(equal_ranks=False), weights_of[3], st.integers(1, 9))
def test_svd_is_the_best_approximation_of_cat(
    sources: list[Source], weights: tuple[float, ...], rank: int
) -> None:
    exact = merge(sources, weights, "cat").delta
    merged = merge(sources, weights, "svd", rank=rank)
    assert merged.rank == min(rank, *exact.shape)
    distance = float(np.linalg.norm(exact - merged.delta))
    rounding = TOLERANCE * float(np.linalg.norm(exact))
    assert distance <= restated.residual(exact, merged.rank) * (1 + 1e-4) + rounding


@FEW
@given(adapters(equal_ranks=False), weights_of[3])
def test_svd_at_full_rank_is_cat(sources: list[Source], weights: tuple[float, ...]) -> None:
    merged = merge(sources, weights, "svd", **full_rank(sources, "svd"))
    assert relative_distance(merged.delta, merge(sources, weights, "cat").delta) < TOLERANCE


@pytest.mark.parametrize("method", WITHOUT_DARE)
@FEW
@given(adapters(), weights_of[3])
def test_the_order_of_adapters_does_not_matter(
    method: str, sources: list[Source], weights: tuple[float, ...]
) -> None:
    merged = merge(sources, weights, method, **full_rank(sources, method))
    turned = merge(
        [*sources[1:], sources[0]],
        [*weights[1:], weights[0]],
        method,
        **full_rank(sources, method),
    )
    assert relative_distance(turned.delta, merged.delta) < TOLERANCE


@pytest.mark.parametrize("method", restated.METHODS)
@FEW
@given(adapters(2), weights_of[2])
def test_weights_scale_the_result(
    method: str, sources: list[Source], weights: tuple[float, ...]
) -> None:
    """Twice the weights, twice the delta: no method normalises them, nor elects by them."""
    merged = merge(sources, weights, method, **full_rank(sources, method))
    doubled = merge(sources, [2 * w for w in weights], method, **full_rank(sources, method))
    scale = np.abs(merged.delta).max() + 1e-30
    assert np.abs(doubled.delta - 2 * merged.delta).max() < TOLERANCE * scale


@pytest.mark.parametrize(
    ("method", "same_as"),
    [
        ("magnitude_prune", "linear"),
        ("dare_linear", "linear"),
        ("dare_ties", "ties"),
        ("magnitude_prune_svd", "svd"),
        ("dare_linear_svd", "svd"),
        ("dare_ties_svd", "ties_svd"),
    ],
)
@FEW
@given(adapters(), weights_of[3])
def test_density_one_prunes_nothing(
    method: str, same_as: str, sources: list[Source], weights: tuple[float, ...]
) -> None:
    more = full_rank(sources, method)
    merged = merge(sources, weights, method, **undropped(method), **more)
    same = merge(sources, weights, same_as, **undropped(same_as), **more)
    assert relative_distance(merged.delta, same.delta) < TOLERANCE


@pytest.mark.parametrize("method", PRUNING)
def test_density_nothing_leaves_nothing(method: str) -> None:
    sources = [random_source(i, 8, 12, 3) for i in range(2)]
    merged = merge(sources, [1.0, 0.5], method, density=0.0)
    assert not merged.delta.any()


@pytest.mark.parametrize("method", restated.DELTA_METHODS)
@FEW
@given(adapters(), weights_of[3])
def test_the_pair_is_balanced(
    method: str, sources: list[Source], weights: tuple[float, ...]
) -> None:
    """B = U sqrt(S) and A = sqrt(S) V^T: both have the Gram matrix S, largest first."""
    merged = merge(sources, weights, method)
    gram_a, gram_b = merged.a @ merged.a.T, merged.b.T @ merged.b
    sigma = np.diag(gram_a)
    scale = TOLERANCE * max(sigma[0], 1e-30)
    assert np.abs(gram_a - gram_b).max() <= scale
    assert np.abs(gram_a - np.diag(sigma)).max() <= scale
    assert (np.diff(sigma) <= scale).all()


@pytest.mark.parametrize(
    "method", [m for m in restated.DELTA_METHODS if not restated.uses_masks(m)]
)
@FEW
@given(adapters(), weights_of[3])
def test_delta_space_sees_only_the_deltas(
    method: str, sources: list[Source], weights: tuple[float, ...]
) -> None:
    """Other factors of the same delta merge to the same: here signs, order and powers of two."""
    changed = [Source(-2 * s.a[::-1], -s.b[:, ::-1] / 2, s.scaling) for s in sources]
    more = full_rank(sources, method)
    merged, other = (merge(s, weights, method, **more) for s in (sources, changed))
    assert relative_distance(other.delta, merged.delta) < TOLERANCE


@pytest.mark.parametrize(
    "method", [m for m in restated.DELTA_METHODS if not restated.uses_masks(m)]
)
@FEW
@given(adapters(), weights_of[3])
def test_delta_space_commutes_with_transposition(
    method: str, sources: list[Source], weights: tuple[float, ...]
) -> None:
    transposed = [Source(s.b.T, s.a.T, s.scaling) for s in sources]
    more = full_rank(sources, method)
    merged, other = (merge(s, weights, method, **more) for s in (sources, transposed))
    assert relative_distance(other.delta.T, merged.delta) < TOLERANCE


@pytest.mark.parametrize("method", ["cat", "linear", "magnitude_prune", "svd"])
@FEW
@given(adapters(2), weights_of[2])
def test_a_scaling_is_a_weight(
    method: str, sources: list[Source], weights: tuple[float, ...]
) -> None:
    """Where nothing is elected, alpha over rank and weight enter as their product alone."""
    moved = [Source(s.a, s.b, 1.0) for s in sources]
    products = [w * s.scaling for w, s in zip(weights, sources, strict=True)]
    more = full_rank(sources, method)
    merged, other = merge(sources, weights, method, **more), merge(moved, products, method, **more)
    assert relative_distance(other.delta, merged.delta) < TOLERANCE


@pytest.mark.parametrize("method", restated.METHODS)
def test_a_target_of_zeros_stays_zero(method: str) -> None:
    """Fresh adapters have B = 0; nothing may divide by their norm."""
    zero = Source(random_source(0, 8, 12, 3).a, np.zeros((8, 3)), 2.0)
    merged = merge([zero, zero], [1.0, -0.5], method)
    assert not merged.delta.any()
    assert np.isfinite(merged.a).all()


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties_svd"])
def test_the_seed_decides_the_masks(method: str) -> None:
    sources = [random_source(i, 20, 30, 3) for i in range(2)]
    first, again, other = (merge(sources, [1.0, 0.5], method, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.a, again.a)
    np.testing.assert_array_equal(first.b, again.b)
    assert relative_distance(other.delta, first.delta) > 0.1
