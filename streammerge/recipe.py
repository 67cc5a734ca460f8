"""What the user asked for; the command line, recipe files and the Python call all make one."""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from typing import Any, TypeVar

from streammerge.errors import RecipeError
from streammerge.ranks import Rank, RankLimit, RankPolicy, parse_rank
from streammerge.schedule import Value, as_json, make_value, numbers

Number = TypeVar("Number", int, float)

OUTPUT_DTYPES = ("auto", "float64", "float32", "float16", "bfloat16")
FORMATS = ("auto", "peft", "diffusers")
COMPUTE_DTYPES = ("float32", "float64")
MAJORITY_SIGNS = ("total", "frequency")
THRESHOLD_SCOPES = ("tensor", "global")
EXTRAS = ("error", "drop", "first", "mean")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the output's bytes, and nothing else.

    Raises:
        RecipeError: a field is out of its range, on construction.
    """

    adapters: tuple[str, ...]
    """Paths, in order: an adapter's position decides its weight and its DARE masks."""
    method: str
    weights: tuple[Value, ...]
    """One for each adapter: a number, or what says it of each target."""
    normalize: bool = False
    """Divide the weights by their sum, in each target over the adapters that have it."""
    space: str | None = None
    """Overrides the method's space."""
    density: float | tuple[Value, ...] | None = None
    """Share of elements kept, in [0, 1]: of all adapters, or one for each, as the weights are."""
    parameters: tuple[tuple[str, float], ...] = ()
    """Numbers that the rule or the space takes, by name, in the order of the names; what is not
    given is as the catalog says."""
    rank: Rank | None = None
    """The output's rank, or what decides it; None is the largest of the inputs."""
    majority_sign: str = "total"
    threshold_scope: str = "tensor"
    """Over what the largest are sought: "tensor", each tensor on its own; "global", an adapter's
    tensors in all targets of the merge together."""
    clamp: float | None = None
    """Quantile in (0, 1] at which truncated factors are clamped, as PEFT's `svd_clamp`."""
    seed: int = 0
    dtype: str = "auto"
    """Of the output; "auto" is the widest of the inputs."""
    format: str = "auto"
    """Of the output: "peft" or "diffusers"; "auto" is that of the inputs."""
    compute_dtype: str = "float32"
    extras: str = "error"
    """What to do about tensors that are not LoRA factors: refuse them, leave them out, take them
    from the first adapter that has them, or average them by the weights."""
    scaling: str | float | None = None
    """For targets whose scaling the config cannot explain: "config" (alpha over the config's
    rank), "tensor" (alpha over the tensor's rank), or the scaling itself."""
    include: str | None = None
    """Merge only targets in whose name this regular expression is found."""
    exclude: str | None = None
    """Leave out targets in whose name this regular expression is found."""
    base_model: str | None = None
    """What the output's config names, instead of what the adapters' do."""
    strict_base: bool = False
    """Refuse adapters that name different base models."""
    max_shard_bytes: int | None = None

    def __post_init__(self) -> None:
        if not self.adapters:
            raise RecipeError("no adapters were given", option="adapters")
        _check_weights(self.weights, len(self.adapters))
        _check_density(self.density, len(self.adapters))
        _check_rank(self.rank)
        if self.clamp is not None and not 0 < self.clamp <= 1:
            raise RecipeError(f"clamp must be in (0, 1], not {self.clamp!r}", option="clamp")
        if not _is_integer(self.seed) or not 0 <= self.seed < 2**64:
            raise RecipeError(f"seed must be in [0, 2**64), not {self.seed!r}", option="seed")
        _check_choice("majority_sign", self.majority_sign, MAJORITY_SIGNS)
        _check_choice("threshold_scope", self.threshold_scope, THRESHOLD_SCOPES)
        _check_choice("dtype", self.dtype, OUTPUT_DTYPES)
        _check_choice("format", self.format, FORMATS)
        _check_choice("compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        _check_choice("extras", self.extras, EXTRAS)
        _check_scaling(self.scaling)
        for option in ("include", "exclude"):
            _check_pattern(option, getattr(self, option))

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON can hold it; `Recipe.from_dict` takes it back."""
        fields = {field.name: getattr(self, field.name) for field in dataclass_fields(self)}
        density = self.density
        return {
            **fields,
            "adapters": list(self.adapters),
            "weights": [as_json(weight) for weight in self.weights],
            "density": list(map(as_json, density)) if isinstance(density, tuple) else density,
            "parameters": dict(self.parameters),
            "rank": str(self.rank) if isinstance(self.rank, RankPolicy | RankLimit) else self.rank,
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Recipe:
        """Return the recipe that `to_dict` gave."""
        return cls(
            **{
                **fields,
                "adapters": tuple(fields["adapters"]),
                "weights": make_weights(fields["weights"], len(fields["adapters"])),
                "density": make_density(fields["density"]),
                "parameters": make_parameters(fields["parameters"]),
                "rank": make_rank(fields["rank"]),
            }
        )


def make_weights(weights: Any, count: int) -> tuple[Value, ...]:
    """Return a weight for each of `count` adapters: 1.0 each when None.

    Raises:
        RecipeError: an entry is neither a number nor a schedule.
    """
    if weights is None:
        return (1.0,) * count
    return _each(weights, "weights")


def make_density(density: Any) -> float | tuple[Value, ...] | None:
    """Return a density for all adapters, or one for each where a sequence was given.

    Raises:
        RecipeError: an entry is neither a number nor a schedule.
    """
    if isinstance(density, Iterable) and not isinstance(density, str):
        return _each(density, "density")
    return make_number(density, float, option="density")


def make_parameters(parameters: Any) -> tuple[tuple[str, float], ...]:
    """Return the numbers that a rule or a space takes, in the order of their names.

    Raises:
        RecipeError: it is no mapping from names to finite numbers.
    """
    if parameters is None:
        return ()
    if not isinstance(parameters, Mapping):
        raise RecipeError(
            f"parameters: a mapping from names to numbers, not {parameters!r}", option="parameters"
        )
    made = []
    for name, given in sorted(parameters.items(), key=str):
        number = None
        with suppress(RecipeError):
            number = make_number(given, float, option="parameters")
        if number is None or not math.isfinite(number):
            raise RecipeError(f"{name} must be a number, not {given!r}", option="parameters")
        made.append((str(name), number))
    return tuple(made)


def _each(given: Any, option: str) -> tuple[Value, ...]:
    if isinstance(given, str | bytes | Mapping):
        raise RecipeError(f"{option}: one for each adapter, not {given!r}", option=option)
    entries = given if isinstance(given, Iterable) else (given,)
    return tuple(make_value(entry, option=option) for entry in entries)


def make_number(value: Any, kind: type[Number], *, option: str) -> Number | None:
    """Return an option's value as a plain int or float, None as it is; numpy's are taken too.

    Raises:
        RecipeError: it is not such a number.
    """
    if value is None:
        return None
    try:
        if isinstance(value, (str, bytes, bool)):
            raise TypeError
        return kind(operator.index(value)) if kind is int else kind(value)
    except (TypeError, ValueError) as error:
        name = "an integer" if kind is int else "a number"
        raise RecipeError(f"{option} must be {name}, not {value!r}", option=option) from error


def make_rank(rank: Any) -> Rank | None:
    """Return a rank, or the limit or policy that a text such as "energy:0.95,max:64" means.

    Raises:
        RecipeError: it is neither.
    """
    if isinstance(rank, RankPolicy | RankLimit):
        return rank
    return parse_rank(rank) if isinstance(rank, str) else make_number(rank, int, option="rank")


def as_limit(rank: Any) -> str | None:
    """Return what `make_rank` takes, with a number as the limit of that number.

    Raises:
        RecipeError: it means nothing.
    """
    asked = make_rank(rank)
    return None if asked is None else str(RankLimit(asked) if isinstance(asked, int) else asked)


def make_paths(adapters: Sequence[str | os.PathLike[str]]) -> tuple[str, ...]:
    """Return the adapters' paths as strings.

    Raises:
        RecipeError: a single path was given where a sequence is meant.
    """
    if isinstance(adapters, (str, os.PathLike)):
        raise RecipeError("adapters must be a list of paths, not one path", option="adapters")
    return tuple(os.fspath(path) for path in adapters)


def _check_weights(weights: tuple[Value, ...], count: int) -> None:
    if len(weights) != count:
        raise RecipeError(
            f"{count} adapters but {len(weights)} weights; give one weight for each adapter",
            option="weights",
        )
    for position, weight in enumerate(weights):
        for number in numbers(weight):
            if not math.isfinite(number):
                raise RecipeError(
                    f"weight {position + 1} is {number}; weights must be finite", option="weights"
                )


def _check_density(density: float | tuple[Value, ...] | None, count: int) -> None:
    if density is None:
        return
    if isinstance(density, tuple) and len(density) != count:
        raise RecipeError(
            f"{count} adapters but {len(density)} densities; give one for each adapter, or one "
            "for all",
            option="density",
        )
    for value in density if isinstance(density, tuple) else (density,):
        for number in numbers(value):
            _check_share("density", number)


def _check_share(option: str, share: float | None) -> None:
    if share is None:
        return
    if not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise RecipeError(f"{option} must be in [0, 1], not {share!r}", option=option)


def _check_rank(rank: Rank | None) -> None:
    if rank is None or isinstance(rank, RankPolicy | RankLimit):
        return
    if not _is_integer(rank) or rank <= 0:
        raise RecipeError(f"rank must be a positive integer, not {rank!r}", option="rank")


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise RecipeError(
            f"{option} must be one of {', '.join(choices)}, not {value!r}", option=option
        )


def _check_scaling(scaling: str | float | None) -> None:
    if scaling is None or scaling in ("config", "tensor"):
        return
    if isinstance(scaling, str) or not math.isfinite(scaling):
        raise RecipeError(
            f"scaling must be 'config', 'tensor' or a finite number, not {scaling!r}",
            option="scaling",
        )


def _check_pattern(option: str, pattern: str | None) -> None:
    if pattern is None:
        return
    try:
        re.compile(pattern)
    except re.error as error:
        raise RecipeError(
            f"{option}: not a regular expression: {pattern!r} ({error})", option=option
        ) from error


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
