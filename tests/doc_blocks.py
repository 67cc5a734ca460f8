"""Code blocks of the pages: found in their Markdown, and run as a reader would.

`python tests/doc_blocks.py PAGE…` runs them in this process and prints a JSON object for each.
Each page has a folder of its own with the adapters A, B and C, in which its blocks are run in
order; Python blocks of a page share their names, and know `model`, a module that A, B and C fit.
A comment before a block says how it is meant:

    <!-- not run: REASON -->   it is only read (bash: its grammar is checked)
    <!-- file: NAME -->        its text is a file in the folder, for blocks that come later
    <!-- exit: CODE -->        its last command ends with this exit code
    <!-- into: FILE TABLE -->  it is put into the source of the package, by a test of its own
    <!-- instead: FILE NAME -->  it takes the place of what is called so there, by the same test
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from click.testing import CliRunner
from markdown_it import MarkdownIt

from making import linear, write_adapter
from streammerge.cli import main

TARGETS = {
    f"model.layers.{layer}.self_attn.{side}_proj": linear(64, 48, 8)
    for layer in range(2)
    for side in "qv"
}
SHELL = {"", "bash", "sh"}
DATA = {"text", "json", "yaml", "toml"}
OTHERS_MAY = {"pip", "dask", "eval", "source", "export", "scripts"}
"""Commands beside streammerge's own that a page may show; they are not run."""


@dataclass(frozen=True)
class Block:
    """A block of a page."""

    page: str
    line: int
    language: str
    text: str
    not_run: str | None = None
    file: str | None = None
    into: str | None = None
    instead: str | None = None
    exit_code: int = 0


def blocks_of(page: Path) -> Iterator[Block]:
    """The blocks of a page, with what the comment right before each says."""
    before = ""
    for token in MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8")):
        if token.type == "html_block":
            before = token.content
        elif token.type == "fence" and not token.info.startswith("{"):
            said = dict(re.findall(r"<!-- ([a-z ]+): (.+?) -->", before))
            line = token.map[0] + 1 if token.map else 0
            yield Block(
                page.name,
                line,
                token.info,
                token.content,
                said.get("not run"),
                said.get("file"),
                said.get("into"),
                said.get("instead"),
                int(said.get("exit", 0)),
            )
            before = ""
        elif not token.type.endswith("_close"):
            before = ""


def commands_of(text: str) -> list[str]:
    """The commands of a shell block, each on one line, without comments."""
    whole = re.sub(r"\\\n\s*", "", text)
    return [line for line in whole.splitlines() if line.strip() and not line.startswith("#")]


def is_shell(block: Block) -> bool:
    """Whether it is for a shell: a block without a language may be just text."""
    if block.language:
        return block.language in SHELL
    return any(line.startswith("streammerge ") for line in commands_of(block.text))


class Session:
    """What the blocks of one page share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: dict[str, Any] = {"__name__": "__main__"}
        for seed, name in enumerate("ABC"):
            base = {"task_type": None, "base_model_name_or_path": None}
            write_adapter(folder / name, TARGETS, seed=seed, **base)

    def run(self, block: Block) -> str | None:
        """Run a block; what went wrong, or None."""
        if block.not_run:
            return self._grammar(block)
        if block.into or block.instead:
            return None
        if block.file:
            path = self.folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
            return None
        if block.language == "python":
            return self._python(block)
        if is_shell(block):
            return self._grammar(block) or self._shell(block)
        if block.language == "json":
            json.loads(block.text)
        if block.language == "yaml":
            yaml.safe_load(block.text)
        return None if block.language in DATA | {""} else f"nobody runs {block.language!r}"

    def _grammar(self, block: Block) -> str | None:
        if block.language == "python":
            compile(block.text, block.page, "exec")
        if not is_shell(block):
            return None
        checked = subprocess.run(
            ["bash", "-n"], input=block.text, capture_output=True, text=True, check=False
        )
        return checked.stderr or None

    def _python(self, block: Block) -> str | None:
        if "model" not in self.names and re.search(r"\bmodel\b", block.text):
            self.names["model"] = base_model()
        if "streammerge.merge(" in block.text:
            shutil.rmtree(self.folder / "OUT", ignore_errors=True)
        code = compile("\n" * block.line + block.text, block.page, "exec")
        with contextlib.redirect_stdout(io.StringIO()):
            exec(code, self.names)
        return None

    def _shell(self, block: Block) -> str | None:
        commands = commands_of(block.text)
        for number, command in enumerate(commands):
            expected = block.exit_code if number == len(commands) - 1 else 0
            words = shlex.split(command, comments=True)
            if words[0] != "streammerge":
                if words[0].split("/")[0] not in OTHERS_MAY:
                    return f"{command}: neither streammerge's nor one of {sorted(OTHERS_MAY)}"
                continue
            code, output = self._streammerge(command, words)
            if code != expected:
                return f"{command}\nexit code {code}, not {expected}\n{output}"
        return None

    def _streammerge(self, command: str, words: list[str]) -> tuple[int, str]:
        """Run a command in this process, or by a shell where it needs one."""
        if "merge" in words[:2] and "-o" in words:
            # Each example stands on its own; what is unfinished lies beside the output.
            shutil.rmtree(self.folder / words[words.index("-o") + 1], ignore_errors=True)
        if {"|", ">", ">>", "&&", ";"} & set(words):
            shim = f'streammerge() {{ {sys.executable} -m streammerge.cli "$@"; }}\n{command}'
            found = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", shim],
                capture_output=True,
                text=True,
                check=False,
            )
            return found.returncode, found.stdout + found.stderr
        result = CliRunner().invoke(main, words[1:])
        return result.exit_code, result.output


def base_model() -> Any:
    """A module with the weights that A, B and C change."""
    import torch

    model = torch.nn.Module()
    for target, layer in TARGETS.items():
        parent: torch.nn.Module = model
        *path, last = target.split(".")
        for name in path:
            if name not in dict(parent.named_children()):
                parent.add_module(name, torch.nn.Module())
            parent = parent.get_submodule(name)
        parent.add_module(last, torch.nn.Linear(layer.a[1], layer.b[0], bias=False))
    return model


def run_page(page: Path) -> Iterator[tuple[Block, str | None]]:
    """Run a page's blocks in a new folder; each with what went wrong, or None."""
    here, blocks = Path.cwd(), list(blocks_of(page))
    with tempfile.TemporaryDirectory() as folder:
        session = Session(Path(folder))
        os.chdir(folder)
        try:
            for block in blocks:
                try:
                    wrong = session.run(block)
                except Exception:  # whatever an example does is its fault
                    wrong = traceback.format_exc()
                yield block, wrong
        finally:
            os.chdir(here)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        for block, wrong in run_page(Path(name)):
            print(json.dumps({"path": name, "wrong": wrong} | asdict(block)), flush=True)
