"""Memory: how much can be lent, locked and mapped in large pages."""

from __future__ import annotations

from collections.abc import Iterator

from memfabric import units
from memfabric.doctor.findings import Finding, Severity, shown
from memfabric.doctor.system import IPC_LOCK, MEMORY_FILE_SYSTEMS, UNLIMITED, System
from transport._memory import control_group_rooms, filesystem_room

SMALL_BYTES = units.GIB
"""With less room than this a node's default share is cut."""
_WITHIN_SIZE_KERNEL = (6, 18)
"""Source: measured; regions on a tmpfs with huge=within_size got huge pages on Linux 6.18 and none on 6.1, with
huge=always on both, with huge=advise on neither."""


def shared_memory(system: System) -> Iterator[Finding]:
    """How large the regions of this host may be together, and on what they lie."""
    area, directory = "shared memory", shown(str(system.shared_memory))
    try:
        room = filesystem_room(system.shared_memory)
    except OSError as error:
        yield Finding(
            area,
            Severity.PROBLEM,
            f"{directory} cannot be used: {error.strerror or error}",
            "nodes keep their regions there",
            (f"mount -t tmpfs -o size=50% tmpfs {directory}",),
        )
        return
    mount = system.mount_of(system.shared_memory)
    if mount is not None and mount.kind == "hugetlbfs":
        yield Finding(
            area,
            Severity.PROBLEM,
            f"{directory} is on hugetlbfs",
            "regions cannot be kept there; on a tmpfs the kernel gives them huge pages if it is asked to",
            ("unset MEMFABRIC_SHM_DIRECTORY # or name a directory on a tmpfs",),
        )
        return
    if mount is not None and mount.kind not in MEMORY_FILE_SYSTEMS:
        yield Finding(
            area,
            Severity.WARNING,
            f"{directory} is on {shown(mount.kind)}, not in memory",
            "the kernel writes every block that is stored there to a disk",
            ("unset MEMFABRIC_SHM_DIRECTORY # or name a directory on a tmpfs",),
        )
    if room.free_bytes >= SMALL_BYTES:
        yield Finding(area, Severity.OK, f"{units.format_bytes(room.free_bytes)} free in {directory}")
        return
    yield Finding(
        area,
        Severity.WARNING,
        f"only {units.format_bytes(room.free_bytes)} free in {directory}",
        "all nodes of this host together can lend no more than that",
        (
            f"mount -o remount,size=50% {directory}",
            "docker run --shm-size=SIZE ... # Docker gives a container 64 MiB",
            "# Kubernetes: mount an emptyDir with medium: Memory and a sizeLimit at /dev/shm",
        ),
    )


def limits(system: System) -> Iterator[Finding]:
    """What the machine and its control groups leave."""
    available_kib = system.meminfo().get("MemAvailable")
    if available_kib is not None:
        few = available_kib * 1024 < SMALL_BYTES
        yield Finding(
            "memory",
            Severity.WARNING if few else Severity.OK,
            f"{units.format_bytes(available_kib * 1024)} available on the machine",
            "regions take their memory in full when a node starts" if few else "",
            ("free -h # then stop other programs, or lend less: memfabric node --memory SIZE",) if few else (),
        )
    try:
        rooms = control_group_rooms(system.proc, system.sys / "fs/cgroup")
    except (OSError, ValueError) as error:  # a name that no file can have, a number without end
        yield Finding("control group", Severity.INFO, f"its limits cannot be read: {shown(str(error))}")
        return
    if not rooms:
        yield Finding("control group", Severity.OK, "no memory limit")
        return
    room = min(rooms, key=lambda each: each.free_bytes)
    few = room.free_bytes < SMALL_BYTES
    yield Finding(
        "control group",
        Severity.WARNING if few else Severity.INFO,
        f"{units.format_bytes(room.free_bytes)} left below {shown(room.source, 160)}",
        "shared memory counts towards it, and going over it kills a process",
        (
            "systemctl set-property SERVICE MemoryMax=SIZE",
            "docker update --memory SIZE --memory-swap SIZE CONTAINER",
            "# Kubernetes: raise resources.limits.memory of the container",
        )
        if few
        else (),
    )


def locked_memory(system: System) -> Iterator[Finding]:
    """RDMA registers memory, which locks it."""
    area = "locked memory"
    soft, hard = system.limit("MEMLOCK")
    if soft == UNLIMITED:
        yield Finding(area, Severity.OK, "unlimited")
        return
    told = f"limited to {units.format_bytes(soft)}"
    if hard != soft:
        told += f" (at most {'unlimited' if hard == UNLIMITED else units.format_bytes(hard)})"
    if system.has_capability(IPC_LOCK):
        yield Finding(area, Severity.OK, f"{told}, but this process has CAP_IPC_LOCK and is not held to it")
        return
    needed = bool(system.names(system.sys / "class/infiniband"))
    yield Finding(
        area,
        Severity.PROBLEM if needed else Severity.INFO,
        told,
        "regions that are registered for RDMA are locked in memory" + ("" if needed else "; without RDMA nothing is"),
        (
            "ulimit -l unlimited # this shell; for logins: '* - memlock unlimited' in /etc/security/limits.d/rdma.conf",
            "systemctl edit SERVICE # [Service] LimitMEMLOCK=infinity",
            "docker run --ulimit memlock=-1 ...",
            "# Kubernetes: securityContext.capabilities.add: [IPC_LOCK]",
        )
        if needed
        else (),
    )


def huge_pages(system: System) -> Iterator[Finding]:
    """Fewer page-table entries: faster first touch and registration."""
    area = "huge pages"
    info = system.meminfo()
    total, free = info.get("HugePages_Total", 0), info.get("HugePages_Free", 0)
    size = units.format_bytes(info.get("Hugepagesize", 0) * 1024)
    places = [mount.place for mount in system.mounts() if mount.kind == "hugetlbfs"]
    if total:
        where = f"mounted at {', '.join(shown(place) for place in places[:3])}" if places else "mounted nowhere"
        yield Finding(
            area,
            Severity.INFO,
            f"{free} of {total} reserved pages of {size} are free; hugetlbfs is {where}",
            "reserved pages are lost to everything that does not ask for them; memfabric does not",
        )
    elif info:
        yield Finding(area, Severity.OK, "none reserved, none needed")
    yield from _transparent(system)


def _transparent(system: System) -> Iterator[Finding]:
    """Huge pages that the kernel makes by itself: the mount decides, unless the kernel was told otherwise for all.

    Regions are backed before they are mapped, so what the kernel does on a hint of the mapping (`advise`) is too late.
    """
    setting = system.chosen(system.sys / "kernel/mm/transparent_hugepage/shmem_enabled")
    mount = system.mount_of(system.shared_memory)
    if not setting or mount is None or mount.kind != "tmpfs":
        return
    told = next((option[5:] for option in mount.options if option.startswith("huge=")), "never")
    what = f"transparent huge pages in {shown(mount.place)}: {shown(told)}"
    if setting == "force":
        yield Finding("huge pages", Severity.OK, f"{what}, forced for all")
    elif setting != "deny" and (told == "always" or (told == "within_size" and system.kernel() >= _WITHIN_SIZE_KERNEL)):
        yield Finding("huge pages", Severity.OK, what)
    else:
        place = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
        yield Finding(
            "huge pages",
            Severity.INFO,
            f"{what}{', denied for all' if setting == 'deny' else ''}",
            "regions are backed by small pages: their first touch by each client takes longer",
            (
                *((f"echo never > {place} # lets each mount decide",) if setting == "deny" else ()),
                f"mount -o remount,huge=always {shown(mount.place)} # before nodes start; for all files there",
            ),
        )
