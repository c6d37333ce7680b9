"""A client's own memory: of the host, or of a CUDA device where torch is."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np

from memfabric.errors import MemfabricError, UsageError
from memfabric.perf.blocks import Bytes, aligned, fill

_PART_BYTES = 16 << 20


class WrongBytesError(MemfabricError):
    """What was read is not what was written. No figure is taken."""


class Memory:
    """Buffers for `set_count` batches in one piece.

    Attributes:
        address: of the first byte. size_bytes: of all.
    """

    def __init__(self, kind: str, set_count: int, batch: int, block_bytes: int) -> None:
        """Take it.

        Raises:
            UsageError: CUDA without torch or without a device.
        """
        self.size_bytes = set_count * batch * block_bytes
        self._shape = (set_count, batch, block_bytes)
        self._host: Bytes | None = None
        self._device: Any = None
        if kind == "cpu":
            self._host = aligned(self.size_bytes)
            self.address: int = self._host.ctypes.data
        else:
            self._device = _device_memory(self.size_bytes)
            self.address = int(self._device.data_ptr())

    def batch(self, at: int) -> Any:
        """The buffers of one batch, ``[batch, block_bytes]``: a numpy array, or a torch tensor on the device."""
        held = self._device if self._host is None else self._host
        return held.reshape(self._shape)[at]

    def batches(self, part: slice) -> Any:
        """The buffers of several batches, one block a row: ``[batches x batch, block_bytes]``."""
        held = self._device if self._host is None else self._host
        return held.reshape(self._shape)[part].reshape(-1, self._shape[2])

    def fill(self, seed: int) -> None:
        """Bytes that nobody can guess; the same for the same seed."""
        if self._host is not None:
            fill(self._host, seed)
            return
        import torch

        pattern = np.empty(self.size_bytes, np.uint8)
        fill(pattern, seed)
        self._device.copy_(torch.from_numpy(pattern))
        torch.cuda.synchronize()

    def clear(self) -> None:
        """Zeros, so that what is read shows."""
        if self._host is not None:
            self._host[:] = 0
            return
        import torch

        self._device.zero_()
        torch.cuda.synchronize()

    def check(self, seed: int) -> None:
        """That `fill` with this seed is what is there.

        Raises:
            WrongBytesError: it is not; says where.
        """
        held = self._host if self._host is not None else self._device.cpu().numpy()
        tile = np.empty(min(self.size_bytes, _PART_BYTES), np.uint8)
        fill(tile, seed)
        for start in range(0, self.size_bytes, tile.size):
            part = held[start : start + tile.size]
            wrong = part != tile[: part.size]
            if wrong.any():
                first = start + int(np.argmax(wrong))
                raise WrongBytesError(f"{int(wrong.sum())} bytes are wrong after a read, the first is byte {first}")


def _device_memory(size_bytes: int) -> Any:
    if importlib.util.find_spec("torch") is None:
        raise UsageError("memory kind cuda needs torch, which is not installed here")
    import torch

    if not torch.cuda.is_available():
        raise UsageError("memory kind cuda: torch finds no CUDA device here")
    return torch.empty(size_bytes, dtype=torch.uint8, device="cuda")
