"""What pictures of a sweep show: panels of lines over the axis that was swept most.

Knows nothing of how they are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from memfabric import units
from memfabric.perf.plan import REQUESTS
from memfabric.perf.results import NUMBER_AXES

MOST_LINES = 8
AXIS_WORDS = {
    "block_bytes": "block size",
    "batch": "blocks in an operation",
    "depth": "operations in flight",
    "threads": "threads (0: as many as pay)",
    "clients": "clients",
    "nodes": "memory nodes",
}
_SHORT = {
    "block_bytes": "",
    "batch": "x ",
    "depth": "depth ",
    "threads": "threads ",
    "clients": "clients ",
    "nodes": "nodes ",
}
LIMIT_WORDS = {"memcpy": "memcpy", "socket": "plain socket"}


@dataclass
class Line:
    """One line: what differs from the other lines, and its points.

    Attributes:
        colour: number of the colour; a limit has that of what it belongs to.
        limit: it is a limit, drawn thin and dashed.
        ys, lows, highs: of speeds the median of the repeats, and their quartiles; of times p50, and p50 to p99.
    """

    label: str
    colour: int
    limit: bool = False
    xs: list[int] = field(default_factory=list)
    ys: list[float] = field(default_factory=list)
    lows: list[float] = field(default_factory=list)
    highs: list[float] = field(default_factory=list)


@dataclass
class Panel:
    """One diagram.

    Attributes:
        ticks: positions on the horizontal axis, which is logarithmic, with their words.
        left_out: lines that there was no room for.
    """

    title: str
    across: str
    up: str
    ticks: list[tuple[int, str]]
    lines: list[Line]
    left_out: int


def panels(document: dict[str, Any]) -> list[tuple[Panel, Panel]]:
    """For every operation its speed, limits beside it, and its latency; without those that were not measured."""
    found = []
    records = [record for record in document["points"] if record.get("summary")]
    for op in dict.fromkeys(record["op"] for record in records):
        found.append(_pair(op, [record for record in records if record["op"] == op]))
    return found


def _pair(op: str, records: Sequence[dict[str, Any]]) -> tuple[Panel, Panel]:
    axis = _axis(op, records)
    others = [name for name in ("transport", "kind", *NUMBER_AXES) if name != axis]
    differing = [name for name in others if len({record[name] for record in records}) > 1]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(tuple(record[name] for name in differing), []).append(record)
    fixed = ("batch",) if op in REQUESTS else ("block_bytes", "batch")
    words = [_word(name, records[0][name]) for name in fixed if name not in (axis, *differing)]
    title = " ".join([op, *words])
    ticks = [(value, _tick(axis, value)) for value in sorted({record[axis] for record in records})]
    speeds: list[Line] = []
    times: list[Line] = []
    for number, (values, members) in enumerate(list(groups.items())[:MOST_LINES]):
        label = ", ".join(_word(name, value) for name, value in zip(differing, values, strict=True))
        members.sort(key=lambda record: int(record[axis]))
        speed, limit = _speed(op, axis, members, number, label)
        latency = _latency(op, axis, members, number, label)
        speeds += [line for line in (speed, limit) if line.xs]
        times += [latency] if latency.xs else []
    left_out = max(0, len(groups) - MOST_LINES)
    across, unit = AXIS_WORDS[axis], "thousand keys/s" if op in REQUESTS else "GB/s"
    return (
        Panel(f"{title}: speed", across, unit, ticks, speeds, left_out),
        Panel(f"{title}: time of an operation, p50 to p99", across, "µs", ticks, times, left_out),
    )


def _speed(op: str, axis: str, records: Sequence[dict[str, Any]], number: int, label: str) -> tuple[Line, Line]:
    """A line of medians, and the limit that applies."""
    key, scale = ("blocks_per_s", 1e3) if op in REQUESTS else ("bytes_per_s", 1e9)
    speed, limit = Line(label or op, number), Line("", number, limit=True)
    for record in records:
        summary, name = record["summary"], str(record.get("limit"))
        quartiles = np.percentile([repeat[key] for repeat in record["repeats"]], [25, 75]) / scale
        _add(speed, record[axis], summary[key]["median"] / scale, *map(float, quartiles))
        beside = summary.get(f"{name}_{key}")
        if beside is not None:
            limit.label = ", ".join([LIMIT_WORDS.get(name, name), *([label] if label else [])])
            _add(limit, record[axis], *[beside["median"] / scale] * 3)
    return speed, limit


def _latency(op: str, axis: str, records: Sequence[dict[str, Any]], number: int, label: str) -> Line:
    line = Line(label or op, number)
    for record in records:
        times = record["summary"]["latency"]
        if times["p50_us"] is not None:
            _add(line, record[axis], times["p50_us"], times["p50_us"], times["p99_us"] or times["max_us"])
    return line


def _axis(op: str, records: Sequence[dict[str, Any]]) -> str:
    """The number that takes most values; of equals the first."""
    names = [name for name in NUMBER_AXES if not (op in REQUESTS and name == "block_bytes")]
    return max(names, key=lambda name: len({record[name] for record in records}))


def _add(line: Line, x: int, y: float, low: float, high: float) -> None:
    line.xs.append(x)
    line.ys.append(y)
    line.lows.append(low)
    line.highs.append(high)


def _word(name: str, value: Any) -> str:
    if name == "block_bytes":
        return units.format_bytes(value)
    if name == "threads" and value == 0:
        return "threads auto"
    return f"{_SHORT.get(name, '')}{value}"


def _tick(name: str, value: int) -> str:
    return (
        units.format_bytes(value)
        if name == "block_bytes"
        else "auto"
        if name == "threads" and not value
        else str(value)
    )


def about(document: dict[str, Any]) -> str:
    """The line below a picture: what it was taken on."""
    facts = document["machine"]
    parts = [f"{facts['cpu']}, {facts['cores']} cores", str(facts["date"])[:10]]
    parts += [f"memfabric {facts['revision']}", f"{document['sweep'].get('repeats')} repeats"]
    load = facts.get("load_average")
    parts += [f"load {load[0]:g} at the start"] if load else []
    parts += [f"not complete: {document['stopped']}"] if document.get("stopped") else []
    return " · ".join(parts)
