"""Coefficient rules: weights from inner products alone, and the sum exact."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import streammerge
from making import linear
from making import write_adapter as write_random
from oracle import wholes
from oracle.files import random_source, write_adapter
from oracle.peft_oracle import read_adapter, relative_error
from oracle.restated import Matrix, Source, best_rank
from streammerge import events
from streammerge.catalog import RULES
from streammerge.errors import RecipeError
from streammerge.kernels.inner import inner_products
from streammerge.rules import COEFFICIENTS, Inner

NAMES = tuple(name for name, rule in RULES.items() if rule.kind == "coefficient")
EXACT = {"compute_dtype": "float64", "dtype": "float64"}
WEIGHTS = (1.0, 0.6, 0.8, 0.3)


def sources(count: int, m: int = 40, n: int = 30, seed: int = 0) -> list[Source]:
    """With a part in common, so that they are not at right angles."""
    shared = random_source(seed + 90, m, n, 2, scaling=1.0)
    made = []
    for i in range(count):
        own = random_source(seed + i, m, n, 2 + i % 3, scaling=1 + i / 2)
        made.append(Source(np.vstack([shared.a, own.a]), np.hstack([shared.b, own.b]), own.scaling))
    return made


def merge(
    adapters: Sequence[Source], weights: Sequence[float], method: str, **options: Any
) -> Matrix:
    with tempfile.TemporaryDirectory() as place:
        paths = [
            write_adapter(Path(place) / f"{i}", {"layer": source}, dtype=torch.float64)
            for i, source in enumerate(adapters)
        ]
        streammerge.merge(
            paths,
            Path(place) / "out",
            method=method,
            weights=weights,
            workers=1,
            on_event=events.ignore,
            **options,
        )
        return read_adapter(Path(place) / "out")["layer"].delta


def count_for(method: str) -> int:
    return RULES[method].most_adapters or 4


@pytest.mark.parametrize("compute", ["float32", "float64"])
@pytest.mark.parametrize("space", ["delta", "exact"])
@pytest.mark.parametrize("method", NAMES)
def test_the_definition(method: str, space: str, compute: str) -> None:
    adapters = sources(count_for(method))
    weights = WEIGHTS[: len(adapters)]
    expected = wholes.merged(method, [s.delta for s in adapters], weights)
    options: dict[str, Any] = {"space": space, "compute_dtype": compute, "dtype": "float64"}
    if space == "delta":
        options["rank"] = 30
    found = merge(adapters, weights, method, **options)
    assert relative_error(found, expected) < (1e-11 if compute == "float64" else 1e-5)


@pytest.mark.parametrize("method", NAMES)
def test_the_best_pair_of_a_rank(method: str) -> None:
    adapters = sources(count_for(method))
    weights = WEIGHTS[: len(adapters)]
    expected = wholes.merged(method, [s.delta for s in adapters], weights)
    found = merge(adapters, weights, method, rank=3, **EXACT)
    assert relative_error(found, best_rank(expected, 3)) < 1e-10


@pytest.mark.parametrize("method", NAMES)
def test_a_short_side(method: str) -> None:
    """So many columns, and so few rows, that the sum is formed as a whole."""
    adapters = [random_source(i, 30, 900, 12, scaling=1.0) for i in range(count_for(method))] * 8
    adapters = adapters[: RULES[method].most_adapters]
    weights = ([1.0, 0.7, 0.2, 0.4] * 8)[: len(adapters)]
    expected = wholes.merged(method, [s.delta for s in adapters], weights)
    found = merge(adapters, weights, method, rank=30)
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("method", NAMES)
def test_one_adapter_is_itself(method: str) -> None:
    (adapter,) = sources(1)
    assert relative_error(merge([adapter], [0.3], method, rank=30, **EXACT), adapter.delta) < 1e-11


@pytest.mark.parametrize("method", NAMES)
def test_equal_adapters_are_themselves(method: str) -> None:
    (adapter,) = sources(1)
    twice = merge([adapter, adapter], [0.4, 1.7], method, rank=30, **EXACT)
    assert relative_error(twice, adapter.delta) < 1e-7


@pytest.mark.parametrize("method", NAMES)
def test_weights_count_by_their_shares(method: str) -> None:
    adapters = sources(count_for(method))
    weights = WEIGHTS[: len(adapters)]
    once = merge(adapters, weights, method, rank=30, **EXACT)
    tenfold = merge(adapters, [10 * w for w in weights], method, rank=30, **EXACT)
    assert relative_error(once, tenfold) < 1e-11


@pytest.mark.parametrize("method", ["multislerp", "karcher", "model_stock", "norm_matched"])
def test_the_order_of_adapters_does_not_matter(method: str) -> None:
    adapters = sources(4)
    forth = merge(adapters, WEIGHTS, method, rank=30, **EXACT)
    back = merge(adapters[::-1], WEIGHTS[::-1], method, rank=30, **EXACT)
    assert relative_error(forth, back) < 1e-11


@pytest.mark.parametrize("method", ["multislerp", "karcher", "norm_matched"])
def test_the_length_is_the_mean_one(method: str) -> None:
    adapters = sources(4)
    norms = [np.linalg.norm(source.delta) for source in adapters]
    found = merge(adapters, WEIGHTS, method, rank=30, **EXACT)
    assert np.linalg.norm(found) == pytest.approx(np.array(WEIGHTS) @ norms / sum(WEIGHTS))


def test_a_karcher_mean_is_where_the_directions_average_out() -> None:
    adapters = sources(4)
    found = merge(adapters, WEIGHTS, "karcher", rank=30, **EXACT).ravel()
    units = np.stack([source.delta.ravel() / np.linalg.norm(source.delta) for source in adapters])
    tangent, *_ = wholes.toward(found / np.linalg.norm(found), units, wholes.shares(WEIGHTS))
    assert np.linalg.norm(tangent) < 1e-10


@pytest.mark.parametrize("seed", range(20))
def test_a_karcher_mean_of_what_depends_on_each_other(seed: int) -> None:
    """Six directions in space, spread all round: coefficients are no larger than they need be."""
    drawn = np.random.default_rng(seed)
    deltas = drawn.standard_normal((6, 3))
    inner = Inner(torch.from_numpy(deltas @ deltas.T), list(drawn.random(6) + 0.1))
    found = COEFFICIENTS["karcher"](inner).coefficients.numpy()
    units = deltas / np.linalg.norm(deltas, axis=1)[:, None]
    shortest = np.linalg.lstsq(units.T, found @ deltas, rcond=None)[0]
    assert np.allclose(found * np.linalg.norm(deltas, axis=1), shortest, atol=1e-9)


def nearly_around() -> list[Source]:
    """30 directions less nearly all of what they have in common: the mean is all but undecided."""
    rows = np.eye(30) - 0.99 / 30
    return [Source(row[None], np.eye(5, 1), 1.0) for row in rows]


@pytest.mark.parametrize("space", ["delta", "exact"])
def test_a_karcher_mean_that_does_not_settle_is_told(space: str, tmp_path: Path) -> None:
    """And, in the same merge, one that does is not."""
    around, apart = nearly_around(), sources(30, 5, 30)
    paths = [
        write_adapter(tmp_path / f"{i}", {"apart": apart[i], "around": around[i]})
        for i in range(len(around))
    ]
    out, weights = tmp_path / "out", [1 + 0.5 * math.sin(i) for i in range(len(around))]
    result = streammerge.merge(
        paths, out, method="karcher", space=space, weights=weights, on_event=events.ignore
    )
    reports = {module.target: module for module in result.modules}
    assert reports["apart"].settled
    assert reports["apart"].last_step is None
    assert not reports["around"].settled
    assert reports["around"].last_step == pytest.approx(1e-9, rel=0.9)
    record = json.loads((out / "streammerge.json").read_text())["modules"]
    assert [record[name]["settled"] for name in ("apart", "around")] == [True, False]
    assert record["around"]["last_step"] == reports["around"].last_step
    (told,) = [notice for notice in result.notices if "come to rest" in notice]
    assert all(words in told for words in ("in 1 targets", "karcher", space, "(in around)"))


def test_model_stock_at_right_angles_is_nothing() -> None:
    a = np.eye(4)
    first, second = (Source(a[i : i + 1], np.eye(5, 4)[:, i : i + 1], 1.0) for i in (0, 1))
    assert not merge([first, second], [1.0, 1.0], "model_stock", rank=2, **EXACT).any()


@pytest.mark.parametrize("method", NAMES)
def test_adapters_of_zeros(method: str) -> None:
    """An adapter that was never trained has no direction; all of them have no mean."""
    first, fresh = sources(2)
    fresh = Source(fresh.a, np.zeros_like(fresh.b), 1.0)
    assert not merge([fresh, fresh], [1.0, 1.0], method, rank=4, **EXACT).any()
    found = merge([first, fresh], [1.0, 3.0], method, rank=30, **EXACT)
    assert relative_error(found, 0.25 * first.delta) < 1e-10


def test_model_stock_counts_those_that_are_there() -> None:
    """Adapters of zeros, or of weight 0, change neither N nor the mean cosine."""
    first, second, fresh = sources(3)
    zeros = Source(fresh.a, np.zeros_like(fresh.b), 1.0)
    both = merge([first, second], [1.0, 1.0], "model_stock", rank=30, **EXACT)
    with_zeros = merge([first, second, zeros], [1.0, 1.0, 0.0], "model_stock", rank=30, **EXACT)
    without = merge([first, second, fresh], [1.0, 1.0, 0.0], "model_stock", rank=30, **EXACT)
    assert relative_error(with_zeros, both) < 1e-11
    assert relative_error(without, both) < 1e-11


@pytest.mark.parametrize("size", [1e-20, 1e20])
@pytest.mark.parametrize("method", NAMES)
def test_the_unit_does_not_matter(method: str, size: float) -> None:
    """Deltas that are all as many times as long are combined as before, however short they are."""
    deltas = [torch.from_numpy(s.delta.ravel().copy()) for s in sources(count_for(method))]
    products = torch.stack([torch.stack([x @ y for y in deltas]) for x in deltas])
    weights = WEIGHTS[: len(deltas)]
    once, other = (
        COEFFICIENTS[method](Inner(scaled, weights)).coefficients
        for scaled in (products, products * size)
    )
    assert bool(once.all())
    torch.testing.assert_close(other, once, rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_a_negative_weight_is_that_of_the_opposite(method: str) -> None:
    first, second, third = sources(3)
    against = Source(second.a, -second.b, second.scaling)
    found = merge([first, second, third], [2.0, -1.0, 0.5], method, rank=30, **EXACT)
    expected = merge([first, against, third], [2.0, 1.0, 0.5], method, rank=30, **EXACT)
    assert relative_error(found, expected) < 1e-11
    assert (found * (2 * first.delta - second.delta)).sum() > 0


def test_right_across_from_each_other() -> None:
    """Two deltas that cancel: nothing is divided by what is left of them."""
    (adapter,) = sources(1)
    against = Source(adapter.a, -adapter.b, adapter.scaling)
    for method in ("slerp", "multislerp", "karcher", "norm_matched", "model_stock"):
        found = merge([adapter, against], [1.0, 1.0], method, rank=30, **EXACT)
        assert np.linalg.norm(found) <= np.linalg.norm(adapter.delta) * (1 + 1e-9), method


def against(adapter: Source, times: float) -> Source:
    """The opposite, so many times as large."""
    return Source(adapter.a, -times * adapter.b, adapter.scaling)


@pytest.mark.parametrize("space", ["delta", "exact"])
@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_right_across_with_the_lesser_weight(method: str, space: str) -> None:
    """It leads nowhere, though its cosine is -1 but for rounding; the mean length stays."""
    rank = {} if space == "exact" else {"rank": 5}
    for seed in range(8):
        (adapter,) = sources(1, seed=seed)
        both = [adapter, against(adapter, 3 + seed / 7)]
        found = merge(both, [1.0, 0.3], method, space=space, **rank, **EXACT)
        length = (1 + 0.3 * (3 + seed / 7)) / 1.3
        assert relative_error(found, length * adapter.delta) < 1e-7


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_right_across_of_what_factors_nearly_cancel(method: str) -> None:
    """A delta that is some thirty times shorter than its factors has a less certain cosine."""
    for seed in range(8):
        made = random_source(seed, 1, 1, 7)
        shift = 0.03 * np.linalg.norm(made.a) * np.linalg.norm(made.b) - made.delta[0, 0]
        factors = made.a, made.b + shift * made.a.T / np.linalg.norm(made.a) ** 2
        both = [Source(*factors, 1.0), Source(np.ones((1, 1)), np.array([[-3.0]]), 1.0)]
        length = (both[0].delta[0, 0] + 0.3 * 3) / 1.3
        found = merge(both, [1.0, 0.3], method, rank=1, **EXACT)
        assert found[0, 0] == pytest.approx(length, rel=1e-6)


@pytest.mark.parametrize("method", ["multislerp", "karcher", "norm_matched"])
def test_what_cancels_is_nothing(method: str) -> None:
    """No coefficient comes from what rounding leaves of a length."""
    for seed in range(8):
        (adapter,) = sources(1, seed=seed)
        times = 3 + seed / 7
        both = [adapter, against(adapter, times)]
        weights = [times, 1.0] if method == "norm_matched" else [1.0, 1.0]
        with tempfile.TemporaryDirectory() as place:
            paths = [
                write_adapter(Path(place) / f"{i}", {"layer": source}, dtype=torch.float64)
                for i, source in enumerate(both)
            ]
            out = Path(place) / "out"
            streammerge.merge(
                paths, out, method=method, space="exact", weights=weights, on_event=events.ignore
            )
            assert not read_adapter(out)["layer"].a.any()


@pytest.mark.parametrize("rule", ["multislerp", "karcher", "norm_matched"])
@pytest.mark.parametrize("left", [1e-7, 6e-7, 8e-7, 9.9e-7])
def test_what_nearly_cancels_is_nothing(rule: str, left: float) -> None:
    """Of three directions, whose mean is so long."""
    share = (1 - 3 * left) / 2
    rest = math.sqrt(1 - share**2)
    deltas = np.array([[1.0, 0.0], [-share, rest], [-share, -rest]])
    found = COEFFICIENTS[rule](Inner(torch.from_numpy(deltas @ deltas.T), [1.0] * 3))
    assert not found.coefficients.any()


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_a_negative_weight_as_large_as_the_others(method: str) -> None:
    """It is that of the opposite direction, and nothing is divided by a sum of zero."""
    adapters = sources(2)
    turned = [adapters[0], replace(adapters[1], b=-adapters[1].b)]
    found = merge(adapters, (1.0, -1.0), method, rank=30, **EXACT)
    assert relative_error(found, merge(turned, (1.0, 1.0), method, rank=30, **EXACT)) < 1e-10


def test_groups_of_sources_meet() -> None:
    """Inner products of stacks that are taken in groups are those of the whole."""
    made = sources(7, 50, 20)
    stacked = [
        (torch.from_numpy(s.b.astype(np.float32)), torch.from_numpy(s.a.astype(np.float32)))
        for s in made
    ]

    def stacks(group: range) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = [stacked[i] for i in group]
        return torch.cat([b for b, _ in chosen], 1), torch.cat([a for _, a in chosen])

    ranks = [len(a) for _, a in stacked]
    one = inner_products([range(7)], stacks, ranks, map)
    three = inner_products([range(2), range(2, 3), range(3, 7)], stacks, ranks, map)
    deltas = [(b.double() @ a.double()).flatten() for b, a in stacked]
    expected = torch.tensor([[float(x @ y) for y in deltas] for x in deltas], dtype=torch.float64)
    assert torch.allclose(one, expected, rtol=1e-12)
    assert torch.allclose(three, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("slerp", {"count": 3}, ("slerp", "2 adapters", "karcher")),
        (
            "norm_matched",
            {"weights": (1.0, -1.0)},
            ("up: norm_matched", "zero", "1 of ", "-1 of ", "exclude"),
        ),
        ("slerp", {"weights": (-2.0, 2.0)}, ("up: slerp", "zero", "-2 of ", "/0 and 2 of ")),
        ("norm_matched", {"count": 3, "weights": (0.1, 0.2, -0.3)}, ("norm_matched", "zero")),
        (
            "model_stock",
            {"count": 9, "weights": (*(1.0,) * 8, -8.0)},
            ("model_stock", "1 of ", "and 5 more", "zero"),
        ),
        ("karcher", {"space": "factor"}, ("karcher", "factor", "exact, delta")),
        ("karcher", {"space": "core"}, ("karcher", "core", "exact, delta")),
        ("model_stock", {"density": 0.5}, ("density", "model_stock")),
    ],
)
def test_refusals(
    method: str, options: dict[str, Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    options = dict(options)
    layers = {"up": linear(20, 30, 2)}
    paths = [
        write_random(tmp_path / f"{i}", layers, seed=i) for i in range(options.pop("count", 2))
    ]
    with pytest.raises(RecipeError) as refused:
        streammerge.plan(paths, method=method, **options)
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize("space", ["delta", "exact"])
@pytest.mark.parametrize("method", NAMES)
def test_a_target_that_only_adapters_of_weight_0_have(
    method: str, space: str, tmp_path: Path
) -> None:
    """Nothing of them is wanted, so its delta is zero; the other targets are as ever."""
    first, second, third, fourth = sources(4)
    targets = [{"both": first, "mine": second}, {"both": third, "yours": fourth}]
    paths = [write_adapter(tmp_path / f"{i}", one) for i, one in enumerate(targets)]
    out = tmp_path / "out"
    result = streammerge.merge(
        paths, out, method=method, space=space, weights=[1.0, 0.0], on_event=events.ignore
    )
    found = read_adapter(out)
    assert not found["yours"].delta.any()
    assert relative_error(found["mine"].delta, second.delta) < 1e-5
    assert found["both"].delta.any()
    (told,) = [notice for notice in result.notices if "weight 0" in notice]
    assert "1 of 3 targets" in told
    assert "yours" in told
    assert streammerge.verify(out).checksums


def test_every_rule_has_its_function() -> None:
    assert set(COEFFICIENTS) == set(NAMES)
    nothing = Inner(torch.zeros(2, 2, dtype=torch.float64), (1.0, 1.0))
    for function in COEFFICIENTS.values():
        found = function(nothing)
        assert bool(torch.isfinite(found.coefficients).all())
        assert found.unsettled == 0.0
