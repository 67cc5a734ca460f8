"""Rules from other distributions: docs/add-a-rule.md is followed, and what goes wrong is told."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

import forking
import streammerge
from capped import run_cli
from clusters import LocalCluster, Process, cluster_of, kill, wait_until
from doc_blocks import blocks_of
from making import WEIGHTS, linear, write_adapter
from streammerge import catalog, errors, events, registry, rules
from streammerge.recipe_file import read_recipe

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "add-a-rule.md"
ORIGIN = "streammerge-strongest 1.0"
LAYERS = {"model.up": linear(300, 200, 4), "model.down": linear(90, 300, 4)}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The distribution that the page shows, as files."""
    folder = tmp_path_factory.mktemp("project")
    for block in blocks_of(PAGE):
        if block.file and block.file.startswith("strongest/"):
            path = folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
    return folder / "strongest"


@pytest.fixture(scope="module")
def installed(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It, built and installed by pip into a folder of its own, without a network."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"),
            *("--no-build-isolation", "--disable-pip-version-check", "--target", folder, project),
        ],
        check=True,
        capture_output=True,
    )
    return folder


@pytest.fixture
def with_it(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """It, on the path of this process and of those that it starts."""
    with on_path(monkeypatch, installed):
        yield


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    return [str(write_adapter(tmp_path / f"in{i}", LAYERS, seed=i)) for i in range(3)]


@contextmanager
def on_path(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> Iterator[None]:
    """Have distributions on the path of this process, and of those that it starts meanwhile."""
    ours = (REPOSITORY, REPOSITORY / "tests")
    with monkeypatch.context() as patch:
        for folder in folders:
            patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (*folders, *ours))))
        forget()
        try:
            yield
        finally:
            forget()


def forget() -> None:
    """Have entry points looked for, and modules and functions loaded, again."""
    for module in [name for name in sys.modules if name.startswith(("odd_", "streammerge_"))]:
        del sys.modules[module]
    registry.brought.cache_clear()
    rules.function_of.cache_clear()


def run(*arguments: str, expected: int = 0) -> subprocess.CompletedProcess[str]:
    found = forking.run(["-m", "streammerge.cli", *arguments])
    assert found.returncode == expected, found.stdout + found.stderr
    return found


def distribution(
    folder: Path,
    name: str,
    entries: dict[str, str],
    *,
    version: str = "1.0",
    modules: dict[str, str] | None = None,
) -> Path:
    """Write what an installed distribution is on the path: metadata and modules."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"{entry} = {value}" for entry, value in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(["[streammerge.rules]", *lines, ""]))
    for module, text in (modules or {}).items():
        (folder / f"{module}.py").write_text(text)
    return folder


def declaring(
    rule: str = "odd",
    method: str = "odd_svd",
    *,
    function: str = "odd_rule:odd",
    spec: str = "",
    space: str = "delta",
    of: str | None = None,
) -> str:
    """The text of a module that declares a rule."""
    return (
        "from streammerge.extend import Declaration, Method, Parameter, RuleSpec\n"
        "IT = Declaration(\n"
        f"    RuleSpec({rule!r}, **({{'kind': 'element-wise'}} | dict({spec})), summary='s',\n"
        "             source='t'),\n"
        f"    (Method({method!r}, {of or rule!r}, {space!r}),),\n"
        f"    {function!r},\n"
        ")\n"
    )


# ---------------------------------------------------------------------------------------------
# The page


@pytest.mark.usefixtures("with_it")
def test_the_page_s_own_test_passes(project: Path) -> None:
    pytest_passes(project, str(project / "test_strongest.py"), passed=1)


@pytest.mark.long
@pytest.mark.usefixtures("with_it")
def test_it_passes_what_every_method_passes() -> None:
    names = ("strongest", "strongest_svd")
    same = [f"tests/test_same_bytes.py::test_same_bytes[normal-{name}]" for name in names]
    plans = "tests/test_plans.py::test_a_budget_decides_what_is_kept_and_nothing_else"
    cluster = "tests/test_cluster.py::test_three_workers_make_the_same_bytes"
    memory = [
        f"tests/test_memory.py::test_every_task_keeps_its_projection[{name}]" for name in names
    ]
    chosen = [*same, f"{plans}[strongest_svd]", f"{cluster}[strongest_svd]", *memory]
    pytest_passes(REPOSITORY, *chosen, passed=len(chosen))


def pytest_passes(folder: Path, *arguments: str, passed: int) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert f"{passed} passed" in found.stdout


# ---------------------------------------------------------------------------------------------
# It is like any other


@pytest.mark.usefixtures("with_it")
def test_it_is_listed_helped_and_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = {entry["method"]: entry for entry in json.loads(run("methods", "--json").stdout)}
    assert list(listed) == [*catalog.METHODS, "strongest", "strongest_svd"]
    assert listed["strongest_svd"]["space"] == "delta"
    assert listed["strongest_svd"]["distribution"] == ORIGIN
    assert listed["ties"]["distribution"] is None
    assert f"of {ORIGIN}, not of streammerge" in run("methods").stdout
    assert "strongest_svd" in "".join(run("merge", "--help").stdout.split())
    monkeypatch.setenv("_STREAMMERGE_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "streammerge merge --method stro")
    monkeypatch.setenv("COMP_CWORD", "3")
    source = "from streammerge.cli import main; main(prog_name='streammerge')"
    shown = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=False
    )
    assert shown.stdout.split() == ["plain,strongest", "plain,strongest_svd"]


@pytest.mark.usefixtures("with_it")
def test_a_name_that_is_close_is_told(sources: list[str]) -> None:
    found = run("plan", *sources, "--method", "strongets_svd", expected=2)
    assert "did you mean strongest_svd?" in found.stderr


@pytest.mark.usefixtures("with_it")
def test_from_a_plan_to_a_report(sources: list[str], tmp_path: Path) -> None:
    """The whole way, under a hard cap of the smallest budget, and again by its own recipe."""
    out, again = tmp_path / "out", tmp_path / "again"
    asked = [*sources, "--method", "strongest_svd", "--weights", "2,-1,0.5"]
    planned = run("plan", *asked).stdout
    assert f"strongest_svd: rule strongest of {ORIGIN}, space delta" in planned
    refused = run("plan", *asked, "--max-memory", "1MiB", expected=2).stderr
    smallest = int(refused.partition("(")[2].partition(" bytes)")[0].replace(",", ""))
    arguments = ["merge", *asked, "-o", str(out), "--max-memory", str(smallest)]
    capped = run_cli(arguments, cap_bytes=smallest)
    assert capped.returncode == 0, capped.stderr
    assert capped.peak_bytes <= smallest
    record = json.loads((out / "streammerge.json").read_text())
    assert (record["rule"], record["rule_origin"]) == ("strongest", ORIGIN)
    run("verify", str(out))
    run("run", str(out / "streammerge_config.yml"), "-o", str(again))
    assert (again / WEIGHTS).read_bytes() == (out / WEIGHTS).read_bytes()
    page = tmp_path / "page.html"
    run("report", str(out), "-o", str(page))
    assert ORIGIN in page.read_text()


@pytest.mark.usefixtures("with_it")
def test_no_declaration_loads_torch() -> None:
    source = (
        "import sys\nfrom streammerge.registry import METHODS\n"
        "assert 'strongest' in list(METHODS)\nassert 'torch' not in sys.modules\n"
        "from streammerge.extend import Tile\nassert 'torch' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", source], check=True)


# ---------------------------------------------------------------------------------------------
# Its version is part of what must be the same


def other_version(installed: Path, folder: Path, version: str) -> Path:
    """A copy of it that says that it is of another version."""
    shutil.copytree(installed, folder)
    (info,) = folder.glob("*.dist-info")
    metadata = info / "METADATA"
    metadata.write_text(metadata.read_text().replace("Version: 1.0\n", f"Version: {version}\n"))
    return folder


def test_resuming_under_another_version_is_refused(
    installed: Path, sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def merge(**options: Any) -> None:
        streammerge.merge(
            sources, tmp_path / "out", method="strongest_svd", max_memory="8GiB", **options
        )

    def end(event: events.Event) -> None:
        if isinstance(event, events.TaskDone):
            raise KeyboardInterrupt

    with on_path(monkeypatch, installed), pytest.raises(KeyboardInterrupt):
        merge(on_event=end)
    other = other_version(installed, tmp_path / "other", "1.1")
    with on_path(monkeypatch, other), pytest.raises(errors.ResumeError) as refused:
        merge(resume=True)
    why = f"its rule was of {ORIGIN}, and is of streammerge-strongest 1.1"
    assert refused.value.changes == (why,)
    resumed: list[events.Event] = []
    with on_path(monkeypatch, installed):
        merge(resume=True, on_event=resumed.append)
    assert any(isinstance(event, events.Resumed) for event in resumed)


def test_workers_that_lack_it_or_have_another_are_refused(
    installed: Path, sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = other_version(installed, tmp_path / "other", "0.9")
    asked = [*sources, "--method", "strongest_svd"]
    with on_path(monkeypatch, installed):
        run("merge", *asked, "-o", str(tmp_path / "here"))
    with cluster_of(tmp_path / "cluster", 0) as cluster:

        def merge(name: str, *folders: Path, expected: int = 0) -> str:
            """Merge on a worker that has these distributions on its path."""
            with monkeypatch.context() as patch:
                for folder in folders:
                    patch.syspath_prepend(folder)
                worker = add_worker(cluster)
            with on_path(monkeypatch, installed):
                words = ["-o", str(tmp_path / name), "--scheduler", cluster.address]
                found = run("merge", *asked, *words, expected=expected)
            kill(worker)
            return found.stderr

        lacking = merge("lacking", expected=2)
        assert f"lacks {ORIGIN}, which brings the rule strongest" in lacking
        another = merge("another", other, expected=2)
        assert f"has the rule strongest of streammerge-strongest 0.9, not of {ORIGIN}" in another
        merge("there", installed)
    files = [(tmp_path / name / WEIGHTS).read_bytes() for name in ("here", "there")]
    assert files[0] == files[1]


def add_worker(cluster: LocalCluster) -> Process:
    before = cluster.log().count("Registered to:")
    worker = cluster.add_worker()
    wait_until(lambda: cluster.log().count("Registered to:") > before)
    return worker


# ---------------------------------------------------------------------------------------------
# What goes wrong


def problems_of(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> list[str]:
    with on_path(monkeypatch, *folders):
        return [str(one) for one in registry.problems()]


def test_a_broken_one_disturbs_nobody_else(
    sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = {"odd": "odd_declared:IT"}
    broken = distribution(
        tmp_path / "site", "odd-rules", entries, modules={"odd_declared": "import nowhere_at_all\n"}
    )
    reason = (
        "rule odd of odd-rules 1.0 cannot be used: it could not be loaded (ModuleNotFoundError: "
        "No module named 'nowhere_at_all')"
    )
    with on_path(monkeypatch, broken):
        run("merge", *sources, "-o", str(tmp_path / "out"), "--method", "svd")
        listed = run("methods", "--json")
        assert reason in listed.stderr
        assert len(json.loads(listed.stdout)) == len(catalog.METHODS)
        assert (
            f"method odd: {reason}" in run("plan", *sources, "--method", "odd", expected=2).stderr
        )
        # What else it would have brought is not known.
        unknown = run("plan", *sources, "--method", "odd_svd", expected=2).stderr
        assert "unknown method 'odd_svd'" in unknown
        assert reason in unknown


def test_a_merge_by_one_of_our_own_loads_no_declaration(
    sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"from pathlib import Path\nPath({str(tmp_path / 'loaded')!r}).touch()\n{declaring()}"
    folder = distribution(
        tmp_path / "site", "odd-rules", {"odd": "odd_declared:IT"}, modules={"odd_declared": text}
    )
    with on_path(monkeypatch, folder):
        run("--help")
        run("merge", *sources, "-o", str(tmp_path / "out"), "--method", "ties", "--density", "0.5")
        assert not (tmp_path / "loaded").exists()
        run("methods")
        assert (tmp_path / "loaded").exists()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("IT = 3\n", "odd_declared:IT is no Declaration, but int"),
        ("", "it could not be loaded (AttributeError:"),
        (declaring("ties", "odd_svd"), "the rule ties is streammerge's own"),
        (declaring("odd", "ties_svd"), "the method ties_svd is streammerge's own"),
        (declaring("Odd", of="Odd"), "rule 'Odd' is not of lower-case letters"),
        (declaring(of="even"), "the method odd_svd is of the rule even"),
        (declaring(space="nowhere"), "is in space nowhere, where no rule can be"),
        (declaring(space="exact"), "is in space exact, where no rule can be"),
        (declaring(function="odd_rule"), "'odd_rule', is not of the form module:function"),
        (declaring(spec="kind='spectral'"), "its kind is spectral"),
        (declaring(spec="sparsity='some'"), "sparsity is 'some'"),
        (declaring(spec="sparsity='middle'"), "takes a parameter gamma"),
        (declaring(spec="sparsity='ranked'"), "takes a parameter epsilon"),
        (declaring(spec="tile_buffers=-1"), "tile_buffers at least 0"),
        (
            declaring(spec="parameters=(Parameter('weight', 0.5, 0, 1, 'x'),)"),
            "no parameter can be called 'weight'",
        ),
        (
            declaring(spec="parameters=(Parameter('share', 5, 0, 1, 'x'),)"),
            "the default of share is out of its range",
        ),
    ],
)
def test_a_wrong_declaration_is_told(
    text: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = {"odd": "odd_declared:IT"}
    folder = distribution(tmp_path, "odd-rules", entries, modules={"odd_declared": text})
    (found,) = problems_of(monkeypatch, folder)
    assert "odd-rules 1.0 cannot be used: " in found
    assert why in found


@pytest.mark.parametrize(
    ("rule", "method", "clash"),
    [("odd", "even_svd", "the rule odd"), ("even", "odd_svd", "the method odd_svd")],
)
def test_a_name_that_two_want_is_nobody_s(
    rule: str,
    method: str,
    clash: str,
    sources: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "site"
    distribution(folder, "one", {"odd": "one_rule:IT"}, modules={"one_rule": declaring()})
    text = declaring(rule, method)
    distribution(folder, "two", {"o": "two_rule:IT"}, version="2.0", modules={"two_rule": text})
    with on_path(monkeypatch, folder):
        told = run("plan", *sources, "--method", "odd_svd", expected=2).stderr
        assert (
            f"{clash} is brought by one 1.0 (entry point odd) and two 2.0 (entry point o)" in told
        )
        assert run("methods").stderr.count(clash) == 2
        run("plan", *sources, "--method", "svd")


@pytest.mark.parametrize(
    ("function", "text", "why"),
    [
        ("odd_rule:odd", "import nowhere_at_all\n", "cannot be loaded (ModuleNotFoundError"),
        ("odd_rule:odd", "", "cannot be loaded (AttributeError"),
        ("odd_rule:odd", "odd = 3\n", "is no function, but int"),
    ],
)
def test_a_function_that_is_not_there_is_refused_before_any_work(
    function: str,
    text: str,
    why: str,
    sources: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modules = {"odd_declared": declaring(function=function), "odd_rule": text}
    entries = {"odd": "odd_declared:IT"}
    with on_path(monkeypatch, distribution(tmp_path / "s", "odd-rules", entries, modules=modules)):
        words = ["-o", str(tmp_path / "out"), "--method", "odd_svd"]
        told = run("merge", *sources, *words, expected=2).stderr
        assert "rule odd of odd-rules 1.0: its function odd_rule:odd" in told
        assert why in told
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("    raise KeyError('nothing')\n", "KeyError: 'nothing'"),
        ("    return tile.out.clone()\n", "TypeError: the answer is not in tile.out"),
        ("    return next(iter(tile.tensors()))\n", "TypeError: the answer is not in tile.out"),
        ("    return tile.out[:1]\n", "TypeError: the answer is not in tile.out"),
    ],
)
def test_a_function_that_fails_is_told_with_its_distribution(
    body: str, why: str, sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = {"odd_declared": declaring(), "odd_rule": f"def odd(tile):\n{body}"}
    entries = {"odd": "odd_declared:IT"}
    with on_path(monkeypatch, distribution(tmp_path / "s", "odd-rules", entries, modules=modules)):
        words = ["-o", str(tmp_path / "out"), "--method", "odd_svd"]
        told = run("merge", *sources, *words, expected=1).stderr
    assert "rule odd of odd-rules 1.0 has failed on model." in told
    assert why in told
    assert "Traceback" not in told


@pytest.mark.usefixtures("with_it")
def test_a_failure_that_is_none_of_its_own_keeps_its_name(
    sources: list[str], tmp_path: Path
) -> None:
    path = Path(sources[0]) / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-4:] = b"\x00\x00\xc0\x7f"  # a NaN
    path.write_bytes(data)
    with pytest.raises(errors.NonFiniteError):
        streammerge.merge(sources, tmp_path / "out", method="strongest_svd", max_memory="4GiB")


# ---------------------------------------------------------------------------------------------
# Parameters


def test_a_parameter_that_a_rule_brings(
    sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = "parameters=(Parameter('share', 0.5, 0, 1, 'of the sum that is kept'),)"
    body = (
        "def odd(tile):\n    tile.out.zero_()\n    for x in tile.tensors():\n"
        "        tile.out.add_(x, alpha=tile.parameters['share'])\n    return tile.out\n"
    )
    modules = {"odd_declared": declaring(spec=spec), "odd_rule": body}
    entries = {"odd": "odd_declared:IT"}
    recipe = tmp_path / "recipe.yml"
    models = ", ".join(f"{{model: {path}}}" for path in sources)
    recipe.write_text(
        f"merge_method: odd_svd\nmodels: [{models}]\nparameters: {{share: 0.25}}\nrank: 12\n"
    )
    with on_path(monkeypatch, distribution(tmp_path / "s", "odd-rules", entries, modules=modules)):
        assert read_recipe(recipe).options["parameters"] == {"share": 0.25}
        assert "share (odd):" in run("methods").stdout
        run("run", str(recipe), "-o", str(tmp_path / "by-file"))
        words = ["--method", "odd_svd", "--parameters", "share=0.25", "--rank", "12"]
        run("merge", *sources, *words, "-o", str(tmp_path / "by-option"))
        refused = run("plan", *sources, *words[:2], "--parameters", "shore=1", expected=2)
        assert "takes share" in refused.stderr
        recipe.write_text(recipe.read_text().replace("share:", "shere:"))
        told = run("run", str(recipe), "-o", str(tmp_path / "no"), expected=2).stderr
        assert "did you mean share?" in told
    made = [load_file(tmp_path / name / WEIGHTS) for name in ("by-file", "by-option")]
    assert all((made[0][name] == made[1][name]).all() for name in made[0])


# ---------------------------------------------------------------------------------------------
# One way to all of them


def test_nothing_in_the_package_goes_past_the_registry() -> None:
    """The catalog's own tables lack what others bring."""
    tables = {"RULES", "METHODS", "PARAMETERS"}
    for path in (REPOSITORY / "streammerge").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "streammerge.catalog":
                assert not tables & {alias.name for alias in node.names}, path


def test_the_catalog_and_the_functions_agree() -> None:
    tables = rules.FUNCTIONS | rules.COEFFICIENTS | rules.SPECTRAL
    assert tables.keys() == catalog.RULES.keys()
