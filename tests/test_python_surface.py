"""The Python call as its users meet it: in a notebook, under a type checker, in `help()`."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
from dataclasses import fields, is_dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from mypy import api as mypy

import streammerge
from making import linear, write_adapter
from streammerge.api import StreammergeWarning
from streammerge.errors import StreammergeError
from streammerge.finish import ModuleReport
from streammerge.notebook import LONGEST, card
from streammerge.verification import Verification

REPOSITORY = Path(__file__).resolve().parents[1]

# ---------------------------------------------------------------------------------------------
# Notebooks


class Cells(HTMLParser):
    """The texts of all cells, and whether all that was opened was closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.opened: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert attrs == []
        self.tags.add(tag)
        self.opened.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.opened.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


TAGS = {
    *("div", "strong", "table", "thead", "tbody", "tr", "th", "td", "details", "summary", "p"),
}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> streammerge.MergeResult:
    folder = tmp_path_factory.mktemp("merged")
    layers = {f"model.{i}.up": linear(12, 8, 2) for i in range(10)}
    sources = [write_adapter(folder / f"{i}", layers, seed=i) for i in range(2)]
    return streammerge.merge(sources, folder / "<out>", workers=1, max_memory="4GiB")


def test_a_notebook_shows_the_totals_and_the_first_targets(
    result: streammerge.MergeResult,
) -> None:
    cells = Cells(result._repr_html_())
    assert cells.opened == []
    assert cells.tags <= TAGS
    assert {"MergeResult", "svd", "10", str(result.output), "… and 2 more"} <= set(cells.texts)
    worst = max(result.modules, key=lambda module: module.relative_error or 0)
    assert cells.texts.index(worst.target) < cells.texts.index("… and 2 more")
    planned = Cells(result.plan._repr_html_())
    assert planned.opened == []
    assert planned.tags <= TAGS
    assert {"Plan", "svd: rule linear, space delta", "4.0 GiB, max_memory"} <= set(planned.texts)


def test_a_thousand_times_as_many_targets_take_no_more_room(
    result: streammerge.MergeResult,
) -> None:
    plan = replace(result.plan, tasks=result.plan.tasks * 4500)
    large = replace(result, plan=plan, modules=result.modules * 4500)
    for small, big in ((result.plan, plan), (result, large)):
        assert len(big._repr_html_()) < len(small._repr_html_()) + 100
        assert len(repr(big)) < len(repr(small)) + 100
    assert "… and 44,992 more" in plan._repr_html_()


def test_names_out_of_files_are_text() -> None:
    evil = "<script>alert(1)</script>\x1b[31m&" + "x" * 10_000
    page = card(evil, [(evil, evil)], [evil], [[evil]], more=0)
    cells = Cells(page)
    assert cells.tags <= TAGS
    assert cells.opened == []
    assert "\x1b" not in page
    assert "more" not in page
    assert all(len(text) <= LONGEST + 1 for text in cells.texts)


# ---------------------------------------------------------------------------------------------
# Types

SCRIPT = """
import streammerge
from streammerge import Adapter, MergeResult, Plan, StreammergeError

def f() -> MergeResult:
    try:
        return streammerge.merge(["A"], "OUT", method="ties", weights=[1, 2.0], density=0.2)
    except StreammergeError as error:
        reveal_type(error.exit_code)
        raise

result = f()
reveal_type(result.output)
reveal_type(result.modules[0].kept_energy)
reveal_type(result.notices)
reveal_type(streammerge.plan(["A"]).projected_bytes)
reveal_type(streammerge.open_adapter("A").target(0))
reveal_type(streammerge.verify("OUT").checksums)
made: Plan = result.plan
adapter: Adapter = streammerge.open_adapter("A")
streammerge.merge("A", "OUT")
streammerge.merge(["A"], "OUT", methd="ties")
streammerge.plan(["A"], density="much")
"""

REVEALED = [
    "int",
    "Path",
    "float | None",
    "tuple[str, ...]",
    "int",
    "str",
    "bool",
]


def test_a_users_script_is_typed(tmp_path: Path) -> None:
    """With mypy --strict, from outside the package, which therefore has to ship py.typed."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    cache = REPOSITORY / ".mypy_cache"
    shown, said, _ = mypy.run(
        ["--strict", "--python-version=3.11", f"--cache-dir={cache}", "--no-pretty", str(script)]
    )
    assert said == ""
    revealed = re.findall(r'note: Revealed type is "(.*)"', shown)
    assert [re.sub(r"\b(?:builtins|pathlib)\.", "", name) for name in revealed] == REVEALED
    errors = re.findall(r"error: (.*?)  \[([\w-]+)\]", shown)
    assert [code for _, code in errors] == ["call-arg", "arg-type"], shown


def test_types_are_shipped() -> None:
    assert (Path(streammerge.__file__).parent / "py.typed").is_file()


# ---------------------------------------------------------------------------------------------
# help()

NAMED = [getattr(streammerge, name) for name in streammerge.__all__]
CALLS = [found for found in NAMED if inspect.isfunction(found)]
CLASSES = [found for found in NAMED if is_dataclass(found)]
RETURNED = [ModuleReport, Verification]


def test_every_public_name_is_looked_at() -> None:
    assert {*NAMED} == {*CALLS, *CLASSES, StreammergeError}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_says_what_it_takes_and_raises(call: Any) -> None:
    text = inspect.getdoc(call) or ""
    assert "Raises:" in text
    if "arguments are those of `merge`" not in text:
        described = re.findall(r"^    (\w+): \S", text, re.MULTILINE)
        assert [name for name in described if name in inspect.signature(call).parameters] == list(
            inspect.signature(call).parameters
        )
    for error in re.findall(r"^    (\w+Error): ", text, re.MULTILINE):
        assert issubclass(getattr(streammerge.errors, error), StreammergeError)


@pytest.mark.parametrize("kind", [*CLASSES, *RETURNED])
def test_every_part_of_a_class_is_described(kind: type) -> None:
    assert kind.__doc__
    described = described_fields(kind)
    assert is_dataclass(kind)
    assert {field.name for field in fields(kind)} <= described
    for name, member in vars(kind).items():
        if not name.startswith("_") and (inspect.isroutine(member) or isinstance(member, property)):
            assert inspect.getdoc(getattr(kind, name)), name


def described_fields(kind: type) -> set[str]:
    """The fields that a text follows in the source."""
    (body,) = (
        node.body
        for node in ast.walk(ast.parse(inspect.getsource(kind)))
        if isinstance(node, ast.ClassDef)
    )
    return {
        field.target.id
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }


def test_notices_are_warnings_that_can_be_filtered(tmp_path: Path) -> None:
    layers = {"up": linear(8, 6, 2)}
    sources = [
        write_adapter(tmp_path / base, layers, base_model_name_or_path=base) for base in "ab"
    ]
    with pytest.warns(StreammergeWarning, match="different base models"):
        streammerge.merge(sources, tmp_path / "out", method="cat", workers=1)
