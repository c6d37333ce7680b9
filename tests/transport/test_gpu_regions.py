"""Regions in a device's memory. The device is made of threads and its memory of a file, which stands for the dma-buf; a
client reaches it over UCX."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.transport.conftest import one, random_bytes
from transport import ShmTransport, registry
from transport.base import DONE, Region
from transport.errors import BoundsError, OutOfMemoryError, UnsupportedError
from transport.gpu import DeviceError, HostDevice, cuda, lend

SIZE = 5 * 1024 * 1024 + 100


class FileMemory:
    """Memory that is a file's, and begins between two pages, as cudaMalloc's may."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.fd = os.memfd_create("gpu")
        os.ftruncate(self.fd, size_bytes + 4096)
        self.map = mmap.mmap(self.fd, size_bytes + 4096)
        self.array = np.frombuffer(self.map, np.uint8)
        self.array[:] = 0xA5
        self.address = int(self.array.ctypes.data) + 256


class FileDevice(HostDevice):
    def __init__(self) -> None:
        super().__init__()
        self.made: list[FileMemory] = []
        self.exported: list[int] = []

    def allocate(self, size_bytes: int) -> Any:
        if size_bytes < 1 << 20:
            return super().allocate(size_bytes)
        self.made.append(FileMemory(size_bytes))
        return self.made[-1]

    def pin(self, size_bytes: int) -> Any:
        return super().allocate(size_bytes)

    def export(self, address: int, size_bytes: int) -> int:
        memory = self.made[-1]
        assert address % mmap.PAGESIZE == size_bytes % mmap.PAGESIZE == 0
        assert memory.address <= address and address + size_bytes <= memory.address + memory.size_bytes
        self.offset = address - int(memory.array.ctypes.data)
        self.exported.append(os.dup(memory.fd))
        return self.exported[-1]


@pytest.fixture
def device() -> Iterator[FileDevice]:
    made = FileDevice()
    yield made
    made.close()


@pytest.fixture
def owner(device: FileDevice) -> Iterator[Any]:
    """UCX, which takes "dma-bufs" by mapping them."""
    why = registry.why_not("ucx")
    if why:
        pytest.skip(why)
    transport: Any = registry.create("ucx", addresses=["127.0.0.1"])

    def register_dmabuf(fd: int, offset: int, size_bytes: int, region_id: int) -> Region:
        whole = np.frombuffer(mmap.mmap(fd, 0), np.uint8)
        begin = device.offset + offset
        return transport.register(whole[begin : begin + size_bytes], region_id)  # type: ignore[no-any-return]

    transport.register_dmabuf = register_dmabuf
    yield transport
    transport.close()


def test_clients_reach_it_and_the_owner_sees_what_they_write(device: FileDevice, owner: Any) -> None:
    deadline = time.monotonic_ns() + 30_000_000_000
    with registry.create("ucx") as client, lend(owner, device, 7, SIZE) as region:
        assert (region.region_id, region.size_bytes) == (7, SIZE)
        with pytest.raises(OSError):
            os.fstat(device.exported[0])  # was closed
        handle = client.connect(region.descriptor, writable=True)
        found = random_bytes(SIZE)
        assert client.read(one(found, handle), deadline) == 1 and not found.any(), "fresh memory is zeroed"
        data = random_bytes(SIZE, 1)
        batch = one(data, handle)
        assert client.write(batch, deadline) == 1 and batch.status.tolist() == [DONE]
        assert np.array_equal(region.read(0, SIZE), data)
        assert np.array_equal(region.read(SIZE - 7, 7), data[-7:])
        region.write(4_194_000, bytes(range(256)) * 4)
        data[4_194_000 : 4_194_000 + 1024] = np.tile(np.arange(256, dtype=np.uint8), 4)
        assert client.read(one(found, handle), deadline) == 1 and np.array_equal(found, data)
        region.zero()
        assert not region.read(0, SIZE).any()


def test_its_limits(device: FileDevice, owner: Any) -> None:
    with lend(owner, device, 7, SIZE) as region:
        for offset, size in [(SIZE, 1), (-1, 1), (0, SIZE + 1)]:
            with pytest.raises(BoundsError, match=f"of a region of {SIZE}"):
                region.read(offset, size)
        with pytest.raises(BoundsError):
            region.write(SIZE - 1, b"ab")
        with pytest.raises(UnsupportedError, match="use its read and write"):
            _ = region.buffer
        region.close()


def test_what_cannot_be_lent(device: FileDevice, owner: Any, shm: ShmTransport) -> None:
    with pytest.raises(UnsupportedError, match="transport shm can't lend a device's memory"):
        lend(shm, device, 1, SIZE)
    with pytest.raises(ValueError, match="0 bytes"):
        lend(owner, device, 1, 0)
    plain = HostDevice()
    with pytest.raises(UnsupportedError, match="exports no dma-buf"):
        lend(owner, plain, 1, SIZE)
    plain.close()

    def refuse(*_: object) -> Region:
        raise OutOfMemoryError("no")

    owner.register_dmabuf = refuse
    with pytest.raises(OutOfMemoryError):
        lend(owner, device, 1, SIZE)
    with pytest.raises(OSError):
        os.fstat(device.exported[-1])


def test_the_driver_is_asked_as_cuda_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in for libcuda: arguments, and what is said when it refuses."""
    refuses: dict[str, int] = {}

    def attribute(out: Any, which: int, device: Any) -> int:
        assert (which, device.value) == (124, 3)
        out._obj.value = refuses.get("supported", 1)
        return 0

    def set_attribute(value: Any, which: int, address: Any) -> int:
        assert (value._obj.value, which, address.value) == (1, 6, 0x7F0000000000)
        return refuses.get("set", 0)

    def get_handle(out: Any, address: Any, size: Any, kind: int, flags: Any) -> int:
        assert (address.value, size.value, kind, flags.value) == (0x7F0000000000, 8192, 1, 0)
        out._obj.value = 42
        return refuses.get("handle", 0)

    driver = SimpleNamespace(
        cuDeviceGetAttribute=attribute,
        cuPointerSetAttribute=set_attribute,
        cuMemGetHandleForAddressRange=get_handle,
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda name: {"libcuda.so.1": driver}[name])
    assert cuda._export(3, 0x7F0000000000, 8192) == 42
    for what, value, error in [
        ("handle", 801, UnsupportedError),
        ("set", 1, DeviceError),
        ("supported", 0, UnsupportedError),
    ]:
        refuses[what] = value
        with pytest.raises(error, match="CUDA device 3"):
            cuda._export(3, 0x7F0000000000, 8192)
    del driver.cuMemGetHandleForAddressRange
    with pytest.raises(UnsupportedError, match="driver exports no dma-bufs"):
        cuda._export(3, 0x7F0000000000, 8192)
