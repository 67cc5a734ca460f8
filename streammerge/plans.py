"""The plan: frozen data that says what a merge reads, holds, writes, and in which pieces.

A plan is made from headers alone, can be printed and stored as JSON, and is run by an executor.
Its tasks hold ranges into the plan's source columns, which point into the manifests.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from streammerge.budget import CPU, format_size
from streammerge.notebook import card
from streammerge.tiling import row_tiles

Route = Literal[
    "concatenate",
    "fold",
    "core",
    "gram",
    "sum",
    "dense",
    "krylov",
    "left_basis",
    "both_bases",
    "shared_bases",
    "spectral",
    "copy",
    "mean",
    "bias",
]
"""How a task computes its pair:
concatenate: the factors side by side, scaled; fold: the rule on A's and on B's, tile by tile;
core: QR of the stacked factors and the SVD of the small core between them; gram: the same from the
Gram matrices of the stacked factors; sum: block Krylov on the factors of a weighted sum, one group
of adapters after another; dense: the merged matrix as a whole and its SVD; krylov: block Krylov on
the tiles of the merged matrix; left_basis: a basis of the columns of all deltas, and one of the two
before on the matrix of coordinates in it; both_bases: the same in a basis of the columns of all B's
and one of the rows of all A's; shared_bases: the same in two bases of the output's rank in which
all deltas together keep the most; spectral: from the singular triples of the deltas.
Or, of a tensor that is no factor, copy: the bytes of the first source, which those of others have
to be; mean: by the adapters' weights; bias: the weighted sum of what is added to deltas."""

EXTRA_ROUTES = ("copy", "mean", "bias")
"""Those of tensors that are not LoRA factors; their sources are rows of the extra columns."""

ARITHMETIC_RATE = 1e10
"""Operations a second on one core, products and element-wise work together."""

SHOWN = 8
"""Targets and notices that a notebook shows of a plan."""

DISK_RATE = 5e8
"""Bytes a second."""

DEVICE_RATE = 5e11
"""Operations a second on a device: low, for most operations are on tiles that keep it waiting for
the next. An assumption: no device was at hand."""

LINK_RATE = 5e9
"""Bytes a second to a device and back. An assumption."""

DEVICE_START = 5.0
"""Seconds until a device has begun: its libraries are loaded and warm. An assumption."""


@dataclass(frozen=True, slots=True)
class Region:
    """Where one output tensor lies: `offset` counts from the start of the file's data."""

    name: str
    file: int
    offset: int
    shape: tuple[int, ...]
    nbytes: int
    dtype: str
    """As safetensors spells it."""

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Task:
    """One target: it reads its sources, computes a pair and writes its regions, A's and B's.

    Or one tensor that is no factor, which has one region.
    """

    target: str
    """A module's path; or the full name of a tensor that is no factor."""
    m: int
    n: int
    rank: int
    """Of the output, or the largest that it may have, where the plan's ranks are late; 0 where
    there is no pair."""
    first: int
    last: int
    """Its sources are rows first to last - 1 of the plan's source columns."""
    route: Route
    resident: int
    """How many tiles are held at once (the chunk): of the merged matrix or of its coordinates, the
    others being computed again when they are needed; or of B's side by side, the others being made
    afterwards. Changes time and memory, never a byte of the result."""
    spilled: int
    """How many of the others lie on scratch disk instead of being computed again."""
    factors: int
    """Sources whose factors are held, converted; the others' are read again for each tile."""
    stacked: bool
    """Whether all sources' tensors of a tile are held while the rule goes over them again."""
    block: int
    """Columns of a Krylov block; 0 on other routes."""
    passes: int
    """Krylov passes planned; later ones are skipped when the certificate holds."""
    alone: bool
    """Whether no other task is in flight with it."""
    lanes: int
    """Threads that work on it at once, of each worker that does."""
    team: int
    """Workers of a cluster that share it."""
    read_bytes: int
    write_bytes: int
    projected_bytes: int
    """What the task holds of the process's memory at most."""
    device_bytes: int
    """What it holds of a device's memory at most; 0 where it computes on the CPU."""
    flops: int
    regions: tuple[Region, ...]

    @property
    def is_extra(self) -> bool:
        """Whether it is of a tensor that is no factor."""
        return self.route in EXTRA_ROUTES


@dataclass(frozen=True, slots=True)
class Census:
    """Passes over all targets before the tasks, which find thresholds over whole adapters."""

    adapters_at_once: int
    """Those whose elements a pass counts; there are passes for each such group."""
    passes: int
    """For each group, at most: one for each digit, and one for equals."""
    read_bytes: int
    """Of all passes, at most."""
    flops: int
    """Of all passes, at most."""
    projected_bytes: int
    """What the targets in flight hold at most together, with what is counted."""


@dataclass(frozen=True, slots=True)
class ExtraModule:
    """What is done with the tensors of one module that are not LoRA factors."""

    module: str
    """Its path; of what is left out, the tensor's full name."""
    kind: str
    done: str
    """"first", "mean", "sum" or "drop"."""
    adapters: tuple[int, ...]
    """Positions of those that it is made from, or dropped from."""
    tensors: tuple[str, ...]
    """Full names, in the output where they are written."""


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One file of the output's weights."""

    name: str
    data_bytes: int


@dataclass(frozen=True, eq=False)
class Sources:
    """Which rows of which manifests take part, task by task; columns of equal length.

    A row is one of an adapter's targets, or of its extra columns, as the task has it.
    """

    adapter: npt.NDArray[np.int32]
    row: npt.NDArray[np.int32]
    scaling: npt.NDArray[np.float64]
    weight: npt.NDArray[np.float64]
    density: npt.NDArray[np.float64]
    """Share of elements that the rule keeps; 1 where it keeps all."""

    def __len__(self) -> int:
        return len(self.adapter)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sources) and all(
            np.array_equal(mine, theirs)
            for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)
        )

    __hash__ = None  # type: ignore[assignment]  # arrays have no hash


@dataclass(frozen=True, repr=False)
class Plan:
    """Everything about a run that is known before it starts."""

    recipe: dict[str, Any]
    """As `Recipe.to_dict` gives it."""
    rule: str
    """How several tensors become one, as the catalog names it."""
    space: str
    """What the rule is applied to, as the catalog names it."""
    parameters: dict[str, float]
    """Of rule and space, by name: what was asked for, and what the catalog says otherwise."""
    dtype: str
    """Of the output, as torch spells it."""
    tasks: tuple[Task, ...]
    """One for each target, in the output's order."""
    sources: Sources
    """Which rows of which adapters the tasks read."""
    files: tuple[OutputFile, ...]
    """Of the output's weights."""
    config: dict[str, Any]
    """The output's adapter_config.json; what stands in its header instead, in diffusers' format."""
    allowed_bytes: int
    """What the whole process may hold."""
    allowed_origin: str
    """Who says so, for people."""
    reserved_bytes: int
    """What the process takes by itself: interpreter, libraries, threads."""
    concurrency: int
    """Threads: as many tasks are in flight at once, or lanes of one."""
    rule_origin: str | None = None
    """The distribution that brings the rule, and its version; None of streammerge's own."""
    format: str = "peft"
    """Of the output: "peft" or "diffusers"."""
    device: str = CPU
    """Where tasks compute, as torch spells it."""
    device_origin: str = "as asked"
    """Why there, for people."""
    device_allowed_bytes: int = 0
    """What may be held of the device's memory; 0 on the CPU."""
    io: str = "mmap"
    """How inputs are read: "mmap" or "pread"."""
    scratch: str | None = None
    """Directory for tiles that do not fit into memory."""
    census: Census | None = None
    """What finds thresholds over whole adapters; None where each tensor has its own."""
    extras: tuple[ExtraModule, ...] = ()
    """Modules of tensors that are not LoRA factors, and what is done with each."""
    notices: tuple[str, ...] = ()
    """What the user should know and what stops nothing."""
    late: bool = False
    """Whether ranks are only known from the work: those here, and bytes, regions and files, are
    the largest that there may be."""

    @property
    def method(self) -> str:
        """How adapters become one, for people."""
        brought = f" of {self.rule_origin}" if self.rule_origin else ""
        return f"{self.recipe['method']}: rule {self.rule}{brought}, space {self.space}"

    @property
    def usual_rank(self) -> int:
        """The rank that most targets of the output have, the larger one of equals."""
        counts = Counter(task.rank for task in self.targets)
        return max(counts, key=lambda rank: (counts[rank], rank))

    @property
    def targets(self) -> tuple[Task, ...]:
        """The tasks that merge factors."""
        return tuple(task for task in self.tasks if not task.is_extra)

    @property
    def regions(self) -> list[Region]:
        """Where every output tensor lies, task by task."""
        return [region for task in self.tasks for region in task.regions]

    @property
    def read_bytes(self) -> int:
        """Bytes of input tensors that the tasks need; the census reads more."""
        return sum(task.read_bytes for task in self.tasks)

    @property
    def flops(self) -> int:
        """Operations of the whole run, about."""
        return sum(task.flops for task in self.tasks) + (self.census.flops if self.census else 0)

    @property
    def write_bytes(self) -> int:
        """Bytes of tensors in the output."""
        return sum(file.data_bytes for file in self.files)

    @property
    def scratch_bytes(self) -> int:
        """What the tasks in flight spill at most."""
        return self.in_flight([spilled_bytes(task, self.item_bytes) for task in self.tasks])

    @property
    def seconds(self) -> float:
        """How long it takes on ordinary cores, disks and devices: within a factor of some three."""
        moved = self.read_bytes + self.write_bytes
        if self.census is not None:
            moved += self.census.read_bytes
        flops = self.flops
        if self.device == CPU:
            return flops / ARITHMETIC_RATE / self.concurrency + moved / DISK_RATE
        return DEVICE_START + flops / DEVICE_RATE + moved / LINK_RATE + moved / DISK_RATE

    @property
    def item_bytes(self) -> int:
        """Bytes of a number in the compute dtype."""
        return 8 if self.recipe["compute_dtype"] == "float64" else 4

    @property
    def projected_bytes(self) -> int:
        """What the process holds at most: reserved, and the largest tasks in flight together."""
        tasks = self.in_flight([task.projected_bytes for task in self.tasks])
        return self.reserved_bytes + max(tasks, self.census.projected_bytes if self.census else 0)

    def in_flight(self, sizes: Sequence[int]) -> int:
        """Return what tasks of these sizes take at most together, as they are in flight."""
        together = [size for size, task in zip(sizes, self.tasks, strict=True) if not task.alone]
        largest = sorted(together, reverse=True)[: self.concurrency]
        alone = [size for size, task in zip(sizes, self.tasks, strict=True) if task.alone]
        return max([sum(largest), *alone])

    def __repr__(self) -> str:
        return (
            f"Plan({self.recipe['method']}: {len(self.recipe['adapters'])} adapters, "
            f"{len(self.targets)} targets, reads {self.read_bytes:,} bytes, writes "
            f"{self.write_bytes:,}, holds at most {self.projected_bytes:,} of "
            f"{self.allowed_bytes:,})"
        )

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the totals, and the targets that hold most."""
        tasks = sorted(self.tasks, key=lambda task: (-task.projected_bytes, task.target))
        at_most = "at most " * self.late
        facts = [
            ("method", self.method),
            ("adapters", f"{len(self.recipe['adapters']):,}"),
            ("targets", f"{len(tasks):,}"),
            ("reads", format_size(self.read_bytes)),
            *(
                [("reads before", f"{format_size(self.census.read_bytes)} at most, for thresholds")]
                if self.census
                else []
            ),
            ("writes", f"{at_most}{format_size(self.write_bytes)}, {self.dtype}"),
            ("holds", f"{format_size(self.projected_bytes)} at most"),
            ("allowed", f"{format_size(self.allowed_bytes)}, {self.allowed_origin}"),
            ("time, roughly", f"{self.seconds:,.1f} s"),
            *(("note", notice) for notice in self.notices[:SHOWN]),
        ]
        rows = [
            (task.target, f"{task.m}×{task.n}", str(task.rank), format_size(task.projected_bytes))
            for task in tasks[:SHOWN]
        ]
        header = ("target", "shape", "rank", "holds")
        return card("Plan", facts, header, rows, more=len(tasks) - len(rows))

    def to_json(self) -> str:
        """Return the plan as JSON; `Plan.from_json` takes it back."""
        fields = asdict(self)
        fields["sources"] = {name: c.tolist() for name, c in vars(self.sources).items()}
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Return the plan that `to_json` gave."""
        fields = json.loads(text)
        sources = fields["sources"]
        fields["sources"] = Sources(
            adapter=np.array(sources["adapter"], np.int32),
            row=np.array(sources["row"], np.int32),
            **{
                name: np.array(sources[name], np.float64)
                for name in ("scaling", "weight", "density")
            },
        )
        fields["tasks"] = tuple(_task(task) for task in fields["tasks"])
        fields["files"] = tuple(OutputFile(**file) for file in fields["files"])
        fields["notices"] = tuple(fields["notices"])
        fields["census"] = Census(**fields["census"]) if fields["census"] else None
        fields["extras"] = tuple(
            ExtraModule(
                **{**one, "adapters": tuple(one["adapters"]), "tensors": tuple(one["tensors"])}
            )
            for one in fields["extras"]
        )
        return cls(**fields)


def at_rank(task: Task, rank: int) -> Task:
    """Return a task with a pair of this rank; its regions begin where they did.

    Args:
        task: of a pair.
        rank: not more than it was planned with.
    """
    if rank == task.rank:
        return task
    a, b = task.regions
    shapes = (rank, *a.shape[1:]), (b.shape[0], rank, *b.shape[2:])
    regions = tuple(
        replace(region, shape=shape, nbytes=region.nbytes // task.rank * rank)
        for region, shape in zip(task.regions, shapes, strict=True)
    )
    nbytes = sum(region.nbytes for region in regions)
    return replace(task, rank=rank, regions=regions, write_bytes=nbytes)


def spilled_bytes(task: Task, item_bytes: int) -> int:
    """Return what a task writes to scratch disk."""
    if not task.spilled:
        return 0
    tiles = row_tiles(task.m, task.n)[task.resident : task.resident + task.spilled]
    return sum(stop - start for start, stop in tiles) * task.n * item_bytes


def _task(fields: dict[str, Any]) -> Task:
    regions = (
        Region(**{**region, "shape": tuple(region["shape"])}) for region in fields["regions"]
    )
    return Task(**{**fields, "regions": tuple(regions)})
