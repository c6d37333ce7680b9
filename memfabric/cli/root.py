"""The root command: global options, the list of commands, and how errors reach people."""

from __future__ import annotations

import difflib
import errno
import sys
import traceback
from collections.abc import Callable
from typing import Any

import click

from memfabric.cli import blocks, completion, demo, doctor, namespaces, nodes, parts, perf, pins, status, up
from memfabric.cli.base import Settings, common_options
from memfabric.errors import MemfabricError, UsageError

EXIT_INTERRUPTED = 128 + 2
"""What shells report for a process that SIGINT ended."""


class RootGroup(click.Group):
    """A group whose help is in sections, and which turns errors into one line on standard error."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.sections: list[tuple[str, list[str]]] = []

    def add_section(self, title: str, *commands: click.Command) -> None:
        """Add commands under a heading of the help page."""
        for command in commands:
            self.add_command(command)
        self.sections.append((title, [command.name or "" for command in commands]))

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the sections."""
        return [name for _, names in self.sections for name in names]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One table per section; all with the same column width."""
        longest = max(len(name) for name in self.list_commands(ctx))
        for title, names in self.sections:
            with formatter.section(title):
                limit = formatter.width - 6 - longest
                commands = [self.commands[name] for name in names]
                rows = [
                    ((command.name or "").ljust(longest), command.get_short_help_str(limit)) for command in commands
                ]
                formatter.write_dl(rows)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As in click, and an unknown command names the nearest known one."""
        name = args[0]
        if not ctx.resilient_parsing and not name.startswith("-") and name not in self.commands:
            near = difflib.get_close_matches(name, self.commands, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"No such command {name!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; what it raises becomes ``Error: …`` and an exit code, unless ``--debug`` is set."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit, SystemExit):
            raise
        except KeyboardInterrupt:
            code, shown = EXIT_INTERRUPTED, None
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # click ends quietly when the reader of our output has gone
            code, shown = 1, describe(error)
            if ctx.ensure_object(Settings).debug:
                click.echo(traceback.format_exc(), nl=False, err=True)
                shown = None
        # Raised out here, so that the error no longer holds the frames, and with them clients, until the very end.
        if shown is not None:
            raise shown
        raise click.exceptions.Exit(code)


class WrongCall(click.ClickException):
    """The call itself was wrong, as the library found out."""

    exit_code = 2


def describe(error: Exception) -> click.ClickException:
    """The words and the exit code for an error: 2 when the call was wrong, 1 otherwise."""
    if isinstance(error, MemfabricError):
        return WrongCall(str(error)) if isinstance(error, UsageError) else click.ClickException(str(error))
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return click.ClickException(f"{where}{error.strerror}")
    transport = sys.modules.get("transport")  # not loaded: then it raised nothing
    if transport is not None and isinstance(error, transport.TransportError):
        return click.ClickException(str(error))
    return click.ClickException(
        f"{type(error).__name__}: {error}\nThis is a defect of memfabric; --debug shows where it happened."
    )


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("memfabric")
    except PackageNotFoundError:  # run from a source tree
        return "(not installed)"


def _show_version(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(f"memfabric {_version()}")
        ctx.exit()


F = Callable[..., Any]


@click.group(
    cls=RootGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with `memfabric up`, then `memfabric status` in another terminal. "
    "`memfabric COMMAND --help` shows examples.",
)
@common_options(json=True, environment=True)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and exit.",
)
def cli() -> None:
    """A memory pool for the KV cache blocks of LLM serving.

    Engines put the blocks they computed into the memory of other processes and hosts, and read them back
    one-sidedly instead of computing them again.
    """


cli.add_section("Run a pool", up.up, parts.meta, nodes.node, demo.demo)
cli.add_section("Look at it", status.status, doctor.doctor, perf.perf)
cli.add_section("Namespaces", namespaces.namespace)
cli.add_section("Blocks by hand", *blocks.COMMANDS, pins.pin, pins.unpin)
cli.add_section("Your shell", completion.completion)
