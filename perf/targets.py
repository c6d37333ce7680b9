"""What the project promises, held against what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from perf.latency import BLOCK_BYTES
from perf.plan import KIB, size_text

RATIO_FROM_BYTES = 64 * KIB
UNVERIFIED_RATIO, VERIFIED_RATIO = 0.9, 0.8
GET_P50_US = 25.0
MATCH_KEYS, MATCH_US = 4096, 1000.0
PUT_BLOCKS_PER_S, ACQUIRE_BLOCKS_PER_S = 500_000, 1_000_000
BYTES_PER_BLOCK = 200.0
NODE_CPU_S_PER_GIB = 0.001
STREAM_RATIOS = {(64 * KIB, 128): 0.7, (1024 * KIB, 16): 0.9, (1024 * KIB, 64): 0.9}
"""Of a plain socket stream on the same cable, by (block_bytes, batch)."""
SMALL_BLOCK_US = 2.0


@dataclass(frozen=True)
class Verdict:
    """A target and what came of it.

    Attributes:
        what, unit: in words.
        target, measured: numbers in that unit. at_least: which side is good.
        where: which of several measurements was the worst and counts.
    """

    what: str
    target: float
    measured: float
    unit: str
    at_least: bool
    where: str = ""

    @property
    def met(self) -> bool:
        """Whether the promise holds."""
        return self.measured >= self.target if self.at_least else self.measured <= self.target

    @property
    def missed_by(self) -> float:
        """By how much of the target; 0 when met."""
        return 0.0 if self.met else abs(self.measured - self.target) / self.target

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "met": self.met, "missed_by": round(self.missed_by, 4)}


def judge(results: dict[str, Any]) -> list[Verdict]:
    """All targets of which the run measured something."""
    return [
        *_copies(results["get"], "verify_off", "get, unverified, by", UNVERIFIED_RATIO),
        *_copies(results["get"], "verify_on", "get, verified, by", VERIFIED_RATIO),
        *_copies(results["put"], "put", "put, whole, by", VERIFIED_RATIO),
        *_copies(results["put"], "write", "put, data part, by", VERIFIED_RATIO),
        *_latency(results["latency"]),
        *_requests(results["core"]),
        *_memory(results["memory"]),
        _node(results["node"]),
    ]


def judge_fabric(results: dict[str, Any]) -> list[Verdict]:
    """The same for `perf.fabric`."""
    verdicts = []
    for record in results["tcp"]:
        target = STREAM_RATIOS.get((record["block_bytes"], record["batch"]))
        for what in ("get", "put"):
            if target is not None:
                name = f"{what}, UCX over TCP, {size_text(record['block_bytes'])} x {record['batch']}"
                verdicts.append(Verdict(name, target, record[what]["ratio"]["median"], "of a stream", True))
    small = results["same_host"]
    for what in ("read", "write"):
        name = f"{what}, UCX on one host, {size_text(small['block_bytes'])} x {small['batch']}, per block"
        verdicts.append(Verdict(name, SMALL_BLOCK_US, small[what]["us_per_block"], "µs", False, small["data_path"]))
    return verdicts


def _copies(records: list[dict[str, Any]], part: str, what: str, target: float) -> Iterator[Verdict]:
    """One for each batch; the worst block size counts."""
    for batch in sorted({record["batch"] for record in records}):
        found = [
            (record["threads"]["auto"][part]["ratio"]["median"], record["block_bytes"])
            for record in records
            if record["batch"] == batch and record["block_bytes"] >= RATIO_FROM_BYTES
        ]
        if found:
            worst, block_bytes = min(found)
            yield Verdict(f"{what} {batch}", target, worst, "of memcpy", True, size_text(block_bytes))


def _latency(records: list[dict[str, Any]]) -> Iterator[Verdict]:
    for record in records:
        if record["mode"] == "optimistic" and record["from"] == "memory":
            what = f"one {size_text(BLOCK_BYTES)} get, {record['check']}, p50"
            yield Verdict(what, GET_P50_US, record["p50_us"], "µs", False, "from memory")


def _requests(records: list[dict[str, Any]]) -> Iterator[Verdict]:
    for record in records:
        name, keys = record["request"], record["keys"]
        if name == "match" and keys == MATCH_KEYS:
            yield Verdict(f"match of {keys} keys, server p50", MATCH_US, record["p50_us"], "µs", False)
        for request, target in (("reserve+commit", PUT_BLOCKS_PER_S), ("acquire", ACQUIRE_BLOCKS_PER_S)):
            if name == request:
                yield Verdict(f"{name} of {keys} keys", target, record["blocks_per_s"], "blocks/s", True)


def _memory(memory: dict[str, Any]) -> Iterator[Verdict]:
    where = f"{memory['core']['blocks']:,} blocks"
    yield Verdict(
        "table memory per block", BYTES_PER_BLOCK, memory["core"]["accounted_bytes_per_block"], "bytes",
        False, where,
    )  # fmt: skip
    yield Verdict(
        "server memory per block", BYTES_PER_BLOCK, memory["server"]["resident_bytes_per_block"],
        "bytes", False, where,
    )  # fmt: skip


def _node(node: dict[str, Any]) -> Verdict:
    return Verdict(
        "nodes, CPU per GiB read", NODE_CPU_S_PER_GIB, node["cpu_s_per_gib_beyond_idle"], "s", False,
        "beyond its heartbeats",
    )  # fmt: skip
