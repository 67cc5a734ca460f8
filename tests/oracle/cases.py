"""The settings under which PEFT, the restatement and streammerge are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from oracle import peft_oracle as peft
from oracle import restated
from oracle.restated import FactorMasks, Mask, Matrix, Source

MaskMaker = Callable[[int, str, str, tuple[int, int]], Mask]
"""(adapter's position, target, "A" | "B" | "delta", shape) -> what DARE keeps."""


@dataclass(frozen=True)
class AdapterSpec:
    """The LoRA config of one source; `targets` of None means every layer."""

    alpha: float
    rank: int = 3
    targets: tuple[str, ...] | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def config(self, *, fan_in_fan_out: bool) -> dict[str, Any]:
        """Keyword arguments of a LoraConfig."""
        config = {"r": self.rank, "lora_alpha": self.alpha, "fan_in_fan_out": fan_in_fan_out}
        if self.targets:
            config["target_modules"] = list(self.targets)
        return config | dict(self.more)


@dataclass(frozen=True)
class Setting:
    """Adapters, and the weights and density under which they are merged."""

    adapters: tuple[AdapterSpec, ...]
    weights: tuple[float, ...]
    density: float = 0.5


_THREE = (AdapterSpec(6), AdapterSpec(3), AdapterSpec(7.5))
SIGNS = Setting(_THREE, (1.0, -0.5, 0.3))
ZERO_WEIGHT = Setting(_THREE, (0.7, 0.0, -1.2), density=0.3)
PLAIN = Setting(_THREE[:2], (1.0, 1.0), density=0.8)
SETTINGS = {"signs": SIGNS, "zero_weight": ZERO_WEIGHT, "plain": PLAIN}
KINDS_AND_SETTINGS = [
    *((kind, "signs") for kind in peft.KINDS),
    *(("linear", setting) for setting in ("zero_weight", "plain")),
    *((kind, "zero_weight") for kind in ("gpt2_conv1d", "embedding")),
]
"""Every kind of layer once; the further settings where they meet other code paths."""

TWO_LAYERS = peft.linear_layers(block__first=(10, 14), block__second=(13, 9))
PARTIAL = Setting(
    (
        AdapterSpec(6, targets=("first",)),
        AdapterSpec(3, targets=("first", "second")),
        AdapterSpec(7.5, targets=("second",)),
    ),
    (1.0, -0.5, 0.3),
)
_PATTERNS = {"rank_pattern": {"second": 5}, "alpha_pattern": {"second": 7, "first": 2}}
SAME_PATTERNS = Setting(
    (AdapterSpec(6, more=_PATTERNS), AdapterSpec(3, more=_PATTERNS)), (1.0, -0.5)
)
UNEQUAL_RANKS = Setting(
    (
        AdapterSpec(6, rank=2, more={"rank_pattern": {"second": 4}}),
        AdapterSpec(3, rank=3, more={"alpha_pattern": {"first": 8}}),
        AdapterSpec(5, rank=1),
    ),
    (1.0, -0.5, 0.3),
)
TWO_LAYER_SETTINGS = {
    "partial": PARTIAL,
    "same_patterns": SAME_PATTERNS,
    "unequal_ranks": UNEQUAL_RANKS,
}
TWO_LAYER_CASES = [
    (setting, method)
    for setting in TWO_LAYER_SETTINGS
    for method in restated.METHODS
    if setting != "unequal_ranks" or method not in restated.FACTOR_METHODS
]
"""Every method under every setting, but for factor rules over unequal ranks."""


def majority_signs(methods: Sequence[str]) -> list[tuple[str, str]]:
    """Each method with each vote that it can take."""
    return [
        (method, sign)
        for method in methods
        for sign in (("total", "frequency") if restated.uses_majority_sign(method) else ("total",))
    ]


def save(
    directory: Path, layers: peft.Layers, setting: Setting, kind: str = "linear"
) -> list[Path]:
    """Every adapter of a setting, made and saved by PEFT."""
    fan_in_fan_out = peft.KINDS[kind].fan_in_fan_out
    return [
        peft.save_adapter(
            directory / f"source{position}",
            layers,
            seed=position,
            **spec.config(fan_in_fan_out=fan_in_fan_out),
        )
        for position, spec in enumerate(setting.adapters)
    ]


@dataclass(frozen=True)
class Present:
    """The adapters that have one target: where they stand in the list, and what they hold."""

    target: str
    positions: tuple[int, ...]
    sources: tuple[Source, ...]

    def weights(self, setting: Setting) -> list[float]:
        """These adapters' weights."""
        return [setting.weights[position] for position in self.positions]

    def factor_masks(self, make: MaskMaker) -> FactorMasks:
        """Masks over each A and each B."""
        return FactorMasks(
            [make(i, self.target, "A", s.a.shape) for i, s in self._each()],
            [make(i, self.target, "B", s.b.shape) for i, s in self._each()],
        )

    def delta_masks(self, make: MaskMaker) -> list[Mask]:
        """Masks over each delta."""
        return [make(i, self.target, "delta", s.delta.shape) for i, s in self._each()]

    def _each(self) -> zip[tuple[int, Source]]:
        return zip(self.positions, self.sources, strict=True)


def present(held: Mapping[str, Sequence[Source | None]]) -> dict[str, Present]:
    """For each target, the adapters that have it."""
    found = {}
    for target, sources in held.items():
        pairs = [(i, source) for i, source in enumerate(sources) if source is not None]
        found[target] = Present(target, tuple(i for i, _ in pairs), tuple(s for _, s in pairs))
    return found


def saved_sources(directories: Sequence[Path]) -> dict[str, Present]:
    """The sources read from the files that PEFT saved."""
    read = [peft.read_adapter(directory) for directory in directories]
    targets = sorted({target for adapter in read for target in adapter})
    return present(
        {
            target: [
                Source(a[target].a, a[target].b, a[target].scaling) if target in a else None
                for a in read
            ]
            for target in targets
        }
    )


def options(method: str, setting: Setting, majority_sign: str) -> dict[str, Any]:
    """The restatement's keyword arguments for a method, without the masks."""
    density = setting.density if restated.uses_density(method) else None
    return {"density": density, "majority_sign": majority_sign}


def expected_factors(
    method: str,
    here: Present,
    setting: Setting,
    majority_sign: str = "total",
    make_mask: MaskMaker | None = None,
) -> tuple[Matrix, Matrix]:
    """(A, B) of `cat` or of a factor-space method, restated."""
    masks = None
    if restated.uses_masks(method):
        assert make_mask is not None
        masks = here.factor_masks(make_mask)
    return restated.merge_factors(
        method,
        here.sources,
        here.weights(setting),
        masks=masks,
        **options(method, setting, majority_sign),
    )


def expected_delta(
    method: str,
    here: Present,
    setting: Setting,
    majority_sign: str = "total",
    make_mask: MaskMaker | None = None,
) -> Matrix:
    """The merged matrix of a delta-space method before truncation, restated."""
    masks = None
    if restated.uses_masks(method):
        assert make_mask is not None
        masks = here.delta_masks(make_mask)
    return restated.merge_delta(
        method,
        here.sources,
        here.weights(setting),
        masks=masks,
        **options(method, setting, majority_sign),
    )


def masks_for_peft(
    method: str, targets: Mapping[str, Present], kind: str, make_mask: MaskMaker
) -> list[Mask]:
    """Every mask of a merge in the order in which PEFT draws them."""
    masks: list[Mask] = []
    for here in targets.values():
        if method in restated.FACTOR_METHODS:
            factor = here.factor_masks(make_mask)
            masks += [*factor.a, *factor.b]
        else:
            masks += [peft.in_base_orientation(kind, m) for m in here.delta_masks(make_mask)]
    return masks if restated.uses_masks(method) else []


def clearest_rank(delta: Matrix) -> tuple[int, float]:
    """The rank at which sigma_R / sigma_(R+1) is largest, and that ratio.

    Only ranks that cut something off: sigma_(R+1) is above the rounding of float32.
    """
    sigma = np.linalg.svd(delta, compute_uv=False)
    sigma = sigma[sigma > 1e-4 * sigma[0]]
    ratios = sigma[:-1] / sigma[1:]
    return int(ratios.argmax()) + 1, float(ratios.max())
