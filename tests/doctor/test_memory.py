"""Memory and limits of made-up hosts."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path

import pytest

from memfabric.doctor import Severity
from memfabric.doctor.memory import huge_pages, limits, locked_memory, shared_memory
from memfabric.doctor.system import IPC_LOCK
from tests.doctor.conftest import Host, one, worst

GIB = 1 << 30
Space = namedtuple("Space", "f_bavail f_frsize")


def mounted(host: Host, kind: str, options: str = "rw,nosuid") -> Host:
    return host.write("proc/mounts", f"/dev/sda / ext4 rw 0 0\nnone {host.root}/shm {kind} {options} 0 0\n")


def root_with(host: Host, *bits: int, identity: str = "0 0 4294967295") -> Host:
    host.write("proc/self/uid_map", identity)
    return host.write("proc/self/status", f"Name:\tx\nCapEff:\t{sum(1 << bit for bit in bits):016x}\nSeccomp:\t0\n")


@pytest.mark.parametrize(
    ("free", "severity"), [(64 << 20, Severity.WARNING), (GIB - 4096, Severity.WARNING), (GIB, Severity.OK)]
)
def test_room_for_regions(host: Host, monkeypatch: pytest.MonkeyPatch, free: int, severity: Severity) -> None:
    monkeypatch.setattr("transport._memory.os.statvfs", lambda _: Space(free // 4096, 4096))
    (finding,) = shared_memory(mounted(host, "tmpfs").system())
    assert finding.severity is severity
    assert bool(finding.fix) == (severity is Severity.WARNING)


def test_no_directory_for_regions(host: Host) -> None:
    (host.root / "shm").rmdir()
    (finding,) = shared_memory(host.system())
    assert finding.severity is Severity.PROBLEM
    assert "No such file or directory" in finding.what


def test_regions_on_a_disk(host: Host) -> None:
    host.write("proc/mounts", "/dev/sda / ext4 rw 0 0\n")
    assert one(shared_memory(host.system()), "is on ext4, not in memory").severity is Severity.WARNING


def test_regions_on_hugetlbfs(host: Host) -> None:
    (finding,) = shared_memory(mounted(host, "hugetlbfs").system())
    assert (finding.severity, "hugetlbfs" in finding.what) == (Severity.PROBLEM, True)


def test_the_last_mount_counts(host: Host) -> None:
    mounted(host, "tmpfs")
    with (host.root / "proc/mounts").open("a") as file:
        file.write(
            f"none {host.root}/shm/deeper xfs rw 0 0\nnone {host.root}/shm ramfs rw 0 0\nnone {host.root} xfs rw 0 0\n"
        )
    mount = host.system().mount_of(host.root / "shm")
    assert mount is not None
    assert mount.kind == "ramfs"


@pytest.mark.parametrize(("limit", "severity"), [(256 << 20, Severity.WARNING), (8 * GIB, Severity.INFO)])
def test_a_control_group(host: Host, limit: int, severity: Severity) -> None:
    host.write("proc/self/cgroup", "0::/pods/mine\n")
    place = "sys/fs/cgroup/pods/mine"
    host.write(f"{place}/memory.max", f"{limit}\n").write(f"{place}/memory.current", f"{64 << 20}\n")
    finding = one(limits(host.system()), "left below")
    assert finding.severity is severity
    assert str(limit) in finding.what


@pytest.mark.parametrize(("outer", "inner", "left"), [(128, 4096, "64 MiB"), (4096, 256, "192 MiB")])
def test_the_tightest_group_counts(host: Host, outer: int, inner: int, left: str) -> None:
    host.write("proc/self/cgroup", "0::/pods/mine\n")
    for place, limit in (("pods", outer), ("pods/mine", inner)):
        host.write(f"sys/fs/cgroup/{place}/memory.max", f"{limit << 20}")
        host.write(f"sys/fs/cgroup/{place}/memory.current", "0")
    assert one(limits(host.system()), "left below").what.startswith(f"{left} left")


@pytest.mark.parametrize(("kib", "severity"), [(24 << 20, Severity.OK), (512 << 10, Severity.WARNING)])
def test_available_memory(host: Host, kib: int, severity: Severity) -> None:
    host.write("proc/meminfo", f"MemTotal: 1 kB\nMemAvailable:   {kib} kB\n")
    assert one(limits(host.system()), "available").severity is severity


@pytest.mark.parametrize(
    ("memlock", "adapter", "severity"),
    [
        (-1, True, Severity.OK),
        (8 << 20, False, Severity.INFO),
        (8 << 20, True, Severity.PROBLEM),
        (0, True, Severity.PROBLEM),
    ],
)
def test_locked_memory(host: Host, memlock: int, adapter: bool, severity: Severity) -> None:
    if adapter:
        host.adapter()
    (finding,) = locked_memory(host.system(memlock=memlock))
    assert finding.severity is severity
    assert any("LimitMEMLOCK=infinity" in line for line in finding.fix) == (severity is Severity.PROBLEM)


def test_locked_memory_does_not_bind_those_with_the_capability(host: Host) -> None:
    root_with(host.adapter(), IPC_LOCK)
    assert worst(locked_memory(host.system(memlock=4096))) is Severity.OK


@pytest.mark.parametrize("identity", ["0 100000 65536", "0 0 4294967295\n5 5 5", ""])
def test_a_capability_of_a_user_namespace_is_none(host: Host, identity: str) -> None:
    root_with(host.adapter(), IPC_LOCK, identity=identity)
    assert worst(locked_memory(host.system(memlock=4096))) is Severity.PROBLEM


def test_a_lower_soft_limit_is_told_with_the_hard_one(host: Host) -> None:
    system = host.adapter().system()
    object.__setattr__(system, "limits", {"MEMLOCK": (65536, -1)})
    (finding,) = locked_memory(system)
    assert finding.what == "limited to 64 KiB (at most unlimited)"


def test_reserved_huge_pages(host: Host) -> None:
    host.write("proc/meminfo", "HugePages_Total: 512\nHugePages_Free: 500\nHugepagesize: 2048 kB\n")
    host.write("proc/mounts", "none /dev/hugepages hugetlbfs rw 0 0\n")
    finding = one(huge_pages(host.system()), "reserved pages")
    assert finding.what == "500 of 512 reserved pages of 2 MiB are free; hugetlbfs is mounted at /dev/hugepages"


NEVER = "always within_size advise [never] deny force"
DENY = "always within_size advise never [deny] force"
FORCE = "always within_size advise never deny [force]"


@pytest.mark.parametrize(
    ("setting", "mount", "kernel", "severity", "fixes"),
    [
        (NEVER, "rw", "6.18.1", Severity.INFO, 1),
        ("always within_size [advise] never deny force", "rw", "6.18.1", Severity.INFO, 1),  # the mount decides
        (NEVER, "rw,huge=never", "6.18.1", Severity.INFO, 1),
        (NEVER, "rw,huge=advise", "6.18.1", Severity.INFO, 1),
        (NEVER, "rw,huge=within_size", "6.18.1", Severity.OK, 0),
        (NEVER, "rw,huge=within_size", "6.1.0-40-amd64", Severity.INFO, 1),
        (NEVER, "rw,size=1g,huge=always", "6.1.0-40-amd64", Severity.OK, 0),
        (DENY, "rw,huge=always", "6.18.1", Severity.INFO, 2),
        (FORCE, "rw", "6.1.0-40-amd64", Severity.OK, 0),
    ],
)
def test_transparent_huge_pages(
    host: Host, setting: str, mount: str, kernel: str, severity: Severity, fixes: int
) -> None:
    host.write("sys/kernel/mm/transparent_hugepage/shmem_enabled", setting)
    host.write("proc/sys/kernel/osrelease", kernel)
    (finding,) = huge_pages(mounted(host, "tmpfs", mount).system())
    assert (finding.severity, len(finding.fix)) == (severity, fixes)


def test_a_kernel_without_them(host: Host) -> None:
    assert list(huge_pages(mounted(host, "tmpfs").system())) == []


def test_the_real_host_is_read(tmp_path: Path) -> None:
    """Against the kernel itself: the numbers are those that the standard library tells."""
    import os

    from memfabric.doctor import System

    system = System(shared_memory=tmp_path)
    mount = system.mount_of(tmp_path)
    assert mount is not None
    assert Path(mount.place).is_mount() or mount.place == "/"
    assert f"{system.kernel()[0]}.{system.kernel()[1]}" in os.uname().release
    assert system.meminfo()["MemTotal"] * 1024 == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
