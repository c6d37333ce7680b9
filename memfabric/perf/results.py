"""What a sweep found: the document, its summaries, and the files it is kept in.

The document holds every repeat as it was, so that whoever reads it can summarize otherwise. Rates are bytes or
operations per second of time spent in operations, summed over the clients.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from memfabric.errors import UsageError
from memfabric.perf import messages
from memfabric.perf.histogram import Histogram
from memfabric.perf.plan import REQUESTS, Point
from memfabric.perf.tools import Figure
from memfabric.units import GIB

SCHEMA = "memfabric-perf/1"
MOST_DOCUMENT_BYTES = 512 << 20
AXES = ("op", "transport", "kind", "block_bytes", "batch", "depth", "threads", "clients", "nodes")
"""What tells points apart."""
NUMBER_AXES = AXES[3:]


@dataclass
class Measured:
    """What was found at a point so far.

    Attributes:
        ready: what the clients told of it; None before the first visit.
        limit: name of the limit that it is held against; empty where none applies.
        repeats: of each visit what it found.
        histogram: of the operations' durations, of all repeats and clients.
        problem: why it was not measured, or not as often as was asked for.
    """

    point: Point
    verify: bool
    ready: messages.Ready | None = None
    limit: str = ""
    repeats: list[dict[str, Any]] = field(default_factory=list)
    histogram: Histogram = field(default_factory=Histogram)
    problem: str = ""

    def document(self) -> dict[str, Any]:
        """For JSON: the point, what it is held against, a summary, and everything behind it."""
        found: dict[str, Any] = {name: getattr(self.point, name) for name in AXES}
        found["verify"] = self.verify
        if self.ready is not None:
            found |= {
                "data_path": self.ready.data_path,
                "one_sided": self.ready.one_sided,
                "mapped": self.ready.mapped,
                "limit": self.limit or None,
            }
        if self.problem:
            found["problem"] = self.problem
        if self.repeats:
            found["summary"] = summarize(self.repeats, self.histogram, requests=self.point.op in REQUESTS)
            found["repeats"] = self.repeats
            found["histogram"] = self.histogram.document()
        return found


def rates(answers: Sequence[messages.Ran]) -> dict[str, Any]:
    """What the clients did in one window, together."""
    histogram = merged(answers)
    return {
        "ops": sum(each.ops for each in answers),
        "bytes": sum(each.size_bytes for each in answers),
        "ops_per_s": round(sum(each.ops * 1e9 / max(1, each.busy_ns) for each in answers), 3),
        "blocks_per_s": round(sum(each.blocks * 1e9 / max(1, each.busy_ns) for each in answers), 3),
        "bytes_per_s": round(sum(each.size_bytes * 1e9 / max(1, each.busy_ns) for each in answers)),
        "latency": histogram.summary(),
    }


def merged(answers: Sequence[messages.Ran]) -> Histogram:
    """The clients' histograms in one."""
    found = Histogram()
    for each in answers:
        found.merge(Histogram.load(each.counts, each.least_ns, each.most_ns))
    return found


def summarize(repeats: Sequence[dict[str, Any]], histogram: Histogram, *, requests: bool) -> dict[str, Any]:
    """Medians over the repeats, their least and greatest, and percentiles of all durations together."""
    found: dict[str, Any] = {"repeats": len(repeats)}
    for name in ("blocks_per_s",) if requests else ("bytes_per_s", "blocks_per_s"):
        found[name] = _spread([each[name] for each in repeats])
    found["latency"] = histogram.summary()
    for name in ("memcpy", "socket"):
        key = "blocks_per_s" if requests else "bytes_per_s"
        limits = [each[name][key] for each in repeats if name in each]
        if limits:
            found[f"{name}_{key}"] = _spread(limits)
    ratios = [each["ratio"] for each in repeats if each.get("ratio") is not None]
    if ratios:
        found["ratio"] = _spread(ratios)
    moved = sum(each["bytes"] for each in repeats)
    costs = [each["node_cpu_beyond_idle_s"] for each in repeats if each.get("node_cpu_beyond_idle_s") is not None]
    if moved and len(costs) == len(repeats):
        found["node_cpu_s_per_gib"] = round(max(0.0, sum(costs)) / (moved / GIB), 6)
    return found


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "least": round(min(values), 4),
        "most": round(max(values), 4),
    }


def key_of(record: dict[str, Any]) -> tuple[Any, ...]:
    """What tells a point of a document apart from others, in this document and in others."""
    return (*(record[name] for name in AXES), record.get("verify"))


def point_of(record: dict[str, Any]) -> Point:
    """The point that a record is of."""
    return Point(**{name: record[name] for name in AXES})


def save(document: dict[str, Any], path: Path) -> None:
    """Write a document, whole or not at all.

    Raises:
        OSError: it can't be written.
    """
    write_whole(path, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all.

    Raises:
        OSError: it can't be written.
    """
    if not path.exists() or path.is_file():
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_bytes(data)
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
    else:
        path.write_bytes(data)  # a pipe or a device


class _Spread(msgspec.Struct):
    median: float
    least: float
    most: float


class _Latency(msgspec.Struct):
    p50_us: float | None
    p90_us: float | None
    p99_us: float | None
    p999_us: float | None
    max_us: float


class _Summary(msgspec.Struct):
    repeats: int
    blocks_per_s: _Spread
    latency: _Latency
    bytes_per_s: _Spread | None = None
    ratio: _Spread | None = None
    memcpy_bytes_per_s: _Spread | None = None
    socket_bytes_per_s: _Spread | None = None
    socket_blocks_per_s: _Spread | None = None
    node_cpu_s_per_gib: float | None = None


class _Histogram(msgspec.Struct):
    counts: list[tuple[int, int]]
    least_ns: int
    most_ns: int


class _Record(msgspec.Struct):
    op: str
    transport: str
    kind: str
    block_bytes: int
    batch: int
    depth: int
    threads: int
    clients: int
    nodes: int
    verify: bool
    data_path: str = ""
    limit: str | None = None
    problem: str = ""
    summary: _Summary | None = None
    histogram: _Histogram | None = None
    repeats: list[dict[str, Any]] = []

    def __post_init__(self) -> None:
        if self.summary is None:
            return
        if self.histogram is None or (self.summary.bytes_per_s is None and self.op not in REQUESTS):
            raise ValueError(f"a point of {self.op} was measured, but lacks figures")
        if not self.repeats or not all(isinstance(each.get(_rate(self.op)), (int, float)) for each in self.repeats):
            raise ValueError(f"a point of {self.op} was measured, but lacks repeats")


def _rate(op: str) -> str:
    return "blocks_per_s" if op in REQUESTS else "bytes_per_s"


class _Machine(msgspec.Struct):
    cpu: str
    cores: int
    date: str
    revision: str


class _Skipped(msgspec.Struct):
    point: str
    reason: str


class _Document(msgspec.Struct):
    """What readers of a document rely on; more may be there."""

    schema: str
    seconds: float
    machine: _Machine
    sweep: dict[str, Any]
    tools: list[Figure]
    points: list[_Record]
    skipped: list[_Skipped]
    left_behind: list[str]
    stopped: str | None = None


def load(path: Path) -> dict[str, Any]:
    """Read a document back.

    Raises:
        UsageError: the file is none, or of another version. OSError: it can't be read.
    """
    if path.is_file() and path.stat().st_size > MOST_DOCUMENT_BYTES:
        raise UsageError(f"{path} has {path.stat().st_size} bytes; no results of a sweep are that long")
    data = path.read_bytes()
    try:
        found = msgspec.json.decode(data)
        if isinstance(found, dict) and found.get("schema") not in (SCHEMA, None):
            raise UsageError(f"{path} is a {str(found['schema'])[:64]!r}; this version reads {SCHEMA!r}")
        msgspec.convert(found, _Document)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path} holds no results of `memfabric perf run --json`: {error}") from error
    assert isinstance(found, dict)
    return found


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def csv_text(document: dict[str, Any]) -> str:
    """One line a point that was measured; units are in the names of the columns."""
    out = io.StringIO()
    names = [*AXES, "verify", "repeats", "bytes_per_s", "bytes_per_s_least", "bytes_per_s_most", "blocks_per_s"]
    names += ["min_us", "p50_us", "p90_us", "p99_us", "p999_us", "max_us", "memcpy_bytes_per_s", "socket_bytes_per_s"]
    names += ["socket_blocks_per_s", "limit", "ratio", "node_cpu_s_per_gib", "data_path", "problem"]
    writer = csv.DictWriter(out, names, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for record in document["points"]:
        summary = record.get("summary")
        row = {name: record.get(name) for name in (*AXES, "verify", "limit", "data_path", "problem")}
        if summary is not None:
            row |= {name: value for name, value in summary["latency"].items() if name != "count"}
            row |= {
                name: value["median"]
                for name, value in summary.items()
                if isinstance(value, dict) and "median" in value
            }
            rate = summary.get("bytes_per_s", {})
            row |= {"bytes_per_s_least": rate.get("least"), "bytes_per_s_most": rate.get("most")}
            row |= {"repeats": summary["repeats"], "node_cpu_s_per_gib": summary.get("node_cpu_s_per_gib")}
        writer.writerow(row)
    return out.getvalue()
