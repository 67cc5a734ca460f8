"""Core and KnOTS space: against the formulas, against each other, and whatever the hardware."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import streammerge
from making import WEIGHTS, linear
from making import write_adapter as write_random
from oracle import restated
from oracle.files import random_source, write_adapter
from oracle.masks import stream_masks
from oracle.peft_oracle import SavedTarget, read_adapter, relative_error
from oracle.restated import Matrix, Source
from streammerge import errors, events
from streammerge.adapter import NameTable
from streammerge.cli import main
from streammerge.finish import ModuleReport
from streammerge.kernels.bases import _groups, left_basis, square_root
from streammerge.output.staging import Staging
from streammerge.readers import read_adapters
from streammerge.run import run_plan
from streammerge.tiling import GRAM_ROWS

SPACES = ("core", "knots")
RULES = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
DENSITY = 0.4
EXACT = {"compute_dtype": "float64", "dtype": "float64"}


def sources(m: int, n: int, ranks: Sequence[int], seed: int = 0) -> list[Source]:
    return [random_source(seed + i, m, n, rank, scaling=1 + i / 2) for i, rank in enumerate(ranks)]


def with_shared_directions() -> list[Source]:
    """One adapter twice, one that another one holds, and one that was never trained."""
    first, second = sources(30, 24, (4, 3))
    part = Source(first.a[:2], 3 * first.b[:, :2], 0.7)
    fresh = Source(second.a, np.zeros_like(second.b), 2.0)
    return [first, second, first, part, fresh]


CASES = {
    "few": sources(40, 30, (3, 4, 2)),
    "more ranks than rows": sources(8, 20, (3, 4, 5)),
    "more ranks than columns": sources(20, 8, (3, 4, 5)),
    "shared directions": with_shared_directions(),
}


def merge(
    adapters: Sequence[Source], weights: Sequence[float], method: str, space: str, **options: Any
) -> tuple[SavedTarget, ModuleReport]:
    """Merge sources of one target through files, and at full rank unless told otherwise."""
    options.setdefault("rank", min(adapters[0].delta.shape))
    with tempfile.TemporaryDirectory() as place:
        paths = [
            write_adapter(Path(place) / f"{i}", {"layer": source}, dtype=torch.float64)
            for i, source in enumerate(adapters)
        ]
        result = streammerge.merge(
            paths,
            Path(place) / "out",
            method=method,
            space=space,
            weights=weights,
            workers=1,
            on_event=events.ignore,
            **options,
        )
        return read_adapter(Path(place) / "out")["layer"], result.modules[0]


def merged(
    adapters: Sequence[Source], weights: Sequence[float], method: str, space: str, **options: Any
) -> Matrix:
    return merge(adapters, weights, method, space, **{**EXACT, **options})[0].delta


def seen_shape(space: str, adapters: Sequence[Source]) -> tuple[int, int]:
    """The shape of what a rule sees."""
    rows, columns = restated.in_coordinates(space, adapters).tensors[0].shape
    return rows, columns


def masks_for(rule: str, space: str, adapters: Sequence[Source]) -> list[Any] | None:
    if not restated.uses_masks(rule):
        return None
    make, shape = stream_masks(DENSITY), seen_shape(space, adapters)
    return [make(i, "layer", space, shape) for i in range(len(adapters))]


# ---------------------------------------------------------------------------------------------
# The formulas


@pytest.mark.parametrize("compute", ["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("space", SPACES)
def test_the_formulas(space: str, rule: str, case: str, compute: str) -> None:
    adapters = CASES[case]
    weights = (1.0, -0.6, 0.3, 2.0, 1.0)[: len(adapters)]
    masks = masks_for(rule, space, adapters)
    expected = restated.merge_in(space, rule, adapters, weights, density=DENSITY, masks=masks)
    found, report = merge(
        adapters, weights, rule, space, density=DENSITY, compute_dtype=compute, dtype="float64"
    )
    shape = seen_shape(space, adapters)
    assert report.directions == shape[: len(report.directions or ())]
    assert report.basis_unique
    assert report.settled
    assert relative_error(found.delta, expected) < (1e-11 if compute == "float64" else 1e-5)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("rule", ["ties", "dare_ties"])
def test_the_sign_of_the_majority(rule: str, space: str) -> None:
    """Where votes are equal + is elected, so the signs of the basis have a say."""
    adapters, weights = CASES["few"], (1.0, -0.6, 0.3)
    options = {"density": DENSITY, "majority_sign": "frequency"}
    masks = masks_for(rule, space, adapters)
    expected = restated.merge_in(space, rule, adapters, weights, masks=masks, **options)
    assert relative_error(merged(adapters, weights, rule, space, **options), expected) < 1e-11


@pytest.mark.parametrize("space", SPACES)
def test_the_best_pair_of_a_rank(space: str) -> None:
    """So many directions that the coordinates are iterated on."""
    adapters, weights = sources(280, 275, (90, 90, 90)), (1.0, 0.5, -0.7)
    expected = restated.merge_in(space, "ties", adapters, weights, density=DENSITY)
    found, report = merge(adapters, weights, "ties", space, density=DENSITY, rank=4)
    distance = float(np.linalg.norm(expected - found.delta))
    best, whole = restated.residual(expected, 4), float(np.linalg.norm(expected))
    assert distance <= best * (1 + 1e-4)
    assert report.converged
    assert report.relative_error == pytest.approx(distance / whole, rel=1e-4)
    assert report.kept_energy == pytest.approx(1 - (distance / whole) ** 2, abs=1e-5)


# ---------------------------------------------------------------------------------------------
# Identities


@pytest.mark.parametrize("weight", [2.5, -1.0])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("space", SPACES)
def test_one_adapter_gives_itself(space: str, rule: str, weight: float) -> None:
    (source,) = sources(14, 12, (3,))
    found = merged([source], [weight], rule, space, density=1.0, rank=3)
    assert relative_error(found, weight * source.delta) < 1e-12


@pytest.mark.parametrize("space", SPACES)
def test_a_sum_is_the_sum_of_the_deltas(space: str) -> None:
    """Whether the rule knows that it is one, or has only nothing to prune."""
    adapters, weights = CASES["more ranks than rows"], (1.0, -0.6, 0.3)
    expected = restated.merge_delta("svd", adapters, weights)
    for method, more in (("linear", {}), ("dare_linear", {"density": 1.0})):
        found = merged(adapters, weights, method, space, **more)
        assert relative_error(found, expected) < 1e-12
        halved = merged(adapters, weights, method, space, rank=4, **more)
        assert relative_error(halved, restated.best_rank(expected, 4)) < 1e-11


@pytest.mark.parametrize("rule", ["ties", "magnitude_prune"])
@pytest.mark.parametrize("space", SPACES)
def test_copies(space: str, rule: str) -> None:
    """N copies have the coordinates of one; ties takes their mean."""
    (source,) = sources(14, 12, (3,))
    alone = merged([source], [1.0], rule, space, density=DENSITY)
    found = merged([source] * 4, [1.0] * 4, rule, space, density=DENSITY)
    assert relative_error(found, alone * (1 if rule == "ties" else 4)) < 1e-11


@pytest.mark.parametrize("compute", ["float32", "float64"])
@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("space", SPACES)
def test_adapters_that_share_nothing_are_added_up(space: str, sign: str, compute: str) -> None:
    """What rounding leaves of one in the directions of another neither votes nor counts."""
    adapters = sources(24, 30, (3, 4, 2))
    for i, source in enumerate(adapters):
        source.b[: 8 * i] = 0.0
        source.b[8 * i + 8 :] = 0.0
    weights = (1.0, -0.6, 0.3)
    options = {"density": 1.0, "majority_sign": sign, "compute_dtype": compute}
    found = merged(adapters, weights, "ties", space, **options)
    expected = restated.merge_delta("svd", adapters, weights)
    assert relative_error(found, expected) < (1e-11 if compute == "float64" else 1e-5)


@pytest.mark.parametrize("rule", ["ties", "magnitude_prune"])
@pytest.mark.parametrize("space", SPACES)
def test_the_order_of_adapters_does_not_matter(space: str, rule: str) -> None:
    adapters, weights = CASES["few"], [1.0, -0.6, 0.3]
    found = merged(adapters, weights, rule, space, density=DENSITY)
    other = merged(adapters[::-1], weights[::-1], rule, space, density=DENSITY)
    assert relative_error(other, found) < 1e-11


def orthogonal(size: int, seed: int) -> Matrix:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]


@pytest.mark.parametrize("rule", ["ties", "magnitude_prune"])
@pytest.mark.parametrize("space", SPACES)
def test_a_rotation_of_the_outputs_goes_through(space: str, rule: str) -> None:
    """Coordinates do not see it. In delta space it does not hold."""
    adapters, weights, turn = CASES["few"], (1.0, -0.6, 0.3), orthogonal(40, 5)
    turned = [Source(s.a, turn @ s.b, s.scaling) for s in adapters]
    for where, holds in ((space, True), ("delta", False)):
        found, other = (
            merged(these, weights, rule, where, density=DENSITY) for these in (adapters, turned)
        )
        assert (relative_error(other, turn @ found) < 1e-10) == holds


@pytest.mark.parametrize(("space", "holds"), [("core", True), ("knots", False)])
def test_a_rotation_of_the_inputs(space: str, holds: bool) -> None:
    """In KnOTS space each column is seen as it is."""
    adapters, weights, turn = CASES["few"], (1.0, -0.6, 0.3), orthogonal(30, 6)
    turned = [Source(s.a @ turn, s.b, s.scaling) for s in adapters]
    found, other = (
        merged(these, weights, "ties", space, density=DENSITY) for these in (adapters, turned)
    )
    assert (relative_error(other, found @ turn) < 1e-10) == holds


@pytest.mark.parametrize(("space", "holds"), [("core", False), ("knots", True)])
def test_other_factors_of_the_same_deltas(space: str, holds: bool) -> None:
    """Core space hangs on how a delta is shared out between B and A; KnOTS space does not."""
    adapters, weights = CASES["few"], (1.0, -0.6, 0.3)
    changed = [
        Source(np.linalg.solve(g, s.a), s.b @ g, s.scaling)
        for s in adapters
        for g in [np.diag(np.arange(1.0, 1 + len(s.a))) + 0.3]
    ]
    found, other = (
        merged(these, weights, "ties", space, density=DENSITY) for these in (adapters, changed)
    )
    assert (relative_error(other, found) < 1e-10) == holds


def test_core_space_commutes_with_transposition() -> None:
    adapters, weights = CASES["few"], (1.0, -0.6, 0.3)
    turned = [Source(s.b.T, s.a.T, s.scaling) for s in adapters]
    found, other = (
        merged(these, weights, "ties", "core", density=DENSITY) for these in (adapters, turned)
    )
    assert relative_error(other.T, found) < 1e-11


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("space", SPACES)
def test_zeros_stay_zero(space: str, rule: str) -> None:
    """Fresh adapters span nothing."""
    zero = Source(random_source(0, 8, 12, 3).a, np.zeros((8, 3)), 2.0)
    found, report = merge([zero, zero], [1.0, -0.5], rule, space, density=DENSITY, rank=3)
    assert not found.delta.any()
    assert np.isfinite(found.a).all()
    assert report.directions is not None
    assert report.directions[0] == 0
    assert report.kept_energy == 1.0


# ---------------------------------------------------------------------------------------------
# Bases


def stacked(adapters: Sequence[Source], dtype: torch.dtype) -> tuple[torch.Tensor, list[int]]:
    widths = [len(source.a) for source in adapters]
    return torch.from_numpy(np.hstack([s.b for s in adapters])).to(dtype), widths


@pytest.mark.parametrize("rooted", [False, True])
@pytest.mark.parametrize("case", ["few", "more ranks than rows", "shared directions"])
def test_bases_have_one_sign_and_order(case: str, rooted: bool) -> None:
    """By Gram matrices or by QR, of adapters in one order or another: the same vectors."""
    found = []
    for dtype in (torch.float64, torch.float32):
        for adapters in (CASES[case], CASES[case][::-1]):
            stack, widths = stacked(adapters, dtype)
            roots = [
                square_root(torch.from_numpy(s.a.copy()).to(dtype), s.scaling, map)
                for s in adapters
            ]
            basis, reduced = left_basis(stack, widths, roots if rooted else None, map)
            found.append(basis.vectors.double())
            projected = reduced.project(lambda x, turn: turn.mT @ x, map)
            assert [part.shape[1] for part in projected] == widths
            torch.testing.assert_close(torch.cat(projected, 1), basis.vectors.mT @ stack)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-5)
    identity = torch.eye(found[0].shape[1], dtype=torch.float64)
    torch.testing.assert_close(found[0].mT @ found[0], identity, rtol=0, atol=1e-12)
    largest = found[0].gather(0, found[0].abs().argmax(0)[None])
    assert bool((largest > 0).all())


@pytest.mark.parametrize("space", ["core", "knots"])
@pytest.mark.parametrize("apart", [1e-4, 1e-8, 1e-11])
def test_small_directions_cost_no_digits(apart: float, space: str) -> None:
    """A rule that keeps all makes the weighted sum, however near the adapters are to each other."""
    drawn = np.random.default_rng(3)
    a, b = drawn.standard_normal((4, 200)), drawn.standard_normal((300, 4))
    near = [x + apart * drawn.standard_normal(x.shape) for x in (a, b)]
    adapters = [Source(a, b, 1.0), Source(*near, 1.0)]
    target, _ = merge(adapters, (1.0, -0.7), "magnitude_prune", space, density=1.0, **EXACT)
    expected = adapters[0].delta - 0.7 * adapters[1].delta
    assert relative_error(target.delta, expected) < 2e-11


@pytest.mark.parametrize("columns", [0, 1])
def test_one_direction_has_no_other_near_it(columns: int) -> None:
    stack = torch.zeros(5, 2, dtype=torch.float64)
    stack[1, :columns] = 3.0
    basis, _ = left_basis(stack, [2], None, map)
    assert basis.vectors.shape == (5, columns)
    assert (basis.gap, basis.unsettled) == (1.0, 0.0)


def test_sources_are_taken_together_up_to_a_number_of_columns() -> None:
    """More would be held than the planner counts, and one at a time takes longer."""
    half = GRAM_ROWS // 2
    groups = _groups([half, half, 1, half, half, GRAM_ROWS + 1, 1, 2])
    assert groups == [range(2), range(2, 4), range(4, 5), range(5, 6), range(6, 8)]


@pytest.mark.parametrize("space", SPACES)
def test_equal_singular_values_are_told(space: str) -> None:
    """Two directions of one length: which is the first is rounding's choice, and said to be."""
    b = np.zeros((6, 1))
    b[0] = 1.0
    adapters = [Source(np.eye(1, 5), b, 1.0), Source(np.eye(1, 5, 3), np.roll(b, 2), 1.0)]
    with tempfile.TemporaryDirectory() as place:
        paths = [write_adapter(Path(place) / f"{i}", {"up": s}) for i, s in enumerate(adapters)]
        result = streammerge.merge(
            paths,
            Path(place) / "out",
            method="ties",
            space=space,
            density=1.0,
            rank=2,
            on_event=events.ignore,
        )
        record = (Path(place) / "out" / "streammerge.json").read_text()
    (report,) = result.modules
    assert report.basis_gap == 0.0
    assert not report.basis_unique
    assert '"basis_unique": false' in record
    assert any("as good as equal" in notice for notice in result.notices)


# ---------------------------------------------------------------------------------------------
# Files, memory, options


@pytest.mark.parametrize("space", SPACES)
def test_what_is_held_does_not_matter(space: str, tmp_path: Path) -> None:
    """Tiles of coordinates, A's, and what a rule goes over again are held or made again."""
    layers = {"up": linear(1100, 2000, 45)}
    paths = [str(write_random(tmp_path / f"in{i}", layers, seed=i)) for i in range(6)]
    options = {"method": "ties", "space": space, "density": 0.3, "rank": 4}
    manifests = read_adapters(paths, NameTable())
    for workers in (1, 2):
        plan = streammerge.plan(paths, max_memory="4GiB", workers=workers, **options)
        (task,) = plan.tasks
        assert task.passes
        assert task.resident
        assert task.stacked
        lean = replace(plan, tasks=(replace(task, resident=0, factors=0, stacked=False),))
        for name, made in ((f"all{workers}", plan), (f"nothing{workers}", lean)):
            with Staging(tmp_path / name) as staging:
                run_plan(made, manifests, staging, events.ignore)
                staging.publish()
    outputs = [path for path in tmp_path.iterdir() if (path / "streammerge.json").exists()]
    assert len(outputs) == 4
    assert len({(path / WEIGHTS).read_bytes() for path in outputs}) == 1


@pytest.mark.parametrize("space", SPACES)
def test_what_overflows_is_an_error(space: str) -> None:
    large = [Source(1e22 * s.a, 1e22 * s.b, s.scaling) for s in CASES["few"]]
    with pytest.raises(errors.ComputeOverflowError, match="layer"):
        merge(large, (1.0, 1.0, 1.0), "ties", space, density=DENSITY)


def test_the_list_of_methods_names_the_spaces() -> None:
    shown = CliRunner().invoke(main, ["methods"]).output
    for part in ("core", "2509.17786", "knots", "2410.19735", "equal ranks"):
        assert part in shown


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("widths", [[1], [600, 600, 1], [1500, 2], [1, 1100, 7]])
def test_factors_come_out_of_a_basis_one_by_one(widths: list[int], dtype: torch.dtype) -> None:
    """However many are brought into it at once."""
    stack = torch.randn(40, sum(widths), dtype=dtype, generator=torch.Generator().manual_seed(0))
    basis, reduced = left_basis(stack, widths, None, map)
    parts = reduced.project(lambda x, turn: turn.mT @ x, map)
    assert [part.shape[1] for part in parts] == widths
    torch.testing.assert_close(basis.vectors @ torch.cat(parts, 1), stack)
