"""``memfabric node``: run a memory node, list nodes, drain one."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Any

import click

from memfabric import units
from memfabric.cli.base import SIZE, Settings, common_options, examples, pass_settings
from memfabric.cli.memory import (
    DIRECTORY_VARIABLE,
    SHARED_MEMORY,
    check_room,
    default_memory_bytes,
    default_region_bytes,
    whole_regions,
)
from memfabric.cli.output import console, emit_json, note
from memfabric.cli.parts import attach_to_parent, serving_options, write_ready_file


@click.group(
    invoke_without_command=True,
    epilog=examples(
        """
memfabric node --memory 4GiB
memfabric node --name gpu7 --memory 64GiB --region 1GiB --address tcp://10.0.0.1:7170 --insecure
memfabric node list
memfabric node drain gpu7
"""
    ),
)
@click.option("--name", help="Name in the pool; one node each.  [default: the host's name]")
@click.option(
    "--memory", "memory_bytes", type=SIZE, help="How much to lend.  [default: 1GiB, or a quarter of what is free]"
)
@click.option(
    "--region",
    "region_bytes",
    type=SIZE,
    help="Size of one region, the unit that a namespace gets.  [default: an eighth of the memory, 1GiB at most]",
)
@click.option(
    "--directory",
    type=click.Path(file_okay=False, path_type=Path),
    envvar=DIRECTORY_VARIABLE,
    default=SHARED_MEMORY,
    help=f"Shared memory to take it from.  [default: ${DIRECTORY_VARIABLE} or {SHARED_MEMORY}]",
)
@click.option(
    "--transport",
    help="By which to lend it beside shared memory: names, separated by commas, or auto.  [default: auto: nothing else "
    "while the server is on the loopback, else all that work here]",
)
@click.option("--bind", multiple=True, help="Address on which transports listen; may be repeated.")
@click.option("--insecure", is_flag=True, default=None, help="Allow addresses that other hosts can reach.")
@serving_options
@common_options()
@pass_settings
def node(
    settings: Settings,
    name: str | None,
    memory_bytes: int | None,
    region_bytes: int | None,
    directory: Path,
    transport: str | None,
    bind: tuple[str, ...],
    insecure: bool | None,
    ready_file: Path | None,
    parent_pid: int | None,
    report_fd: int | None,
    **options: Any,
) -> None:
    """Run a memory node, or manage nodes.

    Without a command it lends memory of this host to the pool until it is stopped. All of the memory is claimed at the
    start; if it is not there, the node says so and does not start.
    """
    if click.get_current_context().invoked_subcommand is not None:
        return
    reporter = attach_to_parent(parent_pid, report_fd)
    from memfabric.node import NodeOptions, serve_node

    memory = memory_bytes if memory_bytes is not None else default_memory_bytes(directory)
    region = region_bytes if region_bytes is not None else default_region_bytes(memory)
    memory = whole_regions(memory, region)
    check_room(directory, memory)
    if settings.timeout_ns is not None:
        options["register_timeout_s"] = settings.timeout_s
    name = name if name is not None else default_name()
    spelled = units.format_bytes(memory)

    def progress(done_bytes: int) -> None:
        reporter.report(done_bytes=done_bytes)

    def ready() -> None:
        if ready_file is not None:
            write_ready_file(ready_file, {"name": name, "server": settings.server, "pid": os.getpid()})
        reporter.report(ready=True)
        if report_fd is None:
            note(f"Node {name} lends {spelled} to {settings.server} (pid {os.getpid()}); Ctrl-C stops it.")

    serve_node(
        NodeOptions(
            name=name,
            server=settings.server,
            memory_bytes=memory,
            region_bytes=region,
            directory=directory,
            transport=transport or "auto",
            bind=bind,
            insecure=bool(insecure),
            **options,
        ),
        ready=ready,
        progress=progress,
    )


@node.command("list", epilog=examples("memfabric node list\nmemfabric node list --json"))
@common_options(json=True)
@pass_settings
def list_nodes(settings: Settings) -> None:
    """Show the memory nodes."""
    from memfabric.cli.render import nodes_table

    with settings.admin() as admin:
        nodes = admin.nodes()
    if settings.as_json:
        emit_json(nodes)
    elif nodes:
        console().print(nodes_table(nodes))
    else:
        note("No node has joined yet; start one with `memfabric node`.")


@node.command(epilog=examples("memfabric node drain node-0\nmemfabric node drain node-0 --undo"))
@click.argument("name")
@click.option("--undo", is_flag=True, help="Let new blocks go there again.")
@common_options(json=True)
@pass_settings
def drain(settings: Settings, name: str, undo: bool) -> None:
    """Put no new blocks on a node.

    Blocks that are there stay readable until they are evicted or the node is stopped.
    """
    with settings.admin() as admin:
        admin.drain(name, undo=undo)
    if settings.as_json:
        emit_json({"name": name, "state": "active" if undo else "draining"})
    else:
        click.echo(f"{name} is {'active again' if undo else 'draining: it gets no new blocks'}.")


def default_name() -> str:
    """The host's name, as far as it may be a node's name."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname()).lstrip(".-")[:64] or "node"
