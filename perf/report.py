"""A run's results for people: tables on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from perf.plan import size_text
from perf.targets import Verdict


def show(console: Console, results: dict[str, Any], verdicts: list[Verdict]) -> None:
    """Everything, the targets last."""
    for what, parts in (
        ("get", {"verify_off": "unverified", "verify_on": "verified"}),
        ("put", {"put": "whole", "write": "data part"}),
    ):
        console.print(_copies(what, results[what], parts))
    console.print(_readers(results["readers"]))
    console.print(_latency(results["latency"]))
    console.print(_requests(results["core"], results["round_trip"]))
    console.print(targets_table(verdicts))
    cost = results["verification"]
    console.print(
        f"Verification costs {cost['median_percent']:.0f} % more time on gets from 64 KiB up "
        f"({cost['least_percent']:.0f} to {cost['most_percent']:.0f} %)."
    )
    console.print("Ratios are to a block-wise memcpy of the same blocks, taken in turns with it; 100 % is as fast.")


def _copies(what: str, records: list[dict[str, Any]], parts: dict[str, str]) -> Table:
    table = Table(title=f"{what} against block-wise memcpy")
    for name in ("block", "batch", "memcpy\nGB/s", *(f"{word}\nGB/s" for word in parts.values())):
        table.add_column(name, justify="right")
    for word in parts.values():
        table.add_column(f"{word}\nratio", justify="right")
    for word in parts.values():
        table.add_column(f"{word}\nratio, 1 thread", justify="right")
    last = 0
    for record in records:
        auto, one = record["threads"]["auto"], record["threads"]["one"]
        if last and record["block_bytes"] != last:
            table.add_section()
        last = record["block_bytes"]
        table.add_row(
            size_text(record["block_bytes"]),
            str(record["batch"]),
            f"{auto['memcpy']['gb_s']:.1f}",
            *(f"{auto[part]['gb_s']:.1f}" for part in parts),
            *(f"{auto[part]['ratio']['median']:.0%}" for part in parts),
            *(f"{one[part]['ratio']['median']:.0%}" for part in parts),
        )
    return table


def _readers(records: list[dict[str, Any]]) -> Table:
    table = Table(title="readers at the same time, one thread each")
    for name in ("block", "batch", "readers", "memcpy\nGB/s", "unverified\nratio", "verified\nratio"):
        table.add_column(name, justify="right")
    for record in records:
        table.add_row(
            size_text(record["block_bytes"]),
            str(record["batch"]),
            str(record["readers"]),
            f"{record['memcpy_gb_s']:.1f}",
            f"{record['verify_off_ratio']:.0%}",
            f"{record['verify_on_ratio']:.0%}",
        )
    return table


def _latency(records: list[dict[str, Any]]) -> Table:
    table = Table(title="one 64 KiB block from Python, µs")
    for name in ("mode", "check", "from"):
        table.add_column(name)
    for name in ("min", "p50", "p90", "p99", "p99.9"):
        table.add_column(name, justify="right")
    for record in records:
        points = (record[f"{name}_us"] for name in ("min", "p50", "p90", "p99", "p999"))
        table.add_row(record["mode"], record["check"], record["from"], *(f"{point:.1f}" for point in points))
    return table


def _requests(core: list[dict[str, Any]], round_trip: list[dict[str, Any]]) -> Table:
    table = Table(title="metadata requests")
    for name in ("request", "keys", "server\nms", "server\nblocks/s", "round trip\np50 ms", "round trip\np99 ms"):
        table.add_column(name, justify="right" if name != "request" else "left")
    trips = {(record["request"], record["keys"]): record for record in round_trip}
    for record in core:
        trip = trips.get((record["request"], record["keys"]))
        table.add_row(
            record["request"],
            str(record["keys"]),
            f"{record['p50_us'] / 1e3:.3f}",
            f"{record['blocks_per_s']:,}",
            f"{trip['p50_us'] / 1e3:.3f}" if trip else "",
            f"{trip['p99_us'] / 1e3:.3f}" if trip else "",
        )
    return table


def targets_table(verdicts: list[Verdict]) -> Table:
    """Every promise beside what came of it."""
    table = Table(title="targets")
    table.add_column("what", no_wrap=True)
    table.add_column("target", justify="right", no_wrap=True)
    table.add_column("measured", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("at")
    for verdict in verdicts:
        sign = "≥" if verdict.at_least else "≤"
        table.add_row(
            verdict.what,
            f"{sign} {_number(verdict.target, verdict.unit)}",
            _number(verdict.measured, verdict.unit),
            "[green]met[/]" if verdict.met else f"[red]missed {verdict.missed_by:.0%}[/]",
            verdict.where,
        )
    return table


def _number(value: float, unit: str) -> str:
    if unit.startswith("of "):
        return f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"
    if unit == "blocks/s":
        return f"{value / 1e6:.1f} M/s"
    if unit == "s":
        return f"{value * 1e3:.3g} ms"
    short = {"bytes": "B"}.get(unit, unit)
    return f"{value:,.0f} {short}" if value >= 100 else f"{value:.3g} {short}"
