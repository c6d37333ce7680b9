"""The benchmarks run, and what they write has the shape that readers of it expect. Nothing is held against a clock."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[2]


@pytest.mark.processes
def test_quick_run_writes_everything(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "perf.bench", "--quick", "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "targets" in done.stdout
    for picture in ("bench-copies.png", "bench-latency.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    document = json.loads((out / "bench.json").read_text())
    assert document["schema"] == "memfabric-bench/1"
    assert document["quick"] is True
    assert {"cpu", "cores", "kernel", "date", "revision", "versions"} <= document["machine"].keys()
    _check_results(document["results"])
    assert document["targets"]
    for target in document["targets"]:
        assert {"what", "target", "measured", "unit", "met", "missed_by"} <= target.keys()
        assert target["met"] == (target["missed_by"] == 0)


def _check_results(results: dict[str, Any]) -> None:
    for what, parts in (("get", {"verify_off", "verify_on"}), ("put", {"put", "write", "reserve", "commit"})):
        shapes = {(record["block_bytes"], record["batch"]) for record in results[what]}
        assert (65536, 1) in shapes and (65536, 16) in shapes
        for record in results[what]:
            for threads in ("one", "auto"):
                measured = record["threads"][threads]
                assert measured.keys() == parts | {"memcpy"}
                assert all(measured[part]["p50_us"] > 0 and measured[part]["ratio"]["median"] > 0 for part in parts)
    assert {record["readers"] for record in results["readers"]} == {1, 2}
    modes = {(record["mode"], record["check"]) for record in results["latency"]}
    assert {("optimistic", "verified"), ("optimistic", "unverified"), ("leased", "verified")} <= modes
    for record in results["latency"]:
        histogram = record["histogram"]
        assert len(histogram["edges_us"]) == len(histogram["counts"]) + 1
        assert sum(histogram["counts"]) == record["count"]
    requests = {(record["request"], record["keys"]) for record in results["core"]}
    assert {(name, keys) for name in ("match", "acquire", "reserve+commit") for keys in (512, 4096)} <= requests
    assert {(record["request"], record["keys"]) for record in results["round_trip"]} <= requests
    assert results["memory"]["core"]["blocks"] == results["memory"]["server"]["blocks"] == 100_000
    assert results["node"]["cpu_s_per_gib_beyond_idle"] >= 0


@pytest.mark.processes
def test_gpu_figures_are_printed_by_the_stand_in_too() -> None:
    command = [sys.executable, "-m", "perf.gpu", "--device", "host", "--mib", "2", "--seconds", "0.1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("digest", "gather and digest of 256 B", "write of 1024 KiB blocks, staged"):
        assert f"  {name} " in done.stdout
