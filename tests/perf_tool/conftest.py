"""Small documents and sweeps for the tests of `memfabric perf`; nothing may be left in shared memory."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from memfabric.perf.histogram import Histogram
from memfabric.perf.messages import Ready
from memfabric.perf.plan import Point
from memfabric.perf.results import SCHEMA, Measured
from memfabric.units import MIB


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A directory for regions in shared memory; the test fails if it leaves any there."""
    directory = Path(tempfile.mkdtemp(prefix="mfperf-", dir="/dev/shm"))
    try:
        yield directory
        assert sorted(path.name for path in directory.iterdir()) == []
    finally:
        shutil.rmtree(directory)


def point(**changes: Any) -> Point:
    """A point; whatever is not said is usual."""
    usual = {"op": "read", "transport": "shm", "kind": "cpu", "block_bytes": 65536, "batch": 16}
    return Point(**{**usual, "depth": 1, "threads": 0, "clients": 1, "nodes": 0, **changes})


def record(at: Point, speeds: list[float], limit: float = 2e10, problem: str = "") -> dict[str, Any]:
    """What a document holds of a point whose repeats had these speeds (bytes or keys a second)."""
    requests = at.op in ("match", "reserve+commit")
    found = Measured(at, verify=False, limit="memcpy", problem=problem)
    found.ready = Ready(data_path="memory copy", one_sided=True, mapped=True, limits=["memcpy"])
    for speed in speeds:
        taken_ns = at.batch * 1e9 / speed if requests else at.batch_bytes * 1e9 / speed
        histogram = Histogram()
        histogram.add([taken_ns] * 200)
        found.histogram.merge(histogram)
        beside = {"bytes_per_s": limit, "blocks_per_s": limit / at.block_bytes}
        found.repeats.append(
            {
                "ops": 200,
                "bytes": 0 if requests else 200 * at.batch_bytes,
                "bytes_per_s": 0 if requests else speed,
                "blocks_per_s": speed if requests else speed / at.block_bytes,
                "latency": histogram.summary(),
                "memcpy": beside,
                "ratio": speed / limit,
                "node_cpu_beyond_idle_s": 0.001,
            }
        )
    return found.document()


@pytest.fixture
def document() -> Callable[..., dict[str, Any]]:
    """Makes documents of a sweep from records."""

    def make(*records: dict[str, Any], **changes: Any) -> dict[str, Any]:
        machine = {"cpu": "a processor", "cores": 8, "memory_bytes": 64 * MIB, "hypervisor": False, "kernel": "6.1"}
        made = {
            "schema": SCHEMA,
            "stopped": None,
            "seconds": 12.5,
            "machine": {**machine, "date": "2026-01-02T03:04:05+00:00", "revision": "abc", "digest": "avx2"},
            "sweep": {"repeats": 5, "working_set_bytes": 64 * MIB, "random_order": False, "verify": None},
            "transports": {},
            "tools": [],
            "points": list(records),
            "skipped": [],
            "left_behind": [],
        }
        return {**made, **changes}

    return make


def noisy(middle: float, scatter: float, seed: int, count: int = 5) -> list[float]:
    """Speeds that scatter around a middle, by a share of it."""
    chance = random.Random(seed)
    return [middle * (1 + scatter * chance.uniform(-1, 1)) for _ in range(count)]
