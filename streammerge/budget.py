"""How much memory a run may take: allowed, reserved, and where the number came from.

Four words, never a fifth: *allowed* is what the user gave, for the whole process as `top` shows
it; *reserved* is what interpreter, libraries and thread pools take before any work; *projected*
is what a task promises to hold; *peak* is what was measured. All in bytes.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from streammerge.errors import RecipeError

KIB = 1024
MIB = 1024**2
GIB = 1024**3

HEADROOM = 0.85
"""Share of what the machine grants that a run allows itself when nothing was said."""

PROCESS_BYTES = 264 * MIB
"""What a process takes that does nothing but merge: 235 to 255 MiB were measured. One that holds
more, for it has loaded more than streammerge, is measured."""

THREAD_BYTES = 17 * MIB
"""What one more worker thread reserves: its stack, its allocator arena, and the buffers of BLAS and
LAPACK, which in float64 grow with a product's rows up to 11 MiB: 17 MiB at most were measured."""

SPARE_BYTES = 8 * MIB
"""What the process grows by apart from its tasks: receipts, progress, code that is loaded late."""

_UNITS = {
    "": 1,
    "b": 1,
    "k": KIB,
    "kb": 1000,
    "kib": KIB,
    "m": MIB,
    "mb": 1000**2,
    "mib": MIB,
    "g": GIB,
    "gb": 1000**3,
    "gib": GIB,
    "t": 1024**4,
    "tb": 1000**4,
    "tib": 1024**4,
}


def parse_size(text: str | int, *, option: str) -> int:
    """Return the bytes that `text` names: 1073741824, "512MiB", "2 GB", "1.5g".

    Raises:
        RecipeError: not a size, or not positive.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        size = text
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-zA-Z]*)\s*", str(text))
        unit = _UNITS.get(match[2].lower()) if match else None
        if match is None or unit is None:
            raise RecipeError(
                f"{option}: {text!r} is not a size; write it like 512MiB, 2GiB or 4GB",
                option=option,
            )
        size = int(float(match[1]) * unit)
    if size <= 0:
        raise RecipeError(f"{option}: {text!r} is not a positive size", option=option)
    return size


def format_size(size: float) -> str:
    """Return `size` bytes for people: "37 B", "1.5 MiB"."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(size) >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size:.0f} B"


_DURATIONS = (
    (r"(\d+(?:\.\d*)?)", (1,)),
    (r"(?:(\d+):)?(\d+):(\d+)", (3600, 60, 1)),
    (
        r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?:in)?)?(?:(\d+(?:\.\d*)?)s)?",
        (86400, 3600, 60, 1),
    ),
)
"""Patterns of durations, and how many seconds each of their parts counts."""


def parse_duration(text: str | float, *, option: str) -> float:
    """Return the seconds that `text` names: 5400, "90s", "50m", "1h30m", "2d", "1:30:00".

    Raises:
        RecipeError: not a duration, or not positive.
    """
    seconds = 0.0
    if isinstance(text, str):
        for pattern, lengths in _DURATIONS:
            match = re.fullmatch(pattern, text.strip().lower())
            if match:
                parts = zip(match.groups(default="0"), lengths, strict=True)
                seconds = sum(float(part) * length for part, length in parts)
                break
    elif not isinstance(text, bool):
        seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise RecipeError(
            f"{option}: {text!r} is not a duration; write it like 90s, 50m, 1h30m or 1:30:00",
            option=option,
        )
    return seconds


@dataclass(frozen=True)
class Budget:
    """The memory of one run, in bytes."""

    allowed_bytes: int
    """For the whole process, as the resident set size shows it."""
    origin: str
    """Where the number came from, for people."""
    process_bytes: int = PROCESS_BYTES
    """What the process holds before any task, with all libraries loaded and warm."""
    threads: int = 1
    """Tasks that may be in flight at once."""

    @property
    def reserved_bytes(self) -> int:
        """What the process takes apart from its tasks."""
        return self.process_bytes + SPARE_BYTES + self.threads * THREAD_BYTES


CPU = "cpu"
AUTO = "auto"
"""The accelerator of the machine, if it has one and the plan is faster on it."""


@dataclass(frozen=True)
class Device:
    """Where tasks compute, and how much of its memory they may take, in bytes."""

    name: str = CPU
    """As torch spells it: "cpu", "cuda", "cuda:1", "xpu", …"""
    allowed_bytes: int = 0
    """Of its own memory; nothing on the CPU, whose memory is the process's."""


ON_CPU = Device()


@dataclass(frozen=True, order=True)
class Grant:
    """A limit on the memory of a process."""

    nbytes: int
    origin: str
    """Where it comes from, for people."""
    holder: str
    """Who has it: processes of one machine with the same holder have it together."""


def allow(max_memory: str | int | None) -> tuple[int, str]:
    """Return how much the user allows, or the machine grants with headroom, and who said so."""
    if max_memory is not None:
        return parse_size(max_memory, option="max_memory"), "max_memory"
    least = min(granted_by_machine())
    size = format_size(least.nbytes)
    return int(least.nbytes * HEADROOM), f"{HEADROOM:.0%} of {size} ({least.origin})"


def round_process(measured_bytes: int) -> int:
    """Return what is reserved for a process that was measured to hold so much.

    Figures that differ from run to run must not make a budget work in one and not in the next.
    """
    step = 16 * MIB
    return max(PROCESS_BYTES, -(-measured_bytes // step) * step)


def resident_bytes() -> int:
    """Return what this process holds in memory now, shared pages included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """Return the most that this process has held in memory so far (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def granted_by_machine(
    root: Path = Path("/"), environ: Mapping[str, str] | None = None
) -> list[Grant]:
    """Return every limit on this process's memory.

    Args:
        root: where /proc and /sys are looked for.
        environ: the environment; that of the process when None.
    """
    environ = os.environ if environ is None else environ
    limits = [Grant(_physical_bytes(), "physical memory", "machine")]
    limits += _cgroup_limits(root)
    for name in ("RLIMIT_AS", "RLIMIT_DATA"):
        soft, _ = resource.getrlimit(getattr(resource, name))
        if soft != resource.RLIM_INFINITY:
            limits.append(Grant(soft, name, f"process {os.getpid()}"))
    limits += granted_by_slurm(environ)
    return limits


def _physical_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_limits(root: Path) -> Iterator[Grant]:
    """Yield the limits of this process's control groups and their parents, v1 and v2."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mount = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            base, name, version = mount, "memory.max", "v2"
        elif "memory" in controllers.split(","):
            base, name, version = mount / "memory", "memory.limit_in_bytes", "v1"
        else:
            continue
        directory = base / group.lstrip("/")
        for parent in (directory, *directory.parents):
            limit = _read_limit(parent / name)
            if limit is not None:
                yield Grant(limit, f"memory cgroup {version}", f"group {parent}")
            if parent == base:
                break


def _read_limit(path: Path) -> int | None:
    """Return the limit in a control group's file, None where there is none."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    # cgroup v1 writes "no limit" as the largest multiple of the page size.
    return int(text) if text.isdigit() and int(text) < 2**62 else None


def granted_by_slurm(environ: Mapping[str, str]) -> Iterator[Grant]:
    """Yield what SLURM granted; its variables are in MiB, and 0 means the whole node."""
    job = f"job {environ.get('SLURM_JOB_ID', '')}"
    per_node = environ.get("SLURM_MEM_PER_NODE", "")
    if per_node.isdigit() and int(per_node):
        yield Grant(int(per_node) * MIB, "SLURM_MEM_PER_NODE", job)
    per_cpu = environ.get("SLURM_MEM_PER_CPU", "")
    cpus = environ.get("SLURM_CPUS_ON_NODE", "")
    if per_cpu.isdigit() and cpus.isdigit() and int(per_cpu):
        yield Grant(int(per_cpu) * int(cpus) * MIB, "SLURM_MEM_PER_CPU", job)
