"""``memfabric demo``: a language model whose prefill and decode share KV blocks through a pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from memfabric.cli.base import DURATION, SIZE, Settings, common_options, examples, pass_settings
from memfabric.cli.memory import DIRECTORY_VARIABLE, SHARED_MEMORY


@click.command(
    short_help="Show the pool at work with a real language model.",
    epilog=examples(
        """
memfabric demo
memfabric demo --repeats 5 --out results
memfabric demo --hosts
memfabric demo --json --quiet > report.json
"""
    ),
)
@click.option(
    "-o",
    "--out",
    "out_dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("out/demo"),
    show_default=True,
    help="Where the plot and the report go.",
)
@click.option(
    "--cache-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the converted model is kept.  [default: $MEMFABRIC_CACHE or ~/.cache/memfabric]",
)
@click.option(
    "--new-tokens", type=click.IntRange(1, 512), default=48, show_default=True, help="Tokens to generate per request."
)
@click.option("--block-tokens", type=click.IntRange(1, 256), default=16, show_default=True, help="Tokens in one block.")
@click.option(
    "--repeats", type=click.IntRange(1, 100), default=3, show_default=True, help="Measurements; the median counts."
)
@click.option(
    "-n", "--nodes", "node_count", type=click.IntRange(1, 64), default=2, show_default=True, help="Memory nodes."
)
@click.option("-m", "--memory", "node_bytes", type=SIZE, help="Memory of each node.  [default: 256MiB]")
@click.option("--region", "region_bytes", type=SIZE, help="Size of one region.  [default: 64MiB]")
@click.option(
    "--directory",
    "shm_directory",
    type=click.Path(file_okay=False, path_type=Path),
    envvar=DIRECTORY_VARIABLE,
    help=f"Shared memory to take it from.  [default: ${DIRECTORY_VARIABLE} or {SHARED_MEMORY}]",
)
@click.option(
    "--step-timeout", "step_timeout_ns", type=DURATION, help="How long one process may take.  [default: 15min]"
)
@click.option("--hosts", is_flag=True, help="On two hosts (network namespaces; needs root), over UCX and TCP.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@common_options(json=True, server=False)
@pass_settings
def demo(settings: Settings, step_timeout_ns: int | None, **options: Any) -> None:
    """Show the pool at work with a real language model.

    It starts a pool of its own. One process computes a long prompt and stores the blocks; another one finds and reads
    them, and generates. A table and a plot compare that with computing everything anew; the generated tokens must be
    the same, or the command fails.
    """
    from memfabric.demo import DemoOptions, run_demo

    given = {name: value for name, value in options.items() if value is not None}
    if step_timeout_ns is not None:
        given["step_timeout_s"] = step_timeout_ns / 1e9
    run_demo(DemoOptions(as_json=settings.as_json, **given))
