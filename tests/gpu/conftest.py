"""The devices that tests here run on: the one made of threads, always, and CUDA's first one where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from transport.base import UInt8Column
from transport.errors import UnsupportedError
from transport.gpu import Device, HostDevice, open_device


class Lab:
    """A device, with ways to put bytes into its memory and to look at them."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._stream = device.stream()
        self._kept: list[Any] = []

    def upload(self, data: UInt8Column, skew: int = 0) -> int:
        """Copy bytes to fresh device memory, `skew` bytes behind a multiple of 256; their address."""
        memory = self.device.allocate(data.size + skew + 1)
        pinned = self.device.pin(data.size + 1)
        pinned.array[: data.size] = data
        if data.size:
            self._stream.copy(memory.address + skew, pinned.address, data.size)
        self._stream.wait()
        self._kept.append(memory)
        return memory.address + skew

    def download(self, address: int, size_bytes: int) -> UInt8Column:
        """Bytes of device memory."""
        pinned = self.device.pin(size_bytes + 1)
        if size_bytes:
            self._stream.copy(pinned.address, address, size_bytes)
        self._stream.wait()
        return pinned.array[:size_bytes].copy()


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    if request.param == "host":
        device: Device = HostDevice(fill=0xA5)
    else:
        try:
            device = open_device(0)
        except UnsupportedError as error:
            pytest.skip(str(error))
    yield Lab(device)
    device.close()


def random_bytes(count: int, seed: int = 0) -> UInt8Column:
    return np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)
