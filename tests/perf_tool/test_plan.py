"""Sweeps are checked and fitted into memory and time before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from memfabric.errors import UsageError
from memfabric.perf.axes import fabric
from memfabric.perf.plan import OPS, Setting, Sweep, lent_bytes, make_plan, memory_needed, set_count
from memfabric.units import GIB, KIB, MIB
from tests.perf_tool.conftest import point


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ops": ("reed",)}, "no operation 'reed'"),
        ({"ops": ()}, "no operation is given"),
        ({"fabrics": (fabric("carrier-pigeon"),)}, "no transport 'carrier-pigeon'"),
        ({"fabrics": (fabric("auto"),)}, "auto is for pools"),
        ({"fabrics": (fabric("shm"), fabric("shm"))}, "named twice"),
        ({"kinds": ("tape",)}, "no memory kind 'tape'"),
        ({"block_bytes": (0,)}, "block size must be 1 to"),
        ({"block_bytes": (2 * GIB,)}, "block size must be 1 to"),
        ({"batches": (0,)}, "batch must be"),
        ({"depths": (1000,)}, "depth must be"),
        ({"threads": (65,)}, "threads must be"),
        ({"clients": (0,)}, "clients must be"),
        ({"nodes": (17,)}, "nodes must be"),
        ({"repeats": 0}, "repeats must be"),
        ({"point_s": 0.0}, "a point takes at least"),
        ({"point_s": float("nan")}, "a point takes at least"),
        ({"total_s": -1.0}, "budget must be above 0"),
        ({"total_s": 0.5}, "do not fit into 0.5 s"),
        ({"working_set_bytes": 1}, "working set"),
        ({"directory": Path("/nowhere/at/all")}, "not a directory"),
        ({"address": "tcp://127.0.0.1:1"}, "use no pool"),
        ({"memory_bytes": 1 << 60}, "has only"),
        ({"memory_bytes": MIB}, "no point fits into the memory"),
        ({"batches": tuple(range(1, 200)), "threads": tuple(range(64))}, "over the limit of 5000"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make_plan(Sweep(**changes))


def test_points_are_grouped_by_what_must_run_for_them() -> None:
    sweep = Sweep(ops=OPS, block_bytes=(4 * KIB, 64 * KIB), batches=(1, 16), depths=(1, 4), nodes=(1, 2))
    plan = make_plan(sweep)
    assert list(plan.points) == [
        Setting(True, "shm", "cpu", 0),
        Setting(False, "shm", "cpu", 1),
        Setting(False, "shm", "cpu", 2),
    ]
    raw, one, _ = plan.points.values()
    assert len(raw) == 2 * 2 * 2 * 2  # operations, sizes, batches, depths
    assert {each.nodes for each in raw} == {0}
    assert {each.depth for each in one} == {1}  # a pool's client has one operation in flight
    assert len([each for each in one if each.op == "match"]) == 2  # a request has no block size
    assert (
        plan.count() == sum(map(len, plan.points.values())) == len({each for p in plan.points.values() for each in p})
    )


def test_points_that_are_too_large_are_left_out_with_the_reason() -> None:
    plan = make_plan(Sweep(ops=("read",), block_bytes=(4 * KIB, 16 * MIB), batches=(1, 64), memory_bytes=512 * MIB))
    assert [(skipped.block_bytes, skipped.batch) for skipped, _ in plan.skipped] == [(16 * MIB, 64)]
    assert "512 MiB are allowed" in plan.skipped[0][1]
    assert plan.memory_bytes <= 512 * MIB


def test_memory_counts_every_buffer() -> None:
    sweep = Sweep(working_set_bytes=64 * MIB)
    one = point(block_bytes=64 * KIB, batch=16)
    assert set_count(sweep, one) == 64
    # its own memory, another as large to copy to, the region; and both ends of the socket
    assert memory_needed(sweep, one) == 3 * 64 * MIB + 2 * MIB
    assert memory_needed(sweep, point(block_bytes=64 * KIB, batch=16, clients=4)) == 4 * memory_needed(sweep, one)
    deep = point(block_bytes=64 * MIB, batch=1, depth=8)
    assert set_count(sweep, deep) == 8  # operations in flight at once never share memory
    assert lent_bytes(sweep, point(op="get", nodes=2)) >= 2 * 64 * MIB
    there = Sweep(ops=("get",), address="tcp://127.0.0.1:1")
    assert lent_bytes(there, point(op="get")) == 0


def test_a_budget_for_the_whole_sweep_shortens_the_points() -> None:
    free = make_plan(Sweep(ops=("read",), batches=(1,), block_bytes=(64 * KIB, MIB), point_s=30.0))
    tight = make_plan(Sweep(ops=("read",), batches=(1,), block_bytes=(64 * KIB, MIB), point_s=30.0, total_s=20.0))
    assert free.point_s == 30.0 and free.estimate_s > 60
    assert tight.point_s < 10 and tight.estimate_s == pytest.approx(20.0)
