"""Habits of the command line: completion, dry runs, JSON for everything, colours, widths."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from clocks import processor_seconds
from making import contents, linear, write_adapter
from streammerge.catalog import METHODS
from streammerge.cli import main
from streammerge.cli.program import Sectioned, section
from streammerge.cli.tables import cut, lay_out, lay_out_facts

COMMAND = [sys.executable, "-m", "streammerge.cli"]
PATIENCE = 120.0
NAMES = [f"model.layers.{i}.self_attn.{side}_proj" for i in range(2) for side in "qv"]
LONGEST_COMPLETION_SECONDS = 0.3


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("adapters")
    layers = {name: linear(64, 48, 4) for name in NAMES}
    return [str(write_adapter(folder / name, layers, seed=i)) for i, name in enumerate("ABC")]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
        env=os.environ | environment,
    )


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(main, arguments)


def on_a_terminal(*arguments: str, columns: int = 80, **environment: str) -> str:
    """What a command shows in this process, on a terminal of so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    plain = {"TERM": "xterm", "NO_COLOR": "", "FORCE_COLOR": "", "CLICOLOR": "", "COLUMNS": ""}
    shown: list[bytes] = []
    reading = threading.Thread(target=_read_all, args=(ours, shown))
    reading.start()
    with (
        pytest.MonkeyPatch.context() as patch,
        os.fdopen(theirs, "w", buffering=1, encoding="utf-8") as stream,
        suppress(SystemExit),
    ):
        for name, value in (plain | environment).items():
            patch.setenv(name, value)
        for name in ("stdout", "stderr"):
            patch.setattr(sys, name, stream)
        patch.setattr(sys, "argv", ["streammerge", *arguments])
        main(prog_name="streammerge")
    reading.join(PATIENCE)
    os.close(ours)
    return b"".join(shown).decode()


def _read_all(descriptor: int, shown: list[bytes]) -> None:
    with suppress(OSError):  # Linux says so when the other side is closed
        while data := os.read(descriptor, 65536):
            shown.append(data)


# ---------------------------------------------------------------------------------------------
# Help


def test_options_stand_under_headings() -> None:
    shown = invoke("merge", "--help").stdout
    headings = re.findall(r"^(\S.*):$", shown, re.MULTILINE)
    assert headings == [
        *("What to make", "What to take", "Memory and machine", "Output", "Run", "Other")
    ]
    output = shown.partition("\nOutput:")[2].partition("\nRun:")[0]
    assert output.split()[:2] == ["-o,", "--output"], "what is required comes first"
    assert "--overwrite" in output


def test_an_option_without_a_heading_is_not_lost() -> None:
    @click.command(cls=Sectioned)
    @section("Some", click.option("--one", help="First."))
    @click.option("--two", help="Second.")
    def command(**_: object) -> None:
        """Do it."""

    shown = CliRunner().invoke(command, ["--help"]).stdout
    assert re.search(r"Some:\n  --one.*First\.\n\nOther:\n  --two.*Second\.\n  --help", shown)


# ---------------------------------------------------------------------------------------------
# Completion


def proposed(*words: str) -> list[str]:
    """What a shell is given for the last of the words: 'plain,WORD', 'file,', 'dir,'."""
    asked = {
        "_STREAMMERGE_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["streammerge", *words]),
        "COMP_CWORD": str(len(words)),
    }
    found = CliRunner().invoke(main, prog_name="streammerge", env=asked)
    assert found.stderr == ""
    return found.stdout.splitlines()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ver"], ["plain,verify"]),
        (["merge", "--method", "ti"], ["plain,ties", "plain,ties_svd"]),
        (["plan", "--space", "f"], ["plain,factor"]),
        (["merge", "--majority-sign", ""], ["plain,total", "plain,frequency"]),
        (["merge", "--scaling", "t"], ["plain,tensor"]),
        (["merge", "--dtype", "b"], ["plain,bfloat16"]),
        (["merge", "--io", "p"], ["plain,pread"]),
        (["merge", "--dens"], ["plain,--density"]),
        (["merge", "A", "B"], ["file,B"]),
        (["merge", "A", "-o", "ou"], ["file,ou"]),
        (["completion", ""], ["plain,bash", "plain,zsh", "plain,fish"]),
    ],
    ids=" ".join,
)
def test_what_is_proposed(words: list[str], expected: list[str]) -> None:
    assert proposed(*words) == expected


def test_every_method_is_proposed() -> None:
    assert proposed("merge", "--method", "") == [f"plain,{name}" for name in METHODS]


def test_bash_completes_with_the_script() -> None:
    script = run("completion", "bash")
    assert script.returncode == 0
    asked = (
        f"{script.stdout}\nCOMP_WORDS=(streammerge merge --method magnitude_prune_); COMP_CWORD=3\n"
        "_streammerge_completion streammerge\necho ${COMPREPLY[@]}"
    )
    # The script calls the program by its name.
    asked = f"streammerge() {{ {' '.join(COMMAND)}; }}; export -f streammerge\n" + asked
    asked = asked.replace("_STREAMMERGE_COMPLETE=bash_complete $1", _BASH)
    found = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=False)
    assert found.stdout.split() == ["magnitude_prune_svd"], found.stderr


_BASH = f"_STREAMMERGE_COMPLETE=bash_complete {' '.join(COMMAND)}"


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_scripts_for_other_shells(shell: str) -> None:
    shown = invoke("completion", shell)
    assert shown.exit_code == 0
    assert f"_STREAMMERGE_COMPLETE={shell}_complete" in shown.stdout


def test_completion_is_instant() -> None:
    asked = {"_STREAMMERGE_COMPLETE": "bash_complete", "COMP_CWORD": "3"}

    def complete() -> None:
        found = run(COMP_WORDS="streammerge merge --method ti", **asked)
        assert found.stdout == "plain,ties\nplain,ties_svd\n"

    took = processor_seconds(complete, times=5)
    assert min(took) < LONGEST_COMPLETION_SECONDS, took


# ---------------------------------------------------------------------------------------------
# --dry-run


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["text", "json"])
def test_a_dry_run_prints_what_plan_prints(
    more: list[str], adapters: list[str], tmp_path: Path
) -> None:
    out = str(tmp_path / "deep" / "out")
    options = ["--method=ties_svd", "--density=0.2", "--max-memory=1GiB", "--rank=2", *more]
    planned = invoke("plan", *adapters, "-o", out, *options)
    dry = invoke("merge", *adapters, "-o", out, *options, "--dry-run", "--resume")
    assert planned.exit_code == dry.exit_code == 0
    assert dry.stdout == planned.stdout
    assert dry.stderr == planned.stderr
    assert contents(tmp_path) == {}


def test_a_dry_run_refuses_what_plan_refuses(adapters: list[str], tmp_path: Path) -> None:
    options = ["-o", str(tmp_path / "out"), "--method=ties", "--json"]
    planned = invoke("plan", *adapters, *options)
    dry = invoke("merge", *adapters, *options, "--dry-run")
    assert planned.exit_code == dry.exit_code == 2
    assert dry.stdout == planned.stdout


# ---------------------------------------------------------------------------------------------
# --json for everything


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["merge", "A", "-o", "O", "--densty", "1"], "'--density'"),
        (["merge", "A", "-o", "O", "--density", "much"], "'much' is not a list of numbers"),
        (["merge", "-o", "O"], "ADAPTERS"),
        (["merge", "A"], "--output"),
        (["merg"], "Did you mean 'merge'"),
        (["--verbose"], "--verbose"),
        (["merge", "A", "-o", "O", "--method", "tie"], "did you mean ties"),
        (["verify", "gone"], "no such directory"),
        (["inspect", "gone"], "no such"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_for_machines(words: list[str], message: str) -> None:
    found = invoke(*words, "--json")
    assert found.exit_code == 2
    told = json.loads(found.stdout)
    assert told["exit_code"] == 2
    assert message in told["error"]["message"]
    assert found.stderr == f"error: {told['error']['message']}\n"
    quiet = invoke(*words, "--json", "--quiet")
    if words[0] in {"merge", "merg", "--verbose"}:  # the others have no --quiet
        assert (quiet.stdout, quiet.stderr) == (found.stdout, "")


def test_a_mistake_for_people() -> None:
    found = invoke("merge", "A", "-o", "O", "--densty", "1")
    assert found.exit_code == 2
    assert found.stdout == ""
    assert found.stderr.startswith("error: No such option '--densty'.")


def test_words_after_two_dashes_are_no_options() -> None:
    assert invoke("merge", "--", "--json").stdout == ""


def test_quiet_json_has_its_notes_inside(adapters: list[str], tmp_path: Path) -> None:
    other = write_adapter(
        tmp_path / "other", {NAMES[0]: linear(64, 48, 4)}, base_model_name_or_path="another"
    )
    found = invoke(
        "merge", adapters[0], str(other), "-o", str(tmp_path / "out"), "--json", "--quiet"
    )
    assert found.exit_code == 0
    assert found.stderr == ""
    assert any("base model" in notice for notice in json.loads(found.stdout)["notices"])


# ---------------------------------------------------------------------------------------------
# Colours, and what to do next


def test_colours_on_a_terminal_only() -> None:
    shown = on_a_terminal("verify", "gone")
    assert shown.startswith("\x1b[31m\x1b[1merror:\x1b[0m gone: no such directory")
    assert "\x1b" not in run("verify", "gone").stderr


@pytest.mark.parametrize(
    ("asked", "coloured"),
    [
        ({"NO_COLOR": "1"}, False),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
        ({"CLICOLOR": "0"}, False),
    ],
    ids=str,
)
def test_a_terminal_without_colours(asked: dict[str, str], coloured: bool) -> None:
    assert ("\x1b" in on_a_terminal("verify", "gone", **asked)) == coloured


@pytest.mark.parametrize("asked", [{"FORCE_COLOR": "1"}, {"CLICOLOR_FORCE": "1"}], ids=str)
def test_colours_in_a_pipe_that_asks_for_them(asked: dict[str, str]) -> None:
    found = run("verify", "gone", **({"NO_COLOR": ""} | asked))
    assert found.stderr.startswith("\x1b[31m\x1b[1merror:")


def test_a_name_cannot_colour() -> None:
    assert r"\x1b[31mred" in on_a_terminal("verify", "\x1b[31mred")


def test_what_to_do_after_a_plan_and_a_merge(adapters: list[str], tmp_path: Path) -> None:
    planned = on_a_terminal("plan", *adapters, "--method", "cat", "--max-memory=1GiB", NO_COLOR="1")
    told = re.search(r"merge it:  streammerge (.*) -o OUT", planned)
    assert told is not None
    out = str(tmp_path / "my out")
    merged = on_a_terminal(*told[1].split(), "-o", out, columns=300, NO_COLOR="1")
    assert f"PeftModel.from_pretrained(model, '{out}')" in merged
    check = re.search(r"check it:  streammerge verify '(.*)'", merged)
    assert check is not None
    assert invoke("verify", check[1]).exit_code == 0
    # Neither in a pipe.
    assert "merge it" not in invoke("plan", *adapters).output


# ---------------------------------------------------------------------------------------------
# Widths and characters


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_nothing_is_wider_than_the_terminal(columns: int, adapters: list[str]) -> None:
    for words in (["methods"], ["plan", *adapters]):
        shown = on_a_terminal(*words, columns=columns).replace("\r", "")
        body = [line for line in shown.splitlines() if "merge it" not in line]
        assert max(map(len, body)) <= columns
        names = [*METHODS] if words[0] == "methods" else [".1.self_attn.v_proj"]
        assert all(name in shown for name in names)
        assert columns < 200 or "…" not in shown


def test_nothing_is_cut_in_a_pipe(adapters: list[str]) -> None:
    found = CliRunner().invoke(main, ["plan", *adapters], env={"COLUMNS": "40"})
    assert all(
        re.search(rf"^{re.escape(name)} +64x48", found.stdout, re.MULTILINE) for name in NAMES
    )


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "latin-1"},
    ],
    ids=str,
)
def test_any_locale_will_do(environment: dict[str, str], tmp_path: Path) -> None:
    sources = [str(write_adapter(tmp_path / "maß", {"ein.Ω": linear(8, 6, 2)}))]
    for words in (["merge", "--help"], ["inspect", *sources]):
        found = subprocess.run(
            [*COMMAND, *words], capture_output=True, check=False, env=os.environ | environment
        )
        assert found.returncode == 0, found.stderr
        assert found.stdout
        assert found.stderr == b""


LONG = "base_model.model.layers.17.mlp.down_proj"


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        pytest.param(None, ["name      what", f"{LONG[-8:]}  weighted sum"], id="a pipe"),
        pytest.param(22, ["name      what", f"{LONG[-8:]}  weighted sum"], id="it fits"),
        pytest.param(
            21, ["name      what", f"{LONG[-8:]}  weighted", "          sum"], id="words wrap first"
        ),
        pytest.param(17, [LONG[-8:], "  what  weighted", "        sum"], id="too narrow: a list"),
    ],
)
def test_a_table_is_made_to_fit(width: int | None, expected: list[str]) -> None:
    assert lay_out([[LONG[-8:], "weighted sum"]], ["name", "what"], width) == expected


def test_a_name_gives_way_last() -> None:
    shown = lay_out([[LONG, "weighted sum"]], ["name", "what"], 50)
    assert shown == ["name" + " " * 38 + "what", f"{LONG}  weighted", " " * 42 + "sum"]
    assert lay_out([[LONG, "weighted sum"]], ["name", "what"], 30) == [
        "name              what",
        "bas…lp.down_proj  weighted sum",
    ]


@pytest.mark.parametrize("width", range(1, 60))
def test_no_line_of_a_table_is_too_long(width: int) -> None:
    rows = [[LONG, "1024x4096", "keep the largest, elect a sign"], ["a", "1x1", "sum"]]
    shown = lay_out(rows, ["target", "shape", "rule"], width)
    if width >= 17:  # a name and a value, each of the least width
        assert max(map(len, shown)) <= width
    assert sum("elect" in line for line in shown) == 1


@pytest.mark.parametrize("width", [1, 2, 3, 8, 39, 40, 41])
def test_a_name_is_cut_in_its_middle(width: int) -> None:
    short = cut(LONG, width)
    assert len(short) == min(width, len(LONG))
    if 3 <= width < len(LONG):
        head, tail = short.split("…")
        assert LONG.startswith(head)
        assert LONG.endswith(tail)
        assert len(tail) >= len(head)


def test_values_go_on_below_themselves() -> None:
    facts = [("method", "ties: rule ties"), ("path", "/" + "x" * 30)]
    assert lay_out_facts(facts, None) == ["method  ties: rule ties", "path    /" + "x" * 30]
    shown = lay_out_facts(facts, 20)
    assert shown[:2] == ["method  ties: rule", "        ties"]
    assert len(shown[2]) == 20
