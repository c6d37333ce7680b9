"""``memfabric up``: a whole pool as child processes of one command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from memfabric.cli.base import SIZE, Settings, common_options, examples, pass_settings
from memfabric.cli.memory import (
    DIRECTORY_VARIABLE,
    SHARED_MEMORY,
    check_room,
    default_memory_bytes,
    default_region_bytes,
    whole_regions,
)
from memfabric.cli.output import note
from memfabric.cli.parts import check_ready_file, write_ready_file

if TYPE_CHECKING:
    from memfabric.cli.pool import Pool

EXIT_CHILD_FAILED = 1


@click.command(
    short_help="Run a whole pool on this machine.",
    epilog=examples(
        """
memfabric up
memfabric up --nodes 4 --memory 8GiB
memfabric up --address tcp://127.0.0.1:auto --ready-file pool.json
"""
    ),
)
@click.option("-n", "--nodes", type=click.IntRange(1, 64), default=2, show_default=True, help="How many memory nodes.")
@click.option(
    "-m",
    "--memory",
    "memory_bytes",
    type=SIZE,
    help="Memory of each node.  [default: 1GiB, less where little is free]",
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
    "--state-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where namespaces are kept over restarts.  [default: nowhere]",
)
@click.option(
    "--transport",
    default="auto",
    show_default=True,
    help="By which nodes lend memory beside shared memory: names, separated by commas, or auto.",
)
@click.option("--insecure", is_flag=True, help="Allow an address that other hosts can reach.")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="warning",
    show_default=True,
    help="Least important log lines of the processes to show.",
)
@click.option(
    "--ready-file",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=check_ready_file,
    help='Write {"address": …, "pids": {…}} to this file once the pool is ready.',
)
@common_options(address="Where to serve; port `auto` takes a free one.")
@pass_settings
@click.pass_context
def up(
    ctx: click.Context,
    settings: Settings,
    nodes: int,
    memory_bytes: int | None,
    region_bytes: int | None,
    directory: Path,
    state_dir: Path | None,
    transport: str,
    insecure: bool,
    log_level: str,
    ready_file: Path | None,
) -> None:
    """Run a whole pool on this machine: one metadata server and some memory nodes.

    The processes end with this command: Ctrl-C stops them in order, a second Ctrl-C at once. If a node dies the others
    go on; if the metadata server dies the pool stops. The exit code is 0 only if everything that was started also
    ended well.
    """
    from memfabric.cli.pool import Pool, PoolPlan

    memory = memory_bytes if memory_bytes is not None else default_memory_bytes(directory, nodes)
    region = region_bytes if region_bytes is not None else default_region_bytes(memory)
    memory = whole_regions(memory, region)
    check_room(directory, memory, nodes)
    plan = PoolPlan(
        address=settings.bind,
        node_count=nodes,
        memory_bytes=memory,
        region_bytes=region,
        directory=directory,
        state_dir=state_dir,
        log_level=log_level,
        timeout_s=settings.timeout_s,
        transport=transport,
        insecure=insecure,
    )
    if ready_file is not None:
        ready_file.unlink(missing_ok=True)  # of a pool that was killed
    with Pool(plan) as pool:
        if pool.start():
            _announce(pool, ready_file)
            pool.watch()
            if ready_file is not None:
                ready_file.unlink(missing_ok=True)
    if pool.failures:
        ctx.exit(EXIT_CHILD_FAILED)


def _announce(pool: Pool, ready_file: Path | None) -> None:
    """Tell people and scripts that the pool is there."""
    if ready_file is not None:
        document: dict[str, Any] = {"address": pool.address, "pids": pool.pids()}
        write_ready_file(ready_file, document)
    for line in pool.summary():
        note(line)
