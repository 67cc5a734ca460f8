"""How docs/ becomes a site: Sphinx, MyST's Markdown, the theme Furo. `scripts/docs` builds it."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import click
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

# A page that does not stand here fails the build, and one that stands here and is not there is
# left out. To add one, write its name under the heading where a reader would look for it.
NAVIGATION = {
    "Use": [
        *("quickstart", "choosing", "methods", "ranks", "formats", "extras", "recipes", "seeing"),
        *("hub", "publishing"),
    ],
    "Memory and machines": ["memory", "reliability", "clusters", "scaling", "benchmarks"],
    "PEFT": ["from-peft", "peft-differences"],
    "Reference": ["methods", "command-line", "api"],
    "Change it": ["architecture", "add-a-rule", "add-a-format", "decisions/README"],
}
CONTENTS = "<!-- contents -->"
"""Where the front page has the navigation."""

project = "streammerge"
author = "the streammerge authors"
release = version = metadata.version("streammerge")
copyright = "the streammerge authors; Apache-2.0"  # noqa: A001  # Sphinx calls it so

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
default_role = "code"  # docstrings have Markdown's backticks
templates_path: list[str] = []
exclude_patterns = ["_build"]

autodoc_mock_imports = ["torch"]  # no page shows a tensor, and it takes seconds to load
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
toc_object_entries = False
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "streammerge"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}
highlight_language = "none"
pygments_style = "friendly"
pygments_dark_style = "github-dark"


def add_contents(_app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the navigation into the front page, and the notes into the page on decisions."""
    if docname == "index":
        trees = [
            toctree([page for page in pages if (HERE / f"{page}.md").is_file()], caption)
            for caption, pages in NAVIGATION.items()
        ]
        source[0] = source[0].replace(CONTENTS, "\n".join(trees))
    elif docname == "decisions/README":
        notes = sorted(path.stem for path in (HERE / "decisions").glob("*.md"))
        source[0] += toctree([note for note in notes if note != "README"], "")


def toctree(pages: list[str], caption: str) -> str:
    """Return Markdown for a part of the navigation; it is shown in the side bar alone."""
    options = ":hidden:\n" + (f":caption: {caption}\n" if caption else "")
    return "\n```{toctree}\n" + options + "\n" + "\n".join(pages) + "\n```\n"


class CommandHelp(SphinxDirective):
    """The help of a command, as it prints it: `{command-help} merge`, or of all of it."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return a block of text."""
        from streammerge.cli import main  # noqa: PLC0415

        context = click.Context(
            main, info_name="streammerge", max_content_width=90, **main.context_settings
        )
        command: click.Command = main
        if self.arguments:
            command = main.commands[self.arguments[0]]
            context = click.Context(command, info_name=self.arguments[0], parent=context)
        text = command.get_help(context)
        return [nodes.literal_block(text, text, language="text")]


class ErrorTree(SphinxDirective):
    """The drawing of the tree of errors, from the module that defines them."""

    def run(self) -> list[nodes.Node]:
        """Return a block of text."""
        from streammerge import errors  # noqa: PLC0415

        _, _, text = (errors.__doc__ or "").partition("\n\n")
        return [nodes.literal_block(text.rstrip(), text.rstrip(), language="text")]


def leave_out_drawing(_app: Sphinx, what: str, *rest: object) -> None:
    """Drop the docstrings of modules: the drawing in one of them is shown by `ErrorTree`."""
    lines = rest[-1]
    if what == "module" and isinstance(lines, list):
        lines.clear()


def setup(app: Sphinx) -> dict[str, bool]:
    """Register what is above."""
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", leave_out_drawing)
    app.add_directive("command-help", CommandHelp)
    app.add_directive("error-tree", ErrorTree)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
