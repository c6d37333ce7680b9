"""RDMA devices as libibverbs shows them, and the choice of one of them: device, port, GID."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transport.errors import UnsupportedError

LIBRARY = "libibverbs.so.1"
HOW_TO_GET = (
    "install it with the drivers of your device (Debian, Ubuntu: apt install libibverbs1 ibverbs-providers; "
    "RHEL: dnf install libibverbs)"
)
_STATES = {0: "nop", 1: "down", 2: "initializing", 3: "armed", 4: "active", 5: "active, deferred"}
_LINKS = {1: "InfiniBand", 2: "Ethernet"}
_TYPES = {0: "InfiniBand", 1: "RoCE v1", 2: "RoCE v2", -1: "unknown type"}


@dataclass(frozen=True)
class Gid:
    """One entry of a port's GID table."""

    index: int
    raw: bytes
    kind: str
    """`"InfiniBand"`, `"RoCE v1"`, `"RoCE v2"` or `"unknown type"`."""

    @property
    def address(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
        """As an address; RoCE v2 over IPv4 holds one that is mapped into IPv6."""
        found = ipaddress.IPv6Address(self.raw)
        return found.ipv4_mapped or found

    def __str__(self) -> str:
        return f"GID {self.index} {self.address} ({self.kind})"


@dataclass(frozen=True)
class Port:
    """One port of a device."""

    number: int
    state: str
    link_layer: str
    """`"InfiniBand"` or `"Ethernet"` (RoCE)."""
    mtu_bytes: int
    """Of the link now: 256 to 4096."""
    lid: int
    max_message_bytes: int
    gids: tuple[Gid, ...]


@dataclass(frozen=True)
class Device:
    """One RDMA device."""

    name: str
    firmware: str
    error: str
    """Why it can't be opened; empty otherwise."""
    limits: dict[str, int]
    ports: tuple[Port, ...]


@dataclass(frozen=True)
class Choice:
    """What a transport opens."""

    device: Device
    port: Port
    gid: Gid | None
    """None on InfiniBand without a GID, where the LID suffices."""

    def __str__(self) -> str:
        return f"{self.device.name}:{self.port.number}, {self.port.link_layer}, {self.gid or f'LID {self.port.lid}'}"


def open_library(path: str | None = None) -> Any:
    """libibverbs: by argument, ``$MEMFABRIC_VERBS_LIBRARY``, or the system's.

    Raises:
        UnsupportedError: It can't be opened; the message says why and how to get it.
    """
    from transport import _verbs

    chosen = path or os.environ.get("MEMFABRIC_VERBS_LIBRARY") or LIBRARY
    try:
        return _verbs.Library(chosen)
    except RuntimeError as error:
        raise UnsupportedError(f"libibverbs can't be opened: {error}; {HOW_TO_GET}") from None


def devices(library: str | None = None) -> list[Device]:
    """All RDMA devices of this host, with their ports and GIDs; also those that can't be opened.

    Raises:
        UnsupportedError: There is no libibverbs, or the kernel gives no list.
    """
    return list_devices(open_library(library))


def list_devices(library: Any) -> list[Device]:
    """As `devices`, of a library that is open."""
    from transport import _verbs

    try:
        return [_device(raw) for raw in library.devices()]
    except _verbs.VerbsError as error:
        raise UnsupportedError(f"RDMA devices can't be listed: {error.args[1]}") from None


def _device(raw: dict[str, Any]) -> Device:
    ports = tuple(
        Port(
            each["number"],
            _STATES.get(each["state"], f"state {each['state']}"),
            _LINKS.get(each["link_layer"], f"link layer {each['link_layer']}"),
            128 << each["mtu"],
            each["lid"],
            each["max_message_bytes"],
            tuple(
                Gid(index, gid, _TYPES[_type(raw["name"], each["number"], index, kind)])
                for index, gid, kind in each["gids"]
            ),
        )
        for each in raw["ports"]
    )
    limits = {name: value for name, value in raw.items() if isinstance(value, int)}
    return Device(raw["name"], raw["firmware"], raw["error"], limits, ports)


def _type(device: str, port: int, index: int, kind: int) -> int:
    """Libraries before rdma-core 32 do not tell a GID's type; the kernel's own files do."""
    if kind in (0, 1, 2):
        return kind
    try:
        told = Path(f"/sys/class/infiniband/{device}/ports/{port}/gid_attrs/types/{index}").read_text().strip()
    except OSError:
        return -1
    return {"IB/RoCE v1": 1, "RoCE v2": 2}.get(told, -1)


def choose(found: list[Device], device: str | None, port: int | None, gid_index: int | None) -> Choice:
    """The first port that is active, or the one that is named.

    On Ethernet a RoCE v2 GID with an IPv4 address is preferred, then RoCE v2 with a routable IPv6 address, then any of
    v2, then v1; on InfiniBand the first GID.

    Raises:
        UnsupportedError: None fits; the message goes through all of them.
    """
    reasons = []
    for each in found:
        if device is not None and each.name != device:
            continue
        if each.error:
            reasons.append(f"{each.name}: {each.error}")
            continue
        for one in each.ports:
            if port is not None and one.number != port:
                continue
            where = f"{each.name}:{one.number}"
            if not one.state.startswith("active"):
                reasons.append(f"{where} is {one.state}")
                continue
            gid = _gid(one, gid_index)
            if gid is None and (gid_index is not None or one.link_layer == "Ethernet"):
                wanted = "GID" if gid_index is None else f"GID {gid_index}"
                there = ", ".join(str(entry) for entry in one.gids) or "none"
                reasons.append(f"{where} has no {wanted} (it has: {there})")
                continue
            return Choice(each, one, gid)
    if not found:
        raise UnsupportedError("there is no RDMA device on this host")
    if not reasons:
        wanted = (device or "any device") + ("" if port is None else f", port {port}")
        there = ", ".join(f"{each.name} (ports 1 to {len(each.ports)})" for each in found)
        raise UnsupportedError(f"no RDMA device fits {wanted}; there are: {there}")
    raise UnsupportedError(f"no RDMA port can be used: {'; '.join(reasons)}")


def _gid(port: Port, gid_index: int | None) -> Gid | None:
    if gid_index is not None:
        return next((each for each in port.gids if each.index == gid_index), None)
    if port.link_layer != "Ethernet":
        return port.gids[0] if port.gids else None
    return min(port.gids, key=_rank, default=None)


def _rank(gid: Gid) -> tuple[bool, bool, bool, int]:
    address = gid.address
    return gid.kind != "RoCE v2", address.version != 4, address.is_link_local, gid.index
