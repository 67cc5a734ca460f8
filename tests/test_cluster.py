"""Merges on a real dask cluster: a scheduler and workers on loopback, each a process of its own."""

from __future__ import annotations

import inspect
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import dask
import numpy as np
import psutil
import pytest

import streammerge
from clusters import LocalCluster, cluster_of, kill, wait_until
from making import CONFIG, PREFIX, WEIGHTS, convolution, embedding, encode, linear, write_adapter
from names import PAIRS, chosen, most, rule_of
from streammerge import errors, events
from streammerge.adapter import NameTable, TensorFile
from streammerge.budget import GIB, MIB, ON_CPU, Grant, granted_by_slurm
from streammerge.cli import main
from streammerge.executors.remote import Gate, WorkerFacts, look
from streammerge.executors.workers import common_budget
from streammerge.planner.part import take_part
from streammerge.readers import read_adapters

SAME = (WEIGHTS, CONFIG, "streammerge.json", "streammerge_config.yml")
REAL = tuple(
    f"distilbert-base-uncased/{name}"
    for name in ("dayanidhi04-emotion", "khajaphysist-qkv", "tashu014-imdb")
)
LAYERS = {
    "model.up": linear(500, 400, 4),
    "model.words": embedding(24, 9_000, 4),
    "model.patches": convolution(50, 6, (3, 3), 4),
    **{f"model.{i}": linear(60 + i, 90, 4) for i in range(40)},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("sources")
    paths = [folder / f"adapter{seed}" for seed in range(3)]
    for seed, path in enumerate(paths):
        write_adapter(path, LAYERS, seed=seed)
    return [str(path) for path in paths]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with cluster_of(tmp_path_factory.mktemp("cluster") / "three", 3) as cluster:
        yield cluster


def options(method: str) -> dict[str, object]:
    density = 0.3 if rule_of(method).needs_density else None
    weights = (1.0, -0.6, 0.3)[: most(method)]
    return {**chosen(method), "density": density, "weights": weights}


def files(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in SAME]


def heavy(folder: Path, targets: int = 60, side: int = 700) -> list[str]:
    """Adapters whose targets take some tens of milliseconds each."""
    layers = {f"model.{i:03d}": linear(side, side, 8) for i in range(targets)}
    paths = [folder / f"heavy{seed}" for seed in range(2)]
    for seed, path in enumerate(paths):
        write_adapter(path, layers, seed=seed)
    return [str(path) for path in paths]


HEAVY = {"method": "ties_svd", "density": 0.3, "rank": 8}


@dataclass(frozen=True)
class Long:
    """A merge that takes seconds: what it is made of, and what comes of it."""

    paths: list[str]
    files: list[bytes]


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Long:
    folder = tmp_path_factory.mktemp("long")
    paths = heavy(folder, targets=150)
    streammerge.merge(paths, folder / "serial", workers=1, **HEAVY)
    return Long(paths, files(folder / "serial"))


# ---------------------------------------------------------------------------------------------
# The same bytes


@pytest.mark.parametrize("method", PAIRS)
def test_three_workers_make_the_same_bytes(
    method: str, sources: list[str], three: LocalCluster, tmp_path: Path
) -> None:
    sources = sources[: most(method)]
    asked = {**options(method), "exclude": r"model\.[0-9]{2}"}
    streammerge.merge(sources, tmp_path / "serial", workers=1, **asked)
    result = streammerge.merge(sources, tmp_path / "out", scheduler=three.address, **asked)
    assert files(tmp_path / "out") == files(tmp_path / "serial")
    assert len(result.modules) == 13
    assert streammerge.verify(tmp_path / "out").checksums
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {*SAME, "streammerge-timings.json"}


@pytest.mark.parametrize("policy", ["first", "mean"])
def test_heads_and_biases_on_a_cluster(policy: str, three: LocalCluster, tmp_path: Path) -> None:
    """Tensors that are no factors travel in the same parts."""
    layers = {f"model.{i}": linear(60 + i, 90, 4) for i in range(6)}
    paths = []
    for seed in range(3):
        shapes = {"head.weight": (300, 500), "head.bias": (300,), "model.1.lora_B.bias": (61,)}
        drawn = np.random.default_rng(seed)
        extra = {PREFIX + n: encode(drawn.standard_normal(s), "F16") for n, s in shapes.items()}
        extra[f"{PREFIX}norm.seen"] = encode(np.ones(2), "I32")
        paths.append(write_adapter(tmp_path / f"{seed}", layers, seed=seed, extra=extra))
    chosen = {"method": "svd", "extras": policy, "on_event": events.ignore}
    streammerge.merge(paths, tmp_path / "serial", workers=1, **chosen)
    streammerge.merge(paths, tmp_path / "out", scheduler=three.address, **chosen)
    assert files(tmp_path / "out") == files(tmp_path / "serial")
    assert streammerge.verify(tmp_path / "out").tensors == 2 * 6 + 3 + 6


@pytest.mark.parametrize("workers", [1, 2])
def test_fewer_workers_make_the_same_bytes(
    workers: int, sources: list[str], tmp_path: Path
) -> None:
    streammerge.merge(sources, tmp_path / "serial", workers=1, **options("dare_ties_svd"))
    with cluster_of(tmp_path / "cluster", workers) as cluster:
        streammerge.merge(
            sources,
            tmp_path / "out",
            scheduler=cluster.file,
            max_shard_size="100KiB",
            **options("dare_ties_svd"),
        )
        streammerge.merge(
            sources, tmp_path / "one", scheduler=cluster.file, **options("dare_ties_svd")
        )
    assert files(tmp_path / "one") == files(tmp_path / "serial")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_real_adapters_on_a_cluster(
    real_adapters: Path, three: LocalCluster, tmp_path: Path
) -> None:
    paths = [real_adapters / name for name in REAL]
    chosen = {"method": "ties_svd", "density": 0.2, "extras": "drop", "on_event": events.ignore}
    streammerge.merge(paths, tmp_path / "serial", workers=1, **chosen)
    streammerge.merge(paths, tmp_path / "out", scheduler=three.address, **chosen)
    assert files(tmp_path / "out") == files(tmp_path / "serial")


def test_workers_with_several_threads(tmp_path: Path) -> None:
    """A target that is alone has its worker to itself and is worked on by its threads."""
    big = heavy(tmp_path, targets=2, side=1500)
    streammerge.merge(big, tmp_path / "serial", workers=1, **HEAVY)
    with cluster_of(tmp_path / "cluster", 0) as cluster:
        cluster.add_worker("--nthreads", "2")
        result = streammerge.merge(big, tmp_path / "out", scheduler=cluster.address, **HEAVY)
    assert {(task.alone, task.lanes) for task in result.plan.tasks} == {(True, 2)}
    assert files(tmp_path / "out") == files(tmp_path / "serial")


@pytest.mark.parametrize("parts", [1, 3, 7])
def test_parts_of_a_plan_hold_what_they_need(parts: int, sources: list[str]) -> None:
    plan = streammerge.plan(sources, method="cat", weights=(1.0, 2.0, 3.0))
    manifests = read_adapters(sources, NameTable())
    for picked in np.array_split(np.arange(len(plan.tasks)), parts):
        tasks = [plan.tasks[i] for i in picked]
        part, taken = pickle.loads(pickle.dumps(take_part(plan, manifests, tasks)))
        assert part.write_bytes == sum(task.write_bytes for task in tasks)
        ends = 0
        for task, whole in zip(part.tasks, tasks, strict=True):
            assert (task.target, task.route) == (whole.target, whole.route)
            a, b = task.regions
            assert (a.offset, b.offset) == (ends, ends + a.nbytes)
            ends += a.nbytes + b.nbytes
            for mine, theirs in zip(
                range(task.first, task.last), range(whole.first, whole.last), strict=True
            ):
                position = part.sources.adapter[mine]
                assert position == plan.sources.adapter[theirs]
                assert part.sources.scaling[mine] == plan.sources.scaling[theirs]
                for side in "AB":
                    assert taken[position].factor(int(part.sources.row[mine]), side) == manifests[
                        position
                    ].factor(int(plan.sources.row[theirs]), side)


# ---------------------------------------------------------------------------------------------
# Workers that come and go


def at_first_task(act: Callable[[], object]) -> tuple[events.OnEvent, list[str]]:
    """Return a listener that acts when the first task is done, and the targets it hears of."""
    heard: list[str] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.TaskDone):
            heard.append(event.target)
            if len(heard) == 1:
                act()

    return listen, heard


def test_a_worker_is_killed(tmp_path: Path) -> None:
    paths = heavy(tmp_path)
    streammerge.merge(paths, tmp_path / "serial", workers=1, **HEAVY)
    with cluster_of(tmp_path / "cluster", 3) as cluster:
        listen, heard = at_first_task(lambda: kill(cluster.workers[1]))
        streammerge.merge(
            paths, tmp_path / "out", scheduler=cluster.address, on_event=listen, **HEAVY
        )
        runs = finished_runs(cluster)
    assert len(heard) == 60
    assert files(tmp_path / "out") == files(tmp_path / "serial")
    # What the worker had done was not done again, but for what was on its way.
    assert sum(runs.values()) <= len(runs) + 2


def assert_goes_on(long: Long, folder: Path, scheduler: str | None = None) -> None:
    """What the workers have done is kept, and the rest is done here or by others."""
    heard: list[events.Event] = []
    streammerge.merge(
        long.paths, folder / "out", resume=True, scheduler=scheduler, on_event=heard.append, **HEAVY
    )
    resumed = [event.done for event in heard if isinstance(event, events.Resumed)]
    done = [event for event in heard if isinstance(event, events.TaskDone)]
    assert len(resumed) == 1
    assert resumed[0] + len(done) == 150
    assert not list(folder.glob(".out*"))
    assert files(folder / "out") == long.files


CLIENT = """
import os, signal, sys
import streammerge
from streammerge import events

scheduler, out, *paths = sys.argv[1:]
done = []

def listen(event):
    done.append(isinstance(event, events.TaskDone))
    if sum(done) == 20:
        os.kill(os.getpid(), signal.SIGKILL)

streammerge.merge(
    paths, out, scheduler=scheduler, on_event=listen, method="ties_svd", density=0.3, rank=8
)
"""


def test_the_client_is_killed(long: Long, tmp_path: Path) -> None:
    with cluster_of(tmp_path / "cluster", 2) as cluster:
        arguments = [cluster.address, str(tmp_path / "out"), *long.paths]
        killed = subprocess.run([sys.executable, "-c", CLIENT, *arguments], check=False)
        assert killed.returncode == -signal.SIGKILL
        assert list((tmp_path / ".out.streammerge").glob(".streammerge-*/*.tasks"))
        assert_goes_on(long, tmp_path, cluster.address)


def test_the_time_limit_on_a_cluster(long: Long, tmp_path: Path) -> None:
    with cluster_of(tmp_path / "cluster", 1) as cluster:
        with pytest.raises(errors.StoppedError) as caught:
            streammerge.merge(
                long.paths, tmp_path / "out", scheduler=cluster.address, time_limit=1, **HEAVY
            )
        assert caught.value.done < caught.value.targets
        streammerge.merge(
            long.paths, tmp_path / "out", scheduler=cluster.address, resume=True, **HEAVY
        )
        assert not list(tmp_path.glob(".out*"))


def finished_runs(cluster: LocalCluster) -> dict[str, int]:
    """How often each bundle was run to its end."""
    from distributed import Client

    with Client(cluster.address, set_as_default=False) as client:
        log = client.run_on_scheduler(
            lambda dask_scheduler: [
                (str(entry.key), entry.finish) for entry in dask_scheduler.transition_log
            ]
        )
    done = [key for key, finish in log if key.startswith("merge-") and finish == "memory"]
    return {key: done.count(key) for key in done}


def test_a_late_worker_gets_work(long: Long, tmp_path: Path) -> None:
    from distributed import Client

    with cluster_of(tmp_path / "cluster", 1) as cluster, Client(cluster.address) as client:
        first, busy = at_first_task(cluster.add_worker)[0], set()

        def listen(event: events.Event) -> None:
            first(event)
            busy.update(worker for worker, keys in client.processing().items() if keys)

        streammerge.merge(
            long.paths, tmp_path / "out", scheduler=cluster.address, on_event=listen, **HEAVY
        )
    assert len(busy) == 2


@pytest.mark.long
def test_a_late_worker_that_rounds_differently(
    long: Long, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cluster_of(tmp_path / "cluster", 1, forked=False) as cluster:
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
        listen, _ = at_first_task(cluster.add_worker)
        with pytest.raises(errors.WorkerError, match=r"'DEFAULT'.*mixed_hardware"):
            streammerge.merge(
                long.paths, tmp_path / "out", scheduler=cluster.address, on_event=listen, **HEAVY
            )
    assert_goes_on(long, tmp_path)


def test_the_scheduler_is_lost(long: Long, tmp_path: Path) -> None:
    with cluster_of(tmp_path / "cluster", 1) as cluster:
        listen, _ = at_first_task(lambda: kill(cluster.scheduler))
        with pytest.raises(errors.WorkerError, match="the cluster was lost"):
            streammerge.merge(
                long.paths, tmp_path / "out", scheduler=cluster.address, on_event=listen, **HEAVY
            )
    assert_goes_on(long, tmp_path)


def test_all_workers_are_lost(long: Long, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from streammerge.executors import workers as module

    with cluster_of(tmp_path / "cluster", 1) as cluster:

        def strike() -> None:
            monkeypatch.setattr(module, "ANSWER_SECONDS", 1)
            kill(cluster.workers[0])

        listen, _ = at_first_task(strike)
        with pytest.raises(errors.WorkerError, match="no worker any more"):
            streammerge.merge(
                long.paths, tmp_path / "out", scheduler=cluster.address, on_event=listen, **HEAVY
            )
    assert_goes_on(long, tmp_path)


def test_a_gate_lets_in_what_the_plan_says() -> None:
    """Never more than its slots at once, and what is alone is alone."""
    gate, inside, seen = Gate(3), [], []

    def go(number: int) -> None:
        alone = number % 5 == 0
        with gate.passed(alone=alone):
            inside.append(alone)
            seen.append((len(inside), any(inside)))
            time.sleep(0.002)
            seen.append((len(inside), any(inside)))
            inside.remove(alone)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(go, range(120)))
    assert {count for count, alone in seen if alone} == {1}
    assert max(count for count, _ in seen) == 3


def test_a_task_that_costs_every_worker_its_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES", "0")
    paths = heavy(tmp_path, targets=1, side=3000)
    with cluster_of(tmp_path / "cluster", 1, forked=False) as cluster:

        def strike() -> None:
            wait_until(lambda: list((tmp_path / ".out.streammerge").glob(".streammerge-*/*.part")))
            kill(cluster.workers[0])

        striking = threading.Thread(target=strike)
        striking.start()
        with pytest.raises(errors.WorkerError, match=r"model\.000, worker tcp://127.* lost"):
            streammerge.merge(paths, tmp_path / "out", scheduler=cluster.address, **HEAVY)
        striking.join()
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_a_task_that_always_fails(three: LocalCluster, tmp_path: Path) -> None:
    """Its own error ends the run, and the cluster is as good as before."""
    from distributed import Client

    write_adapter(tmp_path / "good", {"up": linear(30, 20, 2)})
    write_adapter(tmp_path / "bad", {"up": linear(30, 20, 2)}, seed=1)
    spoil(tmp_path / "bad" / WEIGHTS)
    with pytest.raises(errors.NonFiniteError, match=r"bad.*up\.lora_B\.weight") as caught:
        streammerge.merge(
            [tmp_path / "good", tmp_path / "bad"], tmp_path / "out", scheduler=three.address
        )
    assert caught.value.tensor.endswith("up.lora_B.weight")
    assert not list(tmp_path.glob("*out*"))
    with Client(three.address, set_as_default=False) as client:
        wait_until(lambda: not any(client.processing().values()))
    streammerge.merge([tmp_path / "good"], tmp_path / "out", scheduler=three.address)


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    path.write_bytes(data)


# ---------------------------------------------------------------------------------------------
# Refused before any work


def facts(number: int, *, host: str, **environ: str) -> WorkerFacts:
    """A worker on a machine of 64 GiB, with a memory limit of 8 GiB."""
    return WorkerFacts(
        address=f"tcp://{number}",
        host=host,
        version="1",
        rule_origin=None,
        rule_problem=None,
        threads=1,
        limit_bytes=6 * GIB,
        granted=(
            Grant(64 * GIB, "physical memory", "machine"),
            *granted_by_slurm(environ),
        ),
        process_bytes=200 * MIB,
        fingerprints={},
        device=ON_CPU,
    )


def test_jobs_on_one_machine_share_its_memory_but_not_each_others() -> None:
    """Eight jobs on a machine, each granted 8 GiB: each has them for itself."""
    jobs = [facts(i, host="n1", SLURM_MEM_PER_NODE="8192", SLURM_JOB_ID=str(i)) for i in range(8)]
    assert common_budget(jobs, None).allowed_bytes == 6 * GIB
    # What the machine has they share, here twenty of them.
    more = [facts(i, host="n1", SLURM_MEM_PER_NODE="8192", SLURM_JOB_ID=str(i)) for i in range(20)]
    assert common_budget(more, None).allowed_bytes == int(64 * GIB * 0.85) // 20


def test_workers_of_one_job_share_what_it_was_granted() -> None:
    """On each machine, for what SLURM says is for one machine."""
    job = [
        facts(i, host=f"n{i % 2}", SLURM_MEM_PER_NODE="8192", SLURM_JOB_ID="7") for i in range(8)
    ]
    assert common_budget(job, None).allowed_bytes == int(8 * GIB * 0.85) // 4


def test_what_no_worker_can_hold_is_refused(tmp_path: Path) -> None:
    paths = heavy(tmp_path, targets=1, side=3000)
    with cluster_of(tmp_path / "cluster", 0) as cluster:
        cluster.add_worker("--nthreads", "1", "--memory-limit", "380MiB")
        began = time.monotonic()
        with pytest.raises(errors.BudgetError, match=r"model\.000.*worker tcp://"):
            streammerge.merge(paths, tmp_path / "out", scheduler=cluster.address, **HEAVY)
        assert time.monotonic() - began < 30
    assert not list(tmp_path.glob("*out*"))


def test_more_memory_than_a_worker_has(sources: list[str], three: LocalCluster) -> None:
    with pytest.raises(errors.ClusterError, match=r"768\.0 MiB, which is less than max_memory"):
        streammerge.plan(sources, scheduler=three.address, max_memory="2GiB")


def test_workers_that_round_differently(
    sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cluster_of(tmp_path / "cluster", 1, forked=False) as cluster:
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
        cluster.add_worker()
        wait_until(lambda: cluster.log().count("Registered to:") >= 2)
        with pytest.raises(errors.ClusterError, match="mixed_hardware"):
            streammerge.merge(sources, tmp_path / "out", scheduler=cluster.address)
        assert not list(tmp_path.glob("*out*"))
        streammerge.merge(sources, tmp_path / "out", scheduler=cluster.address, mixed_hardware=True)


@pytest.mark.parametrize("scheduler", ["tcp://127.0.0.1:1", "nowhere.json"])
def test_a_scheduler_that_is_not_there(
    scheduler: str, sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streammerge.executors import workers

    monkeypatch.setattr(workers, "CONNECT_SECONDS", 1)
    with pytest.raises(errors.ClusterError, match=scheduler):
        streammerge.merge(sources, tmp_path / "out", scheduler=scheduler)
    assert not list(tmp_path.iterdir())


def test_a_cluster_without_workers(
    sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streammerge.executors import workers

    monkeypatch.setattr(workers, "ANSWER_SECONDS", 1)
    with (
        cluster_of(tmp_path / "cluster", 0) as empty,
        pytest.raises(errors.ClusterError, match="no worker"),
    ):
        streammerge.plan(sources, scheduler=empty.address)


def test_workers_and_a_cluster(sources: list[str], three: LocalCluster) -> None:
    with pytest.raises(errors.RecipeError, match="workers"):
        streammerge.plan(sources, scheduler=three.address, workers=2)


def test_a_worker_that_sees_other_files(tmp_path: Path) -> None:
    probe, data = tmp_path / "probe", tmp_path / "data"
    probe.write_bytes(b"here")
    data.write_bytes(b"1234")
    status = data.stat()
    file = TensorFile(str(data), 4, status.st_mtime_ns, status.st_ino)
    assert look([file], str(probe), b"here", str(tmp_path)) is None
    assert "no such directory" in str(look([file], str(probe), b"here", str(tmp_path / "no")))
    assert "sees another" in str(look([file], str(probe), b"there", None))
    assert "cannot write" in str(look([file], str(tmp_path / "no" / "probe"), b"here", None))
    os.utime(data, ns=(1, 1))
    assert f"sees another {data}" in str(look([file], str(probe), b"here", None))
    data.unlink()
    assert "does not see" in str(look([file], str(probe), b"here", None))


# ---------------------------------------------------------------------------------------------
# Around it


def test_the_command_line(sources: list[str], three: LocalCluster, tmp_path: Path) -> None:
    from click.testing import CliRunner

    arguments = ["merge", *sources, "-o", str(tmp_path / "out"), "--scheduler", str(three.file)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert f"{len(LAYERS)} targets from 3 adapters" in done.output
    refused = CliRunner().invoke(main, [*arguments[:-1], "nowhere.json", "--overwrite"])
    assert refused.exit_code == 2
    assert "nowhere.json" in refused.output


def test_a_cluster_with_keys(sources: list[str], tmp_path: Path) -> None:
    """tls://, with a certificate that all share, from dask's own configuration."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a key")
    key, certificate = make_key(tmp_path / "cluster-keys")
    streammerge.merge(sources, tmp_path / "serial", workers=1)
    security = ["--tls-ca-file", str(certificate), "--tls-cert", str(certificate)]
    with cluster_of(tmp_path / "cluster", 1, [*security, "--tls-key", str(key)]) as cluster:
        assert cluster.address.startswith("tls://")
        # With a key that the cluster's authority has not signed.
        other = make_key(tmp_path / "stranger")
        stranger = [sys.executable, "-c", STRANGER, cluster.address, *sources]
        prefix = "DASK_DISTRIBUTED__COMM__TLS__"
        environ = {"CA_FILE": certificate, "CLIENT__CERT": other[1], "CLIENT__KEY": other[0]}
        refused = subprocess.run(
            stranger, capture_output=True, text=True, check=False,
            env={**os.environ, **{prefix + name: str(path) for name, path in environ.items()}},
        )  # fmt: skip
        assert "ClusterError" in refused.stderr
        assert "TLS" not in refused.stderr.partition("requires")[2]
        with dask.config.set(
            {
                "distributed.comm.tls.ca-file": str(certificate),
                "distributed.comm.tls.client.cert": str(certificate),
                "distributed.comm.tls.client.key": str(key),
            }
        ):
            streammerge.merge(sources, tmp_path / "out", scheduler=cluster.address)
    assert files(tmp_path / "out") == files(tmp_path / "serial")


def make_key(folder: Path) -> tuple[Path, Path]:
    """Return a new key, and a certificate that it has signed itself."""
    folder.mkdir()
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", "/CN=streammerge", "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return key, certificate


STRANGER = """
import sys
import streammerge
from streammerge.executors import workers

workers.CONNECT_SECONDS = 3
streammerge.plan(sys.argv[2:], scheduler=sys.argv[1])
"""


def test_relative_paths_are_the_callers(
    sources: list[str], three: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers work in other directories."""
    monkeypatch.chdir(Path(sources[0]).parent)
    names = [Path(path).name for path in sources]
    streammerge.merge(names, tmp_path / "serial", workers=1)
    streammerge.merge(names, tmp_path / "out", scheduler=three.address)
    assert files(tmp_path / "out") == files(tmp_path / "serial")


def test_a_client_stays_open(sources: list[str], three: LocalCluster, tmp_path: Path) -> None:
    from distributed import Client

    with Client(three.address, set_as_default=False) as client:
        streammerge.merge(sources, tmp_path / "out", scheduler=client)
        assert client.submit(sum, [1, 2]).result() == 3


def test_workers_stay_within_their_memory(tmp_path: Path) -> None:
    paths = heavy(tmp_path, targets=6, side=2500)
    with cluster_of(tmp_path / "cluster", 2, forked=False) as cluster:
        plan = streammerge.plan(paths, scheduler=cluster.address, **HEAVY)
        allowed = plan.reserved_bytes + 60 * MIB
        assert max(task.projected_bytes for task in plan.tasks) > 60 * MIB
        streammerge.merge(
            paths, tmp_path / "out", scheduler=cluster.address, max_memory=allowed, **HEAVY
        )
        peaks = [peak_of(worker.pid) for worker in cluster.workers]
    assert max(peaks) <= allowed


def peak_of(pid: int) -> int:
    """VmHWM of a process, in bytes."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024


def test_no_port_is_opened(sources: list[str], three: LocalCluster, tmp_path: Path) -> None:
    """Neither by the client, nor by the workers beyond loopback."""
    listening: list[object] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.TaskDone):
            mine = psutil.Process().net_connections()
            listening.extend(c for c in mine if c.status == psutil.CONN_LISTEN)

    before = [c for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]
    streammerge.merge(sources, tmp_path / "out", scheduler=three.address, on_event=listen)
    assert set(listening) <= set(before)
    for worker in three.workers:
        ports = psutil.Process(worker.pid).net_connections()
        assert {c.laddr.ip for c in ports if c.status == psutil.CONN_LISTEN} == {"127.0.0.1"}


def test_errors_travel() -> None:
    """With their facts and their message, whatever their constructors ask for."""
    made = {
        "str": "x",
        "str | None": "x",
        "int": 3,
        "int | None": 3,
        "float": 0.5,
        "tuple[str, ...]": ("x", "y"),
        "tuple[str, str]": ("x", "y"),
    }
    kinds = [kind for kind in vars(errors).values() if inspect.isclass(kind)]
    for kind in kinds:
        if not issubclass(kind, errors.StreammergeError):
            continue  # what the module imports
        # A class without an __init__ of its own takes a message, as Exception does.
        own = inspect.isfunction(kind.__init__)
        parameters = inspect.signature(kind).parameters if own else {"message": None}
        named = {name: made[p.annotation] for name, p in parameters.items() if name != "message"}
        error = kind(*["what is wrong"] * ("message" in parameters), **named)
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is kind
        assert str(again) == str(error)
        assert vars(again) == vars(error)
