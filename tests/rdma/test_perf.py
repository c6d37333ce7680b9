"""Sweeps over an RDMA device: reads and writes of a transport, between two processes of one host."""

from __future__ import annotations

from pathlib import Path

import pytest

from memfabric.perf.axes import Fabric
from memfabric.perf.plan import Sweep, make_plan
from memfabric.perf.run import run_sweep
from memfabric.units import KIB, MIB
from tests.rdma.test_ucx import RC
from transport import registry

FABRICS = [Fabric("rc", "ucx", tuple(RC.items()))]
FABRICS += [Fabric("verbs", "verbs")] if "verbs" in registry.names() else []


@pytest.mark.parametrize("fabric", FABRICS, ids=lambda fabric: fabric.label)
def test_reads_and_writes_are_measured(fabric: Fabric) -> None:
    sweep = Sweep(
        fabrics=(fabric,),
        block_bytes=(16 * KIB,),
        batches=(4,),
        repeats=1,
        point_s=0.5,
        working_set_bytes=MIB,
        directory=Path("/dev/shm"),
    )
    document = run_sweep(make_plan(sweep), lambda progress: None, with_tools=False)
    read, write = document["points"]
    for record, tool in ((read, "ib_read_bw"), (write, "ib_write_bw")):
        assert record.get("problem", "") == ""
        assert record["one_sided"] and record["summary"]["latency"]["count"] > 0
        assert record["limit"] == ("ucx_perftest" if fabric.name == "ucx" else tool)
