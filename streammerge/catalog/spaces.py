"""What a rule may be applied to, and how the answer becomes a pair again."""

from __future__ import annotations

from dataclasses import dataclass

from streammerge.catalog.parameter import Parameter


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
