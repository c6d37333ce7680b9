"""`python -m perf.bench`: all benchmarks, with tables, JSON and pictures."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console

from memfabric.perf import machine
from memfabric.perf.pool import BenchPool
from perf import copies, latency, metadata, plan, readers, report, targets
from perf.plan import GIB, Plan, size_text

SCHEMA = "memfabric-bench/1"
REPORT_COLUMNS = 110
"""Of tables that go to a file."""


@click.command()
@click.option("--quick", is_flag=True, help="Small and short: shows that everything runs, in under a minute.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("out/bench"),
    show_default=True,
    help="Where bench.json and the pictures go.",
)
@click.option(
    "--directory",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path("/dev/shm"),
    show_default=True,
    help="Shared memory for the pool.",
)
@click.option("--plot/--no-plot", default=True, help="Draw pictures (needs matplotlib).")
def main(quick: bool, out: Path, directory: Path, plot: bool) -> None:
    """Measure what memfabric costs, as ratios to limits measured in the same run. Never fails on time."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=REPORT_COLUMNS)
    begin_s = time.monotonic()

    def tell(line: str) -> None:
        console.print(f"[dim]{time.monotonic() - begin_s:5.0f} s[/]  {line}", highlight=False, soft_wrap=True)

    chosen = plan.quick(directory) if quick else plan.full(directory)
    facts = machine.facts()
    tell(
        f"{facts['cpu']}, {facts['cores']} cores, load {facts['load_average'][0]}; the pool takes "
        f"{size_text(chosen.pool_bytes // plan.MIB * plan.MIB)} of {directory}"
    )
    for reason in chosen.skipped():
        tell(f"skipped: {reason}")
    results = run(chosen, tell)
    facts["load_average_after"] = machine.facts()["load_average"]
    verdicts = targets.judge(results)
    out.mkdir(parents=True, exist_ok=True)
    document = {
        "schema": SCHEMA,
        "quick": quick,
        "seconds": round(time.monotonic() - begin_s, 1),
        "machine": facts,
        "skipped": chosen.skipped(),
        "results": results,
        "targets": [verdict.document() for verdict in verdicts],
    }
    written = [out / "bench.json"]
    written[0].write_text(json.dumps(document, indent=1) + "\n")
    if plot:
        from perf import plots

        written += plots.draw(results, facts, out)
    report.show(console, results, verdicts)
    if quick:
        console.print("This was a quick run: its figures mean little.")
    console.print("Written: " + ", ".join(str(path) for path in written), soft_wrap=True)


def run(chosen: Plan, tell: Callable[[str], None]) -> dict[str, Any]:
    """All measurements."""
    core_memory, core = metadata.measure_core(chosen, tell)
    with BenchPool(chosen.pool_bytes, chosen.directory) as pool:
        server_memory, round_trip = metadata.measure_wire(pool, chosen, tell)
        single = latency.measure(pool, chosen, tell)
        several = readers.measure(pool, chosen, tell)
        idle_share = _idle_share(pool, chosen.idle_s)
        grid = copies.measure(pool, chosen, tell)
    return {
        **grid,
        "readers": several,
        "latency": single,
        "core": core,
        "round_trip": round_trip,
        "memory": {"core": core_memory, "server": server_memory},
        "verification": verification(grid["get"]),
        "node": node_cost(grid["get"], idle_share),
    }


def verification(gets: list[dict[str, Any]]) -> dict[str, float]:
    """How much longer verified gets take with one thread, in percent, over all combinations from 64 KiB up."""
    costs = []
    for record in gets:
        if record["block_bytes"] >= targets.RATIO_FROM_BYTES:
            one = record["threads"]["one"]
            costs.append((one["verify_off"]["ratio"]["median"] / one["verify_on"]["ratio"]["median"] - 1) * 100)
    least, middle, most = np.percentile(costs, [0, 50, 100])
    return {
        "least_percent": round(float(least), 1),
        "median_percent": round(float(middle), 1),
        "most_percent": round(float(most), 1),
    }


def node_cost(gets: list[dict[str, Any]], idle_share: float) -> dict[str, float]:
    """Processor time of the nodes while others read from them, and how much of it is beyond their heartbeats."""
    elapsed_s, cpu_s, moved = (
        sum(record["node"][name] for record in gets) for name in ("elapsed_s", "cpu_s", "bytes_read")
    )
    return {
        "gib_read": round(moved / GIB, 1),
        "elapsed_s": round(elapsed_s, 1),
        "cpu_s": round(cpu_s, 4),
        "idle_cpu_share": round(idle_share, 6),
        "cpu_s_per_gib": round(cpu_s / (moved / GIB), 6),
        "cpu_s_per_gib_beyond_idle": round(max(0.0, cpu_s - idle_share * elapsed_s) / (moved / GIB), 6),
    }


def _idle_share(pool: BenchPool, idle_s: float) -> float:
    """Processor time of the nodes per second when nobody does anything."""
    begin_s, busy_s = time.monotonic(), pool.node_cpu_s()
    time.sleep(idle_s)
    return (pool.node_cpu_s() - busy_s) / (time.monotonic() - begin_s)


if __name__ == "__main__":
    main()
