"""Transports are tried in processes that may do anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfabric.doctor import probe
from memfabric.doctor.fabrics import findings, verdict
from memfabric.doctor.findings import Severity
from memfabric.doctor.probe import Probed, ask
from tests.doctor.conftest import Host

WHEEL = """#
#     component 0  :  self
#     component 1  :  tcp
#      resource 0  :  md 0  dev 0  flags -- self/memory0
#      resource 1  :  md 1  dev 1  flags -- tcp/eth0
"""
SYSTEM = WHEEL + "#     component 4  :  ib\n"
FABRIC = SYSTEM + "#      resource 2  :  md 4  dev 2  flags -- rc_mlx5/mlx5_0:1\n"


def ucx(transports: str = WHEEL) -> Probed:
    info = {"version": "1.22.0", "library": "/lib/libucp.so.0", "source": "the system's library"}
    return Probed("ucx", "", "UCX 1.22.0, all", {**info, "transports": transports})


def test_shared_memory_can_be_tried() -> None:
    probed = ask("shm")
    assert (probed.why_not, probed.data_path) == ("", "memory copy")


def test_ucx_can_be_tried_or_says_why_not() -> None:
    from transport import registry

    probed = ask("ucx")
    assert probed.why_not == registry.why_not("ucx")
    if not probed.why_not:
        assert probed.info["version"][0].isdigit()
        assert ("tcp", "lo") in probed.fabrics or any(name == "tcp" for name, _ in probed.fabrics)


def test_a_transport_that_is_not_there() -> None:
    assert "there is no transport 'telepathy'" in ask("telepathy").why_not


def test_what_lies_in_the_current_directory_is_not_run(tmp_path: Path) -> None:
    for name in ("json", "transport", "memfabric", "signal"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    code = (
        "import sys; sys.path.remove(''); from memfabric.doctor.probe import ask; print(ask('loopback_or_not').why_not)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "there is no transport" in done.stdout


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import os; os.kill(os.getpid(), 11)", "trying it crashed: SIGSEGV"),
        ("import os; os.abort()", "trying it crashed: SIGABRT"),
        ("raise ValueError('the library is broken')", "trying it failed: ValueError: the library is broken"),
        ("import sys; sys.exit(3)", "trying it failed: exit code 3"),
        ("", "trying it failed: exit code 0"),
        ("import os; os.write(1, bytes(range(256)))", "trying it failed: exit code 0"),
        (f"print({probe._MARK!r} + 'gibberish')", "it gave an answer that makes no sense"),
        (f"print({probe._MARK!r} + '[]')", "it gave an answer that makes no sense"),
        (f"print({probe._MARK!r} + '[' * 100000)", "it gave an answer that makes no sense"),
        ("import time; time.sleep(600)", "trying it took longer than 1 s"),
        ("import signal, time; signal.signal(15, signal.SIG_IGN); print('x' * 10**6); time.sleep(600)", "took longer"),
    ],
)
def test_a_child_that_misbehaves(code: str, why: str) -> None:
    assert why in ask("bad", code=code, limit_s=1 if "sleep" in code else 60).why_not


def test_a_child_that_hangs_is_gone_afterwards(tmp_path: Path) -> None:
    where = tmp_path / "pid"
    code = f"import os, time, pathlib; pathlib.Path({str(where)!r}).write_text(str(os.getpid())); time.sleep(600)"
    ask("bad", code=code, limit_s=5)
    with pytest.raises(ProcessLookupError):
        os.kill(int(where.read_text()), 0)


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    """The child hangs in opening a library that is a pipe; the parent is killed."""
    pipe = tmp_path / "libucp.so.0"
    os.mkfifo(pipe)
    code = "from memfabric.doctor.probe import ask; ask('ucx')"
    environment = {**os.environ, "MEMFABRIC_UCX_LIBRARY": str(pipe)}

    def hanging() -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            try:
                told = (entry / "environ").read_bytes() if entry.name.isdigit() else b""
            except OSError:
                continue
            if str(pipe).encode() in told:
                found.append(int(entry.name))
        return found

    def eventually(count: int) -> None:
        deadline_s = time.monotonic() + 60
        while len(hanging()) != count:
            assert time.monotonic() < deadline_s, hanging()
            time.sleep(0.05)

    with subprocess.Popen([sys.executable, "-c", code], env=environment) as parent:
        eventually(2)
        parent.kill()
    eventually(0)


def test_words_before_and_after_the_answer_do_no_harm() -> None:
    answer = json.dumps({"why_not": "", "data_path": "by hand", "info": {}, "devices": []})
    probed = ask("good", code=f"print('UCX  WARN'); print({probe._MARK + answer!r}); print('bye')")
    assert probed == Probed("good", data_path="by hand")


def test_the_last_answer_counts() -> None:
    """What a transport prints in its name while it is tried comes before the answer."""
    forged, real = (
        probe._MARK + json.dumps({"why_not": why, "data_path": "", "info": {}, "devices": []}) for why in ("", "real")
    )
    assert ask("two", code=f"print({forged!r}); print({real!r})").why_not == "real"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "why_not": JSON,
            "data_path": JSON,
            "info": JSON | st.dictionaries(st.sampled_from(["version", "library", "transports"]), JSON),
            "devices": JSON
            | st.lists(
                st.fixed_dictionaries(
                    {"name": JSON, "error": JSON, "mtu_bytes": JSON | st.dictionaries(st.text(), JSON)}
                )
            ),
        },
    )
)
def test_any_answer_is_understood_or_refused(answer: object) -> None:
    probed = probe._understand("x", json.dumps(answer))
    assert all(isinstance(value, str) for value in probed.info.values())
    assert probed.fabrics is not None
    assert probed.why_not.isascii()


def test_shared_memory_is_judged_by_its_directory(host: Host) -> None:
    made = Probed("shm", data_path="memory copy")
    system = host.system()
    assert verdict(system, made).usable
    host.write("proc/mounts", "none / xfs rw 0 0\n")
    assert verdict(system, made).words.startswith("usable, but slower because")
    host.write("proc/mounts", f"none {host.root}/shm hugetlbfs rw 0 0\n")
    assert not verdict(system, made).usable
    (host.root / "shm").rmdir()
    assert "is not a directory" in verdict(system, made).words


def test_ucx_without_an_adapter_takes_tcp(host: Host) -> None:
    made = ucx()
    told = verdict(host.system(), made)
    assert (told.usable, "no RDMA adapter" in told.slower) == (True, True)
    assert told.detail == "UCX 1.22.0, /lib/libucp.so.0 (the system's library)"
    assert list(findings(host.system(), [made])) == []


@pytest.mark.parametrize(
    ("transports", "why"), [(WHEEL, "without InfiniBand"), (SYSTEM, "finds no device that it can use")]
)
def test_ucx_that_leaves_an_adapter_unused(host: Host, transports: str, why: str) -> None:
    system = host.adapter().system()
    made = ucx(transports)
    assert "does not use mlx5_0" in verdict(system, made).slower
    (finding,) = findings(system, [made])
    assert finding.severity is Severity.WARNING
    assert why in finding.why


def test_ucx_over_an_adapter(host: Host) -> None:
    system = host.adapter().system()
    told = verdict(system, ucx(FABRIC))
    assert (told.words, told.detail.split(";")[0]) == ("usable", "RDMA over mlx5_0:1")
    assert list(findings(system, [ucx(FABRIC)])) == []


def test_ucx_over_software(host: Host) -> None:
    host.write("sys/devices/virtual/infiniband/rxe0/node_desc", "rxe0")
    host.link("sys/class/infiniband/rxe0", "../../devices/virtual/infiniband/rxe0")
    made = ucx(FABRIC.replace("mlx5_0:1", "rxe0:1").replace("rc_mlx5", "rc_verbs"))
    assert "emulated in software" in verdict(host.system(), made).slower


@pytest.mark.parametrize(("adapter", "severity"), [(False, Severity.INFO), (True, Severity.WARNING)])
def test_no_ucx(host: Host, adapter: bool, severity: Severity) -> None:
    system = host.adapter().system() if adapter else host.system()
    made = Probed("ucx", "there is no libucp")
    assert verdict(system, made).words == "not usable because there is no libucp"
    (finding,) = findings(system, [made])
    assert (finding.severity, finding.fix[0].split(" #")[0]) == (severity, "apt-get install libucx0")


def test_verbs_are_judged_by_the_device(host: Host) -> None:
    system = host.adapter().system()
    devices = [
        {"name": "mlx5_0", "error": "", "mtu_bytes": {"1": 4096}},
        {"name": "mlx5_1", "error": "no driver", "mtu_bytes": {}},
    ]
    made = Probed("verbs", data_path="RDMA over mlx5_0", devices=devices)
    assert verdict(system, made).words == "usable"
    fine, broken = findings(system, [made])
    assert (fine.severity, fine.what) == (Severity.OK, "mlx5_0: packets of 4096 bytes at port 1")
    assert (broken.severity, broken.what) == (Severity.PROBLEM, "mlx5_1 cannot be opened: no driver")


def test_devices_are_those_that_verbs_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    port = SimpleNamespace(number=1, mtu_bytes=1024)
    device = SimpleNamespace(name="rxe0", error="", ports=(port,))
    monkeypatch.setitem(sys.modules, "transport.verbs", SimpleNamespace(devices=lambda: [device]))
    told = probe._understand("verbs", json.dumps(probe._look("verbs")))
    assert told.devices == [{"name": "rxe0", "error": "", "mtu_bytes": {"1": 1024}}]


def test_a_library_that_was_named_and_is_none(host: Host) -> None:
    (finding,) = findings(
        host.system(), [Probed("ucx", "UCX can't be used here: /x ($MEMFABRIC_UCX_LIBRARY): no file")]
    )
    assert finding.fix == ("unset MEMFABRIC_UCX_LIBRARY # or name a libucp there",)


@pytest.mark.parametrize(("adapter", "count"), [(True, 1), (False, 0)])
def test_an_adapter_without_libibverbs(host: Host, adapter: bool, count: int) -> None:
    system = host.adapter().system() if adapter else host.system()
    found = list(findings(system, [Probed("verbs", "libibverbs can't be opened: libibverbs.so.1: no such file")]))
    assert [(each.severity, each.fix[0].split(" #")[0]) for each in found] == [
        (Severity.WARNING, "apt-get install libibverbs1 ibverbs-providers")
    ] * count


def test_what_a_third_partys_transport_says_cannot_steer_a_terminal(host: Host) -> None:
    answer = {"why_not": "\x1b[2Jgone", "data_path": "", "info": {}, "devices": []}
    told = verdict(host.system(), probe._understand("x", json.dumps(answer)))
    assert told.detail == "?[2Jgone"
