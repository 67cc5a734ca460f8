"""Several methods on some of the modules, side by side: nothing is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from streammerge import events
from streammerge.adapter import Adapter, NameTable
from streammerge.budget import CPU, parse_size
from streammerge.comparison import (
    ComparedMethod,
    ComparedModule,
    Comparison,
    NotCompared,
    mean,
)
from streammerge.errors import (
    BroughtRuleError,
    ClampError,
    ComputeOverflowError,
    MemoryExhaustedError,
    OutputOverflowError,
    RecipeError,
    RefusedError,
    StreammergeError,
)
from streammerge.notices import unsettled_notices
from streammerge.planner import fitted, make_plan, resolve_method
from streammerge.planner.align import align
from streammerge.planner.checks import check_bases, partial_targets, unwanted_targets
from streammerge.planner.sample import pinned, sample_targets
from streammerge.plans import Plan
from streammerge.preparation import StrPath, bring, make_recipe, own_budget
from streammerge.readers import read_adapters
from streammerge.recipe import Recipe, make_number
from streammerge.worker import (
    Job,
    MeasuredPair,
    held_window,
    measure_pair,
    one_thread_each,
    rule_problem,
)

A = TypeVar("A")
B = TypeVar("B")

SAMPLE = 16
"""Modules that are compared on when nothing is said."""

OWN_FAILURES = (
    BroughtRuleError,
    ClampError,
    ComputeOverflowError,
    MemoryExhaustedError,
    OutputOverflowError,
)
"""What fails one method, and leaves the others to go on."""


def compare(
    adapters: Sequence[StrPath],
    *,
    methods: Sequence[str],
    weights: Sequence[float] | None = None,
    density: float | Sequence[float] | None = None,
    parameters: Mapping[str, float] | None = None,
    normalize: bool = False,
    rank: int | str | None = None,
    space: str | None = None,
    majority_sign: str = "total",
    clamp: float | None = None,
    seed: int = 0,
    dtype: str = "auto",
    compute_dtype: str = "float32",
    scaling: str | float | None = None,
    include: str | None = None,
    exclude: str | None = None,
    sample: int = SAMPLE,
    max_memory: str | int | None = None,
    on_event: events.OnEvent = events.ignore,
    on_module: Callable[[int, int], None] = lambda _done, _total: None,
) -> Comparison:
    """Merge some of the modules by several methods and say how they differ; nothing is written.

    Each factor of the sample is read once. Every pair is the one that `merge` would write, to the
    bit; distances and norms are computed from factors, in float64, without an m × n matrix.
    Options that do not go with a method are left out for it.

    Args:
        adapters: as for `merge`.
        methods: names that `streammerge methods` lists, each perhaps with a space of its own:
            "ties_svd", "ties@core".
        weights: one number for each adapter, 1.0 each when None.
        density: as for `merge`, but numbers alone.
        parameters: as for `merge`; each has to go with one of the methods.
        normalize: as for `merge`.
        rank: as for `merge`; the largest of the inputs, sampled or not, when None.
        space: of the methods that name none, instead of their own.
        majority_sign: as for `merge`.
        clamp: as for `merge`.
        seed: of DARE's masks and of the iteration's start, and of the sample.
        dtype: of the pairs.
        compute_dtype: "float32" or "float64".
        scaling: as for `merge`.
        include: take the sample only from targets in whose name this regular expression is found.
        exclude: leave out targets in whose name it is found.
        sample: how many modules; all where there are fewer.
        max_memory: for the whole process, as for `merge`.
        on_event: hears of downloads from the Hub.
        on_module: hears of each module that is done: how many are, and of how many.

    Raises:
        RefusedError: a subclass of it says why no method can be done, from the headers alone.
        MergeFailedError: an input holds NaN, has changed, or cannot be read.
    """
    count = make_number(sample, int, option="sample")
    if count is None or count < 1:
        raise RecipeError(f"sample must be at least 1, not {sample!r}", option="sample")
    shared: dict[str, Any] = {
        "weights": weights,
        "density": density,
        "parameters": parameters,
        "normalize": normalize,
        "rank": rank,
        "majority_sign": majority_sign,
        "clamp": clamp,
        "seed": seed,
        "dtype": dtype,
        "compute_dtype": compute_dtype,
        "extras": "drop",
        "scaling": scaling,
        "include": include,
        "exclude": exclude,
        "max_shard_size": None,
    }
    memory = None if max_memory is None else parse_size(max_memory, option="max_memory")
    refused: dict[str, RefusedError] = {}
    recipes = _each(_recipes(adapters, methods, space, shared), _resolved, refused)
    paths = next(iter(recipes.values())).adapters
    manifests = bring(read_adapters(paths, NameTable(), store=True), on_event, lambda: None)
    alignment = align(manifests, include, exclude)
    every = [group.target for group in alignment.groups]
    chosen = sample_targets(every, count, seed)
    recipes = _each(recipes, lambda recipe: pinned(recipe, manifests, alignment), refused)
    recipes = _each(recipes, _loaded, refused)
    rules = [resolve_method(recipe)[0].name for recipe in recipes.values()]
    budget, _ = own_budget(memory, 1, CPU, None, rules)
    table = NameTable()
    taken = [_only(adapter, set(chosen), table) for adapter in manifests]
    plans = _each(recipes, lambda one: make_plan(taken, one, budget, compared=True), refused)
    plan = next(iter(plans.values()))
    found, failed = _measure(plans, taken, on_module)
    return Comparison(
        adapters=paths,
        norms=_norms(len(paths), next(iter(found.values()))),
        targets=tuple(task.target for task in plan.tasks),
        of=len(every),
        methods=tuple(_summed(name, plans[name], pairs) for name, pairs in found.items()),
        refused=tuple(NotCompared(name, str(why)) for name, why in (refused | failed).items()),
        read_bytes=plan.read_bytes,
        allowed_bytes=plan.allowed_bytes,
        notices=(
            *(notice for adapter in manifests for notice in adapter.notices),
            *check_bases(manifests, next(iter(recipes.values()))),
            *partial_targets(manifests, alignment),
            *_unwanted(plan),
            *(notice for name, pairs in found.items() for notice in _unsettled(plans[name], pairs)),
        ),
    )


def _recipes(
    adapters: Sequence[StrPath],
    methods: Sequence[str],
    space: str | None,
    shared: Mapping[str, Any],
) -> dict[str, Recipe]:
    """Return each method's recipe, with those of the shared options that go with it.

    Raises:
        RecipeError: there is no method, one is not known, or an option is wrong for all.
    """
    if isinstance(methods, str) or not methods:
        raise RecipeError("methods must be a list of one name at least", option="methods")
    recipes = {}
    for name in dict.fromkeys(methods):
        method, _, own = name.partition("@")
        asked = make_recipe(adapters, method=method, space=own or space, **shared)
        for option in ("weights", "density"):
            values = getattr(asked, option)
            if isinstance(values, tuple) and any(isinstance(value, tuple) for value in values):
                raise RecipeError(
                    f"{option}: a sample has no first and last layer; give a number for each "
                    "adapter",
                    option=option,
                )
        recipes[name] = fitted(asked)
    taken = {given for recipe in recipes.values() for given, _ in recipe.parameters}
    for given in shared["parameters"] or ():
        if given not in taken:
            raise RecipeError(f"none of the methods takes {given}", option="parameters")
    return recipes


def _each(
    values: Mapping[str, A], do: Callable[[A], B], refused: dict[str, RefusedError]
) -> dict[str, B]:
    """Return what comes of each method; those that are refused are put with the others.

    Raises:
        RefusedError: none is left; what was said of the first, with notes on the others.
    """
    done = {}
    for name, value in values.items():
        try:
            done[name] = do(value)
        except RefusedError as error:
            refused[name] = error
    if not done:
        _raise(refused)
    return done


def _raise(failed: Mapping[str, StreammergeError]) -> NoReturn:
    first, *others = failed
    error = failed[first]
    for name in others:
        error.add_note(f"nor by {name}: {failed[name]}")
    raise error


def _resolved(recipe: Recipe) -> Recipe:
    resolve_method(recipe)
    return recipe


def _loaded(recipe: Recipe) -> Recipe:
    problem = rule_problem(resolve_method(recipe)[0].name)
    if problem is not None:
        raise RecipeError(problem, option="methods")
    return recipe


def _only(adapter: Adapter, targets: set[str], table: NameTable) -> Adapter:
    """Return the manifest of these targets alone."""
    rows = [row for row in range(len(adapter)) if adapter.target(row) in targets]
    taken = adapter.take(np.array(rows, np.int32), np.array([], np.int32), table)
    return replace(taken, config=adapter.config, notices=adapter.notices)


def _measure(
    plans: Mapping[str, Plan], adapters: Sequence[Adapter], on_module: Callable[[int, int], None]
) -> tuple[dict[str, list[MeasuredPair]], dict[str, StreammergeError]]:
    """Return what each method makes of each target, in the plans' order, and which have failed.

    Raises:
        MergeFailedError: a subclass of it says what failed, of an input, or of all methods.
    """
    jobs = {name: Job(plan, adapters, Path(), ()) for name, plan in plans.items()}
    found: dict[str, list[MeasuredPair]] = {name: [] for name in plans}
    failed: dict[str, StreammergeError] = {}
    reading, *_ = jobs.values()
    tasks = reading.plan.tasks
    with one_thread_each(), closing(reading.files):
        for number, task in enumerate(tasks):
            window = held_window(reading, task)
            for name in list(found):
                try:
                    found[name].append(measure_pair(jobs[name], plans[name].tasks[number], window))
                except OWN_FAILURES as error:
                    failed[name] = error
                    del found[name]
            if not found:
                _raise(failed)
            on_module(number + 1, len(tasks))
    return found, failed


def _unwanted(plan: Plan) -> list[str]:
    """Say of which modules of the sample no adapter is wanted, whatever the method: a distance of 1
    to each of their adapters would look like a fault."""
    weights = plan.sources.weight
    return unwanted_targets({task.target: weights[task.first : task.last] for task in plan.tasks})


def _unsettled(plan: Plan, pairs: Sequence[MeasuredPair]) -> Iterator[str]:
    """Say of one method in which modules its iteration has not come to rest."""
    steps = {
        task.target: pair.last_step
        for task, pair in zip(plan.tasks, pairs, strict=True)
        if pair.last_step is not None
    }
    return unsettled_notices(steps, plan, told="`last_step` in --json says of how much in each")


def _summed(name: str, plan: Plan, pairs: Sequence[MeasuredPair]) -> ComparedMethod:
    count = len(plan.recipe["adapters"])
    cut = [pair.relative_error for pair in pairs if pair.relative_error is not None]
    return ComparedMethod(
        method=name,
        rule=plan.rule,
        space=plan.space,
        distances=_ratios(count, pairs, "distances"),
        interference=_ratios(count, pairs, "on_inputs"),
        norm=math.sqrt(sum(pair.energy for pair in pairs)),
        relative_error=mean(cut) if cut else None,
        seconds=mean([pair.seconds for pair in pairs]),
        projected_bytes=max(task.projected_bytes for task in plan.tasks),
        modules=tuple(
            ComparedModule(
                target=task.target,
                rank=pair.rank,
                route=task.route,
                distances=_ratios(count, [pair], "distances"),
                interference=_ratios(count, [pair], "on_inputs"),
                norm=math.sqrt(pair.energy),
                relative_error=pair.relative_error,
                settled=pair.last_step is None,
                last_step=pair.last_step,
                seconds=pair.seconds,
            )
            for task, pair in zip(plan.tasks, pairs, strict=True)
        ),
    )


def _ratios(count: int, pairs: Sequence[MeasuredPair], column: str) -> tuple[float, ...]:
    """Return for each adapter the root of a column's sum over that of its deltas."""
    deltas = _sums(count, pairs, "deltas")
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = np.sqrt(_sums(count, pairs, column) / deltas)
    return tuple(np.where(deltas > 0, ratios, np.nan).tolist())


def _norms(count: int, pairs: Sequence[MeasuredPair]) -> tuple[float, ...]:
    return tuple(np.sqrt(_sums(count, pairs, "deltas")).tolist())


def _sums(count: int, pairs: Sequence[MeasuredPair], column: str) -> npt.NDArray[np.float64]:
    """Return a column's sum for each adapter; NaN of those that have none of the modules."""
    sums = np.full(count, np.nan)
    for pair in pairs:
        for position, value in zip(pair.positions, getattr(pair, column), strict=True):
            sums[position] = value + (0.0 if np.isnan(sums[position]) else sums[position])
    return sums
