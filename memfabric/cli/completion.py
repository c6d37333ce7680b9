"""``memfabric completion``: the script that teaches a shell this command line."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from memfabric.cli.base import common_options, examples
from memfabric.errors import UnavailableError


@click.command(
    epilog=examples(
        """
eval "$(memfabric completion bash)"                                   # this shell, or in ~/.bashrc
eval "$(memfabric completion zsh)"                                    # this shell, or in ~/.zshrc
memfabric completion fish > ~/.config/fish/completions/memfabric.fish
"""
    )
)
@common_options(server=False)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell."""
    completer = get_completion_class(shell)
    if completer is None:
        raise UnavailableError(f"the installed click knows no completion for {shell}")
    root = ctx.find_root().command
    click.echo(completer(root, {}, "memfabric", "_MEMFABRIC_COMPLETE").source())
