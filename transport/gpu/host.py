"""A device on the processor: for tests, and to see staging work where there is no GPU.

Its memory is ordinary memory, its streams are threads that copy and run the kernel compiled for the processor. It is as
asynchronous as a real one: what is put on a stream happens later, and streams overtake one another.
"""

from __future__ import annotations

import ctypes
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeAlias

import numpy as np

from transport import _gpu_host
from transport.base import UInt8Column
from transport.errors import UnsupportedError
from transport.gpu.device import DeviceError, chunks_per_warp
from transport.gpu.plan import MovePlan

_ALIGNMENT = 256
_Queue: TypeAlias = "queue.SimpleQueue[tuple[Callable[[], None] | None, threading.Event | None] | None]"


def _aligned(size_bytes: int, fill: int) -> UInt8Column:
    room = np.full(size_bytes + _ALIGNMENT, fill, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + size_bytes]


class HostMemory:
    """`DeviceMemory` and `PinnedMemory` in one."""

    def __init__(self, size_bytes: int, fill: int) -> None:
        self.array = _aligned(size_bytes, fill)
        self.address = int(self.array.ctypes.data)
        self.size_bytes = size_bytes


class HostStream:
    """A thread that works off what was put on the stream; ends with the stream or its device.

    Attributes:
        number: What `follow` of others takes.
    """

    def __init__(self, device: HostDevice) -> None:
        self._device = device
        self._work: _Queue = queue.SimpleQueue()
        self._failure: list[Exception] = []
        self._ended = False
        self.number = device._number(self)
        # The thread must not hold the stream, so that the stream can end it.
        self._thread = threading.Thread(
            target=_work_off, args=(self._work, self._failure, device.hook), name="memfabric-host-device", daemon=True
        )
        self._thread.start()
        self._finalizer = weakref.finalize(self, self._work.put, None)

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        self._put(lambda: _copy(target, source, size_bytes))

    def move(self, at: int, plan: MovePlan) -> None:
        count, streams, sums, chunks = plan.count, at + plan.streams_offset, at + plan.sums_offset, plan.chunks
        self._put(lambda: _gpu_host.move(at, count, streams, sums, chunks, chunks_per_warp(chunks, 1)))

    def follow(self, stream: int) -> None:
        other = self._device.by_number(stream)
        if other is not None:
            reached = other._mark()
            self._put(lambda: _await(reached))

    def wait(self) -> None:
        self._mark().wait()
        if self._failure:
            raise DeviceError(f"{self._device.name}: {self._failure[0]}") from self._failure[0]

    def close(self) -> None:
        """End the thread once it has worked everything off."""
        self._ended = True
        self._finalizer()
        self._thread.join()

    def _put(self, work: Callable[[], None]) -> None:
        if self._ended:
            raise DeviceError(f"{self._device.name}: the stream was closed")
        self._work.put((work, None))

    def _mark(self) -> threading.Event:
        """Set once everything before is done, or dropped after a failure."""
        reached = threading.Event()
        if self._ended:
            reached.set()
        else:
            self._work.put((None, reached))
        return reached


def _copy(target: int, source: int, size_bytes: int) -> None:
    ctypes.memmove(target, source, size_bytes)


def _await(reached: threading.Event) -> None:
    reached.wait()


def _work_off(work: _Queue, failure: list[Exception], hook: Callable[[], None] | None) -> None:
    while (item := work.get()) is not None:
        step, reached = item
        if reached is not None:
            reached.set()
        elif step is not None and not failure:
            try:
                if hook is not None:
                    hook()
                step()
            except Exception as error:  # noqa: BLE001  # told by `wait`, as a device does
                failure.append(error)
        del item, step, reached  # not held while there is nothing to do


class HostDevice:
    """See the module.

    Args:
        hook: Called by a stream's thread before each piece of work; tests delay there, or raise.
        fill: What fresh memory is filled with, so that tests see what was never written.
        limit_bytes: Memory of both kinds together; beyond that, allocations fail.
    """

    def __init__(self, hook: Callable[[], None] | None = None, fill: int = 0, limit_bytes: int = 1 << 40) -> None:
        self.name = "host"
        self.hook = hook
        self._fill = fill
        self._left_bytes = limit_bytes
        self._given_back: deque[int] = deque()
        self._lock = threading.Lock()
        self._streams: weakref.WeakValueDictionary[int, HostStream] = weakref.WeakValueDictionary()
        self._count = 0

    def allocate(self, size_bytes: int) -> HostMemory:
        """Ordinary memory."""
        with self._lock:
            while self._given_back:
                self._left_bytes += self._given_back.popleft()
            if size_bytes > self._left_bytes:
                raise DeviceError(f"host: {size_bytes} bytes were asked for, {self._left_bytes} are left")
            self._left_bytes -= size_bytes
        memory = HostMemory(size_bytes, self._fill)
        # May run anywhere, also where this thread holds the lock: so it takes none.
        weakref.finalize(memory, self._given_back.append, size_bytes)
        return memory

    def pin(self, size_bytes: int) -> HostMemory:
        """The same."""
        return self.allocate(size_bytes)

    def stream(self) -> HostStream:
        """A thread."""
        return HostStream(self)

    def active(self) -> AbstractContextManager[None]:
        """Threads have no device of their own."""
        return nullcontext()

    def export(self, address: int, size_bytes: int) -> int:
        """There is nothing to export."""
        raise UnsupportedError("a device made of threads exports no dma-buf")

    def by_number(self, number: int) -> HostStream | None:
        """The stream with this `HostStream.number`; None for others', which never have work here."""
        with self._lock:
            return self._streams.get(number)

    def close(self) -> None:
        """End all streams."""
        for stream in list(self._streams.values()):
            stream.close()

    def _number(self, stream: HostStream) -> int:
        with self._lock:
            self._count += 1
            self._streams[self._count] = stream
            return self._count
