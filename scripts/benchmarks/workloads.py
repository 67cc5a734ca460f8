"""What is measured: named workloads, in two sizes."""

from __future__ import annotations

from dataclasses import dataclass

WITHOUT_DENSITY = ("linear", "cat", "svd")
DENSITY = 0.2


@dataclass(frozen=True)
class Inputs:
    """Adapters of one shape: bfloat16, normal factors, every target an m × n Linear layer."""

    adapters: int
    rank: int
    m: int
    n: int
    targets: int = 1

    @property
    def names(self) -> list[str]:
        """The targets' paths in the base model: four to a layer."""
        return [f"layers.{i // 4}.{'qkvo'[i % 4]}_proj" for i in range(self.targets)]

    @property
    def total_rank(self) -> int:
        """Rows of one target's A's together."""
        return self.adapters * self.rank


@dataclass(frozen=True)
class Workload:
    """One method on one set of adapters, and who else does it."""

    name: str
    method: str
    inputs: Inputs
    peers: tuple[str, ...] = ("peft",)

    @property
    def density(self) -> float | None:
        """The share that is kept, for the methods that have one."""
        return None if self.method in WITHOUT_DENSITY else DENSITY

    @property
    def truncates(self) -> bool:
        """Whether there is a best result to compare with."""
        return self.method.endswith("svd")


@dataclass(frozen=True)
class Sizes:
    """The numbers that --small makes smaller."""

    few: int
    many: int
    rank: int
    side: int
    wide: int
    file_rank: int
    file_targets: int
    growth_methods: tuple[str, ...]
    growth_adapters: tuple[int, ...]
    growth_sides: tuple[int, ...]
    growth_ranks: tuple[int, ...]
    growth_targets: int
    """For methods on factors, of which one target takes too little time to measure."""


FULL = Sizes(
    few=8,
    many=200,
    rank=16,
    side=4096,
    wide=11008,
    file_rank=32,
    file_targets=88,
    growth_methods=("linear", "cat", "ties", "svd", "ties_svd"),
    growth_adapters=(8, 16, 32, 64),
    growth_sides=(2048, 3072, 4096, 6144, 8192),
    growth_ranks=(8, 16, 32, 64, 128),
    growth_targets=16,
)
SMALL = Sizes(
    few=4,
    many=24,
    rank=8,
    side=512,
    wide=1376,
    file_rank=8,
    file_targets=8,
    growth_methods=("cat", "ties_svd"),
    growth_adapters=(2, 4),
    growth_sides=(320, 512),
    growth_ranks=(4, 8),
    growth_targets=2,
)

PRUNED_SVD = ("ties_svd", "magnitude_prune_svd", "dare_ties_svd")
ON_FILES = ("linear", "cat", "ties", "magnitude_prune", "dare_ties")


def workloads(sizes: Sizes) -> dict[str, Workload]:
    """The workloads by name."""
    square = Inputs(sizes.few, sizes.rank, sizes.side, sizes.side)
    wide = Inputs(sizes.few, sizes.rank, sizes.side, sizes.wide)
    many = Inputs(sizes.many, sizes.rank, sizes.side, sizes.side)
    files = Inputs(sizes.few, sizes.file_rank, sizes.side, sizes.side, sizes.file_targets)
    made = (
        Workload("svd-square", "svd", square),
        Workload("svd-many", "svd", many, ("core",)),
        *(Workload(f"{method}-square", method, square) for method in PRUNED_SVD),
        *(Workload(f"{method}-wide", method, wide) for method in PRUNED_SVD),
        *(Workload(f"{method}-files", method, files, ("peft", "script")) for method in ON_FILES),
    )
    return {workload.name: workload for workload in made}
