"""RDMA adapters: ports, addresses, the kernel's modules and files for them."""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Iterable, Iterator
from pathlib import Path

from memfabric.doctor.findings import Finding, Severity, shown
from memfabric.doctor.pci import devices
from memfabric.doctor.system import System

_MODULES = (
    "ib_core", "ib_uverbs", "rdma_cm", "rdma_ucm", "mlx4_ib", "mlx5_ib", "irdma", "bnxt_re", "efa", "hfi1", "qedr",
    "hns_roce_hw_v2", "iw_cxgb4", "rdma_rxe", "siw",
)  # fmt: skip
_DRIVERS = {"mlx5_core": "mlx5_ib", "mlx4_core": "mlx4_ib"}
"""The module that adds RDMA to a driver for Ethernet."""
_SHOWN_GIDS = 4
_UNSET = "0000:0000:0000:0000:0000:0000:0000:0000"
_ROCE_MTU_BYTES = 4200
"""Ethernet packets that hold RoCE packets of 4096 bytes, the largest, with their headers; 1500 hold 1024."""


def names(system: System) -> list[str]:
    """RDMA devices."""
    return system.names(system.sys / "class/infiniband")


def in_software(system: System, device: str) -> bool:
    """Whether a device is the kernel's emulation (Soft-RoCE, Soft-iWARP), not hardware."""
    try:
        return "virtual" in (system.sys / "class/infiniband" / device).resolve().parts
    except (OSError, RuntimeError):  # a loop of links
        return False


def rdma(system: System) -> Iterator[Finding]:
    """Adapters, the way to them, and their ports.

    That one of several adapters or ports is not used is usual: it is a problem only where there is no other.
    """
    found = names(system)
    if not found:
        yield _nothing(system)
        return
    yield from _at_least_one(_access(system, found))
    loaded = [name for name in _MODULES if (system.sys / "module" / name).exists()]
    if loaded:
        yield Finding("RDMA", Severity.OK, f"kernel modules: {', '.join(loaded)}")
    ports = [
        _Port(system, device, port)
        for device in found
        for port in system.names(system.sys / "class/infiniband" / device / "ports")
    ]
    yield from _at_least_one(port.finding() for port in ports)
    for port in ports:
        yield from port.packets()
    for device in found:
        yield from _slot(system, device)
        if in_software(system, device):
            yield Finding(
                "RDMA",
                Severity.INFO,
                f"{shown(device)} is emulated in software",
                "it shows that things work, not how fast: the processors move every byte",
            )


def _at_least_one(findings: Iterable[Finding]) -> list[Finding]:
    """Problems are for information where there is one without a problem."""
    told = list(findings)
    if all(finding.severity is Severity.PROBLEM for finding in told):
        return told
    problem = Severity.PROBLEM
    return [
        dataclasses.replace(each, severity=Severity.INFO, fix=()) if each.severity is problem else each for each in told
    ]


def _nothing(system: System) -> Finding:
    why = "between hosts blocks travel over TCP, which takes the node's processor"
    for device in devices(system):
        if device.is_adapter:
            module = _DRIVERS.get(device.driver, "")
            return Finding(
                "RDMA",
                Severity.WARNING,
                f"an adapter at {shown(device.address)} (driver {shown(device.driver) or 'none'}), but no RDMA device",
                why,
                (f"modprobe {module}",) if module else ("lspci -nnk -d ::0207 # load the driver that is named there",),
            )
    return Finding("RDMA", Severity.INFO, "no RDMA adapter", why)


def _access(system: System, found: list[str]) -> Iterator[Finding]:
    """Programs reach adapters through /dev/infiniband."""
    verbs = system.sys / "class/infiniband_verbs"
    files = {
        (system.text(verbs / name / "ibdev") or ""): name for name in system.names(verbs) if name.startswith("uverbs")
    }
    why = "programs reach an adapter through its file there"
    for device in found:
        name = files.get(device)
        if name is None:
            what = f"{shown(device)} has no file in /dev/infiniband: ib_uverbs is not loaded"
            yield Finding("RDMA", Severity.PROBLEM, what, why, ("modprobe ib_uverbs",))
            continue
        path, told = system.dev / "infiniband" / name, f"/dev/infiniband/{shown(name)}"
        if not path.exists():
            yield Finding(
                "RDMA",
                Severity.PROBLEM,
                f"{shown(device)} is there, but not {told}",
                why,
                (
                    f"docker run --device {told} ... # in a container; or --device /dev/infiniband for all",
                    "# Kubernetes: the device plug-in of the adapter's maker",
                ),
            )
        elif not system.may_use(path):
            what = f"{told} may not be opened by this user"
            yield Finding("RDMA", Severity.PROBLEM, what, why, (f"chmod a+rw {told} # for good: a udev rule",))
        else:
            yield Finding("RDMA", Severity.OK, f"{told} may be opened")


def _slot(system: System, device: str) -> Iterator[Finding]:
    """Whether the adapter has the lanes and the speed that it could have."""
    place = system.sys / "class/infiniband" / device / "device"
    now, most = (system.number(place / f"{which}_link_width") for which in ("current", "max"))
    speed, best = (system.text(place / f"{which}_link_speed") or "" for which in ("current", "max"))
    narrow = now is not None and most is not None and 0 < now < most
    slow = speed != best and bool(speed and best)
    if narrow or slow:
        yield Finding(
            "RDMA",
            Severity.WARNING,
            f"{shown(device)}: its slot gives {now} lanes at {shown(speed)}, it could use {most} at {shown(best)}",
            "the bus may be slower than the link",
            ("lspci -vv # look at LnkCap and LnkSta; try another slot",),
        )


class _Port:
    """One port of an adapter."""

    def __init__(self, system: System, device: str, port: str) -> None:
        self._system = system
        self._place = system.sys / "class/infiniband" / device / "ports" / port
        self._name = f"{shown(device, 32)}/{shown(port, 8)}"
        self._where = f"{shown(device, 32)} port {shown(port, 8)}"
        self._ethernet = system.text(self._place / "link_layer") == "Ethernet"
        self._hardware = not in_software(system, device)

    def finding(self) -> Finding:
        """What it is and whether it can carry anything."""
        system, place = self._system, self._place
        state = shown((system.text(place / "state") or "unknown").rpartition(":")[2].strip(), 20)
        layer = "RoCE" if self._ethernet else shown(system.text(place / "link_layer") or "unknown link", 20)
        rate = shown(system.text(place / "rate") or "unknown rate", 40)
        gids = _gids(system, place)
        more = f" and {len(gids) - _SHOWN_GIDS} more" if len(gids) > _SHOWN_GIDS else ""
        told = f"{self._where}: {layer}, {state}, {rate}; GID {', '.join(gids[:_SHOWN_GIDS]) or 'none'}{more}"
        if state != "ACTIVE":
            link = "" if self._ethernet else "; is a subnet manager running?"
            return Finding(
                "RDMA",
                Severity.PROBLEM,
                told,
                f"a port that is not active carries nothing: look at cable and switch{link}",
                (f"rdma link show {self._name}", *(("ip link set INTERFACE up",) if self._ethernet else ())),
            )
        if self._ethernet and not gids:
            return Finding(
                "RDMA",
                Severity.PROBLEM,
                told,
                "RoCE addresses a port by its GIDs, which follow the IP addresses of its interface",
                (f"rdma link show {self._name} # names the interface", "ip address add ADDRESS/LENGTH dev INTERFACE"),
            )
        return Finding("RDMA", Severity.OK, told)

    def packets(self) -> Iterator[Finding]:
        """RoCE packets are as large as the interface's MTU allows."""
        if not (self._ethernet and self._hardware):
            return
        system, place = self._system, self._place / "gid_attrs/ndevs"
        interfaces = {shown(system.text(place / number) or "", 16) for number in system.names(place)}
        for name in sorted(interfaces):
            mtu = system.number(system.sys / "class/net" / name / "mtu") if name and "/" not in name else None
            if mtu is not None and 0 < mtu < _ROCE_MTU_BYTES:
                yield Finding(
                    "RDMA",
                    Severity.WARNING,
                    f"{self._where}: the MTU of {name} is {mtu}",
                    f"RoCE packets of 4096 bytes need {_ROCE_MTU_BYTES}; smaller ones cost bandwidth",
                    (f"ip link set {name} mtu 9000 # on all hosts and switches of the fabric",),
                )


def _gids(system: System, place: Path) -> list[str]:
    """``index address (type)`` of each GID that is set."""
    found = []
    for number in system.names(place / "gids"):
        text = system.text(place / "gids" / number) or ""
        if text == _UNSET:  # most of them; Soft-RoCE has 1024
            continue
        try:
            address = ipaddress.IPv6Address(text)
        except ValueError:
            continue
        if int(address) == 0:
            continue
        kind = shown(system.text(place / "gid_attrs/types" / number) or "type unknown", 16)
        found.append(f"{shown(number, 4)} {address.ipv4_mapped or address} ({kind})")
    return found
