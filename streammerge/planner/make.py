"""From manifests, a recipe and a budget to a plan, or a refusal."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from streammerge.adapter import (
    DIFFUSERS,
    DTYPES,
    ITEM_BYTES,
    MLX,
    STORED_NAMES,
    TORCH_NAMES,
    Adapter,
)
from streammerge.budget import ON_CPU, Budget, Device
from streammerge.catalog import SPACES, RuleSpec, SpaceSpec
from streammerge.errors import RecipeError
from streammerge.planner.align import Alignment, align, check_shapes, gather
from streammerge.planner.census import plan_census
from streammerge.planner.checks import (
    check_bases,
    check_one_density,
    check_range,
    check_shares,
    check_sources,
    partial_targets,
    unwanted_targets,
)
from streammerge.planner.extra_terms import Terms
from streammerge.planner.extras import check_extras, extra_drafts, plan_extras
from streammerge.planner.fit import fit, plan_task
from streammerge.planner.formats import check_image_extras, image_config, output_format
from streammerge.planner.hold import Draft
from streammerge.planner.layout import Pair, lay_out
from streammerge.planner.memory import project_compared, tally_bytes
from streammerge.planner.output_config import output_config
from streammerge.planner.routes import COORDINATES, Shape, choose_course
from streammerge.planner.scaling import scalings
from streammerge.planner.sources import resolve, weights_by_name, with_extras
from streammerge.plans import Plan
from streammerge.ranks import RankLimit, RankPolicy
from streammerge.recipe import Recipe
from streammerge.registry import METHODS, RULES, origin, problems


def make_plan(
    adapters: Sequence[Adapter],
    recipe: Recipe,
    budget: Budget,
    *,
    device: Device = ON_CPU,
    workers: int = 1,
    io: str = "mmap",
    scratch: str | None = None,
    stream: bool = False,
    compared: bool = False,
) -> Plan:
    """Plan a merge from the manifests alone.

    Args:
        adapters: their manifests, in the recipe's order, over one name table.
        recipe: what was asked for.
        budget: allowed memory, and how many tasks may be in flight.
        device: where tasks compute, and its memory.
        workers: processes that run tasks, each within the budget and with such a device.
        io: how inputs are read.
        scratch: directory for tiles that do not fit into memory.
        stream: whether files on the Hub are read from there while the tasks run.
        compared: whether pairs are kept and measured instead of being written.

    Raises:
        RefusedError: a subclass of it says why the merge cannot be done.
    """
    rule, space = resolve_method(recipe)
    parameters = resolve_parameters(recipe, rule, space)
    notices = [notice for adapter in adapters for notice in adapter.notices]
    check_extras(adapters, recipe.extras)
    notices += check_bases(adapters, recipe)
    scaling = [scalings(adapter, recipe.scaling) for adapter in adapters]
    alignment = align(adapters, recipe.include, recipe.exclude)
    sources = resolve(alignment, scaling, recipe)
    check_range(adapters, sources, recipe.compute_dtype)
    check_shares(sources, rule, parameters)
    check_sources(adapters, sources, alignment, rule)
    check_one_density(alignment, sources, rule)
    check_shapes(adapters, alignment, equal_ranks=space.equal_ranks)
    dtype = output_dtype(adapters, alignment, recipe.dtype)
    stored = STORED_NAMES[dtype]
    shapes = _shapes(adapters, alignment, recipe, (rule, space), dtype, stream=stream)
    if compared:
        shapes = (replace(shape, kept=project_compared(shape)) for shape in shapes)
    everywhere = recipe.threshold_scope == "global"
    tally = tally_bytes(rule, len(alignment.groups)) if everywhere else 0
    drafts = [
        Draft(group, shape, choose_course(rule, space, shape), tally)
        for group, shape in zip(alignment.groups, shapes, strict=True)
    ]
    pairs = [_pair(adapters, alignment, draft, stored) for draft in drafts]
    chosen = output_format(adapters, recipe, [pair.target for pair in pairs])
    targets = {pair.target: (pair.kind, pair.m) for pair in pairs}
    weight = weights_by_name(alignment, sources, recipe)
    extra = plan_extras(adapters, Terms(recipe, rule, space, stored, targets, scaling, weight))
    check_image_extras(chosen, [one.tensor.name for one in extra.tensors])
    drafts += extra_drafts(adapters, extra.tensors, len(alignment.row), recipe.compute_dtype)
    units = [*(pair.tensors(chosen) for pair in pairs), *((one.tensor,) for one in extra.tensors)]
    files, regions = lay_out(units, recipe.max_shard_bytes, chosen)
    limits = fit(drafts, rule, budget, device, workers)
    tasks = tuple(
        plan_task(draft, rule, limits, scratch, places)
        for draft, places in zip(drafts, regions, strict=True)
    )
    census = (
        plan_census(drafts[: len(pairs)], tasks[: len(pairs)], rule, limits, len(adapters))
        if everywhere
        else None
    )
    ranks = {pair.target: pair.rank for pair in pairs}
    selected = recipe.include is not None or recipe.exclude is not None
    config, settled = (
        (image_config(ranks), [])
        if chosen == DIFFUSERS
        else output_config(
            adapters, ranks, extra.config, selected=selected, base_model=recipe.base_model
        )
    )
    return Plan(
        recipe=recipe.to_dict(),
        rule=rule.name,
        rule_origin=origin(rule.name),
        space=space.name,
        parameters=parameters,
        dtype=dtype,
        tasks=tasks,
        sources=with_extras(sources, extra.tensors),
        files=files,
        config=config,
        format=chosen,
        allowed_bytes=limits.budget.allowed_bytes,
        allowed_origin=limits.budget.origin,
        reserved_bytes=limits.budget.reserved_bytes,
        concurrency=limits.budget.threads,
        device=device.name,
        device_allowed_bytes=device.allowed_bytes,
        io=io,
        scratch=scratch,
        census=census,
        extras=extra.modules,
        notices=(
            *(*extra.notices, *notices, *settled),
            *partial_targets(adapters, alignment),
            *(
                unwanted_targets(
                    {g.target: sources.weight[g.first : g.last] for g in alignment.groups}
                )
                if rule.kind == "coefficient" or recipe.normalize
                else ()
            ),
        ),
        late=isinstance(recipe.rank, RankPolicy),
    )


def resolve_method(recipe: Recipe) -> tuple[RuleSpec, SpaceSpec]:
    """Return the rule and the space that a recipe means.

    Raises:
        RecipeError: an unknown method or space, a missing option, or one that does not fit.
    """
    rule, space = _named(recipe)
    if space.name not in rule.spaces:
        raise RecipeError(
            f"{rule.name} does not go with space {space.name}, but with {', '.join(rule.spaces)}",
            option="space",
        )
    _check_options(recipe, rule, space)
    return rule, space


def fitted(recipe: Recipe) -> Recipe:
    """Return a recipe without the options that do not go with its rule and space.

    Raises:
        RecipeError: an unknown method or space.
    """
    rule, space = _named(recipe)
    known = {parameter.name for parameter in (*rule.parameters, *space.parameters)}
    return replace(
        recipe,
        density=recipe.density if rule.needs_density else None,
        normalize=recipe.normalize and not rule.elects,
        majority_sign=recipe.majority_sign if rule.elects else "total",
        rank=recipe.rank if space.truncates else None,
        clamp=recipe.clamp if space.truncates else None,
        parameters=tuple(given for given in recipe.parameters if given[0] in known),
    )


def _named(recipe: Recipe) -> tuple[RuleSpec, SpaceSpec]:
    """Return the rule and the space that a recipe names, whatever its other options say.

    Raises:
        RecipeError: an unknown method or space.
    """
    method = METHODS.get(recipe.method)
    if method is None:
        raise _no_method(recipe.method)
    space = SPACES.get(recipe.space or method.space)
    if space is None:
        raise RecipeError(
            f"unknown space {recipe.space!r}; there are {', '.join(SPACES)}", option="space"
        )
    return RULES[method.rule], space


def _no_method(name: str) -> RecipeError:
    """Return what says that a method is not there, or why it cannot be used."""
    broken = problems()
    for one in broken:
        if name in one.methods:
            return RecipeError(f"method {name}: {one}", option="method")
    close = difflib.get_close_matches(str(name), METHODS, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    there = f"unknown method {name!r}{hint}; there are {', '.join(METHODS)}"
    # What these would have been called is not known.
    perhaps = [f"; {one}" for one in broken if one.declaration is None]
    return RecipeError("".join([there, *perhaps]), option="method")


def resolve_parameters(recipe: Recipe, rule: RuleSpec, space: SpaceSpec) -> dict[str, float]:
    """Return the value of every parameter of the rule and of the space.

    Raises:
        RecipeError: one that was given is out of its range, or is none of theirs.
    """
    known = {parameter.name: parameter for parameter in (*rule.parameters, *space.parameters)}
    values = {name: parameter.default for name, parameter in known.items()}
    for name, value in recipe.parameters:
        if name not in known:
            what = f"{rule.name} in space {space.name}"
            takes = f"takes {', '.join(known)}" if known else "takes no parameters"
            raise RecipeError(f"{name} does not go with {what}, which {takes}", option="parameters")
        parameter = known[name]
        if not parameter.takes(value):
            kind = "an integer in" if parameter.whole else "in"
            raise RecipeError(
                f"{name} must be {kind} [{parameter.low:g}, {parameter.high:g}], not {value:g}",
                option="parameters",
            )
        values[name] = value
    return values


def _check_options(recipe: Recipe, rule: RuleSpec, space: SpaceSpec) -> None:
    what = f"{rule.name} in space {space.name}"
    if rule.needs_density and recipe.density is None:
        raise RecipeError(f"{what} needs a density in [0, 1]", option="density")
    if not rule.needs_density and recipe.density is not None:
        raise RecipeError(f"density does not go with {what}, which keeps all", option="density")
    if rule.elects and recipe.normalize:
        raise RecipeError(
            f"normalize does not go with {what}, which divides by how many agree, not by their "
            "weights",
            option="normalize",
        )
    if not rule.elects and recipe.majority_sign != "total":
        raise RecipeError(
            f"majority_sign does not go with {what}, which elects no sign", option="majority_sign"
        )
    if recipe.threshold_scope == "global":
        _check_global(recipe, rule, what)
    if rule.of_rank and isinstance(recipe.rank, RankPolicy):
        raise RecipeError(
            f"{what} makes another matrix for each rank, so that none can be told from what it "
            "keeps: give a number",
            option="rank",
        )
    for option in ("rank", "clamp"):
        if getattr(recipe, option) is not None and not space.truncates:
            raise RecipeError(
                f"{option} does not go with {what}, which truncates nothing", option=option
            )


def _check_global(recipe: Recipe, rule: RuleSpec, what: str) -> None:
    if rule.sparsity not in ("largest", "middle"):
        raise RecipeError(
            f"threshold_scope does not go with {what}, which looks for no largest elements",
            option="threshold_scope",
        )
    given = recipe.density if isinstance(recipe.density, tuple) else ()
    if any(isinstance(density, tuple) for density in given):
        raise RecipeError(
            "threshold_scope global is one threshold for a whole adapter, and does not go with a "
            "density that differs from target to target",
            option="threshold_scope",
        )


def output_dtype(adapters: Sequence[Adapter], alignment: Alignment, asked: str) -> str:
    """Return the output's dtype: as asked, or one that holds every input's values."""
    if asked != "auto":
        return asked
    codes = [gather(adapters, alignment, column) for column in ("a_dtype", "b_dtype")]
    present = {DTYPES[code] for code in np.unique(codes)}
    if present in ({"F16"}, {"BF16"}):
        return TORCH_NAMES[present.pop()]
    return "float64" if "F64" in present else "float32"


def _shapes(
    adapters: Sequence[Adapter],
    alignment: Alignment,
    recipe: Recipe,
    method: tuple[RuleSpec, SpaceSpec],
    dtype: str,
    *,
    stream: bool,
) -> Iterator[Shape]:
    """Yield the shape of every group's task."""
    m, n, rank = (gather(adapters, alignment, column) for column in ("m", "n", "rank"))
    itemsize = np.array([ITEM_BYTES[TORCH_NAMES[name]] for name in DTYPES])
    a_item, b_item = (
        itemsize[gather(adapters, alignment, column)] for column in ("a_dtype", "b_dtype")
    )
    stored = rank * (n * a_item + m * b_item)
    remote = np.array([stream and adapter.files[0].etag is not None for adapter in adapters])
    fetched = stored * remote[alignment.adapter]
    rule, space = method
    limited = isinstance(recipe.rank, RankPolicy | RankLimit)
    limit = recipe.rank.largest if isinstance(recipe.rank, RankPolicy | RankLimit) else recipe.rank
    asked = limit or int(rank.max())
    # Only a number asks for more than the sources span, where the result lies in that.
    summed = rule.name == "linear" or rule.kind == "coefficient"
    spanned = limited and space.spans and (summed or space.name in COORDINATES)
    turned = np.array([adapter.dialect == MLX for adapter in adapters])[alignment.adapter]
    for group in alignment.groups:
        rows = slice(group.first, group.last)
        ranks = tuple(rank[rows].tolist())
        height, width = int(m[group.first]), int(n[group.first])
        most = min(asked, sum(ranks)) if spanned else asked
        yield Shape(
            m=height,
            n=width,
            rank=_output_rank(space, ranks, min(most, height, width)),
            ranks=ranks,
            source_bytes=int(stored[rows].sum()),
            stored_item=int(max(a_item[rows].max(), b_item[rows].max())),
            item=ITEM_BYTES[recipe.compute_dtype],
            out_item=ITEM_BYTES[dtype],
            fetched=int(fetched[rows].sum()),
            turned=bool(turned[rows].any()),
        )


def _output_rank(space: SpaceSpec, ranks: tuple[int, ...], asked: int) -> int:
    if space.truncates:
        return asked
    return ranks[0] if space.equal_ranks else sum(ranks)


def _pair(adapters: Sequence[Adapter], alignment: Alignment, draft: Draft, dtype: str) -> Pair:
    first = draft.group.first
    adapter, row = adapters[alignment.adapter[first]], int(alignment.row[first])
    inner = tuple(int(size) for size in adapter.columns.inner[row] if size)
    kind = int(adapter.columns.kind[row])
    return Pair(draft.group.target, kind, draft.shape.rank, draft.shape.m, inner, dtype)
