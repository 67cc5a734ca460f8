"""Laws of the model of `scripts/scaling`: what a run on many workers takes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atscale.cases import Case
from atscale.makespan import Load, Rates, Terms, best, load, project, read_bytes, seconds, simulate
from streammerge.executors.bundles import bundles
from streammerge.plans import Plan

FREE = Terms()
GIB = 2**30

times = st.floats(0, 100)
amounts = st.floats(0, 1000)
work = st.lists(times.map(Load), min_size=1, max_size=40)
shared = st.builds(
    Load, compute=times, read=amounts, written=amounts, scheduler=times, submit=times, seal=times
)
everything = st.lists(shared, min_size=1, max_size=40)
terms = st.builds(Terms, file_system=st.floats(1, 100), link=st.floats(1, 100))
workers = st.integers(1, 12)


# ---------------------------------------------------------------------------------------------
# Bundles


@settings(max_examples=200)
@given(work)
def test_one_worker_takes_the_sum(loads: list[Load]) -> None:
    assert simulate(loads, 1, FREE) == pytest.approx(sum(item.compute for item in loads))


@settings(max_examples=200)
@given(work, workers)
def test_one_worker_more_is_never_slower(loads: list[Load], count: int) -> None:
    assert simulate(loads, count + 1, FREE) <= simulate(loads, count, FREE) * (1 + 1e-9)


@settings(max_examples=200)
@given(work, workers)
def test_no_worker_waits_while_there_is_work(loads: list[Load], count: int) -> None:
    """Graham's bound: the whole shared out, and the longest."""
    total, longest = sum(item.compute for item in loads), max(item.compute for item in loads)
    assert simulate(loads, count, FREE) <= total / count + longest * (1 - 1 / count) + 1e-6


@settings(max_examples=200)
@given(everything, terms, workers)
def test_nothing_is_faster_than_what_it_shares(
    loads: list[Load], given_terms: Terms, count: int
) -> None:
    found = simulate(loads, count, given_terms) * (1 + 1e-9) + 1e-9
    link = given_terms.link
    assert found >= max(item.compute + (item.read + item.written) / link for item in loads)
    assert found >= sum(item.compute for item in loads) / count
    moved = sum(item.read + 3 * item.written for item in loads)
    assert found >= moved / given_terms.file_system
    assert found >= sum(item.submit + item.seal for item in loads)
    assert found >= sum(item.scheduler for item in loads)


def test_a_case_by_hand() -> None:
    """Two workers; the file system moves 10 bytes a second, a worker 5, a seal takes 3 seconds.

    | second | worker 1 | worker 2 | client |
    |---|---|---|---|
    | 0 | reads the first, 20 bytes, until 4 | | |
    | 0 | | waits for the file system until 2, reads 20 more until 4 | |
    | 4 | computes until 6 | computes until 9 | |
    | 6 | writes 10 until 8 | | |
    | 8 | reads the third until 12 | | seals the first: 20 bytes, after the reading, until 12 |
    | 9 | | writes 10, after these two, until 13 | |
    | 12 | computes until 13 | | nothing is there |
    | 13 | writes 10, after the second, until 15 | | seals the second until 16 |
    | 16 | | | seals the third until 19 |
    """
    loads = [Load(compute, read=20, written=10, seal=3) for compute in (2, 5, 1)]
    assert simulate(loads, 2, Terms(file_system=10, link=5)) == pytest.approx(19)


def test_the_scheduler_hands_out_one_after_another() -> None:
    loads = [Load(1, scheduler=2) for _ in range(5)]
    assert simulate(loads, 5, FREE) == pytest.approx(5 * 2 + 1)


def test_the_client_seals_after_it_has_submitted() -> None:
    loads = [Load(1, submit=4, seal=3) for _ in range(2)]
    # Submitted at 4 and 8, computed at 5 and 9; sealed from 8 and from 11.
    assert simulate(loads, 2, FREE) == pytest.approx(14)


# ---------------------------------------------------------------------------------------------
# Plans

LAYERS = {
    **{f"layers.{i}.q_proj": (2048, 2048) for i in range(40)},
    **{f"layers.{i}.up_proj": (8192, 2048) for i in range(40)},
}
RATES = Rates({"krylov": 1e10, "sum": 1e10, "fold": 1e9})
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def plan_of(method: str, adapters: int = 8) -> Plan:
    return Case("test", LAYERS, adapters, 16, method).plan(16 * GIB)


def test_a_plan_on_one_worker_takes_the_sum_of_its_targets() -> None:
    plan = plan_of("ties_svd")
    whole = sum(task.flops for task in plan.tasks) / 1e10
    projected = project(plan, RATES, FREE, 1)
    assert projected.seconds == pytest.approx(whole)
    assert projected.bound == "compute"


@pytest.mark.parametrize("method", ["ties_svd", "linear"])
def test_a_plan_is_bounded_by_its_longest_target_and_by_its_bytes(method: str) -> None:
    plan, given_terms = plan_of(method), Terms(file_system=1e9, link=1e8)
    longest = max(task.flops for task in plan.tasks) / RATES.flops[plan.tasks[0].route]
    moved = sum(read_bytes(task) + 3 * task.write_bytes for task in plan.tasks)
    for count in COUNTS:
        projected = project(plan, RATES, given_terms, count)
        found = projected.seconds * (1 + 1e-9)
        assert found >= longest
        assert found >= moved / given_terms.file_system
        assert found >= max(projected.bounds.values())


@pytest.mark.parametrize("method", ["ties_svd", "linear"])
def test_twice_the_workers_are_never_slower_on_a_plan(method: str) -> None:
    plan = plan_of(method)
    found = [project(plan, RATES, FREE, count).seconds for count in COUNTS]
    assert found == sorted(found, reverse=True)


def test_bundles_are_those_of_the_executor() -> None:
    """Of few targets each worker gets one, and no more workers than that have work."""
    plan = plan_of("ties_svd")
    longest = max(task.flops for task in plan.tasks) / 1e10
    assert len(bundles(plan.tasks, 80)) == len(plan.tasks)
    assert project(plan, RATES, FREE, 80).seconds == pytest.approx(longest)
    assert project(plan, RATES, FREE, 1000).seconds == pytest.approx(longest)


def test_split_targets_pass_what_bounded_whole_ones() -> None:
    plan = plan_of("ties_svd")
    whole, split = project(plan, RATES, FREE, 1000), best(plan, RATES, FREE, 1000)
    assert whole.bound == "longest target"
    assert split.team > 1
    assert split.seconds < whole.seconds


def test_what_a_team_says_to_each_other_is_not_free() -> None:
    task = plan_of("ties_svd").tasks[0]
    free = seconds(task, RATES, FREE, 8)
    alone = seconds(task, RATES, FREE, 1)
    assert alone / 8 < free < alone
    slow = seconds(task, RATES, Terms(latency=0.5), 8)
    assert slow == pytest.approx(free + 2 * 0.5 * (task.passes + 2))
    narrow = seconds(task, RATES, Terms(link=1e6), 8)
    panel = task.block * 4 * (2 * 8 * task.n + task.m)
    assert narrow == pytest.approx(free + task.passes * panel / 1e6)


def test_a_rule_on_factors_is_not_split() -> None:
    plan = plan_of("linear")
    task = plan.tasks[0]
    assert seconds(task, RATES, FREE, 8) == seconds(task, RATES, FREE, 1)
    assert best(plan, RATES, FREE, 64).team == 1


def test_factors_that_are_not_held_are_read_in_every_pass() -> None:
    task = plan_of("svd", adapters=400).tasks[0]
    assert task.route == "sum"
    assert read_bytes(task) == task.read_bytes
    lean = replace(task, factors=0)
    assert read_bytes(lean) == 2 * task.passes * task.read_bytes


def test_loads_add_up() -> None:
    plan = plan_of("ties_svd")
    priced = Terms(
        bundle_seconds=1,
        submit_seconds=2,
        submit_bundle_seconds=7,
        seal_seconds=3,
        seal_byte_seconds=0.5,
    )
    found = load(plan.tasks[:3], RATES, priced, 1)
    written = sum(task.write_bytes for task in plan.tasks[:3])
    assert (found.scheduler, found.submit, found.written) == (1, 13, written)
    assert math.isclose(found.seal, 9 + written / 2)
