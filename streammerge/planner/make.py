"""From manifests, a recipe and a budget to a plan, or a refusal."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from streammerge.adapter import DTYPE_BYTES, DTYPES, Adapter
from streammerge.budget import Budget, format_size
from streammerge.catalog import METHODS, RULES, SPACES, RuleSpec, SpaceSpec
from streammerge.errors import BudgetError, ExtraTensorsError, IncompatibleError, RecipeError
from streammerge.planner.align import Alignment, Group, align, check_shapes, gather
from streammerge.planner.cost import arithmetic, prefers_scratch
from streammerge.planner.layout import Pair, lay_out
from streammerge.planner.memory import Holding, factor_bytes, project, stack_bytes, tile_bytes
from streammerge.planner.output_config import output_config
from streammerge.planner.routes import Course, Shape, choose_course
from streammerge.planner.scaling import scalings
from streammerge.plans import Plan, Region, Sources, Task, flat_tiles, longest, row_tiles
from streammerge.recipe import Recipe

TORCH_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
ITEM_BYTES = {TORCH_DTYPES[name]: size for name, size in DTYPE_BYTES.items()}


@dataclass(frozen=True)
class _Draft:
    """A task before the budget has had its say."""

    group: Group
    shape: Shape
    course: Course


def make_plan(
    adapters: Sequence[Adapter],
    recipe: Recipe,
    budget: Budget,
    *,
    io: str = "mmap",
    scratch: str | None = None,
) -> Plan:
    """Plan a merge from the manifests alone.

    Args:
        adapters: their manifests, in the recipe's order, over one name table.
        recipe: what was asked for.
        budget: allowed memory, and how many tasks may be in flight.
        io: how inputs are read.
        scratch: directory for tiles that do not fit into memory.

    Raises:
        RefusedError: a subclass of it says why the merge cannot be done.
    """
    rule, space = resolve_method(recipe)
    notices = [*_check_extras(adapters, recipe.extras), *_check_bases(adapters, recipe)]
    scaling = [scalings(adapter, recipe.scaling) for adapter in adapters]
    _check_range(adapters, recipe, scaling)
    alignment = align(adapters, recipe.include, recipe.exclude)
    check_shapes(adapters, alignment, equal_ranks=space.equal_ranks)
    dtype = output_dtype(adapters, alignment, recipe.dtype)
    shapes = _shapes(adapters, alignment, recipe, space, dtype)
    drafts = [
        _Draft(group, shape, choose_course(rule, space, shape))
        for group, shape in zip(alignment.groups, shapes, strict=True)
    ]
    pairs = [_pair(adapters, alignment, draft) for draft in drafts]
    files, regions = lay_out(pairs, ITEM_BYTES[dtype], recipe.max_shard_bytes)
    budget = fit(drafts, rule, budget)
    tasks = tuple(
        _task(draft, rule, budget, scratch, places)
        for draft, places in zip(drafts, regions, strict=True)
    )
    config, settled = output_config(adapters, {pair.target: pair.rank for pair in pairs})
    return Plan(
        recipe=recipe.to_dict(),
        rule=rule.name,
        space=space.name,
        dtype=dtype,
        tasks=tasks,
        sources=_sources(alignment, scaling),
        files=files,
        config=config,
        allowed_bytes=budget.allowed_bytes,
        allowed_origin=budget.origin,
        reserved_bytes=budget.reserved_bytes,
        concurrency=budget.threads,
        io=io,
        scratch=scratch,
        notices=(*notices, *settled, *_partial_targets(adapters, alignment)),
    )


def resolve_method(recipe: Recipe) -> tuple[RuleSpec, SpaceSpec]:
    """Return the rule and the space that a recipe means.

    Raises:
        RecipeError: an unknown method or space, a missing option, or one that does not fit.
    """
    method = METHODS.get(recipe.method)
    if method is None:
        close = difflib.get_close_matches(recipe.method, METHODS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise RecipeError(
            f"unknown method {recipe.method!r}{hint}; there are {', '.join(METHODS)}",
            option="method",
        )
    space = SPACES.get(recipe.space or method.space)
    if space is None:
        raise RecipeError(
            f"unknown space {recipe.space!r}; there are {', '.join(SPACES)}", option="space"
        )
    rule = RULES[method.rule]
    if space.name == "exact" and rule.name != "linear":
        raise RecipeError(
            f"only a weighted sum has an exact pair; {rule.name} goes with factor or delta",
            option="space",
        )
    _check_options(recipe, rule, space)
    return rule, space


def _check_options(recipe: Recipe, rule: RuleSpec, space: SpaceSpec) -> None:
    what = f"{rule.name} in space {space.name}"
    if rule.needs_density and recipe.density is None:
        raise RecipeError(f"{what} needs a density in [0, 1]", option="density")
    if not rule.needs_density and recipe.density is not None:
        raise RecipeError(f"density does not go with {what}, which keeps all", option="density")
    for option in ("rank", "clamp"):
        if getattr(recipe, option) is not None and not space.truncates:
            raise RecipeError(
                f"{option} does not go with {what}, which truncates nothing", option=option
            )


def _check_range(
    adapters: Sequence[Adapter], recipe: Recipe, scaling: Sequence[npt.NDArray[np.float64]]
) -> None:
    """Check that the compute dtype can hold every weight times every scaling."""
    limit = float(np.finfo(recipe.compute_dtype).max)
    for adapter, weight, values in zip(adapters, recipe.weights, scaling, strict=True):
        largest = max(abs(weight), float(np.abs(values).max() * max(1.0, abs(weight))))
        if not largest <= limit:
            raise RecipeError(
                f"{adapter.path}: weight {weight:g} times its scaling leaves the range of "
                f"{recipe.compute_dtype}",
                option="weights",
            )


def _check_extras(adapters: Sequence[Adapter], policy: str) -> list[str]:
    notices = []
    for adapter in adapters:
        if not adapter.extras:
            continue
        shown = ", ".join(adapter.extras[:4]) + (", …" if len(adapter.extras) > 4 else "")
        if policy == "error":
            raise ExtraTensorsError(
                f"holds {len(adapter.extras)} tensors that are not LoRA factors ({shown}), such "
                "as a trained head or biases; choose --extras drop to leave them out of the output",
                path=adapter.path,
                names=adapter.extras,
            )
        notices.append(f"{adapter.path}: {len(adapter.extras)} extra tensors dropped ({shown})")
    return notices


def _check_bases(adapters: Sequence[Adapter], recipe: Recipe) -> list[str]:
    """Compare what the configs say of the base; only strict_base makes a difference an error."""
    notices = [f"{a.path}: no adapter_config.json" for a in adapters if a.config is None]
    configs = [(a.path, a.config) for a in adapters if a.config is not None]
    bases = {config.base_model: path for path, config in reversed(configs)}
    if len(bases) > 1:
        named = ", ".join(f"{base!r} ({path})" for base, path in reversed(bases.items()))
        message = f"the adapters name different base models: {named}"
        if recipe.strict_base:
            raise IncompatibleError(message, target=None, paths=tuple(bases.values()))
        notices.append(message)
    if len({config.fan_in_fan_out for _, config in configs}) > 1:
        notices.append(
            "the adapters disagree on fan_in_fan_out, which changes nothing in the files; the "
            "output says true"
        )
    return notices


def _partial_targets(adapters: Sequence[Adapter], alignment: Alignment) -> list[str]:
    partial = [g.target for g in alignment.groups if g.last - g.first < len(adapters)]
    if not partial:
        return []
    notice = (
        f"{len(partial)} of {len(alignment.groups)} targets are not in all adapters (such as "
        f"{partial[0]}); they are merged from those that have them"
    )
    return [notice]


def output_dtype(adapters: Sequence[Adapter], alignment: Alignment, asked: str) -> str:
    """Return the output's dtype: as asked, or one that holds every input's values."""
    if asked != "auto":
        return asked
    present: set[str] = set()
    for position in np.unique(alignment.adapter):
        columns = adapters[position].columns
        codes = np.union1d(columns.a_dtype, columns.b_dtype)
        present |= {DTYPES[code] for code in codes}
    if present in ({"F16"}, {"BF16"}):
        return TORCH_DTYPES[present.pop()]
    return "float64" if "F64" in present else "float32"


def _shapes(
    adapters: Sequence[Adapter], alignment: Alignment, recipe: Recipe, space: SpaceSpec, dtype: str
) -> Iterator[Shape]:
    """Yield the shape of every group's task."""
    m, n, rank = (gather(adapters, alignment, column) for column in ("m", "n", "rank"))
    itemsize = np.array([DTYPE_BYTES[name] for name in DTYPES])
    a_item, b_item = (
        itemsize[gather(adapters, alignment, column)] for column in ("a_dtype", "b_dtype")
    )
    stored = rank * (n * a_item + m * b_item)
    asked = recipe.rank or int(rank.max())
    for group in alignment.groups:
        rows = slice(group.first, group.last)
        ranks = tuple(rank[rows].tolist())
        height, width = int(m[group.first]), int(n[group.first])
        yield Shape(
            m=height,
            n=width,
            rank=_output_rank(space, ranks, min(asked, height, width)),
            ranks=ranks,
            source_bytes=int(stored[rows].sum()),
            stored_item=int(max(a_item[rows].max(), b_item[rows].max())),
            item=ITEM_BYTES[recipe.compute_dtype],
            out_item=ITEM_BYTES[dtype],
        )


def _output_rank(space: SpaceSpec, ranks: tuple[int, ...], asked: int) -> int:
    if space.truncates:
        return asked
    return ranks[0] if space.equal_ranks else sum(ranks)


def fit(drafts: Sequence[_Draft], rule: RuleSpec, budget: Budget) -> Budget:
    """Return the budget with as many tasks in flight as all tasks allow.

    Raises:
        BudgetError: not even one task at a time fits.
    """
    needs = [_least(draft, rule) for draft in drafts]
    worst = max(range(len(drafts)), key=needs.__getitem__)
    for threads in range(min(budget.threads, len(drafts)), 0, -1):
        fitted = replace(budget, threads=threads)
        if needs[worst] <= fitted.task_bytes:
            return fitted
    smallest = needs[worst] + fitted.reserved_bytes
    raise BudgetError(
        f"{drafts[worst].group.target}: this merge needs {format_size(smallest)} "
        f"({smallest} bytes) at least, {format_size(fitted.reserved_bytes)} of them for the "
        f"process itself; allowed are {format_size(budget.allowed_bytes)} ({budget.origin})",
        target=drafts[worst].group.target,
        projected_bytes=needs[worst],
        allowed_bytes=budget.allowed_bytes,
        smallest_bytes=smallest,
    )


def _least(draft: _Draft, rule: RuleSpec) -> int:
    return project(draft.course, rule, draft.shape, Holding())


def _task(
    draft: _Draft,
    rule: RuleSpec,
    budget: Budget,
    scratch: str | None,
    places: tuple[Region, Region],
) -> Task:
    shape, course, (a, b) = draft.shape, draft.course, places
    holding = _hold(draft, rule, budget.task_bytes)
    spilled = 0
    if course.route == "krylov" and scratch and prefers_scratch(rule, shape):
        spilled = len(row_tiles(shape.m, shape.n)) - holding.tiles
    return Task(
        target=draft.group.target,
        m=shape.m,
        n=shape.n,
        rank=shape.rank,
        first=draft.group.first,
        last=draft.group.last,
        route=course.route,
        resident=holding.tiles,
        spilled=spilled,
        factors=holding.factors,
        stacked=holding.stacked,
        block=course.block,
        passes=course.passes,
        read_bytes=shape.source_bytes,
        write_bytes=a.nbytes + b.nbytes,
        projected_bytes=project(course, rule, shape, holding),
        flops=arithmetic(course, rule, shape),
        a=a,
        b=b,
    )


def _hold(draft: _Draft, rule: RuleSpec, task_bytes: int) -> Holding:
    """Return what a streamed task keeps in memory: first A's, then tiles, as many as fit."""
    shape = draft.shape
    if draft.course.route not in ("fold", "dense", "krylov"):
        return Holding()
    room = task_bytes - _least(draft, rule)
    factors = _held_factors(shape, room) if draft.course.route != "fold" else 0
    room -= factor_bytes(shape, factors)
    stack = stack_bytes(shape, _tile_elements(draft))
    stacked = rule.sweeps > 1 and stack <= room
    room -= stack if stacked else 0
    if draft.course.route != "krylov":
        # Each tile is made once: for the output, or for a matrix that is held as a whole.
        return Holding(factors=factors, stacked=stacked)
    tiles = min(len(row_tiles(shape.m, shape.n)), room // tile_bytes(shape))
    return Holding(tiles, factors, stacked)


def _held_factors(shape: Shape, room: int) -> int:
    """Return of how many sources the A fits into `room` bytes."""
    sizes = np.cumsum(shape.ranks) * shape.n * shape.item
    return int(np.searchsorted(sizes, room, side="right"))


def _tile_elements(draft: _Draft) -> int:
    shape = draft.shape
    if draft.course.route == "fold":
        return max(longest(flat_tiles(shape.rank * side)) for side in (shape.m, shape.n))
    return longest(row_tiles(shape.m, shape.n)) * shape.n


def _pair(adapters: Sequence[Adapter], alignment: Alignment, draft: _Draft) -> Pair:
    first = draft.group.first
    adapter, row = adapters[alignment.adapter[first]], int(alignment.row[first])
    inner = tuple(int(size) for size in adapter.columns.inner[row] if size)
    kind = int(adapter.columns.kind[row])
    return Pair(draft.group.target, kind, draft.shape.rank, draft.shape.m, inner)


def _sources(alignment: Alignment, scaling: Sequence[npt.NDArray[np.float64]]) -> Sources:
    starts = np.cumsum([0] + [len(s) for s in scaling[:-1]])
    values = np.concatenate(scaling)[starts[alignment.adapter] + alignment.row]
    return Sources(alignment.adapter, alignment.row, values)
