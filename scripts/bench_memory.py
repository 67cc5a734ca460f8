"""The memory promise on large inputs: each case under a hard cap, against a run without one.

    scripts/bench-memory [CASE …] [--folder DIR] [--json FILE]

Makes its inputs in DIR (up to 12 GB of disk, kept for the next time) and prints a table. All cases
take about an hour on two cores; one takes from half a minute to ten minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from capped import MIB, run_cli, task_peaks

ALL_METHODS = (
    "linear",
    "cat",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_ties",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
)
WITHOUT_DENSITY = ("linear", "cat", "svd")


@dataclass(frozen=True)
class Case:
    """One row of the promise."""

    name: str
    adapters: int
    rank: int
    targets: dict[str, tuple[int, int]]
    methods: tuple[str, ...]
    cap_mib: int = 512
    open_files: int | None = None
    sparse: bool = False
    """Whether the files are holes: real headers, no data. For plans only."""
    alike: bool = True
    """Whether all headers are the same to the byte, as those of adapters trained alike are."""


def _layers(count: int, shapes: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return {f"layers.{i}.{name}": shape for i in range(count) for name, shape in shapes.items()}


CASES = {
    case.name: case
    for case in (
        Case(
            "700mib",
            8,
            128,
            _layers(
                88, {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096)}
            ),
            ("linear", "ties", "cat", "svd"),
        ),
        Case("wide", 8, 16, {"layers.0.down": (4096, 11008)}, ("ties_svd",)),
        Case("huge", 4, 64, {"layers.0.up": (32768, 8192)}, ("ties_svd", "magnitude_prune_svd")),
        Case("embedding", 4, 16, {"model.embed_tokens": (4096, 128256)}, ("svd", "dare_ties")),
        Case(
            "thousand",
            1000,
            16,
            _layers(16, dict.fromkeys(("q", "k", "v", "o"), (512, 512))),
            ALL_METHODS,
            open_files=256,
        ),
        *(
            Case(
                name,
                64,
                16,
                _layers(15000, {"gate": (1408, 2048), "up": (1408, 2048), "down": (2048, 1408)}),
                ("plan",),
                cap_mib=1024,
                sparse=True,
                alike=alike,
            )
            for name, alike in (("moe", True), ("moe-unlike", False))
        ),
    )
}


def make_adapters(case: Case, folder: Path) -> list[str]:
    """Write a case's adapters, bfloat16, as PEFT would name them; return their paths."""
    paths = [folder / case.name / f"adapter{i:04d}" for i in range(case.adapters)]
    noise = np.random.default_rng(0).standard_normal(2**22, dtype=np.float32) * 0.02
    block = (noise.view(np.uint32) >> 16).astype(np.uint16)
    for number, path in enumerate(paths):
        if (path / "adapter_config.json").exists():
            continue
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        header, size = _header(case, number)
        with (path / "adapter_model.safetensors").open("wb") as stream:
            stream.write(header)
            if case.sparse:
                stream.truncate(len(header) + size)
            else:
                _write_noise(stream, block, size, number)
        config = {
            "peft_type": "LORA",
            "r": case.rank,
            "lora_alpha": case.rank,
            "target_modules": sorted({name.rsplit(".", 1)[-1] for name in case.targets}),
            "base_model_name_or_path": "made-up",
        }
        (path / "adapter_config.json").write_text(json.dumps(config))
    return [str(path) for path in paths]


def _header(case: Case, number: int) -> tuple[bytes, int]:
    metadata = {"format": "pt"} if case.alike else {"format": "pt", "number": str(number)}
    fields: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for target, (m, n) in case.targets.items():
        names = (".lora_A.weight", ".lora_B.weight")
        if target.endswith("embed_tokens"):
            names = (".lora_embedding_A", ".lora_embedding_B")
        for name, shape in zip(names, ((case.rank, n), (m, case.rank)), strict=True):
            size = 2 * shape[0] * shape[1]
            fields[f"base_model.model.{target}{name}"] = {
                "dtype": "BF16",
                "shape": shape,
                "data_offsets": (offset, offset + size),
            }
            offset += size
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offset


def _write_noise(stream: object, block: np.ndarray, size: int, number: int) -> None:
    """Write `size` bytes of a Gaussian block, from another place of it for each adapter."""
    rng = np.random.default_rng(number)
    left = size // 2
    while left:
        start = int(rng.integers(len(block) // 2))
        part = block[start : start + left]
        stream.write(part.tobytes())
        left -= len(part)


def measure(case: Case, method: str, folder: Path) -> Iterator[tuple[str, object]]:
    """Yield what one method on one case shows."""
    adapters = make_adapters(case, folder)
    capped_out, free_out = folder / "capped", folder / "free"
    for output in (capped_out, free_out):
        shutil.rmtree(output, ignore_errors=True)
    options = [] if method in WITHOUT_DENSITY else ["--density", "0.2"]
    arguments = [*adapters, "--method", method, *options]
    cap = case.cap_mib * MIB
    if method == "plan":
        arguments = ["plan", *adapters, "--method", "ties", "--density", "0.2"]
        began = time.perf_counter()
        run = run_cli(arguments, cap_bytes=cap, open_files=case.open_files)
        yield "seconds", round(time.perf_counter() - began, 1)
        yield "peak_mib", round(run.peak_bytes / MIB)
        yield "ok", run.returncode == 0 and run.peak_bytes <= cap
        return
    began = time.perf_counter()
    # The group's cap counts the page cache too, so it is a little more than what is promised.
    run = run_cli(
        ["merge", "-o", str(capped_out), "--max-memory", f"{case.cap_mib}MiB", *arguments],
        cap_bytes=cap,
        open_files=case.open_files,
    )
    seconds = time.perf_counter() - began
    yield "exit", run.returncode
    if run.returncode:
        yield "said", run.stderr[-300:]
        return
    yield "capped_by", run.capped_by
    yield "seconds", round(seconds, 1)
    yield "peak_mib", round(run.peak_bytes / MIB)
    began = time.perf_counter()
    free = run_cli(["merge", "-o", str(free_out), *arguments])
    yield "free_seconds", round(time.perf_counter() - began, 1)
    yield "free_peak_mib", round(free.peak_bytes / MIB)
    same = _digest(capped_out) == _digest(free_out)
    yield "same_bytes", same
    yield "ok", same and run.peak_bytes <= cap


def measure_tasks(case: Case, method: str, folder: Path) -> dict[str, object]:
    """Return each task's projection and peak under the cap, for one target of every shape."""
    adapters = make_adapters(case, folder)
    options: dict[str, object] = {"method": method, "max_memory": f"{case.cap_mib}MiB"}
    options["workers"] = len(os.sched_getaffinity(0))
    if method not in WITHOUT_DENSITY:
        options["density"] = 0.2
    if len(case.targets) > 8:
        options["include"] = r"layers\.0\."
    return task_peaks(adapters, **options)


def _digest(output: Path) -> str:
    digest = hashlib.sha256()
    for name in ("adapter_config.json", "adapter_model.safetensors", "streammerge.json"):
        with (output / name).open("rb") as stream:
            while data := stream.read(2**23):
                digest.update(data)
    return digest.hexdigest()


def main() -> None:
    """Run the cases that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], default=[])
    parser.add_argument("--method", action="append", help="only these")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/streammerge-bench-memory"))
    parser.add_argument("--json", type=Path, help="where the figures go")
    chosen = parser.parse_args()
    rows = []
    for name in chosen.cases or CASES:
        case = CASES[name]
        for method in case.methods:
            if chosen.method and method not in chosen.method:
                continue
            row: dict[str, object] = {"case": name, "method": method, "cap_mib": case.cap_mib}
            row.update(measure(case, method, chosen.folder))
            if method != "plan" and row.get("exit") == 0:
                row.update(_task_facts(measure_tasks(case, method, chosen.folder), case))
            rows.append({**row, "inputs": asdict(case)["adapters"]})
            print(json.dumps(row), flush=True)
            if chosen.json:
                chosen.json.write_text(json.dumps(rows, indent=1))
    if not all(row.get("ok") for row in rows):
        raise SystemExit("a case broke its promise")


def _task_facts(measured: dict[str, object], case: Case) -> dict[str, object]:
    tasks = measured["tasks"]
    worst = max(tasks, key=lambda task: task["peak_bytes"] / task["projected_bytes"])
    room = case.cap_mib * MIB - measured["reserved_bytes"]
    return {
        "route": worst["route"],
        "worst_peak_to_projected": round(worst["peak_bytes"] / worst["projected_bytes"], 2),
        "projected_mib": round(max(task["projected_bytes"] for task in tasks) / MIB, 1),
        "utilisation": round(max(task["peak_bytes"] for task in tasks) / room, 2),
    }


if __name__ == "__main__":
    main()
