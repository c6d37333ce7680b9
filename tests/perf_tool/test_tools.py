"""Other people's meters: what they say is understood, and nothing they do stops a sweep."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from memfabric.perf import tools
from memfabric.perf.axes import fabric
from memfabric.perf.limits import applies, measurable
from memfabric.perf.messages import Ready
from tests.perf_tool.conftest import point

UCX = """iterations,50.0_percentile_lat,avg_lat,overall_lat,avg_bw,overall_bw,avg_mr,overall_mr
1000,57.934,60.581,60.581,1031.67,1031.67,16507,16507
"""
PERFTEST = """ #bytes     #iterations    BW peak[MB/sec]    BW average[MB/sec]   MsgRate[Mpps]
 65536      1000             11011.22            10993.56             0.175897
---------------------------------------------------------------------------------------
"""


def test_what_tools_print_is_understood() -> None:
    assert tools.parse_ucx(UCX) == 1031.67 * (1 << 20)
    assert tools.parse_perftest(PERFTEST) == 10993.56 * (1 << 20)
    for parse in (tools.parse_ucx, tools.parse_perftest):
        with pytest.raises(ValueError, match="no line of figures"):
            parse("Segmentation fault\n1,2,3\n")


def test_what_is_not_installed_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    found = tools.ucx_perftest("ucx", ["read", "write"], [4096, 65536], {})
    assert [(each.op, each.bytes_per_s, each.reason) for each in found] == [
        ("read", None, "not installed"),
        ("write", None, "not installed"),
    ]
    assert {each.tool for each in tools.perftest("verbs", ["read", "write"], [1], {})} == {"ib_read_bw", "ib_write_bw"}


SERVER = """#!/usr/bin/env python3
import os, socket, sys, time
given = [os.environ[name] for name in ("UCX_TLS", "UCX_NET_DEVICES", "UCX_X")]
if given != ["tcp", "lo", "3"]:
    sys.exit("not what was asked for")
arguments = sys.argv[1:]
port = int(arguments[arguments.index("-p") + 1])
with open(os.environ["PIDS"], "a") as pids:
    print(os.getpid(), file=pids)
if arguments[-1] != "127.0.0.1":
    with socket.create_server(("127.0.0.1", port)) as server:
        server.accept()
        time.sleep(600)
socket.create_connection(("127.0.0.1", port))
"""


def fake(folder: Path, monkeypatch: pytest.MonkeyPatch, near: str) -> Path:
    """A ucx_perftest whose far end listens and whose near end does something."""
    tool = folder / "ucx_perftest"
    tool.write_text(SERVER + near)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PIDS", str(folder / "pids"))
    return folder / "pids"


def gone(pids: Path) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids.read_text().split())


@pytest.mark.processes
@pytest.mark.parametrize(
    ("near", "reason"),
    [
        (f"print({UCX!r})", ""),
        ("sys.exit('no device\\nof that name')", "no device; of that name"),
        ("sys.exit(9)", "exit code 9"),
        ("print('all is well')", "no line of figures"),
        ("time.sleep(600)", "not done after 4 s"),
        ("os.kill(os.getpid(), 11)", "exit code -11"),
    ],
)
def test_tools_that_fail_or_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, near: str, reason: str) -> None:
    pids = fake(tmp_path, monkeypatch, near)
    monkeypatch.setattr(tools, "TOOL_S", 4.0 if "not done" in reason else 60.0)
    found = tools.ucx_perftest("ucx", ["read"], [4096, 65536], {"tls": "tcp", "devices": "lo", "settings": {"X": 3}})
    if reason:
        assert len(found) == 1 and found[0].bytes_per_s is None and reason in found[0].reason
    else:
        assert [each.bytes_per_s for each in found] == [1031.67 * (1 << 20)] * 2
    end_s = time.monotonic() + 60
    while not gone(pids):
        assert time.monotonic() < end_s, "a tool was left running"
        time.sleep(0.05)


@pytest.mark.processes
def test_a_tool_that_never_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "ucx_perftest"
    tool.write_text("#!/bin/sh\necho cannot bind\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    [found] = tools.ucx_perftest("ucx", ["read"], [4096], {})
    assert found.reason == "cannot bind"


@pytest.mark.parametrize(
    ("name", "op", "path", "mapped", "limit"),
    [
        ("shm", "read", "memory copy", True, "memcpy"),
        ("shm", "put", "memory copy", False, "memcpy"),
        ("shm", "match", "memory copy", False, "socket"),
        ("ucx", "read", "UCX 1.22.0, all", False, "memcpy"),
        ("ucx", "read", "UCX 1.22.0, tcp", False, "socket"),
        ("ucx:tls=tcp,self", "get", "not chosen", False, "socket"),
        ("ucx:tls=rc", "read", "UCX 1.22.0, rc", False, "ucx_perftest"),
        ("ucx:tls=rc", "get", "UCX 1.22.0, rc", False, ""),
        ("verbs", "write", "RDMA, rc on mlx5_0:1", False, "ib_write_bw"),
        ("auto", "get", "memory copy", False, "memcpy"),
    ],
)
def test_which_limit_applies(name: str, op: str, path: str, mapped: bool, limit: str) -> None:
    ready = Ready(data_path=path, one_sided=False, mapped=mapped, limits=[])
    assert applies(point(op=op), fabric(name), ready, ["memcpy", "socket"]) == limit
    if limit in ("memcpy", "socket"):
        assert applies(point(op=op), fabric(name), ready, []) == ""  # what is not measured is no limit
        assert limit in measurable(point(op=op), ["memcpy", "socket"])


@pytest.mark.processes
def test_perftest_is_told_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "ib_read_bw"
    tool.write_text('#!/bin/sh\necho "$@"\nexit 1\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    [found] = tools.perftest("verbs", ["read"], [4096], {"device": "rxe0", "gid_index": 1, "port": 1, "depth": 4})
    assert found.reason.endswith("-F -d rxe0 -i 1 -x 1")
