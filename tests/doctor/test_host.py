"""Processors, clock, network and limits of made-up hosts."""

from __future__ import annotations

import pytest

from memfabric.doctor import Severity
from memfabric.doctor.host import clock, frequency, memory_nodes, network, open_files, process_memory
from memfabric.doctor.system import SYS_PTRACE
from tests.doctor.conftest import Host, one, worst


def test_one_memory_node(host: Host) -> None:
    host.write("sys/devices/system/node/node0/cpulist", "0-7").write("sys/devices/system/node/online", "0")
    assert worst(memory_nodes(host.system())) is Severity.OK


def test_several_memory_nodes_and_what_is_at_which(host: Host) -> None:
    for number in range(2):
        host.write(f"sys/devices/system/node/node{number}/cpulist", "0")
    host.write("sys/class/net/ens1/device/numa_node", "0").write("sys/class/net/tap0/device/numa_node", "-1")
    host.adapter().write("sys/class/infiniband/mlx5_0/device/numa_node", "1")
    place = "sys/bus/pci/devices/0000:41:00.0"
    host.write(f"{place}/vendor", "0x10de").write(f"{place}/class", "0x030200").write(f"{place}/numa_node", "1")
    (finding,) = memory_nodes(host.system())
    assert finding.severity is Severity.INFO
    assert finding.what == "2 memory nodes: mlx5_0 at 1, ens1 at 0, GPU 0000:41:00.0 at 1"
    assert finding.fix[0].startswith("numactl --cpunodebind=N --membind=N memfabric node")


@pytest.mark.parametrize(
    ("governors", "severity", "words"),
    [
        ([], Severity.OK, "not governed"),
        (["performance", "performance"], Severity.OK, "governor performance"),
        (["schedutil"], Severity.OK, "governor schedutil"),
        (["performance", "powersave"], Severity.WARNING, "governor performance, powersave"),
        (["ondemand"], Severity.WARNING, "governor ondemand"),
    ],
)
def test_every_processors_governor_counts(host: Host, governors: list[str], severity: Severity, words: str) -> None:
    for number, governor in enumerate(governors):
        host.write(f"sys/devices/system/cpu/cpu{number}/cpufreq/scaling_governor", f"{governor}\n")
    host.write("sys/devices/system/cpu/cpuidle/current_driver", "none")
    (finding,) = frequency(host.system())
    assert finding.severity is severity
    assert words in finding.what


@pytest.mark.parametrize(
    ("source", "others", "severity", "fix"),
    [
        ("tsc", "tsc hpet", Severity.OK, ""),
        ("kvm-clock", "kvm-clock", Severity.OK, ""),
        ("hpet", "hpet acpi_pm tsc", Severity.WARNING, "echo tsc > /sys/devices/system/clocksource"),
        ("hpet", "hpet acpi_pm", Severity.WARNING, "# the kernel offers no faster one"),
    ],
)
def test_clock(host: Host, source: str, others: str, severity: Severity, fix: str) -> None:
    place = "sys/devices/system/clocksource/clocksource0"
    host.write(f"{place}/current_clocksource", source).write(f"{place}/available_clocksource", others)
    (finding,) = clock(host.system())
    assert finding.severity is severity
    assert (finding.fix[0] if finding.fix else "").startswith(fix)


def interface(host: Host, name: str, state: str = "up", mtu: str = "9000", speed: str = "100000") -> Host:
    place = f"sys/class/net/{name}"
    return host.write(f"{place}/operstate", state).write(f"{place}/mtu", mtu).write(f"{place}/speed", speed)


def test_interfaces_that_are_up(host: Host) -> None:
    interface(host, "lo", "unknown", "65536", "")
    interface(interface(host, "ens1"), "ens2", "down")
    interface(host, "tun0", "unknown", "1400", "-1")
    (finding,) = network(host.system())
    assert finding.what == "ens1 (100000 Mbit/s, MTU 9000), tun0 (speed unknown, MTU 1400)"


@pytest.mark.parametrize(
    ("mtu", "speed", "worth"), [("1500", "100000", True), ("1500", "1000", False), ("9000", "100000", False)]
)
def test_small_packets_on_a_fast_link(host: Host, mtu: str, speed: str, worth: bool) -> None:
    interface(host, "ens1", "up", mtu, speed)
    assert [finding.fix for finding in network(host.system()) if finding.fix] == (
        [("ip link set ens1 mtu 9000",)] if worth else []
    )


def test_no_interface(host: Host) -> None:
    interface(host, "lo", "unknown", "65536", "")
    assert worst(network(host.system())) is Severity.INFO


@pytest.mark.parametrize(
    ("files", "severity"), [(1024, Severity.WARNING), (4096, Severity.OK), (-1, Severity.OK), (0, Severity.WARNING)]
)
def test_open_files(host: Host, files: int, severity: Severity) -> None:
    assert worst(open_files(host.system(files=files))) is severity


def status(host: Host, seccomp: str = "0", *bits: int) -> Host:
    host.write("proc/self/uid_map", "0 0 4294967295")
    return host.write("proc/self/status", f"CapEff:\t{sum(1 << bit for bit in bits):x}\nSeccomp:\t{seccomp}\n")


def test_processes_that_may_read_each_other(host: Host) -> None:
    assert worst(process_memory(status(host).system())) is Severity.OK
    host.write("proc/sys/kernel/yama/ptrace_scope", "0")
    assert worst(process_memory(host.system())) is Severity.OK


@pytest.mark.parametrize("scope", ["1", "2", "3"])
def test_yama(host: Host, scope: str) -> None:
    status(host).write("proc/sys/kernel/yama/ptrace_scope", scope)
    finding = one(process_memory(host.system()), f"ptrace_scope is {scope}")
    assert finding.severity is Severity.INFO
    status(host, "0", SYS_PTRACE)
    assert worst(process_memory(host.system())) is Severity.OK


@pytest.mark.parametrize(("seccomp", "words", "fixes"), [("2", "a seccomp filter", 1), ("0", "the kernel", 0)])
def test_a_call_that_is_refused(host: Host, seccomp: str, words: str, fixes: int) -> None:
    finding = one(process_memory(status(host, seccomp).system(reads=False)), f"refused by {words}")
    assert (finding.severity, len(finding.fix)) == (Severity.INFO, fixes)
