"""The calls to CuPy, against a stand-in that does what they ask for in host memory; and what is said without CuPy."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.transport.conftest import random_bytes
from transport import ShmTransport, _gpu_host, digest
from transport.base import Batch
from transport.errors import UnsupportedError
from transport.gpu import DeviceError, Stager, cuda


class RuntimeFailureError(RuntimeError):
    """As CUDARuntimeError."""


class FakeCupy:
    """The parts of CuPy that are used, over host memory: everything is done at once.

    Attributes:
        devices: How many there are. log: Calls, in order. fail: A word; the next call of that name fails.
    """

    def __init__(self) -> None:
        self.devices, self.fail = 2, ""
        self.current, self.streams = [0], list[int]()
        self.log: list[tuple[Any, ...]] = []
        fake = self

        class Scope:
            def __init__(self, number: int) -> None:
                self.number = number

            def __enter__(self) -> None:
                fake.current.append(self.number)

            def __exit__(self, *_: object) -> None:
                fake.current.pop()

        class Stream:
            def __init__(self, non_blocking: bool = False) -> None:
                assert non_blocking
                self.ptr, self.device = 7000 + len(fake.log), fake.current[-1]

            def __enter__(self) -> None:
                assert self.device == fake.current[-1]
                fake.streams.append(self.ptr)

            def __exit__(self, *_: object) -> None:
                fake.streams.pop()

        class Event:
            def __init__(self, block: bool = False, disable_timing: bool = False) -> None:
                self.ptr, self.block = 9000 + len(fake.log), block

            def record(self, stream: Any) -> None:
                fake.call("record", stream.ptr)

            def synchronize(self) -> None:
                assert self.block, "waiting must not spin"
                fake.call("synchronize")

        class Memory:
            def __init__(self, size: int, flags: int | None = None) -> None:
                fake.call("alloc", size)
                self.raw = np.zeros(size + 256, np.uint8)
                self.ptr = self.raw.ctypes.data + -self.raw.ctypes.data % 256
                self.size = size

        def pointer(memory: Any, offset: int) -> Any:  # a buffer, as PinnedMemoryPointer is
            view: Any = (ctypes.c_uint8 * memory.size).from_address(memory.ptr)
            view.ptr, view.memory = memory.ptr + offset, memory
            return view

        def memcpy(target: int, source: int, size: int, kind: int, stream: int) -> None:
            assert kind == 4 and stream >= 7000
            fake.call("memcpy", size)
            ctypes.memmove(target, source, size)

        def properties(number: int) -> dict[str, Any]:
            return {"name": b"Fake GPU", "multiProcessorCount": 3}

        runtime = SimpleNamespace(
            is_hip=False,
            getDeviceCount=lambda: fake.call("count") or fake.devices,
            getDeviceProperties=properties,
            memcpyAsync=memcpy,
            memcpyDefault=4,
            eventRecord=lambda event, stream: fake.call("eventRecord", stream),
            streamWaitEvent=lambda stream, event: fake.call("streamWaitEvent", stream),
            pointerGetAttributes=lambda address: fake.call("pointer") or SimpleNamespace(device=1),
            CUDARuntimeError=RuntimeFailureError,
        )
        self.cuda = SimpleNamespace(
            runtime=runtime,
            driver=SimpleNamespace(CUDADriverError=type("CUDADriverError", (RuntimeError,), {})),
            memory=SimpleNamespace(OutOfMemoryError=type("OutOfMemoryError", (MemoryError,), {})),
            compiler=SimpleNamespace(CompileException=type("CompileException", (Exception,), {})),
            Device=Scope,
            Stream=Stream,
            Event=Event,
            Memory=Memory,
            PinnedMemory=Memory,
            PinnedMemoryPointer=pointer,
        )

    def call(self, name: str, *arguments: Any) -> None:
        self.log.append((name, *arguments))
        if self.fail == name:
            self.fail = ""
            raise RuntimeFailureError(f"{name} failed on purpose")

    def RawModule(self, code: str, options: tuple[str, ...]) -> Any:
        assert code == cuda.SOURCE.read_text("utf-8") and options == ("-std=c++17",)
        name = re.findall(r'extern "C" __global__ void .*?\n?\s*(\w+)\(const', code)

        def kernel(grid: tuple[int], block: tuple[int], arguments: tuple[Any, ...]) -> None:
            assert self.streams, "launched on a stream of our own"
            assert all(type(each) is np.uint64 for each in arguments)
            *_, chunks, run = (int(each) for each in arguments)
            warps = grid[0] * block[0] // 32
            assert block[0] == 256 and warps * run >= chunks and (warps - 8) * run < chunks
            self.call("launch", chunks, run)
            _gpu_host.move(*(int(each) for each in arguments))

        return SimpleNamespace(get_function=lambda wanted: kernel if [wanted] == name else None)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCupy]:
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    cuda.open_device.cache_clear()
    yield fake
    cuda.open_device.cache_clear()


def batch_of(memory: np.ndarray[Any, Any], handle: int, n: int, size: int) -> Batch:
    return Batch(
        np.arange(n, dtype=np.uint64)[::-1] * np.uint64(size) + np.uint64(memory.ctypes.data),
        np.full(n, handle, np.int32),
        np.arange(n, dtype=np.uint64) * np.uint64(size),
        np.full(n, size, np.uint64),
        np.arange(n, dtype=np.int32),
        np.zeros(n, np.uint64),
        kind="cuda",
    )


@pytest.mark.parametrize("write", [True, False])
def test_a_batch_over_cupy(cupy: FakeCupy, shm: ShmTransport, write: bool) -> None:
    device = cuda.open_device(1)
    assert device is cuda.open_device(1) and device.name == "cuda:1 (Fake GPU)"
    n, size = 64, 48_000
    memory = random_bytes(n * size)
    with shm.create_region("r", 0, n * size) as region:
        handle = shm.connect(region.descriptor, writable=True)
        region.buffer[:] = random_bytes(n * size, 2)
        stager = Stager(shm, device, part_bytes=1 << 20)
        batch = batch_of(memory, handle, n, size)
        assert (stager.write if write else stager.read)(batch, follow=[5]) == n
        assert np.array_equal(memory.reshape(n, size)[::-1].reshape(-1), region.buffer)
        assert batch.digest is not None
        assert batch.digest.tolist() == [digest(region.buffer[i * size : (i + 1) * size]) for i in range(n)]
        assert [entry for entry in cupy.log if entry[0] == "eventRecord"] == [("eventRecord", 5)] * 2
        assert sum(entry[0] == "launch" for entry in cupy.log) == stager.stats()["parts"]
        assert cupy.current == [0], "the calling thread's device is what it was"
        stager.close()


@pytest.mark.parametrize("what", ["memcpy", "launch", "synchronize", "eventRecord"])
def test_errors_of_cuda(cupy: FakeCupy, shm: ShmTransport, what: str) -> None:
    memory = random_bytes(1 << 20)
    with shm.create_region("r", 0, 1 << 20) as region:
        handle = shm.connect(region.descriptor, writable=True)
        stager = Stager(shm, cuda.open_device(0))
        batch = batch_of(memory, handle, 4, 1000)
        assert stager.write(batch) == 4
        cupy.fail = what
        assert stager.write(batch, follow=[5]) == 0
        assert isinstance(batch.error, DeviceError) and f"CUDA device 0: {what} failed" in str(batch.error)
        assert stager.write(batch) == 4 and batch.error is None
        cupy.fail = "alloc"
        stager = Stager(shm, cuda.open_device(0))
        with pytest.raises(DeviceError, match="alloc failed"):
            stager.read(batch)


def test_what_is_said_where_cuda_cannot_be_used(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match="no CUDA device 2; there are 2"):
        cuda.open_device(2)
    assert cuda.ordinal_of(1234) == 1
    cupy.fail = "pointer"
    with pytest.raises(DeviceError, match="no memory of a CUDA device is at 0x4d2"):
        cuda.ordinal_of(1234)
    cupy.devices = 0
    with pytest.raises(UnsupportedError, match="finds no CUDA device"):
        cuda.open_device(0)
    cupy.fail = "count"
    with pytest.raises(UnsupportedError, match="count failed on purpose"):
        cuda.open_device(0)
    cupy.cuda.runtime.is_hip = True
    with pytest.raises(UnsupportedError, match="ROCm"):
        cuda.open_device(0)
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'memfabric\[cuda\]'"):
        cuda.open_device(0)
