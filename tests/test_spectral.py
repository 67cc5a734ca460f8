"""Spectral rules and the space of shared bases: against dense definitions, and well posed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import streammerge
from making import linear
from making import write_adapter as write_random
from oracle import restated, wholes
from oracle.files import random_source, write_adapter
from oracle.peft_oracle import read_adapter, relative_error
from oracle.restated import Matrix, Source, best_rank
from streammerge import events
from streammerge.catalog import RULES
from streammerge.errors import RecipeError
from streammerge.finish import ModuleReport
from streammerge.kernels.polar import polar
from streammerge.output.staging import MARK_NAME
from streammerge.rules import SPECTRAL

EXACT = {"compute_dtype": "float64", "dtype": "float64"}
WEIGHTS = (1.0, -0.6, 0.8, 0.3)
NAMES = ("tsv", "iso_c", "iso_cts")


def sources(m: int, n: int, ranks: Sequence[int], seed: int = 0) -> list[Source]:
    return [random_source(seed + i, m, n, rank, scaling=1 + i / 2) for i, rank in enumerate(ranks)]


CASES = {
    "few": sources(60, 50, (3, 4, 2)),
    "one": sources(60, 50, (5,)),
    "more ranks than rows": sources(8, 20, (3, 4, 5)),
    "more ranks than columns": sources(20, 8, (3, 4, 5)),
}


def merge(
    adapters: Sequence[Source], weights: Sequence[float], method: str, **options: Any
) -> tuple[Matrix, ModuleReport]:
    with tempfile.TemporaryDirectory() as place:
        paths = [
            write_adapter(Path(place) / f"{i}", {"layer": source}, dtype=torch.float64)
            for i, source in enumerate(adapters)
        ]
        result = streammerge.merge(
            paths,
            Path(place) / "out",
            method=method,
            weights=weights,
            workers=1,
            on_event=events.ignore,
            **options,
        )
        return read_adapter(Path(place) / "out")["layer"].delta, result.modules[0]


def defined(
    method: str, adapters: Sequence[Source], weights: Sequence[float], rank: int, **more: float
) -> Matrix:
    deltas = [source.delta for source in adapters]
    if method == "tsv":
        return best_rank(wholes.tsv(deltas, weights), rank)
    if method == "iso_c":
        return wholes.iso_c(deltas, weights, rank)
    return wholes.iso_cts(deltas, weights, rank, **more)


def whole(method: str, adapters: Sequence[Source], weights: Sequence[float]) -> Matrix:
    """What is cut to a rank: of the isotropic rules nothing is."""
    if method == "tsv":
        return wholes.tsv([source.delta for source in adapters], weights)
    return defined(method, adapters, weights, 6)


# ---------------------------------------------------------------------------------------------
# The definitions


@pytest.mark.parametrize("compute", ["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", NAMES)
def test_the_definition(method: str, case: str, compute: str) -> None:
    adapters = CASES[case]
    weights = WEIGHTS[: len(adapters)]
    rank = min(8, *adapters[0].delta.shape)
    found, report = merge(
        adapters, weights, method, rank=rank, compute_dtype=compute, dtype="float64"
    )
    expected = defined(method, adapters, weights, rank)
    assert relative_error(found, expected) < (1e-10 if compute == "float64" else 2e-5)
    assert report.route == "spectral"
    assert report.converged


@pytest.mark.parametrize(
    ("common", "rank"), [(0.0, 8), (0.5, 8), (1.0, 8), (0.0, 7), (0.0, 4), (1.0, 4)]
)
def test_the_share_that_is_common(common: float, rank: int) -> None:
    """Of 7 and 4 directions one alone is left to the sum."""
    adapters, weights = CASES["few"], WEIGHTS[:3]
    parameters = {"common": common}
    found, _ = merge(adapters, weights, "iso_cts", rank=rank, parameters=parameters, **EXACT)
    expected = defined("iso_cts", adapters, weights, rank, common=common)
    assert relative_error(found, expected) < 1e-10


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
def test_one_direction_keeps_its_value(method: str) -> None:
    """One value is its own mean."""
    adapters, weights = CASES["few"], WEIGHTS[:3]
    total = sum(w * s.delta for w, s in zip(weights, adapters, strict=True))
    found, _ = merge(adapters, weights, method, rank=1, **EXACT)
    assert relative_error(found, best_rank(total, 1)) < 1e-10


def test_iso_cts_without_room_is_iso_c() -> None:
    """With no more directions than adapters none is left for one alone."""
    adapters, weights = CASES["few"], WEIGHTS[:3]
    common, _ = merge(adapters, weights, "iso_c", rank=3, **EXACT)
    found, _ = merge(adapters, weights, "iso_cts", rank=3, **EXACT)
    assert relative_error(found, common) < 1e-12


def test_tsv_of_what_does_not_interfere_is_the_sum() -> None:
    """Adapters at right angles in rows and columns have nothing to be whitened."""
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((40, 40)))
    adapters = [
        Source(q[i * 3 : i * 3 + 3] * (i + 1.0), q[:, i * 3 : i * 3 + 3], 0.5) for i in range(4)
    ]
    found, _ = merge(adapters, WEIGHTS, "tsv", rank=12, **EXACT)
    total = sum(w * s.delta for w, s in zip(WEIGHTS, adapters, strict=True))
    assert relative_error(found, total) < 1e-12


def test_iso_c_has_one_singular_value() -> None:
    adapters, weights = CASES["few"], WEIGHTS[:3]
    found, report = merge(adapters, weights, "iso_c", rank=9, **EXACT)
    total = sum(w * s.delta for w, s in zip(weights, adapters, strict=True))
    values = np.linalg.svd(found, compute_uv=False)[:9]
    assert np.allclose(values, np.linalg.svd(total, compute_uv=False)[:9].mean())
    assert report.kept_energy == 1.0


@pytest.mark.parametrize("method", NAMES)
def test_an_adapter_twice(method: str) -> None:
    """Directions that two adapters have are no more than one, and their rounding none."""
    first, second = CASES["few"][:2]
    adapters, weights = [first, second, first], (1.0, 0.5, 0.7)
    for compute in ("float32", "float64"):
        found, report = merge(
            adapters, weights, method, rank=6, compute_dtype=compute, dtype="float64"
        )
        expected = defined(method, adapters, weights, 6)
        assert relative_error(found, expected) < (1e-9 if compute == "float64" else 1e-4)
        assert report.relative_error == pytest.approx(
            float(np.linalg.norm(whole(method, adapters, weights) - found))
            / float(np.linalg.norm(whole(method, adapters, weights))),
            abs=1e-3,
        )


@pytest.mark.parametrize("compute", ["float32", "float64"])
@pytest.mark.parametrize("weights", [(1.0, 0.5, 0.7), (1.0, 0.5, -0.3)])
@pytest.mark.parametrize("method", NAMES)
def test_a_rank_above_what_the_adapters_span(
    method: str, weights: tuple[float, ...], compute: str
) -> None:
    """Rounding in directions that no adapter has is no direction of the sum."""
    first, second = CASES["few"][:2]
    adapters = [first, second, first]
    found, _ = merge(adapters, weights, method, rank=12, compute_dtype=compute, dtype="float64")
    expected = defined(method, adapters, weights, 12)
    assert relative_error(found, expected) < (1e-9 if compute == "float64" else 1e-4)


@pytest.mark.parametrize("compute", ["float32", "float64"])
@pytest.mark.parametrize("method", NAMES)
def test_a_sum_that_cancels_has_no_directions(method: str, compute: str) -> None:
    """Nor has its rounding: what each adapter has alone is all that there is."""
    adapter = CASES["few"][0]
    adapters, weights = [adapter, adapter], (-1.0, 1.0)
    found, _ = merge(adapters, weights, method, rank=5, compute_dtype=compute, dtype="float64")
    expected = defined(method, adapters, weights, 5)
    size = float(np.linalg.norm(adapter.delta))
    assert np.linalg.norm(found - expected) < size * (1e-9 if compute == "float64" else 1e-5)


@pytest.mark.parametrize("method", [*NAMES, "ctm"])
def test_adapters_of_zeros(method: str) -> None:
    first, second = CASES["few"][:2]
    fresh = Source(second.a, np.zeros_like(second.b), 2.0)
    nothing, report = merge([fresh, fresh], (1.0, 1.0), method, rank=4, **EXACT)
    assert not nothing.any()
    assert report.basis_gap in (None, 1.0)
    alone, _ = merge([first], (1.0,), method, rank=3, **EXACT)
    found, _ = merge([first, fresh], (1.0, 1.0), method, rank=3, **EXACT)
    if method == "iso_cts":
        assert np.isfinite(found).all()
    else:
        assert relative_error(found, alone) < 1e-10


@pytest.mark.parametrize("method", NAMES)
def test_many_adapters_are_iterated_on(method: str) -> None:
    """So many columns that their triples are found by iteration, to its tolerance."""
    adapters = sources(300, 280, (40,) * 6)
    weights = (1.0, 0.7, 0.9, 1.1, 0.8, 1.2)
    found, report = merge(adapters, weights, method, rank=4)
    deltas = [source.delta for source in adapters]
    if method == "tsv":
        whole = wholes.tsv(deltas, weights)
        best = restated.residual(whole, 4)
        assert np.linalg.norm(whole - found) <= best * (1 + 1e-4)
        # Of what is iterated on the energy is an estimate.
        assert report.kept_energy == pytest.approx(1 - (best / np.linalg.norm(whole)) ** 2, 0.2)
    else:
        expected = defined(method, adapters, weights, 4)
        assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(expected), rel=1e-2)


# ---------------------------------------------------------------------------------------------
# Well posed


def gap_of(values: Matrix) -> float:
    return float(((values[:-1] - values[1:]) / values[:-1]).min())


@pytest.mark.parametrize("method", [*NAMES, "ctm", "ties@core", "ties@knots", "ties@ctm"])
def test_noise_in_the_inputs_moves_little(method: str) -> None:
    """1e-12 of noise moves the result by less than 1e-6; published codes move by its own size,
    where they take directions from the null spaces of deltas."""
    adapters, weights = sources(96, 80, (4, 4, 4, 4), seed=5), WEIGHTS
    random = np.random.default_rng(1)

    def noisy(x: Matrix) -> Matrix:
        return x * (1 + 1e-12 * random.standard_normal(x.shape))

    shaken = [Source(noisy(s.a), noisy(s.b), s.scaling) for s in adapters]
    name, _, space = method.partition("@")
    options: dict[str, Any] = {"rank": 6, **EXACT}
    if space:
        options |= {"space": space, "density": 0.5}
    total = sum(w * s.delta for w, s in zip(weights, adapters, strict=True))
    assert gap_of(np.linalg.svd(total, compute_uv=False)[:16]) > 1e-6
    still, _ = merge(adapters, weights, name, **options)
    moved, _ = merge(shaken, weights, name, **options)
    assert relative_error(moved, still) < 1e-6


@pytest.mark.parametrize("method", [*NAMES, "ctm"])
def test_how_a_delta_is_factored_does_not_matter(method: str) -> None:
    adapters, weights = CASES["few"], WEIGHTS[:3]
    random = np.random.default_rng(2)
    others = []
    for source in adapters:
        turn = random.standard_normal((len(source.a), len(source.a)))
        others.append(Source(np.linalg.solve(turn, source.a), source.b @ turn, source.scaling))
    one, _ = merge(adapters, weights, method, rank=5, **EXACT)
    other, _ = merge(others, weights, method, rank=5, **EXACT)
    assert relative_error(one, other) < 1e-9


@pytest.mark.parametrize("method", [*NAMES, "ctm"])
def test_the_merge_turns_with_the_adapters(method: str) -> None:
    adapters, weights = CASES["few"], WEIGHTS[:3]
    q, _ = np.linalg.qr(np.random.default_rng(3).standard_normal((60, 60)))
    turned = [Source(s.a, q @ s.b, s.scaling) for s in adapters]
    one, _ = merge(adapters, weights, method, rank=5, **EXACT)
    other, _ = merge(turned, weights, method, rank=5, **EXACT)
    assert relative_error(q @ one, other) < 1e-9


@pytest.mark.parametrize("method", [*NAMES, "ctm"])
def test_the_unit_does_not_matter(method: str) -> None:
    """A merge of deltas a million million times as short is as much shorter, and as sure."""
    adapters, weights = with_a_common_part(4), WEIGHTS
    short = [Source(s.a, s.b * 1e-12, s.scaling) for s in adapters]
    one, report = merge(adapters, weights, method, rank=4, **EXACT)
    other, of_short = merge(short, weights, method, rank=4, **EXACT)
    assert relative_error(1e12 * other, one) < 1e-9
    assert (of_short.basis_gap or 0) == pytest.approx(report.basis_gap or 0, rel=1e-6)


@pytest.mark.parametrize("shape", [(30, 7), (7, 30)])
def test_polar_factors(shape: tuple[int, int]) -> None:
    x = torch.from_numpy(np.random.default_rng(4).standard_normal(shape))
    assert relative_error(polar(x.clone(), map).numpy(), wholes.polar(x.numpy())) < 1e-12
    doubled = torch.cat([x, x], dim=1)
    expected = wholes.polar(doubled.numpy())
    assert relative_error(polar(doubled, map).numpy(), expected) < 1e-9


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 0)])
def test_zeros_have_no_polar_factor(shape: tuple[int, int]) -> None:
    found = polar(torch.zeros(shape, dtype=torch.float64), map)
    assert torch.equal(found, torch.zeros(shape, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------
# Shared bases


def with_a_common_part(count: int, seed: int = 0) -> list[Source]:
    """Adapters that share four directions, of clear order, beside their own."""
    shared = random_source(seed + 70, 48, 36, 4, scaling=1.0)
    strong = np.array([8.0, 5.0, 3.0, 2.0])
    random = np.random.default_rng(seed)
    made = []
    for i in range(count):
        own = random_source(seed + i, 48, 36, 2, scaling=1.0)
        mixed = np.diag(strong) + 0.2 * random.standard_normal((4, 4))
        a = np.vstack([mixed @ shared.a, 0.3 * own.a])
        made.append(Source(a, np.hstack([shared.b, own.b]), 1 + i / 3))
    return made


@pytest.mark.parametrize("rule", ["ctm", "ties", "magnitude_prune"])
@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_the_definition_of_shared_bases(rule: str, beta: float) -> None:
    adapters, weights = with_a_common_part(4), WEIGHTS
    deltas = [source.delta for source in adapters]
    u, v = wholes.shared_bases(deltas, 4, beta)
    cores = [u.T @ delta @ v for delta in deltas]
    options: dict[str, Any] = {"rank": 4, "parameters": {"beta": beta}, **EXACT}
    if rule == "ctm":
        core = restated.weighted_sum(cores, weights)
    else:
        core = restated.apply_rule(rule, cores, weights, density=0.5)
        options |= {"space": "ctm", "density": 0.5}
    found, report = merge(adapters, weights, rule, **options)
    assert relative_error(found, u @ core @ v.T) < 1e-7
    assert report.directions == (4, 4)
    assert report.basis_unique
    assert report.kept_energy == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(5))
def test_the_bases_keep_as_much_as_can_be_kept(seed: int) -> None:
    """On adapters with nothing in common: no less than HOOI finds, from the same start."""
    adapters = sources(40, 30, (3, 4, 3, 5), seed=10 * seed)
    deltas = [source.delta for source in adapters]
    found, _ = merge(adapters, (1.0,) * 4, "ctm", rank=5, parameters={"beta": 1.0}, **EXACT)
    u, v = wholes.shared_bases(deltas, 5, 1.0)
    left, _, right = np.linalg.svd(found, full_matrices=False)
    left, right = left[:, :5], right[:5].T

    def kept(u: Matrix, v: Matrix) -> float:
        return float(sum(np.linalg.norm(u.T @ delta @ v) ** 2 for delta in deltas))

    assert kept(left, right) >= kept(u, v) * (1 - 1e-6)


@pytest.mark.parametrize("faintest", [1e-2, 1e-4, 1e-5])
def test_faint_directions_are_not_lost(faintest: float) -> None:
    """Three adapters with all directions in common, of lengths far apart, and room for all."""
    drawn = np.random.default_rng(3)
    u, v = (np.linalg.qr(drawn.standard_normal((side, 5)))[0] for side in (40, 30))
    sizes = np.geomspace(1, faintest, 5)
    adapters = [Source((drawn.permutation(5) + 1.0)[:, None] * v.T, u * sizes, 1) for _ in range(3)]
    found, report = merge(adapters, (1.0, -0.5, 0.7), "ctm", rank=5, **EXACT)
    total = adapters[0].delta - 0.5 * adapters[1].delta + 0.7 * adapters[2].delta
    assert report.directions == (5, 5)
    inside = u.T @ (found - total) @ v
    assert (np.abs(inside) < 1e-7 * sizes[:, None]).all()


def test_directions_that_the_other_basis_does_not_see() -> None:
    """What all share is a column here and another row there: a basis that sees none of what the
    other began with finds what there is for it."""
    units = np.eye(64)
    adapters = [
        Source(np.stack([units[10 + t], (1 + t / 10) * units[40]]), units[:, [0, 1 + t]], 1.0)
        for t in range(5)
    ]
    found, report = merge(adapters, (1.0,) * 5, "ctm", rank=1, **EXACT)
    assert report.directions == (1, 1)
    assert relative_error(found, 1.4 * np.outer(units[5], units[40])) < 1e-10


@pytest.mark.parametrize("apart", [1e-4, 1e-5])
def test_alike_adapters_do_not_settle_by_rounding(apart: float) -> None:
    """Whose bases cannot be turned by less than rounding makes of nearly equal factors."""
    drawn = np.random.default_rng(0)
    b, a = drawn.standard_normal((60, 4)), drawn.standard_normal((4, 50))
    adapters = [
        Source(
            a + apart * drawn.standard_normal(a.shape),
            b + apart * drawn.standard_normal(b.shape),
            1,
        )
        for _ in range(4)
    ]
    _, report = merge(adapters, (1.0,) * 4, "ctm", rank=8, **EXACT)
    assert report.settled or 1e-10 < (report.last_step or 0) < 1e-4


def test_shared_bases_in_float32() -> None:
    adapters, weights = with_a_common_part(4), WEIGHTS
    exact, _ = merge(adapters, weights, "ctm", rank=4, **EXACT)
    found, _ = merge(adapters, weights, "ctm", rank=4)
    assert relative_error(found, exact) < 1e-5


def test_shared_bases_that_do_not_settle_are_told(tmp_path: Path) -> None:
    """And, in the same merge, those that do are not; on one thread or two, and gone on with."""
    apart = sources(40, 30, (3, 4, 3, 5), seed=310)
    alike = with_a_common_part(4)
    paths = [
        write_adapter(tmp_path / f"{i}", {"alike": alike[i], "apart": apart[i], "end": alike[i]})
        for i in range(4)
    ]
    asked: dict[str, Any] = {"method": "ties", "space": "ctm", "density": 0.5, "rank": 5}
    result = streammerge.merge(paths, tmp_path / "one", workers=1, on_event=events.ignore, **asked)
    reports = {module.target: module for module in result.modules}
    assert {name: report.settled for name, report in reports.items()} == {
        "alike": True,
        "apart": False,
        "end": True,
    }
    assert reports["alike"].last_step is None
    assert reports["apart"].last_step == pytest.approx(1e-5, rel=0.5)
    record = (tmp_path / "one" / MARK_NAME).read_bytes()
    facts = json.loads(record)["modules"]["apart"]
    assert (facts["settled"], facts["last_step"]) == (False, reports["apart"].last_step)
    (told,) = [notice for notice in result.notices if "come to rest" in notice]
    assert all(words in told for words in ("in 1 targets", "ties in ctm space", "(in apart)"))

    def end(event: events.Event) -> None:
        if isinstance(event, events.TaskDone) and event.target == "apart":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        streammerge.merge(paths, tmp_path / "two", workers=1, on_event=end, **asked)
    again = streammerge.merge(
        paths, tmp_path / "two", workers=2, resume=True, on_event=events.ignore, **asked
    )
    assert told in again.notices
    assert (tmp_path / "two" / MARK_NAME).read_bytes() == record


def test_fewer_directions_than_the_rank() -> None:
    """Two adapters of rank 2 and 1 span three directions: the bases have no more."""
    adapters = sources(20, 16, (2, 1))
    found, report = merge(adapters, (1.0, 2.0), "ctm", rank=6, **EXACT)
    total = adapters[0].delta + 2 * adapters[1].delta
    assert report.directions == (3, 3)
    assert relative_error(found, total) < 1e-10


# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("tsv", {"space": "core"}, ("tsv", "core", "delta")),
        ("iso_c", {"space": "exact"}, ("iso_c", "exact")),
        ("iso_cts", {"parameters": {"common": 1.5}}, ("common", "[0, 1]", "1.5")),
        ("iso_c", {"rank": "energy:0.9,max:8"}, ("iso_c", "number")),
        ("iso_cts", {"rank": "error:0.1"}, ("iso_cts", "number")),
        ("svd", {"parameters": {"beta": 0.5}}, ("beta", "linear in space delta")),
        ("ctm", {"parameters": {"beta": -1}}, ("beta", "[0, 1]")),
    ],
)
def test_refusals(
    method: str, options: dict[str, Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    paths = [write_random(tmp_path / f"{i}", {"up": linear(20, 30, 2)}, seed=i) for i in range(2)]
    with pytest.raises(RecipeError) as refused:
        streammerge.plan(paths, method=method, **options)
    assert all(word in str(refused.value) for word in words), refused.value


def test_every_rule_has_its_function() -> None:
    assert set(SPECTRAL) == {name for name, rule in RULES.items() if rule.kind == "spectral"}
