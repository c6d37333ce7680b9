"""Blocks to copy: user buffers, keys, and where blocks are, so that a plain memcpy can copy the same bytes.

This is the one place that looks inside a client: no user needs addresses.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

import transport
from memfabric import BlockKeys, Client

Bytes = npt.NDArray[np.uint8]
Addresses = npt.NDArray[np.uint64]

_OS_PAGE_BYTES = 4096
_TILE_BYTES = 16 << 20


def aligned(size_bytes: int) -> Bytes:
    """Zeroed memory that starts on an OS page, as an engine's KV tensors do; all its pages are there."""
    raw = np.empty(size_bytes + _OS_PAGE_BYTES, np.uint8)
    start = -raw.ctypes.data % _OS_PAGE_BYTES
    found = raw[start : start + size_bytes]
    found[:] = 0
    return found


def fill(buffer: Bytes, seed: int) -> None:
    """Bytes that no processor can guess; the same for the same seed."""
    tile = np.random.default_rng(seed).integers(0, 256, min(buffer.size, _TILE_BYTES), dtype=np.uint8)
    for start in range(0, buffer.size, tile.size):
        part = buffer[start : start + tile.size]
        part[:] = tile[: part.size]


class FreshKeys:
    """Chains of keys that nobody used before."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def __call__(self, count: int) -> BlockKeys:
        return BlockKeys.chain(self._random.integers(0, 256, (count, 16), dtype=np.uint8))


@dataclass(frozen=True)
class Memcpy:
    """Block-wise memcpy: the limit that everything is held against. One native call, one memcpy for each block."""

    destination: Addresses
    source: Addresses
    length: Addresses

    def run(self, threads: int) -> None:
        """Copy; threads as in `Transport.read`."""
        transport.copy_limit(self.destination, self.source, self.length, threads)


def limit_of(client: Client, keys: BlockKeys, buffer: Bytes, *, put: bool) -> Memcpy:
    """A memcpy between the places of blocks that the client knows, in its own mapping, and a user buffer."""
    block_bytes = client.namespace.block_bytes
    remote = addresses(client, keys, writable=put)
    local = (buffer.ctypes.data + np.arange(len(keys)) * block_bytes).astype(np.uint64)
    length = np.full(len(keys), block_bytes, np.uint64)
    return Memcpy(remote, local, length) if put else Memcpy(local, remote, length)


def addresses(client: Client, keys: BlockKeys, *, writable: bool) -> Addresses:
    """Where blocks are in this process; valid until the client is closed or the regions are gone.

    Raises:
        RuntimeError: a place is not known.
    """
    engine = client._engine
    unknown, place = engine.places.find(keys.keys)
    if unknown is not None or not engine.regions.map(place.slot, writable).all():
        raise RuntimeError("the client does not know all places")
    handle, data_offset = engine.regions.table(writable)[place.slot, :2].T
    base = {each: engine.transport.mapped(each).ctypes.data for each in np.unique(handle).tolist()}
    start = np.array([base[each] for each in handle.tolist()], np.int64) + data_offset
    found: Addresses = (start + place.block.astype(np.int64) * client.namespace.block_bytes).astype(np.uint64)
    return found


def enter_pages(client: Client, *, writable: bool) -> None:
    """Map all regions and enter their pages into the page tables: what is measured is the steady state."""
    engine = client._engine
    engine.regions.map(np.arange(len(engine.regions.table(writable)), dtype=np.int32), writable)
    for handle in engine.regions.table(writable)[:, 0].tolist():
        if handle >= 0:
            engine.transport.prefault(handle)
