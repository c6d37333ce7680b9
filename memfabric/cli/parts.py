"""``memfabric meta``, and what it shares with ``memfabric node``: serving until told to stop."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from memfabric.cli.base import DURATION, Settings, common_options, examples, pass_settings
from memfabric.cli.output import note
from memfabric.processes import Reporter, die_with_parent

C = TypeVar("C", bound=Callable[..., Any])


def check_ready_file(ctx: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    """Refuse a file that cannot be written before anything is started."""
    if value is not None and not value.absolute().parent.is_dir():
        raise click.BadParameter(f"{value.parent} is not a directory", ctx, parameter)
    return value


def serving_options(command: C) -> C:
    """Options of every process that serves: logs, readiness, and the hidden ones of a supervised child."""
    options = [
        click.option(
            "--log-level",
            type=click.Choice(["debug", "info", "warning", "error"]),
            default="info",
            show_default=True,
            help="Least important log lines to show.",
        ),
        click.option("--log-json", is_flag=True, help="Log JSON, one event a line."),
        click.option(
            "--ready-file",
            type=click.Path(dir_okay=False, path_type=Path),
            callback=check_ready_file,
            help="Write JSON with address and pid to this file once serving.",
        ),
        click.option("--parent-pid", type=int, hidden=True, help="End when this process ends."),
        click.option("--report-fd", type=int, hidden=True, help="Pipe to report to."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def attach_to_parent(parent_pid: int | None, report_fd: int | None) -> Reporter:
    """Take the child's side of supervision, if there is a supervisor. Call this before anything is claimed."""
    if parent_pid is not None:
        die_with_parent(parent_pid)
    return Reporter(report_fd)


def write_ready_file(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON file that appears whole or not at all.

    Raises:
        OSError: the directory is not there or not writable.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(document) + "\n")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


@click.command(
    epilog=examples(
        """
memfabric meta
memfabric meta --address tcp://127.0.0.1:auto --ready-file meta.json
memfabric meta --state-dir /var/lib/memfabric --log-json
"""
    )
)
@click.option(
    "--state-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where namespaces are kept over restarts.  [default: nowhere]",
)
@click.option("--heartbeat", "heartbeat_ns", type=DURATION, help="How often nodes report.  [default: 500ms]")
@click.option("--dead-after", "dead_ns", type=DURATION, help="Silence after which a node is out.  [default: 2s]")
@click.option("--quarantine", "quarantine_ns", type=DURATION, help="Wait before blocks of lost writers are reused.")
@click.option("--max-lease", "max_lease_ns", type=DURATION, help="Longest lease that is granted.")
@click.option("--session-ttl", "session_ttl_ns", type=DURATION, help="Silence after which a client's leases end.")
@click.option("--insecure", is_flag=True, default=None, help="Allow an address that other hosts can reach.")
@serving_options
@common_options(address="Where to serve; port `auto` takes a free one.")
@pass_settings
def meta(
    settings: Settings,
    ready_file: Path | None,
    parent_pid: int | None,
    report_fd: int | None,
    **options: Any,
) -> None:
    """Run the metadata server.

    It knows which block lies where and who may touch it; the blocks themselves never pass through it.
    """
    reporter = attach_to_parent(parent_pid, report_fd)
    from memfabric.server import ServerOptions, serve

    def ready(address: str) -> None:
        if ready_file is not None:
            write_ready_file(ready_file, {"address": address, "pid": os.getpid()})
        reporter.report(ready=True, address=address)
        if report_fd is None:
            note(f"Metadata server is ready at {address} (pid {os.getpid()}); Ctrl-C stops it.")

    given = {name: value for name, value in options.items() if value is not None}
    serve(ServerOptions(address=settings.bind, **given), ready=ready)
