"""Merges on clusters of a job system: what docs/clusters.md shows is what is run here.

Names of a site are put in the place of those in the text (its network is loopback), and SLURM's
commands are stand-ins that start jobs on this machine at once. What SLURM itself does with a job,
its directives included, is not tried.
"""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

import streammerge
from clusters import LOOPBACK, PATIENCE, wait_until
from making import CONFIG, WEIGHTS, linear, write_adapter
from streammerge import events

pytest.importorskip("dask_jobqueue", reason="dask-jobqueue is not installed")

DOCS = Path(__file__).resolve().parents[1] / "docs" / "clusters.md"
CHOSEN = {"method": "ties_svd", "density": 0.2}

SBATCH = """#!/bin/sh
# Begins the job at once, in a process group of its own; its number is that of this process.
cp "$1" "$JOBS/$$.sh"
SLURM_JOB_ID=$$ setsid bash "$JOBS/$$.sh" >"$JOBS/$$.log" 2>&1 </dev/null &
echo $! >"$JOBS/$$.pid"
echo "Submitted batch job $$"
"""

SCANCEL = """#!/usr/bin/env bash
kill -TERM -- "-$(cat "$JOBS/$1.pid")"
"""

SRUN = """#!/usr/bin/env bash
# Runs the command for each task of the job, all on this machine, and passes on that it is to end.
while [[ $1 == --* ]]; do
    case $1 in --output=*) output=${1#*=} ;; esac
    shift
done
trap 'kill $(jobs -p)' TERM
for ((task = 0; task < SLURM_NTASKS; task++)); do
    "$@" >"${output//%t/$task}" 2>&1 &
done
wait
wait
"""


# ---------------------------------------------------------------------------------------------
# The text


def block(language: str, beginning: str) -> str:
    """The block of the docs that begins with these words."""
    parts = DOCS.read_text().split(f"```{language}\n{beginning}")
    assert len(parts) == 2
    return beginning + parts[1].split("```")[0]


def options_of(script: str) -> dict[str, Any]:
    """The options that a script gives to SLURMCluster."""
    calls = [
        node
        for node in ast.walk(ast.parse(script))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "SLURMCluster"
    ]
    (call,) = calls
    return {str(option.arg): ast.literal_eval(option.value) for option in call.keywords}


def here(text: str, site: Path) -> str:
    """A text of the docs with the names of this site, and jobs of one thread and 1 GiB."""
    for name, ours in {
        "/shared": str(site / "shared"),
        "/local": str(site / "local"),
        "ib0": "lo",
        "cores=8": "cores=1",
        "16GiB": "1GiB",
    }.items():
        assert name in text or "GiB" in name or "cores" in name
        text = text.replace(name, ours)
    return text


def python_script() -> str:
    return block("python", "from dask_jobqueue")


# ---------------------------------------------------------------------------------------------
# The site


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with adapters, an environment, and SLURM's commands; $PATH leads to them."""
    for command, text in {"sbatch": SBATCH, "scancel": SCANCEL, "srun": SRUN}.items():
        executable(tmp_path / "bin" / command, text)
    python = f'#!/bin/sh\nexec "{sys.executable}"'
    virtual = tmp_path / "shared" / "venv" / "bin"
    executable(virtual / "activate", f'PATH="{virtual}:$PATH"\n')
    executable(virtual / "python", f'{python} "$@"\n')
    executable(virtual / "dask", f'{python} -m dask "$@"\n')
    executable(virtual / "streammerge", f'{python} -m streammerge.cli "$@"\n')
    (tmp_path / "jobs").mkdir()
    (tmp_path / "local").mkdir()
    for seed, name in enumerate("ABC"):
        layers = {f"model.{i:02d}": linear(250, 200, 4) for i in range(40)}
        write_adapter(tmp_path / "shared" / name, layers, seed=seed)
    monkeypatch.setenv("JOBS", str(tmp_path / "jobs"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    return tmp_path


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def serial(site: Path) -> list[bytes]:
    """The files of a serial run of what the docs merge."""
    paths = [site / "shared" / name for name in "ABC"]
    streammerge.merge(paths, site / "serial", workers=1, on_event=events.ignore, **CHOSEN)
    return files(site / "serial")


def files(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in (WEIGHTS, CONFIG, "streammerge.json")]


def jobs(site: Path) -> dict[str, int]:
    """The process groups of the jobs that were submitted, by their numbers."""
    found = sorted((site / "jobs").glob("*.pid"))
    return {path.stem: int(path.read_text()) for path in found if path.stat().st_size}


def members(groups: set[int]) -> list[psutil.Process]:
    """The processes of some groups that still run."""
    found = []
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):
            if os.getpgid(process.pid) in groups and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def listening(processes: list[psutil.Process]) -> set[str]:
    """The addresses that processes listen on."""
    found = set()
    for process in processes:
        with suppress(psutil.Error):
            connections = process.net_connections()
            found |= {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    return found


@contextmanager
def none_left(site: Path) -> Iterator[None]:
    """See to it that no process of a job outlives a block, and that none has to be killed."""
    try:
        yield
        wait_until(lambda: not members(set(jobs(site).values())))
    finally:
        for process in members(set(jobs(site).values())):
            process.kill()


# ---------------------------------------------------------------------------------------------
# dask-jobqueue


def test_the_job_that_is_submitted(site: Path) -> None:
    """What the docs say of memory, threads, ports and names is what dask-jobqueue writes."""
    from dask_jobqueue import SLURMCluster

    options = options_of(python_script())
    log, file = site / "logs", site / "scheduler.json"
    server = options["scheduler_options"] | {"host": LOOPBACK, "scheduler_file": str(file)}
    changed = {"log_directory": str(log), "scheduler_options": server}
    with SLURMCluster(**options | changed) as cluster:
        script, address = cluster.job_script(), cluster.scheduler_address
        assert listening([psutil.Process()]) == {LOOPBACK}
        assert address in file.read_text()
    lines = script.splitlines()
    assert {line for line in lines if line.startswith("#SBATCH")} == {
        "#SBATCH -J dask-worker",
        f"#SBATCH -e {log}/dask-worker-%J.err",
        f"#SBATCH -o {log}/dask-worker-%J.out",
        "#SBATCH -p batch",
        "#SBATCH -n 1",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --mem=16G",
        "#SBATCH -t 02:00:00",
    }
    assert address.startswith(f"tcp://{LOOPBACK}:")
    before, command = lines[-2:]
    assert before == "mkdir -p /local/$SLURM_JOB_ID"
    assert command.startswith(f"{sys.executable} -m distributed.cli.dask_worker {address} ")
    for part in (
        "--nthreads 8",
        "--memory-limit 16.00GiB",
        "--nanny",
        "--local-directory /local/$SLURM_JOB_ID",
        "--interface ib0",
        "--no-dashboard",
        f"--dashboard-address {LOOPBACK}:0",
    ):
        assert f" {part} " in f"{command} "
    assert "--nworkers" not in command


def test_what_the_docs_say_of_sizes_and_of_other_systems() -> None:
    from dask_jobqueue.pbs import PBSJob
    from dask_jobqueue.slurm import SLURMJob

    options = options_of(python_script())
    del options["scheduler_options"], options["log_directory"]
    options["config_name"] = "slurm"
    decimal = SLURMJob("tcp://x", "name", **options | {"memory": "16GB"}).job_script()
    assert "--mem=15G" in decimal
    assert "--memory-limit 14.90GiB" in decimal
    halves = SLURMJob("tcp://x", "name", **options | {"processes": 2}).job_script()
    assert "--nthreads 4 --memory-limit 8.00GiB --nworkers 2" in halves
    del options["processes"]
    left_out = SLURMJob("tcp://x", "name", **options).job_script()
    assert "--nthreads 2 --memory-limit 4.00GiB --nworkers 4" in left_out
    options["config_name"] = "pbs"
    pbs = PBSJob("tcp://x", "name", **options | {"processes": 1}).job_script()
    assert "#PBS -l select=1:ncpus=8:mem=16GB" in pbs
    assert "--nthreads 8 --memory-limit 16.00GiB" in pbs


def test_the_script_makes_the_same_bytes(site: Path) -> None:
    """Run as it stands in the docs, on two jobs; all that listens does so on loopback."""
    script = site / "merge.py"
    script.write_text(here(python_script(), site))
    heard: set[str] = set()
    with none_left(site), (site / "script.log").open("wb") as log:
        running = subprocess.Popen([sys.executable, script], stdout=log, stderr=log)
        while running.poll() is None:
            heard |= listening([psutil.Process(running.pid), *members(set(jobs(site).values()))])
            time.sleep(0.1)
    assert running.returncode == 0, logs(site)
    assert len(jobs(site)) == 2
    assert heard == {LOOPBACK}
    assert files(site / "shared" / "OUT") == serial(site)
    assert not (site / "shared" / "scheduler.json").exists()


def logs(site: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(site.rglob("*.log")))


@pytest.mark.long
def test_a_job_that_ends_is_made_up_for(site: Path) -> None:
    """One is cancelled in the middle of a merge, by another client than the one that adapts."""
    from dask_jobqueue import SLURMCluster
    from distributed import Client

    options = options_of(here(python_script(), site))
    cancelled: list[str] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.TaskDone) and not cancelled:
            cancelled.append(min(jobs(site)))
            subprocess.run(["scancel", *cancelled], check=True)

    with none_left(site), SLURMCluster(**options) as cluster, Client(cluster) as client:
        cluster.adapt(minimum_jobs=2, maximum_jobs=2)
        client.wait_for_workers(2, timeout=PATIENCE)
        streammerge.merge(
            [site / "shared" / name for name in "ABC"],
            site / "shared" / "OUT",
            scheduler=options["scheduler_options"]["scheduler_file"],
            on_event=listen,
            **CHOSEN,
        )
        wait_until(lambda: len(jobs(site)) > 2)
        client.wait_for_workers(2, timeout=PATIENCE)
    assert cancelled
    assert files(site / "shared" / "OUT") == serial(site)


# ---------------------------------------------------------------------------------------------
# One allocation


ALLOCATION = {
    "SLURM_JOB_ID": "17",
    "SLURM_NTASKS": "2",
    "SLURM_CPUS_PER_TASK": "1",
    "SLURM_MEM_PER_CPU": "1024",
    "SLURM_CPUS_ON_NODE": "2",
}
"""What SLURM would say to a job with two tasks of one CPU and 1 GiB."""


@pytest.mark.parametrize("spoilt", [False, pytest.param(True, marks=pytest.mark.long)])
def test_one_allocation(spoilt: bool, site: Path) -> None:
    """The same bytes, or the exit code of what went wrong; nothing is left of either."""
    script = site / "job.sh"
    script.write_text(here(block("bash", "#!/usr/bin/env bash\n#SBATCH"), site))
    if spoilt:
        (site / "shared" / "B" / WEIGHTS).write_bytes(b"")
    heard: set[str] = set()
    with (site / "job.log").open("wb") as log:
        running = subprocess.Popen(
            ["bash", script], stdout=log, stderr=log, start_new_session=True,
            env={**os.environ, **ALLOCATION},
        )  # fmt: skip
    try:
        while running.poll() is None:
            heard |= listening(members({running.pid}))
            time.sleep(0.1)
        wait_until(lambda: not members({running.pid}))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode == (2 if spoilt else 0), logs(site)
    assert heard == {LOOPBACK}
    assert len(list((site / "shared" / "runs" / "17").glob("worker-*.log"))) == 2
    if spoilt:
        assert not (site / "shared" / "OUT").exists()
    else:
        assert files(site / "shared" / "OUT") == serial(site)
