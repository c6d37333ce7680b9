"""A CUDA device, through CuPy, which is imported when the first one is opened and not before.

Not run yet: no machine with a GPU was at hand when this was written. What stands above it is tested with
`host.HostDevice`; the calls made here are tested against a stand-in for CuPy (`tests/transport/test_gpu_cuda.py`).
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from transport.base import UInt8Column
from transport.errors import UnsupportedError
from transport.gpu.device import DeviceError, chunks_per_warp
from transport.gpu.plan import MovePlan

SOURCE = Path(__file__).with_name("move.cu")
KERNEL = "memfabric_move"
_THREADS = 256
"""A block's; as in `move.cu`."""
_WARPS = _THREADS // 32
_DMA_BUF_SUPPORTED, _SYNC_MEMOPS, _DMA_BUF_FD = 124, 6, 1
"""Source: cuda.h of CUDA 13.0: CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED, CU_POINTER_ATTRIBUTE_SYNC_MEMOPS,
CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD."""
_PORTABLE = 1
"""cudaHostAllocPortable: pinned for all contexts. Source: CUDA Runtime API, cudaHostAlloc."""


def load_cupy() -> Any:
    """CuPy, with a driver that works and at least one device.

    Raises:
        UnsupportedError: It isn't there, or can't be used here; the message says why and what to do.
    """
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        raise UnsupportedError(
            f"GPU memory needs CuPy, which can't be imported ({error}); pip install 'memfabric[cuda]'"
        ) from error
    if cupy.cuda.runtime.is_hip:
        raise UnsupportedError("this CuPy is built for ROCm; GPU memory needs CUDA")
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except RuntimeError as error:  # CUDARuntimeError
        raise UnsupportedError(f"CuPy finds no CUDA device that works: {error}") from error
    if count < 1:
        raise UnsupportedError("CuPy finds no CUDA device")
    return cupy


@functools.cache
def open_device(ordinal: int) -> CudaDevice:
    """The device with this number; one object for each.

    Raises:
        UnsupportedError: There is no such device, or none can be used here.
    """
    return CudaDevice(ordinal)


def _export(ordinal: int, address: int, size_bytes: int) -> int:
    """By the driver, which CuPy has no call for. The device is the calling thread's."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        get_handle = driver.cuMemGetHandleForAddressRange
    except (OSError, AttributeError) as error:
        raise UnsupportedError(
            f"NVIDIA's driver exports no dma-bufs: {error}; it takes release 515 or later"
        ) from error
    supported = ctypes.c_int(0)
    code = driver.cuDeviceGetAttribute(ctypes.byref(supported), _DMA_BUF_SUPPORTED, ctypes.c_int(ordinal))
    if code != 0 or not supported.value:
        raise UnsupportedError(
            f"CUDA device {ordinal} exports no dma-bufs; it takes NVIDIA's open kernel modules and Linux 5.12 or later"
        )
    flag = ctypes.c_int(1)
    code = driver.cuPointerSetAttribute(ctypes.byref(flag), _SYNC_MEMOPS, ctypes.c_uint64(address))
    if code != 0:
        raise DeviceError(f"CUDA device {ordinal}: cuPointerSetAttribute(SYNC_MEMOPS) failed with {code}")
    fd = ctypes.c_int(-1)
    code = get_handle(
        ctypes.byref(fd), ctypes.c_uint64(address), ctypes.c_size_t(size_bytes), _DMA_BUF_FD, ctypes.c_ulonglong(0)
    )
    if code != 0:
        raise UnsupportedError(f"CUDA device {ordinal} can't export {size_bytes} bytes as a dma-buf: error {code}")
    return fd.value


def ordinal_of(address: int) -> int:
    """Number of the device whose memory is at an address.

    Raises:
        UnsupportedError: CUDA can't be used here. DeviceError: no memory of a CUDA device.
    """
    cupy = load_cupy()
    try:
        found = cupy.cuda.runtime.pointerGetAttributes(address)
    except RuntimeError as error:
        raise DeviceError(f"no memory of a CUDA device is at {address:#x}: {error}") from error
    return int(found.device)


class CudaMemory:
    """Memory of the device (cudaMalloc)."""

    def __init__(self, memory: Any, size_bytes: int) -> None:
        self._memory = memory
        self.address = int(memory.ptr)
        self.size_bytes = size_bytes


class CudaPinnedMemory:
    """Memory of the host (cudaHostAlloc)."""

    def __init__(self, pointer: Any, size_bytes: int) -> None:
        # The array holds the pointer, and that the memory.
        self.array: UInt8Column = np.frombuffer(pointer, np.uint8, size_bytes)
        self.array[:] = 0
        self.address = int(pointer.ptr)


class CudaStream:
    """A stream that does not wait for the default one."""

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        cupy = device.cupy
        self._stream = cupy.cuda.Stream(non_blocking=True)
        # Waiting for a blocking event gives up the processor; waiting for a stream would spin.
        self._reached = cupy.cuda.Event(block=True, disable_timing=True)
        self._followed = cupy.cuda.Event(disable_timing=True)

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        runtime = self._device.cupy.cuda.runtime
        with self._device.active():
            runtime.memcpyAsync(target, source, size_bytes, runtime.memcpyDefault, self._stream.ptr)

    def move(self, at: int, plan: MovePlan) -> None:
        if not plan.chunks:
            return
        run = chunks_per_warp(plan.chunks, self._device.processors)
        warps = -(-plan.chunks // run)
        numbers = (at, plan.count, at + plan.streams_offset, at + plan.sums_offset, plan.chunks, run)
        with self._device.active(), self._stream:
            self._device.kernel((-(-warps // _WARPS),), (_THREADS,), tuple(np.uint64(number) for number in numbers))

    def follow(self, stream: int) -> None:
        runtime = self._device.cupy.cuda.runtime
        with self._device.active():
            runtime.eventRecord(self._followed.ptr, stream)
            runtime.streamWaitEvent(self._stream.ptr, self._followed.ptr)

    def wait(self) -> None:
        with self._device.active():
            self._reached.record(self._stream)
            self._reached.synchronize()


class CudaDevice:
    """See `device.Device`.

    Args:
        ordinal: CUDA's number of the device, from 0.

    Raises:
        UnsupportedError: There is no such device, or none can be used here.
    """

    def __init__(self, ordinal: int) -> None:
        self.cupy = load_cupy()
        count = self.cupy.cuda.runtime.getDeviceCount()
        if not 0 <= ordinal < count:
            raise UnsupportedError(f"there is no CUDA device {ordinal}; there are {count}")
        self.ordinal = ordinal
        self._lock = threading.Lock()
        self._kernel: Any = None
        with self.active():
            told = self.cupy.cuda.runtime.getDeviceProperties(ordinal)
        self.processors = int(told["multiProcessorCount"])
        name = told["name"]
        self.name = f"cuda:{ordinal} ({name.decode('ascii', 'replace') if isinstance(name, bytes) else name})"

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make the device the calling thread's, and CUDA's errors ours."""
        try:
            with self.cupy.cuda.Device(self.ordinal):
                yield
        except (self.cupy.cuda.runtime.CUDARuntimeError, self.cupy.cuda.driver.CUDADriverError) as error:
            raise DeviceError(f"CUDA device {self.ordinal}: {error}") from error
        except self.cupy.cuda.memory.OutOfMemoryError as error:
            raise DeviceError(f"CUDA device {self.ordinal} is out of memory: {error}") from error

    @property
    def kernel(self) -> Any:
        """The kernel, compiled when it is first needed; CuPy keeps it on disk."""
        with self._lock:
            if self._kernel is None:
                try:
                    module = self.cupy.RawModule(code=SOURCE.read_text("utf-8"), options=("-std=c++17",))
                    self._kernel = module.get_function(KERNEL)
                except self.cupy.cuda.compiler.CompileException as error:
                    raise DeviceError(f"{SOURCE.name} can't be compiled for device {self.ordinal}: {error}") from error
            return self._kernel

    def allocate(self, size_bytes: int) -> CudaMemory:
        """Not from CuPy's pool, which would keep it."""
        with self.active():
            return CudaMemory(self.cupy.cuda.Memory(size_bytes), size_bytes)

    def pin(self, size_bytes: int) -> CudaPinnedMemory:
        """Not from CuPy's pool, which rounds up to powers of two."""
        with self.active():
            memory = self.cupy.cuda.PinnedMemory(size_bytes, _PORTABLE)
            return CudaPinnedMemory(self.cupy.cuda.PinnedMemoryPointer(memory, 0), size_bytes)

    def stream(self) -> CudaStream:
        """A new stream."""
        with self.active():
            return CudaStream(self)

    def export(self, address: int, size_bytes: int) -> int:
        """Also makes CUDA order copies of this memory after what the adapter wrote to it before."""
        with self.active():
            return _export(self.ordinal, address, size_bytes)

    def close(self) -> None:
        """Nothing is held."""
