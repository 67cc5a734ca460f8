"""What every rule, space and method is called, needs and costs. No tensor code lives here.

A *rule* says how N tensors become one, a *space* what the rule is applied to and how the answer
becomes a pair (A, B) again. PEFT's combination types are names for a (rule, space) pair. A rule's
code is one file under `rules/`, a space's one file under `spaces/`; both are found by the name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["element-wise", "coefficient", "spectral"]
Sparsity = Literal["none", "largest", "middle", "random", "ranked", "varied"]


@dataclass(frozen=True)
class Parameter:
    """A number that a rule or a space takes, besides the options that many share."""

    name: str
    default: float
    low: float
    high: float
    """Both bounds are allowed."""
    about: str
    whole: bool = False
    """Whether it is an integer."""

    def takes(self, value: float) -> bool:
        """Return whether it may have this value."""
        return self.low <= value <= self.high and not (self.whole and value % 1)


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


@dataclass(frozen=True)
class SpaceSpec:
    """One space."""

    name: str
    summary: str
    equal_ranks: bool
    """Whether all adapters need the same rank in a target."""
    truncates: bool
    """Whether the result is cut to a rank, so that `rank` and `clamp` make sense."""
    source: str
    """The paper, or where else it was defined."""
    spans: bool = True
    """Whether it holds the deltas whole, so that a weighted sum is the same in it as of them."""
    parameters: tuple[Parameter, ...] = ()
    """Numbers that it takes."""


@dataclass(frozen=True)
class Method:
    """One name for a (rule, space) pair."""

    name: str
    rule: str
    space: str


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
            shares=True,
        ),
        RuleSpec(
            name="karcher",
            kind="coefficient",
            summary="the Karcher mean of the directions, at the mean norm",
            source="Karcher 1977",
            shares=True,
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

SPACES: dict[str, SpaceSpec] = {
    space.name: space
    for space in (
        SpaceSpec(
            name="exact",
            summary="the sum itself, factors side by side: rank is the sum of ranks",
            equal_ranks=False,
            truncates=False,
            source="PEFT",
        ),
        SpaceSpec(
            name="factor",
            summary="the rule on all A's and on all B's, each on their own",
            equal_ranks=True,
            truncates=False,
            source="PEFT",
        ),
        SpaceSpec(
            name="delta",
            summary="the rule on the deltas B·A·s, then the best approximation of a rank",
            equal_ranks=False,
            truncates=True,
            source="PEFT",
        ),
        SpaceSpec(
            name="core",
            summary="the rule on the deltas' coordinates in bases of all B's and of all A's, then "
            "the best approximation of a rank",
            equal_ranks=False,
            truncates=True,
            source="Panariello et al. 2025, arXiv 2509.17786",
        ),
        SpaceSpec(
            name="knots",
            summary="the rule on the deltas' coordinates in the left singular vectors of all "
            "deltas side by side, then the best approximation of a rank",
            equal_ranks=False,
            truncates=True,
            source="Stoica et al. 2024, arXiv 2410.19735",
        ),
        SpaceSpec(
            name="ctm",
            summary="the rule on the deltas' coordinates in two bases of the output's rank that "
            "they share",
            equal_ranks=False,
            truncates=True,
            spans=False,
            source="He et al. 2026, arXiv 2606.03723",
            parameters=(
                Parameter(
                    "beta", 0.25, 0.0, 1.0, "how far the bases go by each delta's own norm: 0, not"
                ),
            ),
        ),
    )
}

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("linear", "linear", "factor"),
        Method("cat", "linear", "exact"),
        Method("svd", "linear", "delta"),
        Method("ties", "ties", "factor"),
        Method("ties_svd", "ties", "delta"),
        Method("dare_linear", "dare_linear", "factor"),
        Method("dare_ties", "dare_ties", "factor"),
        Method("dare_linear_svd", "dare_linear", "delta"),
        Method("dare_ties_svd", "dare_ties", "delta"),
        Method("magnitude_prune", "magnitude_prune", "factor"),
        Method("magnitude_prune_svd", "magnitude_prune", "delta"),
        Method("breadcrumbs", "breadcrumbs", "delta"),
        Method("della", "della", "delta"),
        Method("della_linear", "della_linear", "delta"),
        Method("sce", "sce", "delta"),
        Method("consensus", "consensus", "delta"),
        Method("slerp", "slerp", "delta"),
        Method("multislerp", "multislerp", "delta"),
        Method("karcher", "karcher", "delta"),
        Method("model_stock", "model_stock", "delta"),
        Method("norm_matched", "norm_matched", "delta"),
        Method("tsv", "tsv", "delta"),
        Method("iso_c", "iso_c", "delta"),
        Method("iso_cts", "iso_cts", "delta"),
        Method("ctm", "linear", "ctm"),
    )
}
"""PEFT's eleven combination types, and what others call by a name of its own."""


PARAMETERS: dict[str, Parameter] = {
    parameter.name: parameter
    for parameters in [
        *(rule.parameters for rule in RULES.values()),
        *(space.parameters for space in SPACES.values()),
    ]
    for parameter in parameters
}
"""All of them, by name."""
