"""Buffers in GPU memory: what callers may pass, and how batches reach them.

Knows how CUDA memory is described (torch tensors, the CUDA array interface, DLPack) and nothing of CUDA itself: that is
`transport.gpu`, which is imported when the first such buffer comes. Nothing here needs a GPU to be imported.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from memfabric.errors import UsageError
from transport.base import Batch, Transport
from transport.errors import TransportError

if TYPE_CHECKING:
    from transport.gpu import Device, Stager

KIND = "cuda"
"""Of memory, as in `transport.base.Batch.kind`."""
_DLPACK_CUDA = 2
"""Source: DLPack, DLDeviceType.kDLCUDA."""
_DEFAULT_STREAM = 0


@dataclasses.dataclass(frozen=True, slots=True)
class CudaArray:
    """Memory of a CUDA device.

    Attributes:
        address: Where it begins. shape, strides: In items, and in bytes; strides None: C-contiguous.
        ordinal: CUDA's number of its device; -1: not told.
        owner: What keeps it valid.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    item_bytes: int
    writable: bool
    ordinal: int
    owner: Any


def is_cuda_tensor(tensor: Any) -> bool:
    """Whether a torch tensor lies on a CUDA device."""
    return str(getattr(tensor, "device", "cpu")).split(":")[0] == KIND


def cuda_array(value: Any, what: str) -> CudaArray | None:
    """The memory of an object with the CUDA array interface, or with DLPack on a CUDA device; None: it is neither.

    Raises:
        UsageError: It is, but can't be used.
    """
    interface = _interface(value, what)
    if interface is None:
        if not hasattr(value, "__dlpack_device__") or int(value.__dlpack_device__()[0]) != _DLPACK_CUDA:
            return None
        value = _from_dlpack(value, what)
        interface = value.__cuda_array_interface__
    try:
        address, read_only = interface["data"]
        shape = tuple(int(side) for side in interface["shape"])
        strides = interface.get("strides")
        item_bytes = np.dtype(interface["typestr"]).itemsize
        if interface.get("mask") is not None:
            raise UsageError(f"{what} is a masked GPU array")
        ordinal = int(getattr(getattr(value, "device", None), "id", -1))
        return CudaArray(
            int(address or 0),
            shape,
            None if strides is None else tuple(int(stride) for stride in strides),
            item_bytes,
            not read_only,
            ordinal,
            value,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{what} has a CUDA array interface that is malformed: {error!r}") from error


def _interface(value: Any, what: str) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] | None = getattr(value, "__cuda_array_interface__", None)
    except (RuntimeError, TypeError) as error:  # how libraries refuse: a tensor on another device, say
        raise UsageError(f"{what} has no CUDA array interface that can be used: {error}") from error
    return found


def _from_dlpack(value: Any, what: str) -> Any:
    from transport.gpu.cuda import load_cupy

    try:
        return load_cupy().from_dlpack(value)
    except (TransportError, RuntimeError, TypeError, BufferError, ValueError) as error:
        raise UsageError(f"{what} is in GPU memory, and can't be taken over by DLPack: {error}") from error


def current_streams(owners: Iterable[Any]) -> tuple[int, ...]:
    """The streams whose work, as it is now, comes before ours, each once.

    For torch tensors that is the calling thread's current stream, for others the array's own.
    """
    found: dict[int, None] = {}
    for owner in owners:
        if hasattr(owner, "data_ptr"):
            torch = sys.modules.get("torch")
            current = None if torch is None else torch.cuda.current_stream(owner.device)
            found[_DEFAULT_STREAM if current is None else int(current.cuda_stream)] = None
            continue
        interface = getattr(owner, "__cuda_array_interface__", None)
        if interface is not None:  # None for a stream: nothing needs to be waited for
            stream = interface.get("stream", _DEFAULT_STREAM)
            found.update({} if stream is None else {int(stream): None})
    return tuple(found)


def device_of(ordinal: int, address: int, what: str) -> Device:
    """The device of some memory, opened.

    Args:
        ordinal: Its number; -1: told by the address.

    Raises:
        UsageError: CUDA can't be used here; says why and what to do.
    """
    from transport.gpu import cuda

    try:
        return open_device(cuda.ordinal_of(address) if ordinal < 0 else ordinal)
    except TransportError as error:
        raise UsageError(f"{what} is in GPU memory, which can't be used here: {error}") from error


def open_device(ordinal: int) -> Device:
    """As `transport.gpu.open_device`, which is imported now."""
    from transport import gpu

    return gpu.open_device(ordinal)


class Gpu:
    """One client's ways to GPU memory, by device. Thread-safe."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._stagers: dict[Device, Stager] = {}
        self._lock = threading.Lock()
        self._closed = False

    def read(self, device: Device, batch: Batch, deadline_ns: int, threads: int, streams: tuple[int, ...]) -> int:
        """As `transport.gpu.Stager.read`."""
        return self._stager(device).read(batch, deadline_ns, threads, streams)

    def write(self, device: Device, batch: Batch, deadline_ns: int, threads: int, streams: tuple[int, ...]) -> int:
        """As `transport.gpu.Stager.write`."""
        return self._stager(device).write(batch, deadline_ns, threads, streams)

    def stats(self) -> dict[str, int | str]:
        """How GPU memory is reached, and how many bytes went which way."""
        with self._lock:
            each = [stager.stats() for stager in self._stagers.values()]
        return {
            "gpu_path": "; ".join(str(stats["path"]) for stats in each) or "not used yet",
            "gpu_staged_bytes": sum(int(stats["staged_bytes"]) for stats in each),
            "gpu_direct_bytes": sum(int(stats["direct_bytes"]) for stats in each),
        }

    def close(self) -> None:
        """Give staging memory back, once running calls are over."""
        with self._lock:
            self._closed = True
            stagers, self._stagers = list(self._stagers.values()), {}
        for stager in stagers:
            stager.close()

    def _stager(self, device: Device) -> Stager:
        from transport.gpu import Stager

        with self._lock:
            if self._closed:
                raise TransportError("the client is closed")
            found = self._stagers.get(device)
            if found is None:
                found = self._stagers[device] = Stager(self._transport, device)
            return found
