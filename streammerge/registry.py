"""All rules and methods: the catalog's own, and those that other distributions bring.

A distribution brings a rule by an entry point of the group `streammerge.rules`, which names a
`Declaration`. Entry points are looked for once in a process, when something is asked for that the
catalog does not have, or all that there is; the catalog's own names cost nothing. What cannot be
used, for whatever reason, is left out of the tables, and `problems` says why.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, TypeVar, get_args

from streammerge import catalog
from streammerge.catalog import Method, Parameter, RuleSpec, Sparsity

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

T = TypeVar("T")

GROUP = "streammerge.rules"
"""Of the entry points."""

TAKEN = frozenset({"weight", "density", "normalize", "lambda"})
"""What a recipe file calls other things by, and no parameter may be called."""

NEEDED = {"middle": "gamma", "ranked": "epsilon"}
"""The parameter by which elements of a sparsity are chosen, besides the density."""

_OF_SPACES = frozenset(
    parameter.name for space in catalog.SPACES.values() for parameter in space.parameters
)
"""Parameters of spaces, which go with any rule."""

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_PLACE = re.compile(r"\w+(\.\w+)*:\w+(\.\w+)*")


@dataclass(frozen=True)
class Declaration:
    """An element-wise rule that another distribution brings; its module loads without torch."""

    rule: RuleSpec
    methods: tuple[Method, ...]
    """The names under which it can be asked for, one for each of the spaces that it is for."""
    function: str
    """Where its function is, as "module:function"; loaded where the work is done, before it."""


@dataclass(frozen=True)
class Brought:
    """What an entry point has brought, or why nothing can be used of it."""

    entry: str
    """The entry point's name."""
    origin: str
    """The distribution that it is of, and its version."""
    declaration: Declaration | None = None
    """None where it could not be loaded, or is none."""
    problem: str | None = None

    @property
    def rule(self) -> str:
        """The rule's name; the entry point's, for want of a better, of what could not be loaded."""
        return self.declaration.rule.name if self.declaration else self.entry

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of its methods; the entry point's, again, of what could not be loaded."""
        if self.declaration is None:
            return (self.entry,)
        return tuple(method.name for method in self.declaration.methods)

    def __str__(self) -> str:
        return f"rule {self.rule} of {self.origin} cannot be used: {self.problem}"


class Table(Mapping[str, T]):
    """What the catalog has by name, and then what others bring, which is looked for when needed."""

    def __init__(self, own: Mapping[str, T], others: Callable[[Declaration], Mapping[str, T]]):
        """Make it of the catalog's table, and of what a declaration adds to it."""
        self._own = own
        self._others = others

    def __getitem__(self, name: str) -> T:
        return self._own[name] if name in self._own else self._brought()[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from (name for name in self._brought() if name not in self._own)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _brought(self) -> dict[str, T]:
        added: dict[str, T] = {}
        for one in _sound():
            added.update(self._others(one))
        return added


RULES: Mapping[str, RuleSpec] = Table(catalog.RULES, lambda one: {one.rule.name: one.rule})
"""Every rule by its name."""

METHODS: Mapping[str, Method] = Table(
    catalog.METHODS, lambda one: {method.name: method for method in one.methods}
)
"""Every method by its name."""

PARAMETERS: Mapping[str, Parameter] = Table(
    catalog.PARAMETERS, lambda one: {parameter.name: parameter for parameter in one.rule.parameters}
)
"""A parameter for every name; rules may share one, each with a default and a range of its own."""


def origin(rule: str) -> str | None:
    """Return the distribution that brings a rule, and its version; None of streammerge's own."""
    found = _bringing(rule)
    return found.origin if found else None


def place(rule: str) -> str | None:
    """Return where a rule's function is, as "module:function"; None of streammerge's own."""
    found = _bringing(rule)
    return found.declaration.function if found and found.declaration else None


def problems() -> list[Brought]:
    """Return what cannot be used."""
    return [one for one in brought() if one.problem]


def _bringing(rule: str) -> Brought | None:
    if rule in catalog.RULES:
        return None
    return next((one for one in brought() if one.rule == rule and not one.problem), None)


def _sound() -> Iterator[Declaration]:
    return (one.declaration for one in brought() if one.declaration and not one.problem)


@cache
def brought() -> tuple[Brought, ...]:
    """Return what entry points bring, in the order of the distributions' names."""
    # Takes as long to load as all else that `streammerge --help` does.
    from importlib.metadata import entry_points  # noqa: PLC0415  # only for others' rules

    return without_clashes(sorted(map(read, entry_points(group=GROUP)), key=_order))


def _order(one: Brought) -> tuple[str, str]:
    return one.origin, one.entry


def read(entry: EntryPoint) -> Brought:
    """Return what an entry point brings. Its module is loaded, and may do what it will."""
    distribution = entry.dist
    name = f"{distribution.name} {distribution.version}" if distribution else "an unknown package"
    bare = Brought(entry.name, name)
    try:
        found = entry.load()
    except Exception as error:  # whatever the module of somebody else raises
        return replace(bare, problem=f"it could not be loaded ({type(error).__name__}: {error})")
    if not isinstance(found, Declaration):
        kind = type(found).__name__
        return replace(bare, problem=f"{entry.value} is no Declaration, but {kind}")
    return replace(bare, declaration=found, problem=next(_faults(found), None))


def _faults(declaration: Declaration) -> Iterator[str]:
    """Yield what is wrong with a declaration."""
    for kind, name in _names(declaration):
        if not _NAME.fullmatch(name):
            yield f"{kind} {name!r} is not of lower-case letters, digits and underscores"
        if name in (catalog.RULES if kind == "rule" else catalog.METHODS):
            yield f"the {kind} {name} is streammerge's own"
    yield from _faults_of_rule(declaration.rule)
    yield from _faults_of_methods(declaration)
    if not _PLACE.fullmatch(declaration.function):
        yield f"its function, {declaration.function!r}, is not of the form module:function"


def _faults_of_rule(rule: RuleSpec) -> Iterator[str]:
    if rule.kind != "element-wise":
        yield f"its kind is {rule.kind}; only element-wise rules can be brought"
    if rule.sparsity not in get_args(Sparsity):
        yield f"sparsity is {rule.sparsity!r}; it is one of {', '.join(get_args(Sparsity))}"
    if min(rule.sweeps, rule.operations) < 1 or rule.tile_buffers < 0:
        yield "sweeps and operations are at least 1, tile_buffers at least 0"
    needed = NEEDED.get(rule.sparsity)
    if needed and needed not in {one.name for one in rule.parameters}:
        yield f"with the sparsity {rule.sparsity!r} it takes a parameter {needed}"
    for parameter in rule.parameters:
        if not _NAME.fullmatch(parameter.name) or parameter.name in TAKEN | _OF_SPACES:
            yield f"no parameter can be called {parameter.name!r}"
        if not parameter.takes(parameter.default):
            yield f"the default of {parameter.name} is out of its range"


def _faults_of_methods(declaration: Declaration) -> Iterator[str]:
    if not declaration.methods:
        yield "no method names it"
    for method in declaration.methods:
        if method.rule != declaration.rule.name:
            yield f"the method {method.name} is of the rule {method.rule}"
        if method.space not in declaration.rule.spaces:
            yield f"the method {method.name} is in space {method.space}, where no rule can be"


def _names(declaration: Declaration) -> Iterator[tuple[str, str]]:
    yield "rule", declaration.rule.name
    yield from (("method", method.name) for method in declaration.methods)


def without_clashes(entries: Sequence[Brought]) -> tuple[Brought, ...]:
    """Return the entries; those that want a name which another wants too have a problem now."""
    wanting: dict[tuple[str, str], list[Brought]] = defaultdict(list)
    for one in entries:
        if one.declaration and not one.problem:
            for wanted in dict.fromkeys(_names(one.declaration)):
                wanting[wanted].append(one)
    clashes: dict[tuple[str, str], str] = {}
    for (kind, name), several in wanting.items():
        if len(several) > 1:
            of = " and ".join(f"{one.origin} (entry point {one.entry})" for one in several)
            for one in several:
                clashes.setdefault(_order(one), f"the {kind} {name} is brought by {of}")
    return tuple(replace(one, problem=clashes.get(_order(one), one.problem)) for one in entries)
