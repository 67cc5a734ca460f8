"""The shape of the command line: options under headings, mistakes told like any other error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from streammerge.cli.console import Wishes, report, tip
from streammerge.cli.stopping import HOSTED
from streammerge.cli.terminal import forgive_characters

Command = Callable[..., None]

_HEADINGS = "__headings__"
OTHERS = "Other"


def section(title: str, *options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Add options to a `Sectioned` command; they stand under this heading in its help."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        # What click keeps on a function until it becomes a command.
        added: list[click.Parameter] = vars(command)["__click_params__"][-len(options) :]
        headings = vars(command).setdefault(_HEADINGS, {})
        headings.update((parameter.name, title) for parameter in added)
        return command

    return add


class Sectioned(click.Command):
    """A command whose help has its options under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under their headings; required ones come first."""
        headings = vars(self.callback).get(_HEADINGS, {}) if self.callback else {}
        groups: dict[str, list[tuple[bool, tuple[str, str]]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                title = headings.get(parameter.name, OTHERS)
                groups.setdefault(title, []).append((not parameter.required, record))
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl([record for _, record in sorted(records, key=_required_first)])


def _required_first(found: tuple[bool, tuple[str, str]]) -> bool:
    return found[0]


class Program(click.Group):
    """The group of all commands. A mistake in calling one is an error like the others."""

    def main(self, args: Sequence[str] | None = None, *more: Any, **named: Any) -> Any:
        """Run as the process's own program; given its words, as a part of another."""
        if args is not None:
            named["obj"] = HOSTED
        return super().main(args, *more, **named)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take the words up to the command's name."""
        forgive_characters()
        words = args[: args.index("--")] if "--" in args else args
        ctx.meta[__name__] = Wishes("--json" in words, "--quiet" in words)
        with _told(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Take the words of the command, and run it."""
        with _told(ctx):
            return super().invoke(ctx)


@contextmanager
def _told(ctx: click.Context) -> Iterator[None]:
    """Tell of a mistake: as JSON too where that was asked for, and where to look it up."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        wishes: Wishes = ctx.meta[__name__]
        report("UsageError", error.format_message(), error.exit_code, wishes)
        if not wishes.only_json:
            where = error.ctx.command_path if error.ctx else ctx.command_path
            tip(f"{where} --help says what there is")
        raise SystemExit(error.exit_code) from error
