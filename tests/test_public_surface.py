"""What users can name: the package's names, its errors, and the command line."""

from __future__ import annotations

import inspect
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import streammerge
from clocks import processor_seconds
from streammerge import errors, extend

PUBLIC = [
    "Adapter",
    "Comparison",
    "Measured",
    "MergeResult",
    "Plan",
    "Report",
    "StreammergeError",
    "compare",
    "compress",
    "consolidate",
    "measure",
    "merge",
    "open_adapter",
    "plan",
    "push",
    "report",
    "verify",
]
COMMANDS = {
    "compare",
    "completion",
    "compress",
    "consolidate",
    "inspect",
    "merge",
    "methods",
    "plan",
    "push",
    "report",
    "run",
    "verify",
}
LONGEST_HELP_SECONDS = 0.3

INSTALLED = Path(sys.executable).with_name("streammerge")
COMMAND = [str(INSTALLED)] if INSTALLED.exists() else [sys.executable, "-m", "streammerge.cli"]

ERRORS = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and value.__module__ == errors.__name__
]


def python(source: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", source]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def cli(*arguments: str) -> str:
    """What the command prints; it has to succeed."""
    found = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return found.stdout


class TestNames:
    def test_all_is_sorted_and_complete(self) -> None:
        assert streammerge.__all__ == PUBLIC
        shown = python("import streammerge; print(*dir(streammerge))").split()
        assert [name for name in shown if not name.startswith("_")] == PUBLIC

    @pytest.mark.parametrize("name", PUBLIC)
    def test_a_name_has_a_docstring_of_its_own(self, name: str) -> None:
        found = getattr(streammerge, name)
        assert found.__name__ == name
        assert found.__doc__
        assert not found.__doc__.startswith(f"{name}("), "a dataclass without a docstring"

    def test_no_module_has_a_public_name(self) -> None:
        """Importing such a module would put it in the place of the function."""
        modules = {module.name for module in pkgutil.iter_modules(streammerge.__path__)}
        assert not modules & set(PUBLIC)

    @pytest.mark.parametrize("first", ["", "import streammerge.api", "streammerge.merge"])
    def test_a_call_is_a_call_whatever_was_loaded_before(self, first: str) -> None:
        source = f"import streammerge\n{first}\nprint(callable(streammerge.plan))"
        assert python(source).strip() == "True"

    def test_importing_the_package_loads_nothing_heavy(self) -> None:
        assert loaded_by("import streammerge") == set()

    def test_an_unknown_name_is_an_attribute_error(self) -> None:
        with pytest.raises(AttributeError, match="no attribute 'merg'"):
            streammerge.merg  # noqa: B018  # the access is the test

    def test_plan_takes_what_merge_takes(self) -> None:
        merge = inspect.signature(streammerge.merge).parameters
        plan = inspect.signature(streammerge.plan).parameters
        only_merge = {"on_event", "overwrite", "private", "push", "resume", "time_limit"}
        assert [name for name in merge if name not in only_merge] == [
            name for name in plan if name not in only_merge
        ]
        assert all(plan[name].default == merge[name].default for name in plan if name != "output")

    def test_compress_takes_what_merge_takes(self) -> None:
        """But for what goes with several adapters, or with other rules."""
        merge = inspect.signature(streammerge.merge).parameters
        compress = inspect.signature(streammerge.compress).parameters
        both = [name for name in compress if name not in ("adapter", "rank")]
        assert both == [name for name in merge if name in both]
        assert all(compress[name].default == merge[name].default for name in both)
        assert merge.keys() - compress.keys() == {
            *("adapters", "method", "weights", "density", "parameters", "normalize", "space"),
            *(
                "majority_sign",
                "threshold_scope",
                "clamp",
                "seed",
                "strict_base",
                "push",
                "private",
            ),
        }


class TestExtend:
    def test_what_the_author_of_a_rule_needs(self) -> None:
        assert extend.__all__ == ["Declaration", "Method", "Parameter", "RuleSpec", "Tile"]
        assert dir(extend) == extend.__all__
        for name in extend.__all__:
            found = getattr(extend, name)
            assert found.__name__ == name
            assert found.__doc__
            assert not found.__doc__.startswith(f"{name}("), "a dataclass without a docstring"

    def test_a_declaration_needs_nothing_heavy(self) -> None:
        assert loaded_by("from streammerge.extend import Declaration, Method, RuleSpec") == set()

    def test_an_unknown_name_is_an_attribute_error(self) -> None:
        with pytest.raises(AttributeError, match="no attribute 'Tiles'"):
            extend.Tiles  # noqa: B018  # the access is the test

    def test_help_does_not_look_for_entry_points(self) -> None:
        source = (
            "import sys\n"
            "from streammerge.cli import main\n"
            "try: main(['--help'])\n"
            "except SystemExit as stop: assert not stop.code, stop.code\n"
            "print()\nprint('importlib.metadata' in sys.modules)"
        )
        assert python(source).splitlines()[-1] == "False"


class TestErrors:
    @pytest.mark.parametrize("error", ERRORS)
    def test_every_error_is_in_the_tree(self, error: type) -> None:
        assert issubclass(error, errors.StreammergeError)
        assert error.__doc__

    def test_the_drawing_is_the_tree(self) -> None:
        drawn = dict(drawn_tree(errors.__doc__ or ""))
        assert drawn == {error.__name__: error.__bases__[0].__name__ for error in ERRORS} | {
            "StreammergeError": None
        }

    @pytest.mark.parametrize("error", ERRORS)
    def test_the_exit_code_says_whether_work_was_begun(self, error: type) -> None:
        others = {errors.StoppedError: 75, errors.PublishedError: 0}
        expected = 2 if issubclass(error, errors.RefusedError) else others.get(error, 1)
        assert error.exit_code == expected


def drawn_tree(docstring: str) -> Iterator[tuple[str, str | None]]:
    """Each error and its parent, from the lines of a drawing with box characters."""
    parents: list[str] = []
    for line in docstring.splitlines():
        found = re.match(r"((?:│   |    |├── |└── )*)(\w+Error)\b", line)
        if found:
            depth = len(found[1]) // 4
            yield found[2], parents[depth - 1] if depth else None
            parents[depth:] = [found[2]]


class TestCommandLine:
    def test_help_is_instant(self) -> None:
        took = processor_seconds(lambda: cli("--help"), times=5)
        assert min(took) < LONGEST_HELP_SECONDS, took

    def test_help_loads_nothing_heavy(self) -> None:
        source = (
            "import sys\n"
            "from streammerge.cli import main\n"
            "sys.argv = ['streammerge', '--help']\n"
            "try: main()\n"
            "except SystemExit as stop: assert not stop.code, stop.code\n"
        )
        assert loaded_by(source) == set()

    def test_help_names_every_command_and_what_it_does(self) -> None:
        described = dict(re.findall(r"^  (\w+)  +(\w.*)$", listed_commands(), flags=re.MULTILINE))
        assert described.keys() >= COMMANDS

    @pytest.mark.parametrize("command", sorted(COMMANDS))
    def test_every_command_has_help(self, command: str) -> None:
        shown = cli(command, "--help")
        usage, _, body = shown.partition("\n\n")
        assert command in usage
        assert body.strip()
        bare = re.findall(r"^  (-\S+(?: [A-Z_|\[\]a-z]+)?)\s*$(?!\n {10})", shown, re.MULTILINE)
        assert not bare, f"options without a word on them: {bare}"

    def test_the_options_of_merge_are_those_of_the_call(self) -> None:
        shown = cli("merge", "--help")
        arguments = inspect.signature(streammerge.merge).parameters.keys() - {
            "adapters",
            "on_event",
        }
        missing = {name for name in arguments if f"--{name.replace('_', '-')}" not in shown}
        assert not missing

    def test_the_options_of_compress_are_those_of_the_call(self) -> None:
        shown = cli("compress", "--help")
        arguments = inspect.signature(streammerge.compress).parameters.keys()
        named = {name for name in arguments if f"--{name.replace('_', '-')}" in shown}
        assert arguments - named == {"adapter", "on_event"}

    def test_a_usage_error_exits_with_2(self) -> None:
        found = subprocess.run([*COMMAND, "merg"], capture_output=True, text=True, check=False)
        assert found.returncode == 2
        assert "merg" in found.stderr
        assert "Traceback" not in found.stderr


def listed_commands() -> str:
    return cli("--help").partition("Commands:")[2]


def loaded_by(source: str) -> set[str]:
    """Which of the heavy libraries a fresh interpreter has loaded after this source."""
    heavy = {"torch", "numpy", "dask", "safetensors", "huggingface_hub", "yaml"}
    found = python(f"{source}\nimport sys\nprint()\nprint(*sys.modules)")
    return heavy & set(found.splitlines()[-1].split())
