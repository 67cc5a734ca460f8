"""The pages: what they show is run, the site is built from them, and every link leads somewhere."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import click
import numpy as np
import pytest
from safetensors.numpy import load_file

from doc_blocks import Block, blocks_of, is_shell, run_page
from streammerge.cli import main

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.rglob("*.md"))]
PEFT_PAGES = [DOCS / "from-peft.md"]
"""They load PEFT, which a process that is to stay within a memory limit must not have."""
MOST_NOT_RUN = 12
NOT_HERE = {"completion", "consolidate", "push"}
"""Their examples need a shell that starts, shards, the Hub."""
EXEMPLARY = [main, *(command for name, command in main.commands.items() if name not in NOT_HERE)]
"""Commands whose examples are run."""


def named(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


# ---------------------------------------------------------------------------------------------
# Blocks


HELP = "examples-of-help.md"


def write_examples(folder: Path) -> Path:
    """A page of the examples that the commands' help has."""
    lines = [line.strip() for command in EXEMPLARY for line in (command.epilog or "").splitlines()]
    examples = [line for line in lines if line.startswith("streammerge ")]
    page = folder / HELP
    recipe = "merge_method: svd\nmodels: [{model: A}, {model: B}]"
    page.write_text(
        "\n".join(
            [
                "<!-- file: RECIPE.yaml -->",
                "```yaml",
                recipe,
                "```",
                "",
                "```",
                *examples,
                "```",
                "",
            ]
        )
    )
    return page


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What became of every block, page by page, all run by one process."""
    examples = write_examples(tmp_path_factory.mktemp("help"))
    pages = [str(page) for page in (*PAGES, examples) if page not in PEFT_PAGES]
    command = [sys.executable, str(Path(__file__).with_name("doc_blocks.py")), *pages]
    path = os.pathsep.join([str(REPOSITORY / "tests"), str(REPOSITORY), *sys.path])
    found = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert found.returncode == 0, found.stderr
    results: dict[str, list[dict[str, Any]]] = {page: [] for page in pages}
    for line in found.stdout.splitlines():
        result = json.loads(line)
        results[result["path"]].append(result)
    results[HELP] = results.pop(str(examples))
    return results


@pytest.mark.parametrize("page", [page for page in PAGES if page not in PEFT_PAGES], ids=named)
def test_what_a_page_shows_is_so(page: Path, runs: dict[str, list[dict[str, Any]]]) -> None:
    wrong = [
        f"{named(page)}:{result['line']}: {result['wrong']}"
        for result in runs[str(page)]
        if result["wrong"]
    ]
    assert not wrong, "\n".join(wrong)
    assert len(runs[str(page)]) == len(list(blocks_of(page)))


def test_the_examples_of_the_help_work(runs: dict[str, list[dict[str, Any]]]) -> None:
    _recipe, result = runs[HELP]
    assert result["wrong"] is None
    assert result["text"].count("\nstreammerge") >= len(EXEMPLARY)


@pytest.mark.parametrize("command", main.commands.values(), ids=main.commands)
def test_every_help_has_examples(command: click.Command) -> None:
    assert "streammerge " in (command.epilog or "")


def test_the_same_merge_by_peft_and_by_streammerge(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page has one call beside the other; what both have written is compared here."""
    (page,) = PEFT_PAGES
    compared = 0
    for block, wrong in run_page(page):
        assert wrong is None, f"{named(page)}:{block.line}: {wrong}"
        if "streammerge.merge(" in block.text:
            compared += compare(Path("PEFT/merged"), Path("OUT"))
    assert compared >= 3
    monkeypatch.undo()


def compare(theirs: Path, ours: Path) -> int:
    """Compare the deltas of two adapters; 1 where there was something to compare."""
    deltas = [deltas_of(path) for path in (theirs, ours)]
    assert deltas[0].keys() == deltas[1].keys()
    assert deltas[0]
    for target, delta in deltas[0].items():
        scale = np.abs(delta).max()
        np.testing.assert_allclose(deltas[1][target], delta, atol=2e-4 * scale, rtol=0)
    return 1


def deltas_of(path: Path) -> dict[str, np.ndarray]:
    config = json.loads((path / "adapter_config.json").read_text())
    tensors = load_file(path / "adapter_model.safetensors")
    suffix = ".lora_A.weight"
    targets = [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]
    return {
        target: tensors[f"{target}.lora_B.weight"].astype(np.float64)
        @ tensors[f"{target}{suffix}"].astype(np.float64)
        * config["lora_alpha"]
        / config["r"]
        for target in targets
    }


def test_few_blocks_are_not_run_and_each_says_why() -> None:
    skipped = [block for page in PAGES for block in blocks_of(page) if block.not_run]
    listed = "\n".join(f"{block.page}:{block.line}: {block.not_run}" for block in skipped)
    assert len(skipped) <= MOST_NOT_RUN, listed
    assert all(len(block.not_run or "") > 10 for block in skipped), listed
    # One page needs a cluster; elsewhere it is the exception.
    counts = Counter(block.page for block in skipped)
    assert all(count <= 3 for page, count in counts.items() if page != "clusters.md"), listed


def test_blocks_are_found_with_what_is_said_of_them(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n\n```\nstreammerge x \\\n    --json\n```\n\n<!-- not run: no cluster here -->\n"
        "```bash\nfalse\n```\n\n<!-- exit: 2 -->\n\ntext\n\n```text\nplain\n```\n"
    )
    assert list(blocks_of(page)) == [
        Block("page.md", 3, "", "streammerge x \\\n    --json\n"),
        Block("page.md", 9, "bash", "false\n", not_run="no cluster here"),
        Block("page.md", 17, "text", "plain\n"),
    ]
    assert [is_shell(block) for block in blocks_of(page)] == [True, True, False]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("```\nstreammerge merg A\n```", "No such command"),
        ("```\nstreammerge verify A\nstreammerge verify D\n```", "exit code 2, not 0"),
        ("<!-- exit: 2 -->\n```\nstreammerge verify A\n```", "exit code 0, not 2"),
        ("```bash\nrm -rf /\n```", "neither streammerge's"),
        ("```bash\nif\n```", "syntax error"),
        ("<!-- not run: because -->\n```bash\nif\n```", "syntax error"),
        ("```python\nassert 1 == 2\n```", "AssertionError"),
        ("```json\n{\n```", "JSONDecodeError"),
        ("```perl\n```", "nobody runs 'perl'"),
        ("```\nstreammerge verify A | grep never\n```", "exit code 1"),
    ],
)
def test_a_block_that_is_wrong_is_noticed(text: str, wrong: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    ((_, found),) = run_page(page)
    assert found is not None
    assert wrong in found


# ---------------------------------------------------------------------------------------------
# The site


class Page(HTMLParser):
    """What a page of the site points to, loads, and can be pointed to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("id"):
            self.anchors.add(str(given["id"]))
        if tag == "a" and given.get("href"):
            self.links.append(str(given["href"]))
        if tag in {"script", "img", "link", "iframe"}:
            found = given.get("src") or given.get("href")
            if found and given.get("rel") != "canonical":
                self.loads.append(found)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as scripts/docs builds it."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    found = subprocess.run(
        [*command, str(DOCS), str(out)], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    return out


def test_every_page_is_in_the_navigation(site: Path) -> None:
    front = Page((site / "index.html").read_text(encoding="utf-8"))
    linked = {link.partition("#")[0] for link in front.links}
    for page in DOCS.glob("*.md"):
        if page.stem != "index":
            assert f"{page.stem}.html" in linked


def test_every_link_and_anchor_leads_somewhere(site: Path) -> None:
    pages = {
        path: Page(path.read_text(encoding="utf-8"))
        for path in site.rglob("*.html")
        if path.name not in {"genindex.html", "search.html", "py-modindex.html"}
    }
    assert len(pages) > 20
    lost = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchors = pages[there].anchors if there in pages else None
            if not there.exists() or (
                parts.fragment and anchors is not None and unquote(parts.fragment) not in anchors
            ):
                lost.append(f"{path.relative_to(site)}: {link}")
    assert not lost, "\n".join(lost)


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        for loaded in Page(path.read_text(encoding="utf-8")).loads:
            assert not urlsplit(loaded).netloc, f"{path.name}: {loaded}"
    for path in site.rglob("*.css"):
        assert not re.findall(r"url\(\s*['\"]?(?:https?:)?//", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [REPOSITORY / "README.md", REPOSITORY / "SECURITY.md"], ids=named)
def test_links_of_pages_outside_the_site(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not urlsplit(link).scheme:
            assert (page.parent / link.partition("#")[0]).exists(), link


@pytest.mark.parametrize("name", main.commands)
def test_the_reference_has_every_command(name: str) -> None:
    assert f"{{command-help}} {name}\n" in (DOCS / "command-line.md").read_text(encoding="utf-8")


def test_the_reference_has_every_public_name(site: Path) -> None:
    import streammerge

    anchors = Page((site / "api.html").read_text(encoding="utf-8")).anchors
    for name in streammerge.__all__:
        found = getattr(streammerge, name)
        assert {f"streammerge.{name}", f"{found.__module__}.{name}"} & anchors, name


# ---------------------------------------------------------------------------------------------
# Pages that change the package: a test follows them in a copy of it


def insert(source: str, place: str, text: str) -> str:
    """Put lines at the end of a table that a module defines, or after its imports."""
    tree = ast.parse(source)
    lines = source.splitlines(keepends=True)
    if place == "imports":
        end = max(node.end_lineno or 0 for node in tree.body if isinstance(node, ast.ImportFrom))
        return "".join([*lines[:end], text, *lines[end:]])
    (table,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == place
    )
    if isinstance(table, ast.DictComp):
        table = table.generators[0].iter
    assert table is not None
    end = (table.end_lineno or 0) - 1  # the line of its closing bracket
    return "".join([*lines[:end], textwrap.indent(as_entries(text), "    "), *lines[end:]])


def replace(source: str, name: str, text: str) -> str:
    """Put lines in the place of the function or the value that a module calls so."""
    (found,) = (node for node in ast.parse(source).body if name in names_defined(node))
    lines = source.splitlines(keepends=True)
    return "".join([*lines[: found.lineno - 1], text, *lines[found.end_lineno :]])


def names_defined(node: ast.stmt) -> set[str]:
    match node:
        case ast.FunctionDef(name=name):
            return {name}
        case ast.Assign(targets=targets):
            return {ast.unparse(target) for target in targets}
    return set()


def as_entries(text: str) -> str:
    """Expressions one after another with commas behind them, which a formatter takes away."""
    try:
        statements = ast.parse(text).body
    except SyntaxError:  # the entry of a dictionary
        return text
    return "".join(f"{ast.get_source_segment(text, statement)},\n" for statement in statements)


def copy_package(folder: Path) -> None:
    """Copy the package and its tests."""
    for name in ("streammerge", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, folder / name, ignore=ignored)
    shutil.copy(REPOSITORY / "pyproject.toml", folder)


def follow(page: Path, folder: Path) -> None:
    """Do to a copy of the package and its tests what a page says."""
    for block in blocks_of(page):
        if block.file:
            (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.file).write_text(block.text)
        elif block.into or block.instead:
            path, _, place = (block.into or block.instead or "").partition(" ")
            change = insert if block.into else replace
            there = folder / path
            there.write_text(change(there.read_text(), place, block.text))


def run_tests(folder: Path, *arguments: str) -> str:
    """What pytest says of the tests in a copy of the package; they have to pass."""
    path = os.pathsep.join([str(folder), str(folder / "tests")])
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def test_a_rule_and_a_format_are_added_as_the_pages_say(tmp_path: Path) -> None:
    copy_package(tmp_path)
    follow(DOCS / "add-a-rule.md", tmp_path)
    follow(DOCS / "add-a-format.md", tmp_path)
    same_bytes = "tests/test_same_bytes.py::test_same_bytes[normal-average]"
    kept = "tests/test_plans.py::test_a_budget_decides_what_is_kept_and_nothing_else"
    layers = "tests/test_layers.py::test_every_import_goes_down"
    shown = run_tests(
        tmp_path,
        "tests/test_plain.py",
        *(layers, same_bytes, f"{kept}[average_svd]"),
    )
    assert "4 passed" in shown
