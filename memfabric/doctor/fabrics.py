"""The verdict on each transport, from what trying it told and what the kernel tells."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from memfabric.doctor import rdma
from memfabric.doctor.findings import Finding, Severity, TransportVerdict, shown
from memfabric.doctor.probe import Probed
from memfabric.doctor.system import MEMORY_FILE_SYSTEMS, System
from transport._ucx_library import VARIABLE

_RELIABLE = ("rc_", "dc_")
"""UCX transports over InfiniBand and RoCE that leave the target's processor alone."""
_TCP = "the node's processor carries out every operation over TCP"


def verdict(system: System, probed: Probed) -> TransportVerdict:
    """Whether a transport can be used here."""
    if probed.why_not:
        return TransportVerdict(probed.name, False, probed.why_not)
    if probed.name == "shm":
        return _shm(system, probed)
    if probed.name == "ucx":
        return _ucx(system, probed)
    hardware = [device for device in rdma.names(system) if not rdma.in_software(system, device)]
    slower = ""
    if probed.name == "verbs" and not hardware:
        slower = "the only RDMA device is emulated in software"
    return TransportVerdict(probed.name, True, probed.data_path, slower)


def _shm(system: System, probed: Probed) -> TransportVerdict:
    """Shared memory: the directory has to be there, and for writing."""
    place = shown(str(system.shared_memory))
    if not system.shared_memory.is_dir():
        return TransportVerdict("shm", False, f"{place} is not a directory")
    if not os.access(system.shared_memory, os.R_OK | os.W_OK | os.X_OK):
        return TransportVerdict("shm", False, f"{place} may not be written by this user")
    mount = system.mount_of(system.shared_memory)
    if mount is not None and mount.kind == "hugetlbfs":
        return TransportVerdict("shm", False, f"{place} is on hugetlbfs")
    on_disk = mount is not None and mount.kind not in MEMORY_FILE_SYSTEMS
    slower = f"{place} is on a disk" if on_disk else ""
    return TransportVerdict("shm", True, f"{probed.data_path} in {place}, between processes of this host", slower)


def _ucx(system: System, probed: Probed) -> TransportVerdict:
    info = {key: shown(probed.info.get(key, "unknown")) for key in ("version", "library", "source")}
    told = f"UCX {info['version']}, {info['library']} ({info['source']})"
    reliable = sorted({device for transport, device in probed.fabrics if transport.startswith(_RELIABLE)})
    devices = rdma.names(system)
    if reliable:
        over = ", ".join(shown(device, 32) for device in reliable[:4])
        soft = all(rdma.in_software(system, device.partition(":")[0]) for device in reliable)
        slower = "the only RDMA device is emulated in software" if soft else ""
        return TransportVerdict("ucx", True, f"RDMA over {over}; {told}", slower)
    if devices:
        return TransportVerdict("ucx", True, told, f"this UCX does not use {shown(devices[0], 32)}: {_TCP}")
    return TransportVerdict("ucx", True, told, f"there is no RDMA adapter: {_TCP}")


def findings(system: System, probed: Sequence[Probed]) -> Iterator[Finding]:
    """What to do about transports that are not what they could be."""
    for each in probed:
        if each.name == "ucx":
            yield from _about_ucx(system, each)
        if each.name == "verbs" and "libibverbs" in each.why_not and rdma.names(system):
            yield Finding(
                "RDMA",
                Severity.WARNING,
                f"verbs cannot be used: {each.why_not}",
                "memfabric and UCX reach adapters through libibverbs",
                ("apt-get install libibverbs1 ibverbs-providers # RHEL: dnf install libibverbs",),
            )
        for device in each.devices:
            if device["error"]:
                yield Finding(
                    "RDMA",
                    Severity.PROBLEM,
                    f"{shown(device['name'], 32)} cannot be opened: {shown(device['error'], 200)}",
                    "verbs cannot use it",
                    ("apt-get install ibverbs-providers # RHEL: dnf install libibverbs",),
                )
            elif device["mtu_bytes"]:
                packets = ", ".join(
                    f"{size} bytes at port {port}" for port, size in sorted(device["mtu_bytes"].items())
                )
                yield Finding("RDMA", Severity.OK, f"{shown(device['name'], 32)}: packets of {packets}")


def _about_ucx(system: System, probed: Probed) -> Iterator[Finding]:
    devices = rdma.names(system)
    if probed.why_not:
        yield Finding(
            "UCX",
            Severity.WARNING if devices else Severity.INFO,
            "it cannot be used here",
            "without it memfabric reaches other hosts only over transports of its own",
            (f"unset {VARIABLE} # or name a libucp there",)
            if f"${VARIABLE}" in probed.why_not
            else ("apt-get install libucx0 # RHEL: dnf install ucx ucx-ib", "pip install 'memfabric[ucx]' # TCP only"),
        )
    elif devices and not any(transport.startswith(_RELIABLE) for transport, _ in probed.fabrics):
        components = "component" in probed.info.get("transports", "") and ":  ib\n" in probed.info["transports"]
        yield Finding(
            "UCX",
            Severity.WARNING,
            f"it does not use {', '.join(shown(device, 32) for device in devices[:4])}",
            "this library finds no device that it can use"
            if components
            else "this library was built or installed without InfiniBand",
            ("ucx_info -d # and see UCX_TLS, UCX_NET_DEVICES",)
            if components
            else ("apt-get install libucx0 # RHEL: dnf install ucx ucx-ib",),
        )
