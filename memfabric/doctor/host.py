"""Processors, clock, network, and what the kernel lets processes do."""

from __future__ import annotations

from collections.abc import Iterator

from memfabric.doctor.findings import Finding, Severity, shown
from memfabric.doctor.pci import devices
from memfabric.doctor.system import SYS_PTRACE, System, whole_number

FEW_FILES = 4096
"""A node has some descriptors for each client connection."""
FAST_CLOCKS = ("tsc", "kvm-clock", "arch_sys_counter", "hyperv_clocksource_tsc_page", "riscv_clocksource")
"""Those that Linux's vDSO reads, without a system call: on x86 its clock modes are TSC, PVCLOCK and HVCLOCK."""
GOOD_GOVERNORS = ("performance", "schedutil")
_FAST_MBIT_S = 10_000
_JUMBO_BYTES = 9000
_SHOWN_INTERFACES = 8


def memory_nodes(system: System) -> Iterator[Finding]:
    """NUMA: memory nodes, and which adapter is at which."""
    names = system.names(system.sys / "devices/system/node")
    nodes = [name for name in names if name.startswith("node") and whole_number(name[4:]) is not None]
    if len(nodes) == 1:
        yield Finding("NUMA", Severity.OK, "one memory node")
    elif nodes:
        yield Finding(
            "NUMA",
            Severity.INFO,
            f"{len(nodes)} memory nodes{_near(system)}",
            "an adapter reads memory of another processor more slowly than that of its own",
            ("numactl --cpunodebind=N --membind=N memfabric node ... # one for each memory node N",),
        )


def _near(system: System) -> str:
    """Where adapters and GPUs are."""
    found = []
    for kind in ("infiniband", "net"):
        for name in system.names(system.sys / "class" / kind):
            node = system.number(system.sys / "class" / kind / name / "device/numa_node")
            if node is not None and node >= 0:
                found.append(f"{shown(name, 16)} at {node}")
    for device in devices(system):
        if device.is_nvidia_gpu and device.memory_node is not None:
            found.append(f"GPU {shown(device.address, 16)} at {device.memory_node}")
    return f": {', '.join(found[:16])}" if found else ""


def frequency(system: System) -> Iterator[Finding]:
    """The governor of every processor."""
    root = system.sys / "devices/system/cpu"
    processors = [name for name in system.names(root) if name.startswith("cpu") and whole_number(name[3:]) is not None]
    found = {system.text(root / name / "cpufreq/scaling_governor") for name in processors} - {None, ""}
    governors = sorted(shown(each or "", 24) for each in found)
    told = ", ".join(governors[:4])
    if not governors:
        yield Finding("frequency", Severity.OK, "not governed by this kernel, as in most virtual machines")
    elif set(governors) <= set(GOOD_GOVERNORS):
        yield Finding("frequency", Severity.OK, f"governor {told}")
    else:
        yield Finding(
            "frequency",
            Severity.WARNING,
            f"governor {told}",
            "a processor that slows down when it is idle adds microseconds to every request",
            ("cpupower frequency-set -g performance",),
        )


def clock(system: System) -> Iterator[Finding]:
    """Whether the time can be read without a system call."""
    place = system.sys / "devices/system/clocksource/clocksource0"
    source = system.text(place / "current_clocksource")
    if not source:
        return
    told = f"source {shown(source, 40)}"
    if source in FAST_CLOCKS:
        yield Finding("clock", Severity.OK, told)
        return
    others = [name for name in (system.text(place / "available_clocksource") or "").split() if name in FAST_CLOCKS]
    yield Finding(
        "clock",
        Severity.WARNING,
        told,
        "each look at it is a system call, and deadlines are checked often",
        (f"echo {others[0]} > /sys/devices/system/clocksource/clocksource0/current_clocksource",)
        if others
        else ("# the kernel offers no faster one; on hardware add tsc=reliable to its command line",),
    )


def network(system: System) -> Iterator[Finding]:
    """Interfaces that TCP can use."""
    up, small = [], []
    for name in system.names(system.sys / "class/net"):
        place = system.sys / "class/net" / name
        if name == "lo" or (system.text(place / "operstate") or "") not in ("up", "unknown"):
            continue
        mtu, speed = system.number(place / "mtu"), system.number(place / "speed")
        known = speed is not None and speed > 0
        told = shown(name, 16)
        up.append(
            f"{told} ({f'{speed} Mbit/s' if known else 'speed unknown'}, MTU {'unknown' if mtu is None else mtu})"
        )
        if speed is not None and speed >= _FAST_MBIT_S and mtu is not None and 0 < mtu < _JUMBO_BYTES:
            small.append(told)
    if not up:
        yield Finding("network", Severity.INFO, "no interface but the loopback is up", "the pool stays on this host")
        return
    more = f" and {len(up) - _SHOWN_INTERFACES} more" if len(up) > _SHOWN_INTERFACES else ""
    yield Finding("network", Severity.OK, f"{', '.join(up[:_SHOWN_INTERFACES])}{more}")
    if small:
        yield Finding(
            "network",
            Severity.INFO,
            f"small packets on a fast link: {', '.join(small[:_SHOWN_INTERFACES])}",
            "large packets cost the processors less for the same bytes; hosts and switches must agree on them",
            tuple(f"ip link set {name} mtu {_JUMBO_BYTES}" for name in small[:_SHOWN_INTERFACES]),
        )


def open_files(system: System) -> Iterator[Finding]:
    """Descriptors."""
    soft, _hard = system.limit("NOFILE")
    if 0 <= soft < FEW_FILES:
        yield Finding(
            "open files",
            Severity.WARNING,
            f"limited to {soft}",
            "servers and nodes need some for each client that is connected",
            ("ulimit -n 65536", "systemctl edit SERVICE # [Service] LimitNOFILE=65536"),
        )
    else:
        yield Finding("open files", Severity.OK, "unlimited" if soft < 0 else f"limited to {soft}")


def process_memory(system: System) -> Iterator[Finding]:
    """Whether one process may read another's memory (CMA), which UCX does between processes of a host."""
    area, why = (
        "process memory",
        "UCX copies between processes of this host in two steps; shared memory needs none of it",
    )
    if not system.reads_own_memory():
        filtered = system.field(system.proc / "self/status", "Seccomp") not in ("", "0")
        by = "a seccomp filter, as in containers" if filtered else "the kernel"
        yield Finding(
            area,
            Severity.INFO,
            f"process_vm_readv is refused by {by}",
            why,
            ("docker run --cap-add SYS_PTRACE ...",) if filtered else (),
        )
        return
    scope = system.number(system.proc / "sys/kernel/yama/ptrace_scope")
    if scope and not system.has_capability(SYS_PTRACE):
        yield Finding(
            area,
            Severity.INFO,
            f"kernel.yama.ptrace_scope is {scope}: processes cannot read each other's memory",
            why,
            ("sysctl kernel.yama.ptrace_scope=0 # lets every program of a user look into the user's others",),
        )
    else:
        yield Finding(area, Severity.OK, "processes of a user may read each other's")
