"""A module imports only from the layers below it, read off the source of every module.

What counts is every import anywhere in a file: inside functions, under TYPE_CHECKING, and by
`importlib.import_module`. A new file has to be placed in LAYERS before it may exist.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = "streammerge"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE

# From the bottom up. A name is a module or a folder; those on one line are strangers.
LAYERS = (
    {"errors"},
    {"budget", "notebook", "tiling", "regular", "files", "schedule", "ranks"},
    {"catalog", "plans", "recipe", "adapter", "events", "patterns", "comparison"},
    {"registry"},
    {"planner", "hub"},
    {
        "readers",
        "output",
        "rules",
        "spaces",
        "lowrank",
        "select",
        "draw",
        "recipe_file",
        "allocator",
    },
    {"kernels"},
    {"worker"},
    {"executors", "ledger", "resume", "assembly"},
    {"finish"},
    {"notices"},
    {"run", "verification", "preparation", "consolidation"},
    {"publishing"},
    {"measuring", "comparing", "reporting"},
    {"api", "extend"},
    {"cli"},
)
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}

INIT = "__init__"
# What is public: the calls, the errors, and the two types that the calls return.
INIT_MAY_IMPORT = {
    "api", "comparing", "comparison", "measuring", "reporting", "errors", "adapter", "plans",
}  # fmt: skip
STANDARD_LIBRARY_ONLY = {"errors", *LAYERS[1]}
# Reading headers, planning and showing help are pure arithmetic and text.
WITHOUT_TORCH = {INIT, "cli", "readers", "output", "consolidation", "publishing"}.union(*LAYERS[:5])
# Files of torch.save are read by torch, and by nobody else, when there is such a file to read.
READS_BY_TORCH = "readers/torch_file.py"
IMPORTS_TORCH = {"torch", "safetensors.torch", "peft", "transformers"}


def offences(sources: Mapping[str, str]) -> list[str]:
    """Every import that breaks a rule, as 'file:line: what is wrong', and every unplaced file.

    The keys of `sources` are paths below the package: 'cli.py', 'rules/ties.py'.
    """
    modules = {place_of(path) for path in sources} - {INIT}
    found = []
    for path, source in sorted(sources.items()):
        place = place_of(path)
        if place != INIT and place not in HEIGHT:
            found.append(f"{path}: '{place}' has no layer; place it in LAYERS")
            continue
        for line, imported in imports_of(path, source, modules):
            why = why_not(place, imported)
            if why and not (path == READS_BY_TORCH and imported == "torch"):
                found.append(f"{path}:{line}: imports {imported}: {why}")
    return found


def place_of(path: str) -> str:
    """The name that LAYERS knows a file by: its folder's, or its own."""
    return path.split("/", maxsplit=1)[0].removesuffix(".py")


def why_not(place: str, imported: str) -> str | None:
    """Why the module at `place` may not import `imported`; None where it may."""
    top, _, inner = imported.partition(".")
    if top == PACKAGE:
        return why_not_inside(place, inner.partition(".")[0])
    if top in {"dask", "distributed"} and place != "executors":
        return "only executors knows dask"
    if top == "click" and place != "cli":
        return "only cli knows click"
    if place in WITHOUT_TORCH and matches(imported, IMPORTS_TORCH):
        return f"{place} works without torch"
    if place in STANDARD_LIBRARY_ONLY and top not in sys.stdlib_module_names:
        return f"{place} uses the standard library only"
    return None


def why_not_inside(place: str, other: str) -> str | None:
    if place == INIT:
        return (
            None if other in INIT_MAY_IMPORT else "the package itself imports only what is public"
        )
    if other == place:
        return None
    if not other:
        return "nothing imports the package's root"
    if other not in HEIGHT:
        return "no such layer"
    if HEIGHT[other] >= HEIGHT[place]:
        return f"{other} is not below {place}"
    return None


def matches(imported: str, names: set[str]) -> bool:
    return any(imported == name or imported.startswith(f"{name}.") for name in names)


def imports_of(path: str, source: str, modules: set[str]) -> Iterator[tuple[int, str]]:
    """The line and the full dotted name of each thing that a file imports.

    The package's own __init__ loads lazily from a table, so there every string that names a
    module of the package counts.
    """
    is_init = place_of(path) == INIT
    folder = [PACKAGE, *path.split("/")[:-1]]
    for node in ast.walk(ast.parse(source, filename=path)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = [*(folder[: len(folder) - level + 1] if level else []), *split(module)]
                for alias in names:
                    yield node.lineno, ".".join(named_by(base, alias.name, modules))
            case ast.Call(func=func, args=[first, *_]) if called(func) in DYNAMIC and not is_init:
                yield node.lineno, literal(first)
            case ast.Constant(value=str(name)) if is_init and name.startswith(f"{PACKAGE}."):
                yield node.lineno, name


def split(module: str | None) -> list[str]:
    return module.split(".") if module else []


def named_by(base: list[str], name: str, modules: set[str]) -> list[str]:
    """`from streammerge import plan` names a module, `from os import path` is left at os."""
    is_module = base == [PACKAGE] and name in modules
    return [*base, name] if is_module or base == ["safetensors"] else base


DYNAMIC = {"import_module", "__import__"}


def called(func: ast.expr) -> str | None:
    match func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return None


def literal(argument: ast.expr) -> str:
    """The module that a dynamic import names; what is computed is taken for one without a layer."""
    match argument:
        case ast.Constant(value=str(name)):
            return name
    return f"{PACKAGE}.<{ast.unparse(argument)}>"


def test_every_import_goes_down() -> None:
    sources = {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in ROOT.rglob("*.py")
    }
    assert sources, f"no sources under {ROOT}"
    found = offences(sources)
    assert not found, "\n" + "\n".join(found)


def test_the_package_imports_nothing_of_its_own_until_asked() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    eager = [
        f"__init__.py:{node.lineno}: {ast.unparse(node)}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.level or node.module == PACKAGE)
    ]
    assert not eager, "\n" + "\n".join(eager)


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("planner.py", "from streammerge.api import merge", "api is not below planner"),
        ("planner.py", "from .worker import run_task", "worker is not below planner"),
        ("plans.py", "import streammerge.recipe", "recipe is not below plans"),
        ("rules/ties.py", "from ..spaces import delta", "spaces is not below rules"),
        ("rules/ties.py", "from streammerge import kernels", "kernels is not below rules"),
        ("api.py", "from . import cli", "cli is not below api"),
        ("api.py", "from streammerge import merge", "nothing imports the package's root"),
        ("__init__.py", "from streammerge.worker import run_task", "only what is public"),
        ("worker.py", "import dask.base", "only executors knows dask"),
        ("worker.py", "def run():\n    from distributed import Client", "only executors knows"),
        ("api.py", "import click", "only cli knows click"),
        ("planner.py", "import torch.nn.functional as F", "planner works without torch"),
        ("readers/pread.py", "from safetensors.torch import load", "readers works without torch"),
        ("readers/pread.py", "from safetensors import torch", "readers works without torch"),
        ("readers/torch_file.py", "import torch.nn", "readers works without torch"),
        (
            "plans.py",
            "if TYPE_CHECKING:\n    from torch import Tensor",
            "plans works without torch",
        ),
        ("cli.py", "def run():\n    import torch", "cli works without torch"),
        ("errors.py", "import numpy", "standard library only"),
        ("errors.py", "from streammerge.budget import allow", "budget is not below errors"),
        ("budget.py", "import psutil", "standard library only"),
        ("plans.py", "import_module('streammerge.planner')", "planner is not below plans"),
        ("rules/__init__.py", "importlib.import_module(name)", "<name>: no such layer"),
        ("kernels/fold.py", "from streammerge.gone import x", "no such layer"),
        ("__init__.py", "HOME = {'run': 'streammerge.worker'}", "only what is public"),
        ("utils.py", "", "'utils' has no layer"),
        ("utils/strings.py", "", "'utils' has no layer"),
    ],
)
def test_an_offence_is_caught(path: str, source: str, expected: str) -> None:
    neighbours = {"kernels/__init__.py": "", "cli.py": ""}
    (found,) = offences(neighbours | {path: source})
    assert found.startswith(path)
    assert expected in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("cli.py", "import click\n\ndef run():\n    from streammerge import api"),
        ("api.py", "from streammerge.executors import serial\nfrom .errors import RefusedError"),
        ("executors/local.py", "import dask\nfrom streammerge.worker import run_task"),
        ("rules/ties.py", "import torch\nfrom .elect import elect\nfrom ..catalog import RULES"),
        ("rules/ties.py", "from . import elect\nfrom streammerge.rules import elect"),
        ("__init__.py", "HOME = {'merge': 'streammerge.api'}\nimport_module(HOME[name])"),
        ("adapter.py", "import numpy\nimport safetensors"),
        ("readers/torch_file.py", "def load():\n    import torch"),
    ],
)
def test_a_clean_source_passes(path: str, source: str) -> None:
    assert offences({"api.py": "", path: source}) == []
