"""Regions in a device's memory: what a node lends can be a GPU's.

The adapter of a transport reaches such memory through a dma-buf, which the device's driver exports and the transport
registers (`register_dmabuf` of verbs). Clients notice nothing: a descriptor is a descriptor. The node itself has no
view of it, so superblocks and headers are written and read in steps through pinned memory.

Not run yet: it takes a GPU, its driver with open kernel modules, and an adapter whose driver takes dma-bufs. The way of
the bytes is tested with a device made of threads whose memory is a file (`tests/transport/test_gpu_regions.py`).
"""

from __future__ import annotations

import mmap
import os
import threading
from typing import Protocol, cast

import numpy as np

from transport.base import Region, Transport, UInt8Column
from transport.errors import BoundsError, UnsupportedError
from transport.gpu.device import Device, DeviceMemory

_STEP_BYTES = 4 << 20
_LENT: set[_View] = set()
"""Memory that an adapter may still reach: freed when its region is closed, not when nobody looks at it any more."""


class TakesDmabufs(Protocol):
    """A transport that lends memory behind a dma-buf, such as verbs."""

    def register_dmabuf(self, fd: int, offset: int, size_bytes: int, region_id: int) -> Region:
        """Lend part of a dma-buf, whose descriptor may be closed afterwards."""


def lend(transport: Transport, device: Device, region_id: int, size_bytes: int) -> DeviceRegion:
    """Take memory of a device, zero it, and lend it.

    Args:
        size_bytes: At least 1; rounded up to whole pages, of which only these are lent.

    Raises:
        UnsupportedError: The transport takes no dma-buf, or the device exports none; the message says why.
        DeviceError: The device is short of memory. OutOfMemoryError: The adapter can't register it. ValueError: A bad
            argument. Nothing is left behind.
    """
    if not 0 <= region_id < 1 << 64 or size_bytes < 1:
        raise ValueError(f"no such region: id {region_id}, {size_bytes} bytes")
    if not hasattr(transport, "register_dmabuf"):
        raise UnsupportedError(
            f"transport {transport.capabilities.name} can't lend a device's memory: it registers no dma-buf"
        )
    # cudaMalloc promises 256 bytes only, a dma-buf begins and ends with a page.
    whole_bytes = size_bytes + -size_bytes % mmap.PAGESIZE
    memory = device.allocate(whole_bytes + mmap.PAGESIZE)
    address = memory.address + -memory.address % mmap.PAGESIZE
    view = _View(device, memory, address, size_bytes)
    view.zero()
    fd = device.export(address, whole_bytes)
    try:
        inner = cast(TakesDmabufs, transport).register_dmabuf(fd, 0, size_bytes, region_id)
    finally:
        os.close(fd)
    _LENT.add(view)
    return DeviceRegion(inner, view)


class _View:
    """Part of a device's memory, reached through a step of pinned memory. Thread-safe."""

    def __init__(self, device: Device, memory: DeviceMemory, address: int, size_bytes: int) -> None:
        self._memory = memory  # keeps it
        self._address, self.size_bytes = address, size_bytes
        self._step = device.pin(min(size_bytes, _STEP_BYTES))
        self._stream = device.stream()
        self._lock = threading.Lock()

    def zero(self) -> None:
        with self._lock:
            self._step.array[:] = 0
            for start, size in self._steps(0, self.size_bytes):
                self._stream.copy(self._address + start, self._step.address, size)
            self._stream.wait()

    def read(self, offset: int, size_bytes: int) -> UInt8Column:
        found = np.empty(size_bytes, np.uint8)
        with self._lock:
            for start, size in self._steps(offset, size_bytes):
                self._stream.copy(self._step.address, self._address + start, size)
                self._stream.wait()
                found[start - offset : start - offset + size] = self._step.array[:size]
        return found

    def write(self, offset: int, data: UInt8Column) -> None:
        with self._lock:
            for start, size in self._steps(offset, data.size):
                self._step.array[:size] = data[start - offset : start - offset + size]
                self._stream.copy(self._address + start, self._step.address, size)
                self._stream.wait()

    def _steps(self, offset: int, size_bytes: int) -> list[tuple[int, int]]:
        if offset < 0 or size_bytes < 0 or offset + size_bytes > self.size_bytes:
            raise BoundsError(f"bytes {offset} to {offset + size_bytes} of a region of {self.size_bytes}")
        step = self._step.array.size
        return [(at, min(step, offset + size_bytes - at)) for at in range(offset, offset + size_bytes, step)]


class DeviceRegion(Region):
    """A region in a device's memory, as its owner sees it; made by `lend`."""

    def __init__(self, inner: Region, view: _View) -> None:
        self._inner, self._view = inner, view
        self.region_id, self.size_bytes, self.descriptor = inner.region_id, view.size_bytes, inner.descriptor

    @property
    def buffer(self) -> UInt8Column:  # type: ignore[override]
        """There is none.

        Raises:
            UnsupportedError: Always; use `read` and `write`.
        """
        raise UnsupportedError("a region in a device's memory has no view in the host's; use its read and write")

    def read(self, offset: int, size_bytes: int) -> UInt8Column:
        """A copy of some bytes. They may change meanwhile, under clients that write.

        Raises:
            BoundsError: Not all of them are in the region. DeviceError: The device failed.
        """
        return self._view.read(offset, size_bytes)

    def write(self, offset: int, data: bytes | UInt8Column) -> None:
        """Write some bytes; clients see them when this returns.

        Raises:
            BoundsError: They don't fit; not applied. DeviceError: The device failed; unknown how much was applied.
        """
        self._view.write(offset, np.frombuffer(data, np.uint8))

    def zero(self) -> None:
        """Overwrite everything with zeros."""
        self._view.zero()

    def close(self, unlink: bool = True) -> None:
        """As `Region.close`. The memory is freed with the last reference to the region after that."""
        self._inner.close(unlink)
        _LENT.discard(self._view)
