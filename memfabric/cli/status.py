"""``memfabric status``: the pool at a glance, once or live."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from memfabric import units
from memfabric.cli.base import DURATION, Settings, common_options, examples, pass_settings
from memfabric.cli.output import console, emit_json, note
from memfabric.errors import OutcomeUnknownError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from memfabric.client import AdminClient

DEFAULT_INTERVAL = "2s"


@click.command(
    short_help="Show nodes, namespaces, occupancy, hit rates, leases.",
    epilog=examples(
        """
memfabric status
memfabric status --watch
memfabric status --watch 500ms
memfabric status --json | jq '.namespaces[].blocks'
"""
    ),
)
@click.option(
    "-w",
    "--watch",
    "interval_ns",
    type=DURATION,
    is_flag=False,
    flag_value=DEFAULT_INTERVAL,
    metavar="[SECONDS]",
    help=f"Show it again and again, every {DEFAULT_INTERVAL} unless said otherwise, until Ctrl-C.",
)
@common_options(json=True)
@pass_settings
def status(settings: Settings, interval_ns: int | None) -> None:
    """Show nodes, regions, namespaces, occupancy, hit rates and leases.

    MATCH HITS is the share of the looked-up blocks that the pool had, READ HITS that of the blocks that were to be
    read. Counters run since the start of the server.
    """
    if interval_ns is None:
        with settings.admin() as admin:
            show(admin.status(), settings.as_json)
        return
    if interval_ns < 10**7:
        raise click.BadParameter("at least 10ms", param_hint="--watch")
    try:
        watch(settings, interval_ns / 1e9)
    except KeyboardInterrupt:
        return


def show(document: dict[str, Any], as_json: bool) -> None:
    """Print one status document."""
    if as_json:
        emit_json(document)
        return
    from memfabric.cli.render import status_view

    screen = console()
    screen.print(status_view(document, screen.width))


def watch(settings: Settings, interval_s: float) -> None:
    """Show the status until interrupted; a server that is away is waited for."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from memfabric.cli.render import status_view

    if settings.as_json:
        for document, _ in poll(settings, interval_s):
            if document is not None:
                emit_json(document, one_line=True)
                sys.stdout.flush()
        return
    screen = console()
    if not screen.is_terminal:
        for document, trouble in poll(settings, interval_s):
            if document is not None and trouble is None:
                screen.print(status_view(document, screen.width), Text())
            else:
                note(f"{trouble}; trying again")
            sys.stdout.flush()
        return
    with Live(console=screen, auto_refresh=False, vertical_overflow="crop", screen=True) as live:
        for document, trouble in poll(settings, interval_s):
            view: list[RenderableType] = []
            if trouble is not None:
                view += [Text(f"{trouble}; trying again …", style="bold red"), Text()]
            if document is not None:
                view += [status_view(document, screen.width)]
            foot = f"every {units.format_duration(round(interval_s * 1e9))} · Ctrl-C ends · {time.strftime('%X')}"
            live.update(Group(*view, Text(), Text(foot, style="dim")), refresh=True)


def poll(settings: Settings, interval_s: float) -> Iterator[tuple[dict[str, Any] | None, str | None]]:
    """The newest document (None before the first) and what is wrong now (None when nothing is), at every interval."""
    document: dict[str, Any] | None = None
    with ExitStack() as stack:
        admin: AdminClient | None = None
        while True:
            started_s = time.monotonic()
            trouble = None
            try:
                if admin is None:
                    admin = stack.enter_context(settings.admin())
                document = admin.status()
            except (UnavailableError, OutcomeUnknownError) as error:
                trouble = str(error)
                stack.close()
                admin = None
            yield document, trouble
            time.sleep(max(0.0, started_s + interval_s - time.monotonic()))
