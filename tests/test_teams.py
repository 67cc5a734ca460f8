"""One target that several workers share: the same bytes, whoever has which panels, and is lost."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import streammerge
from clusters import LocalCluster, cluster_of, wait_until
from making import CONFIG, WEIGHTS, linear, write_adapter
from streammerge import errors, events
from streammerge.adapter import NameTable
from streammerge.budget import MIB
from streammerge.executors import team as teams
from streammerge.executors.serial import run_serial
from streammerge.kernels.each import Over
from streammerge.planner import fit
from streammerge.plans import Plan
from streammerge.readers import read_adapters
from streammerge.tiling import Pieces, panels
from streammerge.worker import Errand, Job, Member, Part, Receipt, packed, run_task, unpacked

SAME = (WEIGHTS, CONFIG, "streammerge.json")
SHARED = {
    "ties_svd": "krylov",
    "magnitude_prune_svd": "krylov",
    "dare_linear_svd": "krylov",
    "dare_ties_svd": "krylov",
    "della": "krylov",
    "sce": "krylov",
    "svd": "sum",
}


def files(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in SAME]


def options(method: str) -> dict[str, Any]:
    return {"method": method, "density": None if method == "svd" else 0.3, "rank": 4}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Enough adapters for `svd` to iterate on them, group by group; one target is small."""
    folder = tmp_path_factory.mktemp("sources")
    layers = {"model.big": linear(3000, 700, 8), "model.small": linear(60, 50, 8)}
    return [str(write_adapter(folder / f"in{i}", layers, seed=i)) for i in range(90)]


@pytest.fixture
def sharing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets of a test's size are shared."""
    monkeypatch.setattr(fit, "PASS_WORK", 10**5)


# ---------------------------------------------------------------------------------------------
# Members in this process


class Around:
    """A team of members around one table: what goes over it is pickled."""

    def __init__(self, members: list[Member], each: Callable[..., Iterator[Any]] = map) -> None:
        self.members = members
        self.each = each
        self.errands: list[str] = []

    def over(self, part: Part, count: int) -> Over:
        def apply(operation: Callable[..., Any], *args: Any) -> Iterator[Any]:
            whole = panels(count)
            for turn, (start, stop) in enumerate(Pieces(len(whole), min(3, len(whole)))):
                errand = Errand(part, operation, whole[start:stop])
                sent = pickle.loads(pickle.dumps((errand, packed(args))))
                self.errands.append(operation.__name__)
                # Another one each time, as if the one before had been lost.
                member = self.members[(turn + len(self.errands) // 7) % len(self.members)]
                results = pickle.loads(pickle.dumps(list(member.work_on(*sent, self.each))))
                yield from (unpacked(result, torch.device("cpu")) for result in results)

        return apply

    def part(self) -> None:
        self.errands.append("part")


@pytest.mark.parametrize("method", SHARED)
def test_whoever_has_the_panels_the_bytes_are_the_same(
    method: str, sources: list[str], tmp_path: Path
) -> None:
    """Against one process that has all of them, with nothing held and with some."""
    given = sources[:90] if method == "svd" else sources[:5]
    plan = streammerge.plan(given, **options(method))
    assert plan.tasks[0].route == SHARED[method]
    manifests = read_adapters(given, NameTable())
    alone, together = tmp_path / "alone", tmp_path / "together"
    receipts: dict[str, Receipt] = {}

    def job(folder: Path) -> Job:
        folder.mkdir(exist_ok=True)
        path = folder / plan.files[0].name
        path.touch()
        os.truncate(path, plan.write_bytes)
        return Job(plan, manifests, folder, starts=(0,))

    run_serial(
        job(alone), plan.tasks, lambda task, receipt: receipts.update({task.target: receipt})
    )
    for held in (0, 2):
        task = replace(plan.tasks[0], resident=held, factors=held)
        team = Around([Member(job(tmp_path / f"member{i}"), task) for i in range(3)])
        receipt = run_task(job(together), replace(task, resident=0, factors=0), team=team)
        assert replace(receipt, seconds=0.0) == replace(receipts[task.target], seconds=0.0)
        kinds = {"ties_svd": 2, "magnitude_prune_svd": 2, "sce": 3, "svd": 2}
        assert len(set(team.errands)) == kinds.get(method, 1)
        for member in team.members:
            member.close()


# ---------------------------------------------------------------------------------------------
# The plan


def planned(sources: list[str], workers: int, **chosen: Any) -> Plan:
    from streammerge.budget import Budget
    from streammerge.planner import make_plan
    from streammerge.recipe import Recipe

    memory, threads = chosen.pop("memory", 2**31), chosen.pop("threads", 1)
    recipe = Recipe(adapters=tuple(sources), weights=(1.0,) * len(sources), **chosen)
    budget = Budget(memory, "the test", threads=threads)
    return make_plan(read_adapters(sources, NameTable()), recipe, budget, workers=workers)


@pytest.mark.usefixtures("sharing")
@pytest.mark.parametrize("workers", [1, 2, 3, 40])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_plan_says_who_shares(workers: int, threads: int, sources: list[str]) -> None:
    plan = planned(sources[:5], workers, method="ties_svd", density=0.3, rank=4, threads=threads)
    big, small = plan.tasks
    assert big.team == min(workers, 8)  # it has eight panels
    assert big.alone == (workers > 1 or threads > 1)
    assert small.team == 1
    assert big.projected_bytes + plan.reserved_bytes <= plan.allowed_bytes
    assert Plan.from_json(plan.to_json()) == plan


def test_few_large_targets_are_shared_and_many_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target is shared where it is a good part of what each worker has to do."""
    layers = {f"model.{i:02d}": linear(6000, 5000, 4) for i in range(20)}
    paths = [str(write_adapter(tmp_path / f"in{i}", layers, seed=i)) for i in range(2)]
    chosen = {"method": "ties_svd", "density": 0.3, "rank": 64}
    monkeypatch.setattr(fit, "PASS_WORK", 10**9)
    for workers, team in ((1, 1), (2, 1), (3, 3), (8, 8), (64, 14)):  # panels
        plan = planned(paths, workers, memory=4 * 2**30, **chosen)
        assert {task.team for task in plan.tasks} == {team}
    work = min(task.flops // (len(paths) + task.passes) for task in plan.tasks)
    monkeypatch.setattr(fit, "PASS_WORK", work + 1)
    assert {task.team for task in planned(paths, 3, **chosen).tasks} == {1}
    monkeypatch.setattr(fit, "PASS_WORK", work)
    assert {task.team for task in planned(paths, 3, **chosen).tasks} == {3}
    # Where what is on its way does not fit, nothing is shared.
    tight = planned(paths, 3, memory=plan.reserved_bytes + least(paths, chosen) + MIB, **chosen)
    assert {task.team for task in tight.tasks} == {1}


def least(paths: list[str], chosen: dict[str, Any]) -> int:
    """What one of the targets needs on one worker, apart from the process."""
    with pytest.raises(errors.BudgetError) as refused:
        planned(paths, 1, memory=1, **chosen)
    return refused.value.projected_bytes


# ---------------------------------------------------------------------------------------------
# A cluster


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with cluster_of(tmp_path_factory.mktemp("cluster") / "three", 3) as cluster:
        yield cluster


@pytest.mark.usefixtures("sharing")
@pytest.mark.parametrize(
    ("method", "rank"),
    [
        ("ties_svd", 4),
        ("dare_linear_svd", 4),
        ("sce", 4),
        ("svd", 4),
        ("ties_svd", "energy:0.02,max:4"),
    ],
)
def test_three_workers_share_a_target(
    method: str, rank: int | str, sources: list[str], three: LocalCluster, tmp_path: Path
) -> None:
    given = sources if method == "svd" else sources[:5]
    asked = options(method) | {"rank": rank}
    streammerge.merge(given, tmp_path / "serial", workers=1, **asked)
    result = streammerge.merge(given, tmp_path / "out", scheduler=three.address, **asked)
    assert [task.team for task in result.plan.tasks] == [3, 1]
    assert files(tmp_path / "out") == files(tmp_path / "serial")
    assert not held_by(three)


def held_by(cluster: LocalCluster) -> list[str]:
    """The workers that still have something of a target that was shared."""
    from distributed import Client

    with Client(cluster.address, set_as_default=False) as client:
        held: dict[str, bool] = client.run(has_member)
    return [address for address, has in held.items() if has]


def has_member() -> bool:
    return any(seat.taken for seat in teams._SEATS.values())


@pytest.mark.usefixtures("sharing")
@pytest.mark.parametrize("who", [pytest.param("a member", marks=pytest.mark.long), "the leader"])
def test_one_of_a_team_is_killed(who: str, tmp_path: Path) -> None:
    layers = {f"model.{i}": linear(4000, 2500, 8) for i in range(4)}
    paths = [str(write_adapter(tmp_path / f"in{i}", layers, seed=i)) for i in range(3)]
    chosen = options("ties_svd")
    streammerge.merge(paths, tmp_path / "serial", workers=1, **chosen)
    with cluster_of(tmp_path / "cluster", 3) as cluster:
        leaders: list[str] = []

        def listen(event: events.Event) -> None:
            if isinstance(event, events.TaskDone) and not leaders:
                leaders.append("")
                threading.Thread(target=strike, args=(cluster, who, leaders)).start()

        result = streammerge.merge(
            paths, tmp_path / "out", scheduler=cluster.address, on_event=listen, **chosen
        )
        assert leaders[1:], "nobody was killed"
        assert sum(worker.poll() is None for worker in cluster.workers) == 2
    assert {task.team for task in result.plan.tasks} == {3}
    assert files(tmp_path / "out") == files(tmp_path / "serial")


def strike(cluster: LocalCluster, who: str, struck: list[str]) -> None:
    """Kill a worker while a team is at work, once it holds something."""
    from distributed import Client

    with Client(cluster.address, set_as_default=False) as client:
        wait_until(lambda: any(key.startswith("merge-model") for key in keys(client)))
        processing = client.processing()
        leader = next(
            address
            for address, tasks in processing.items()
            if any(not str(key).startswith("merge-model") for key in tasks)
        )
        pids: dict[str, int] = client.run(os.getpid)
    chosen = leader if who == "the leader" else next(a for a in sorted(pids) if a != leader)
    next(worker for worker in cluster.workers if worker.pid == pids[chosen]).send_signal(
        signal.SIGKILL
    )
    struck.append(chosen)


def keys(client: Any) -> list[str]:
    return [str(key) for tasks in client.processing().values() for key in tasks]


@pytest.mark.usefixtures("sharing")
def test_a_failure_in_a_member_comes_through(
    sources: list[str], three: LocalCluster, tmp_path: Path
) -> None:
    bad = write_adapter(tmp_path / "bad", {"model.big": linear(3000, 700, 8)}, seed=0)
    data = bytearray((bad / WEIGHTS).read_bytes())
    data[-4:] = b"\x00\x00\xc0\x7f"  # a NaN at the end of B
    (bad / WEIGHTS).write_bytes(data)
    with pytest.raises(errors.NonFiniteError, match="lora_B"):
        streammerge.merge(
            [*sources[:3], str(bad)],
            tmp_path / "out",
            scheduler=three.address,
            on_event=events.ignore,
            **options("dare_linear_svd"),
        )
    assert not (tmp_path / "out").exists()
    wait_until(lambda: not held_by(three))


@pytest.mark.usefixtures("sharing")
def test_a_stop_while_a_target_is_shared(three: LocalCluster, tmp_path: Path) -> None:
    """Leader and members see that the run is over and let go; the same merge is done after it."""
    paths = [
        str(write_adapter(tmp_path / f"in{i}", {"model.big": linear(9000, 8000, 8)}, seed=i))
        for i in range(4)
    ]
    chosen = options("ties_svd")
    with pytest.raises(errors.StoppedError):
        streammerge.merge(
            paths, tmp_path / "out", scheduler=three.address, time_limit=2.5, **chosen
        )
    wait_until(lambda: not held_by(three))
    result = streammerge.merge(
        paths, tmp_path / "out", scheduler=three.address, resume=True, **chosen
    )
    assert result.plan.tasks[0].team == 3
    streammerge.merge(paths, tmp_path / "serial", workers=1, **chosen)
    assert files(tmp_path / "out") == files(tmp_path / "serial")


@pytest.mark.usefixtures("sharing")
def test_members_stay_within_their_memory(tmp_path: Path) -> None:
    layers = {"model.big": linear(9000, 4000, 8)}
    paths = [str(write_adapter(tmp_path / f"in{i}", layers, seed=i)) for i in range(4)]
    with cluster_of(tmp_path / "cluster", 2, forked=False) as cluster:
        room = streammerge.plan(paths, scheduler=cluster.address, **options("ties_svd"))
        allowed = room.reserved_bytes + 100 * MIB
        result = streammerge.merge(
            paths,
            tmp_path / "out",
            scheduler=cluster.address,
            max_memory=allowed,
            **options("ties_svd"),
        )
        peaks = [peak_of(worker.pid) for worker in cluster.workers]
    (task,) = result.plan.tasks
    assert task.team == 2
    assert 0 < task.resident < 140
    assert max(peaks) <= allowed


def peak_of(pid: int) -> int:
    """VmHWM of a process, in bytes."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024


def test_a_worker_keeps_nothing_of_a_merge(tmp_path: Path) -> None:
    """A second plan finds the process as the first one did, and other work its memory."""
    layers = {"model.big": linear(6000, 5000, 8)}
    paths = [str(write_adapter(tmp_path / f"in{i}", layers, seed=i)) for i in range(4)]
    with cluster_of(tmp_path / "cluster", 1, forked=False) as cluster:
        chosen = {**options("ties_svd"), "max_memory": "700MiB"}
        results = [
            streammerge.merge(
                paths, tmp_path / "out", scheduler=cluster.address, overwrite=True, **chosen
            )
            for _ in range(3)
        ]
    first, *later = (result.plan.reserved_bytes for result in results)
    # The least, for now and then a plan is made while the worker is still tidying up.
    assert min(later) <= first + 32 * MIB


@pytest.mark.usefixtures("sharing")
def test_members_of_two_threads(sources: list[str], tmp_path: Path) -> None:
    streammerge.merge(sources[:5], tmp_path / "serial", workers=1, **options("ties_svd"))
    with cluster_of(tmp_path / "cluster", 0) as cluster:
        for _ in range(2):
            cluster.add_worker("--nthreads", "2")
        wait_until(lambda: cluster.log().count("Registered to:") >= 2)
        result = streammerge.merge(
            sources[:5], tmp_path / "out", scheduler=cluster.address, **options("ties_svd")
        )
    assert [(task.team, task.lanes) for task in result.plan.tasks] == [(2, 2), (1, 1)]
    assert files(tmp_path / "out") == files(tmp_path / "serial")


def test_what_is_lost_with_a_member_before_it_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its future was done, is not any more, and would never be again."""

    class Fetched:
        tries = 0

        def done(self) -> bool:
            return self.tries == 0

        def result(self, timeout: float) -> str:
            assert timeout < 10
            self.tries += 1
            raise TimeoutError

    monkeypatch.setattr(teams, "wait_for", lambda _: None)
    monkeypatch.setattr(teams.Team, "_check", lambda _: None)
    lost = object.__new__(teams.Team)
    lost._members = []
    future: Any = Fetched()
    assert lost._answer("tcp://gone", future) is None
    assert future.tries == 1
