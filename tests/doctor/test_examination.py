"""The whole examination: on hosts with nothing, with garbage, with checks that hang; and on this one."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memfabric.doctor import Finding, Report, Severity, System, examine
from memfabric.doctor.examination import CHECKS
from memfabric.doctor.findings import shown
from memfabric.doctor.probe import Probed
from memfabric.doctor.system import whole_number
from tests.doctor.conftest import Host, MadeSystem
from transport import registry

GID = "sys/class/infiniband/mlx5_0/ports/1"
FILES = [
    "proc/meminfo",
    "proc/mounts",
    "proc/config.gz",
    "proc/self/cgroup",
    "proc/self/status",
    "proc/self/uid_map",
    "proc/sys/kernel/osrelease",
    "proc/sys/kernel/yama/ptrace_scope",
    "proc/driver/nvidia/version",
    "proc/driver/nvidia/gpus/0/information",
    "boot/config-6.1",
    "sys/class/infiniband/mlx5_0/device/numa_node",
    "sys/class/infiniband/mlx5_0/device/current_link_width",
    "sys/class/infiniband/mlx5_0/device/max_link_width",
    "sys/class/infiniband/mlx5_0/device/current_link_speed",
    "sys/class/infiniband/mlx5_0/device/max_link_speed",
    "sys/class/infiniband_verbs/uverbs0/ibdev",
    f"{GID}/state",
    f"{GID}/link_layer",
    f"{GID}/rate",
    f"{GID}/gids/0",
    f"{GID}/gid_attrs/types/0",
    f"{GID}/gid_attrs/ndevs/0",
    "sys/class/net/eth0/operstate",
    "sys/class/net/eth0/mtu",
    "sys/class/net/eth0/speed",
    "sys/class/net/eth0/device/numa_node",
    "sys/bus/pci/devices/0000:00:01.0/vendor",
    "sys/bus/pci/devices/0000:00:01.0/class",
    "sys/bus/pci/devices/0000:00:01.0/numa_node",
    "sys/devices/system/clocksource/clocksource0/current_clocksource",
    "sys/devices/system/clocksource/clocksource0/available_clocksource",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor",
    "sys/devices/system/node/node0/x",
    "sys/devices/system/node/node1/x",
    "sys/kernel/mm/transparent_hugepage/shmem_enabled",
    "sys/fs/cgroup/memory.max",
    "sys/fs/cgroup/memory.current",
    "sys/fs/cgroup/memory.stat",
]
LINES = """
MemAvailable: |HugePages_Total: |HugePages_Free:|Hugepagesize: |CapEff:\t|Seccomp:\t|0::/|1:memory:|inactive_file 5
none /dev/shm tmpfs huge=|none / hugetlbfs rw|[never]|0x15b3|0x10de|0x030000|0x020700|up|4: ACTIVE|Ethernet|eth0|../..|/
NVRM version: |Model:|0 0 4294967295|mlx5_0|5.15.0|\x1b[31m| |,|-1|0|1|\u0663|\0|fe80::1|performance|max
"""
PIECES = [piece.encode() for line in LINES.strip().splitlines() for piece in line.split("|")]
PIECES += [b"\n", b"\x1f\x8b\x08\x00", b"\xff\xfe", b"9" * 18, b"9" * 5000]
CONTENTS = st.binary(max_size=40) | st.lists(st.sampled_from(PIECES), max_size=8).map(b"".join)


def nothing(name: str) -> Probed:
    return Probed(name, "it was not tried")


def sound(finding: Finding) -> bool:
    """Whether people and terminals can take it."""
    texts = [finding.area, finding.what, finding.why, *finding.fix]
    return all(isinstance(text, str) and text.isascii() and text.isprintable() for text in texts)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(FILES), CONTENTS, max_size=len(FILES)), st.booleans())
def test_no_content_of_any_file_does_harm(contents: dict[str, bytes], adapter: bool) -> None:
    with tempfile.TemporaryDirectory() as directory:
        host = Host(Path(directory))
        if adapter:
            host.adapter()
        for path, content in contents.items():
            host.write(path, content)
        system = host.system(memlock=4096, files=64)
        for area, check in CHECKS.items():
            if area != "memfabric":
                assert all(sound(finding) for finding in check(system)), area


@pytest.mark.parametrize("what", ["directory", "unreadable", "loop", "long", "pipe"])
def test_files_that_are_no_files(host: Host, what: str) -> None:
    for path in FILES:
        place = host.root / path
        if place.exists() or (
            what == "pipe" and "cgroup" in path
        ):  # those are read by the transport, which trusts them
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        if what == "directory":
            place.mkdir()
        elif what == "loop":
            place.symlink_to(place.name)
        elif what == "pipe":
            os.mkfifo(place)
        elif what == "unreadable":
            place.symlink_to("/proc/self/mem")  # reading it from the start is an error for root too
        else:
            place.write_bytes(b"7" * (3 << 20))
    for area, check in CHECKS.items():
        assert all(sound(finding) for finding in check(host.system(memlock=4096))), area


def test_numbers_that_no_machine_has(host: Host) -> None:
    huge = "9" * 5000
    host.write("proc/self/cgroup", f"0::/{'x' * 300}\n1:memory:/\n").write("proc/meminfo", f"MemAvailable: {huge} kB")
    host.write("sys/fs/cgroup/memory.max", huge).write("sys/fs/cgroup/memory.current", huge)
    host.write("sys/fs/cgroup/memory/memory.limit_in_bytes", huge)
    for area, check in CHECKS.items():
        assert all(sound(finding) for finding in check(host.system())), area
    host.write("proc/self/cgroup", "0::/\n")
    assert all(sound(finding) for finding in CHECKS["memory"](host.system()))


def test_a_host_that_shows_nothing(host: Host) -> None:
    for name in ("proc", "sys", "dev", "boot", "shm"):
        (host.root / name).rmdir()
    report = examine(host.system(), ask=nothing)
    assert [finding.area for finding in report.findings if finding.severity is Severity.PROBLEM] == ["shared memory"]
    assert [each.name for each in report.transports] == registry.names()
    assert not any(each.usable for each in report.transports)
    assert not any("could not be examined" in finding.what for finding in report.findings)


def test_a_check_that_fails_does_not_hide_the_others(host: Host) -> None:
    def broken(system: System) -> Iterator[Finding]:
        yield Finding("a", Severity.OK, "seen")
        raise ZeroDivisionError("of course")

    checks = {"first": broken, "second": lambda _: [Finding("second", Severity.PROBLEM, "found")]}
    report = examine(host.system(), ask=nothing, checks=checks)
    told = [(finding.area, finding.severity, finding.what) for finding in report.findings if finding.area != "UCX"]
    assert told == [
        ("second", Severity.PROBLEM, "found"),
        ("first", Severity.WARNING, "could not be examined: it failed: ZeroDivisionError('of course')"),
    ]


def test_a_check_that_hangs_is_given_up(host: Host) -> None:
    never = threading.Event()

    def hangs(system: System) -> list[Finding]:
        never.wait(120)
        return []

    try:
        report = examine(host.system(), ask=nothing, checks={"slow": hangs}, limit_s=0.2)
    finally:
        never.set()
    assert "it took longer than 0.2 s" in report.findings[0].what


def test_a_probe_that_fails_is_a_verdict(host: Host) -> None:
    def fails(name: str) -> Probed:
        raise MemoryError(name)

    report = examine(host.system(), ask=fails, checks={})
    assert "MemoryError" in report.transports[0].detail


def test_the_worst_comes_first(host: Host) -> None:
    host.adapter(state="1: DOWN")
    report = examine(host.system(memlock=4096, files=64), ask=nothing)
    order = [list(Severity).index(finding.severity) for finding in report.findings]
    assert order == sorted(order)
    assert report.problems == 2  # the port, the limit
    assert report.findings[0].area == "RDMA"


def test_the_document_is_json(host: Host) -> None:
    host.adapter(state="1: DOWN")
    report = examine(host.system(memlock=4096), ask=nothing)
    document = json.loads(json.dumps(report.document()))
    assert document["problems"] == report.problems == 2
    assert set(document) == {"transports", "findings", "problems", "warnings"}
    assert set(document["findings"][0]) == {"area", "severity", "what", "why", "fix"}
    assert document["findings"][0]["severity"] == "problem"
    assert set(document["transports"][0]) == {"name", "usable", "detail", "slower"}


def test_this_host_can_be_examined() -> None:
    report = examine()
    assert isinstance(report, Report)
    assert all(sound(finding) for finding in report.findings)
    assert not any("could not be examined" in finding.what for finding in report.findings)
    assert next(each for each in report.transports if each.name == "shm").usable
    assert {"memfabric", "shared memory", "open files"} <= {finding.area for finding in report.findings}


def test_this_process_reads_its_own_memory_or_says_that_it_may_not() -> None:
    assert System().reads_own_memory() in (True, False)
    assert MadeSystem(reads=False).reads_own_memory() is False


@given(st.text())
def test_foreign_text_is_one_short_line_of_ascii(text: str) -> None:
    line = shown(text, 30)
    assert line.isascii()
    assert line == "" or line.isprintable()
    assert len(line) <= 30


@pytest.mark.parametrize(
    ("text", "number"),
    [("0", 0), ("-1", -1), ("12", 12), ("", None), ("1_0", None), ("+1", None), ("\u0663", None), ("9" * 19, None)],
)
def test_whole_numbers(text: str, number: int | None) -> None:
    assert whole_number(text) == number
