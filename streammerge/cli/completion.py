"""`streammerge completion`."""

from __future__ import annotations

import click

SHELLS = ("bash", "zsh", "fish")

EXAMPLES = """\b
For this shell alone, and for every one from now on:
  eval "$(streammerge completion bash)"
  streammerge completion bash >> ~/.bashrc
  streammerge completion zsh >> ~/.zshrc
  streammerge completion fish > ~/.config/fish/completions/streammerge.fish
"""


@click.command(epilog=EXAMPLES)
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print what makes SHELL complete commands, options and values."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None, "click knows these three"
    complete = kind(ctx.find_root().command, {}, "streammerge", "_STREAMMERGE_COMPLETE")
    # Not its source(), which for bash starts a bash to look at its version.
    click.echo(complete.source_template % complete.source_vars())
