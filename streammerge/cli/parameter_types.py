"""What a word on the command line may be, how it is read, and how it is completed."""

from __future__ import annotations

from typing import Any

import click
from click.shell_completion import CompletionItem

from streammerge.registry import METHODS


class Word(click.ParamType[Any]):
    """A word, one of those that a shell proposes; the recipe checks it, as for a Python call."""

    def __init__(self, *words: str, name: str = "") -> None:
        self.words = words
        self.name = name or "|".join(words)

    def get_metavar(
        self,
        param: click.Parameter,  # noqa: ARG002  # click's signature
        ctx: click.Context,  # noqa: ARG002  # click's signature
    ) -> str:
        """Return what stands for the value in the help."""
        return self.name

    def shell_complete(
        self,
        ctx: click.Context,  # noqa: ARG002  # click's signature
        param: click.Parameter,  # noqa: ARG002  # click's signature
        incomplete: str,
    ) -> list[CompletionItem[str]]:
        """Return the words that begin so."""
        return [CompletionItem(word) for word in self.words if word.startswith(incomplete)]


class MethodName(Word):
    """A method's name. What other distributions bring is looked for when it is asked for."""

    def __init__(self) -> None:
        super().__init__(name="NAME")

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        """Return the names that begin so."""
        return Word(*METHODS).shell_complete(ctx, param, incomplete)


class Names(click.ParamType[tuple[str, ...]]):
    """Names of methods with commas between them."""

    name = "NAME,NAME,…"

    def convert(
        self,
        value: Any,
        param: click.Parameter | None,  # noqa: ARG002  # click's signature
        ctx: click.Context | None,  # noqa: ARG002  # click's signature
    ) -> tuple[str, ...]:
        """Return the names."""
        return tuple(name.strip() for name in str(value).split(",") if name.strip())

    def shell_complete(
        self,
        ctx: click.Context,  # noqa: ARG002  # click's signature
        param: click.Parameter,  # noqa: ARG002  # click's signature
        incomplete: str,
    ) -> list[CompletionItem[str]]:
        """Return the lists that begin so, with one more name."""
        before, comma, last = incomplete.rpartition(",")
        return [
            CompletionItem(f"{before}{comma}{name}") for name in METHODS if name.startswith(last)
        ]


class MethodOption(click.Option):
    """The option of a method, whose help names them all."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the option and its help."""
        self.help = f"`streammerge methods` lists them: {', '.join(METHODS)}."
        return super().get_help_record(ctx)


class Numbers(click.ParamType[tuple[float, ...]]):
    """Numbers with commas between them."""

    name = "W1,W2,…"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """Return the numbers."""
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 2.0,0.3,0.7", param, ctx)


class Density(Numbers):
    """A number, or several with commas between them."""

    name = "D|D1,D2,…"

    def convert(  # type: ignore[override]  # also a single number
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float | tuple[float, ...]:
        """Return the number, or the numbers."""
        found = super().convert(value, param, ctx)
        return found[0] if len(found) == 1 else found


class Parameters(click.ParamType[dict[str, float]]):
    """Numbers by name, like gamma=0.02,beta=0.5."""

    name = "NAME=VALUE,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, float]:
        """Return the numbers by name."""
        found: dict[str, float] = {}
        for part in value.split(","):
            name, equals, number = (word.strip() for word in part.partition("="))
            if not name or not equals:
                self.fail(f"{value!r} is no mapping of the form NAME=VALUE,NAME=VALUE", param, ctx)
            if name in found:
                self.fail(f"{name} is given twice", param, ctx)
            try:
                found[name] = float(number)
            except ValueError:
                self.fail(f"{name} must be a number, not {number!r}", param, ctx)
        return found


class Scaling(Word):
    """The words config and tensor, or a number."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | float:
        """Return the word or the number."""
        if value in ("config", "tensor"):
            return str(value)
        try:
            return float(value)
        except ValueError:
            self.fail(f"{value!r} is none of config, tensor, or a number", param, ctx)
