"""How N tensors become one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from streammerge.catalog.parameter import Parameter
from streammerge.catalog.spaces import SPACES

Kind = Literal["element-wise", "coefficient", "spectral"]
Sparsity = Literal["none", "largest", "middle", "random", "ranked", "varied"]


@dataclass(frozen=True)
class RuleSpec:
    """One rule."""

    name: str
    kind: Kind
    summary: str
    source: str
    """The paper, or PEFT where it was defined there."""
    sparsity: Sparsity = "none"
    """Which elements it keeps: all, the largest by magnitude, the largest but for outliers, random
    ones, random ones of which the largest of a row are likelier, or those that vary most over the
    tensors."""
    elects: bool = False
    """Whether it takes `majority_sign`."""
    sweeps: int = 1
    """How often it goes over the N tensors of a tile."""
    tile_buffers: int = 0
    """Tile-sized buffers of the compute dtype that it works in besides the incoming tensor's and
    the answer's."""
    operations: int = 2
    """Arithmetic operations for each element of each of the N tensors."""
    parameters: tuple[Parameter, ...] = ()
    """Numbers that it takes besides weights and density."""
    most_adapters: int | None = None
    """How many adapters may have a target at most."""
    of_rank: bool = False
    """Whether what it makes depends on the output's rank, which has to be a number then."""
    shares: bool = False
    """Whether it goes by each weight's share of their sum, which must not be zero then, unless all
    of them are."""

    @property
    def spaces(self) -> tuple[str, ...]:
        """The spaces that it goes with.

        Only a weighted sum has an exact pair, whether the weights are given or found. What a
        coefficient rule sees is the same in all orthonormal bases of the deltas, and a spectral
        rule has bases of its own, so both go with the deltas themselves.
        """
        if self.kind == "coefficient":
            return ("exact", "delta")
        if self.kind == "spectral":
            return ("delta",)
        return tuple(name for name in SPACES if name != "exact" or self.name == "linear")

    @property
    def needs_density(self) -> bool:
        """Whether the rule keeps a share of the elements."""
        return self.sparsity != "none"

    @property
    def whole_rows(self) -> bool:
        """Whether its tiles are of whole rows, for it ranks the elements of each."""
        return self.sparsity == "ranked"

    @property
    def joint_passes(self) -> int:
        """How often it goes over the tiles of all tensors together before it merges the first one:
        some two times for the threshold of what varies most, once for how much each counts."""
        return 3 if self.sparsity == "varied" else 0

    @property
    def cuts(self) -> int:
        """How many thresholds it needs in each tensor."""
        return {"largest": 1, "middle": 2}.get(self.sparsity, 0)


_TIES = "Yadav et al. 2023, arXiv 2306.01708"
_DARE = "Yu et al. 2023, arXiv 2311.03099"
_DELLA = "Deep et al. 2024, arXiv 2406.11617"

_EPSILON = Parameter(
    "epsilon",
    0.14,
    0.0,
    1.0,
    "by how much the largest element of a row is likelier to be kept than the smallest",
)

RULES: dict[str, RuleSpec] = {
    rule.name: rule
    for rule in (
        RuleSpec(
            name="linear",
            kind="element-wise",
            summary="weighted sum",
            source="Ilharco et al. 2022, arXiv 2212.04089",
        ),
        RuleSpec(
            name="ties",
            kind="element-wise",
            summary="keep the largest, elect a sign, mean of those that agree",
            source=_TIES,
            sparsity="largest",
            elects=True,
            sweeps=2,
            tile_buffers=3,
            operations=16,
        ),
        RuleSpec(
            name="dare_linear",
            kind="element-wise",
            summary="keep random elements, rescale, weighted sum",
            source=_DARE,
            sparsity="random",
            tile_buffers=1,
            operations=14,
        ),
        RuleSpec(
            name="dare_ties",
            kind="element-wise",
            summary="keep random elements, rescale, elect a sign, mean of those that agree",
            source=_DARE,
            sparsity="random",
            elects=True,
            sweeps=2,
            tile_buffers=4,
            operations=32,
        ),
        RuleSpec(
            name="magnitude_prune",
            kind="element-wise",
            summary="keep the largest, weighted sum",
            source="PEFT",
            sparsity="largest",
            operations=6,
        ),
        RuleSpec(
            name="breadcrumbs",
            kind="element-wise",
            summary="keep the largest but for outliers, weighted sum",
            source="Davari and Belilovsky 2023, arXiv 2312.06795",
            sparsity="middle",
            tile_buffers=1,
            operations=12,
            parameters=(
                Parameter("gamma", 0.01, 0.0, 1.0, "share of the largest elements that it drops"),
            ),
        ),
        RuleSpec(
            name="della",
            kind="element-wise",
            summary="keep random elements, large ones of a row more often, rescale, elect a sign, "
            "mean of those that agree",
            source=_DELLA,
            sparsity="ranked",
            elects=True,
            sweeps=2,
            tile_buffers=4,
            operations=190,
            parameters=(_EPSILON,),
        ),
        RuleSpec(
            name="della_linear",
            kind="element-wise",
            summary="keep random elements, large ones of a row more often, rescale, weighted sum",
            source=_DELLA,
            sparsity="ranked",
            tile_buffers=1,
            operations=90,
            parameters=(_EPSILON,),
        ),
        RuleSpec(
            name="sce",
            kind="element-wise",
            summary="keep what varies most, elect a sign, mean of those that agree by their mean "
            "squares",
            source="Wan et al. 2024, arXiv 2408.07990",
            sparsity="varied",
            elects=True,
            sweeps=4,
            tile_buffers=4,
            operations=26,
        ),
        RuleSpec(
            name="consensus",
            kind="element-wise",
            summary="weighted sum of the elements that matter to several",
            source="Wang et al. 2024, arXiv 2405.07813",
            sweeps=2,
            tile_buffers=3,
            operations=12,
            parameters=(
                Parameter(
                    "tall_lambda",
                    0.4,
                    0.0,
                    1000.0,
                    "how large an element must be, beside what the others add, to matter to one",
                ),
                Parameter(
                    "agree", 2, 0, 10**6, "to how many an element must matter to stay", whole=True
                ),
            ),
        ),
        RuleSpec(
            name="slerp",
            kind="coefficient",
            summary="from one delta to another along the arc between them",
            source="Shoemake 1985",
            most_adapters=2,
            shares=True,
        ),
        RuleSpec(
            name="multislerp",
            kind="coefficient",
            summary="one step along the sphere from the mean direction, at the mean norm",
            source="Goddard et al. 2024, arXiv 2403.13257 (mergekit)",
        ),
        RuleSpec(
            name="karcher",
            kind="coefficient",
            summary="the Karcher mean of the directions, at the mean norm",
            source="Karcher 1977",
        ),
        RuleSpec(
            name="model_stock",
            kind="coefficient",
            summary="the mean, the nearer to zero the less the deltas agree",
            source="Jang et al. 2024, arXiv 2403.19522",
            shares=True,
        ),
        RuleSpec(
            name="norm_matched",
            kind="coefficient",
            summary="the mean, brought to the mean norm of the deltas",
            source="streammerge",
            shares=True,
        ),
        RuleSpec(
            name="tsv",
            kind="spectral",
            summary="all singular vectors side by side, made orthonormal",
            source="Gargiulo et al. 2024, arXiv 2412.00081",
        ),
        RuleSpec(
            name="iso_c",
            kind="spectral",
            summary="the sum, with one singular value for all of its directions",
            source="Marczak et al. 2025, arXiv 2502.04959",
            of_rank=True,
        ),
        RuleSpec(
            name="iso_cts",
            kind="spectral",
            summary="directions of the sum and of each adapter alone, with one singular value",
            source="Marczak et al. 2025, arXiv 2502.04959",
            of_rank=True,
            parameters=(
                Parameter("common", 0.8, 0.0, 1.0, "share of the directions that are the sum's"),
            ),
        ),
    )
}
