"""What staging needs of a device: memory, streams, one kernel.

Implemented over CUDA (`cuda.CudaDevice`) and, with real copies by real threads, on the processor (`host.HostDevice`),
so that everything above is tested without a GPU.

Invariants of both:
- What is put on a stream is performed in that order; between streams there is none, except through `Stream.follow`.
- When `Stream.wait` has returned, or raised, nothing that was put on the stream before touches memory any more.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from transport.base import UInt8Column
from transport.errors import TransportError
from transport.gpu.plan import MovePlan


class DeviceError(TransportError):
    """A device failed, or ran out of memory. What was on the stream may have been performed or not."""


class DeviceMemory(Protocol):
    """Memory of the device. Freed with its last holder, or by `Device.close`.

    Attributes:
        address: Where it begins, for the device; a multiple of 256.
        size_bytes: Its length.
    """

    address: int
    size_bytes: int


class PinnedMemory(Protocol):
    """Memory of the host that the device copies from and to by itself.

    Attributes:
        array: uint8 [size_bytes]; the memory, which lives as long as this object or a view of it.
        address: Where it begins, for the host and the device; a multiple of 64.
    """

    array: UInt8Column
    address: int


class Stream(Protocol):
    """Work of a device, in order. Used by one thread at a time."""

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        """Begin to copy between two ranges, each of the device or pinned."""

    def move(self, at: int, plan: MovePlan) -> None:
        """Begin what a plan says. Its words were copied to device memory at `at`; the sums are added there."""

    def follow(self, stream: int) -> None:
        """What comes after on this stream begins once the work that is on another one now is done.

        Args:
            stream: A stream of somebody else, as a number (cudaStream_t; 0: the default stream).
        """

    def wait(self) -> None:
        """Block, without the interpreter lock, until everything that was put on this stream is done.

        Raises:
            DeviceError: Some of it failed. The stream is not to be used again.
        """


class Device(Protocol):
    """One device. Thread-safe; a stream is not.

    Attributes:
        name: For people: `"cuda:0 (NVIDIA H100)"`.
    """

    name: str

    def allocate(self, size_bytes: int) -> DeviceMemory:
        """Memory of the device.

        Raises:
            DeviceError: Not enough; not applied.
        """

    def pin(self, size_bytes: int) -> PinnedMemory:
        """Pinned memory of the host, zeroed.

        Raises:
            DeviceError: Not enough; not applied.
        """

    def stream(self) -> Stream:
        """A new stream."""

    def active(self) -> AbstractContextManager[None]:
        """Make the device the calling thread's for as long as the context is open: transports that move its memory
        themselves look for it there."""

    def export(self, address: int, size_bytes: int) -> int:
        """A file descriptor of a dma-buf over some of the device's memory; the caller closes it.

        Args:
            address, size_bytes: Whole pages of the host, within one allocation.

        Raises:
            UnsupportedError: The device or its driver can't; the message says what it takes.
        """

    def close(self) -> None:
        """Give up what the device itself holds; idempotent. Every stream was waited for."""


WARP_CHUNKS_MOST = 16
"""Chunks of 4 KiB that one warp takes at most, one after another."""


def chunks_per_warp(chunks: int, processors: int) -> int:
    """How to spread a launch: first over all processors, with 32 warps each, then longer runs, which save look-ups.

    Source: reasoned from the kernel's 80 registers (24 warps fit a processor), not measured yet.
    """
    return min(WARP_CHUNKS_MOST, max(1, chunks // (32 * max(1, processors))))
