"""Several threads on one target: the same bytes, errors that come through, nothing left running."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import streammerge
from making import linear, write_adapter
from names import chosen, rule_of
from streammerge.kernels.grams import truncate_by_grams
from streammerge.worker import Lanes

METHODS = (
    "linear",
    "cat",
    "svd",
    "ties",
    "dare_ties",
    "ties_svd",
    "dare_linear_svd",
    "consensus",
    "della",
    "della_linear",
    "sce",
)
IN_BASES = ("ties@core", "magnitude_prune@knots", "ties@ctm", "karcher", "tsv")


def merged(paths: list[str], output: Path, method: str, **options: object) -> dict[str, bytes]:
    density = 0.3 if rule_of(method).needs_density else None
    streammerge.merge(paths, output, **chosen(method), density=density, **options)
    return {
        name: (output / name).read_bytes()
        for name in ("adapter_model.safetensors", "streammerge.json")
    }


@pytest.mark.parametrize("method", [*METHODS, *IN_BASES])
def test_one_large_target_is_shared_by_threads(method: str, tmp_path: Path) -> None:
    """A target that is all of the work; one and three threads give the same bytes."""
    layers = {"big": linear(1500, 2200, 16), "small": linear(40, 50, 16)}
    paths = [str(write_adapter(tmp_path / f"in{i}", layers, seed=i)) for i in range(20)]
    one = merged(paths, tmp_path / "one", method, workers=1)
    three = merged(paths, tmp_path / "three", method, workers=3)
    assert one == three
    density = 0.3 if rule_of(method).needs_density else None
    more = {**chosen(method), "density": density}
    plan = streammerge.plan(paths, workers=3, max_memory="4GiB", **more)
    lanes = {task.target: task.lanes for task in plan.tasks}
    assert lanes["small"] == 1
    if method in ("svd", "ties_svd", "dare_linear_svd"):
        assert lanes["big"] == (2 if method == "svd" else 3)
    if method == "ties@core":
        assert lanes["big"] == 1, "a core of 320 x 320 is one tile"


@pytest.mark.parametrize("method", ["svd", "ties_svd"])
def test_many_adapters_are_iterated_on_by_threads(method: str, tmp_path: Path) -> None:
    """The route over factors, and one with short sides."""
    layers = {"a": linear(600, 700, 8), "b": linear(600, 60, 8)}
    paths = [str(write_adapter(tmp_path / f"in{i}", layers, seed=i)) for i in range(90)]
    outputs = [merged(paths, tmp_path / f"out{n}", method, workers=n, rank=4) for n in (1, 2, 5)]
    assert outputs[0] == outputs[1] == outputs[2]
    if method == "svd":
        plan = streammerge.plan(paths, method=method, rank=4, workers=2)
        assert plan.tasks[0].route == "sum"


def test_results_come_in_order_and_no_more_are_in_hand_than_lanes() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def work(item: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.002 * (item % 3))
        with lock:
            running -= 1
        return item * item

    with ThreadPoolExecutor(8) as pool:
        assert list(Lanes(pool, 3, threading.Event())(work, range(50))) == [
            i * i for i in range(50)
        ]
    assert 2 <= most <= 3


def test_a_failure_waits_for_what_is_running_and_comes_through() -> None:
    ended = []

    def work(item: int) -> int:
        if item == 1:
            raise ValueError("here")
        time.sleep(0.05)
        ended.append(item)
        return item

    stopped = threading.Event()
    with ThreadPoolExecutor(4) as pool:
        with pytest.raises(ValueError, match="here"):
            list(Lanes(pool, 3, stopped)(work, range(9)))
        assert stopped.is_set()
        before = len(ended)
        time.sleep(0.1)
        assert len(ended) == before


def test_threads_of_a_pool_use_one_thread_each_and_keep_no_graph() -> None:
    def look(_: int) -> tuple[int, bool]:
        return torch.get_num_threads(), torch.is_inference_mode_enabled()

    with ThreadPoolExecutor(2) as pool:
        assert set(Lanes(pool, 2, threading.Event())(look, range(4))) == {(1, True)}


def test_gram_route_gives_the_best_approximation() -> None:
    """Against the dense SVD in float64, with factors that nearly cancel and one that repeats."""
    rng = np.random.default_rng(0)
    b = rng.standard_normal((700, 48)).astype(np.float32)
    a = rng.standard_normal((48, 900)).astype(np.float32)
    b[:, 32:] = -b[:, :16] * (1 + 1e-3)
    a[32:] = a[:16]
    a[16] = a[17]
    result = truncate_by_grams(torch.from_numpy(b), torch.from_numpy(a), 24, map)
    dense = b.astype(np.float64) @ a.astype(np.float64)
    values = np.linalg.svd(dense, compute_uv=False)
    pair = (result.u.double() * result.s) @ result.v.double().mT
    residual = float(np.linalg.norm(dense - pair.numpy()))
    best = float(np.sqrt((values[24:] ** 2).sum()))
    assert residual <= best * (1 + 1e-6) + 1e-6 * float(np.linalg.norm(dense))
    assert abs(result.lost**0.5 - best) <= 1e-6 * float(np.linalg.norm(dense))
    assert abs(result.energy**0.5 - float(np.linalg.norm(dense))) <= 1e-9 * result.energy**0.5


@pytest.mark.parametrize("unbalance", [1.0, 1e3, 1e5])
def test_gram_route_does_not_mind_how_a_product_is_split(unbalance: float) -> None:
    """A column of B times d and its row of A over d are the same delta."""
    rng = np.random.default_rng(1)
    b = rng.standard_normal((300, 24)).astype(np.float32)
    a = rng.standard_normal((24, 400)).astype(np.float32)
    dense = b.astype(np.float64) @ a.astype(np.float64)
    turn = np.where(np.arange(24) % 2, unbalance, 1 / unbalance).astype(np.float32)
    result = truncate_by_grams(
        torch.from_numpy(b * turn), torch.from_numpy(a / turn[:, None]), 24, map
    )
    pair = (result.u.double() * result.s) @ result.v.double().mT
    assert np.linalg.norm(dense - pair.numpy()) <= 1e-6 * np.linalg.norm(dense)


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_inputs_are_hashed_once_whoever_reads_them(io: str, tmp_path: Path) -> None:
    """Several threads, and no room to hold a factor: each reads the A's for every tile."""
    layers = {"big": linear(300, 16000, 32)}
    paths = [str(write_adapter(tmp_path / f"in{i}", layers, seed=i)) for i in range(3)]
    options = {"method": "dare_linear_svd", "density": 0.3, "io": io}
    with pytest.raises(streammerge.errors.BudgetError) as refused:
        streammerge.plan(paths, max_memory=1, workers=3, **options)
    room = refused.value.smallest_bytes
    while max(task.lanes for task in _tasks(paths, room, options)) < 2:
        room += 2**20
    assert not _tasks(paths, room, options)[0].factors
    records = set()
    for number in range(4):
        output = tmp_path / f"out{number}"
        streammerge.merge(paths, output, workers=3, max_memory=room + 2**20, **options)
        records.add((output / "streammerge.json").read_bytes())
    streammerge.merge(paths, tmp_path / "one", workers=1, **options)
    assert records == {(tmp_path / "one" / "streammerge.json").read_bytes()}


def _tasks(paths: list[str], memory: int, options: dict[str, object]) -> tuple[object, ...]:
    return streammerge.plan(paths, max_memory=memory, workers=3, **options).tasks
