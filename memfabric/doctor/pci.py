"""Devices on the PCI bus, as far as transports care."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from memfabric.doctor.system import System

MELLANOX, NVIDIA = 0x15B3, 0x10DE
INFINIBAND_CLASS, ETHERNET_CLASS = 0x0207, 0x0200
_DISPLAY = 0x03
_HEX = re.compile(r"0x[0-9a-fA-F]{1,8}", re.ASCII)


@dataclasses.dataclass(frozen=True)
class PciDevice:
    """One function of a device.

    Attributes:
        address: on the bus.
        vendor: its number.
        kind: class and subclass.
        driver: empty where none is bound.
        memory_node: the nearest; None where it is not told.
    """

    address: str
    vendor: int
    kind: int
    driver: str
    memory_node: int | None

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter that can do RDMA with the right driver."""
        return self.kind == INFINIBAND_CLASS or (self.kind == ETHERNET_CLASS and self.vendor == MELLANOX)

    @property
    def is_nvidia_gpu(self) -> bool:
        """Whether it is one of NVIDIA's GPUs."""
        return self.vendor == NVIDIA and self.kind >> 8 == _DISPLAY


def devices(system: System) -> Iterator[PciDevice]:
    """All of them."""
    root = system.sys / "bus/pci/devices"
    for address in system.names(root):
        place = root / address
        vendor, kind = (system.text(place / name) or "" for name in ("vendor", "class"))
        if _HEX.fullmatch(vendor) and _HEX.fullmatch(kind):
            node = system.number(place / "numa_node")
            yield PciDevice(
                address,
                int(vendor, 16),
                int(kind, 16) >> 8,
                system.link(place / "driver"),
                node if node is not None and node >= 0 else None,
            )
