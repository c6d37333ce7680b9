"""An owner of regions in the suite's own process, for transports that live in one."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

import numpy as np

from transport._native import digest
from transport.base import Exchange, Region, Transport, UInt8Column
from transport.testing.owner import pattern


class OwnerInProcess:
    """What `OwnerProcess` is for a process, made of calls: it stops, goes on and ends as the transport's world has it.

    Args:
        make: A transport for the owner's next life.
        freeze, thaw, kill: Do that to the life that there is.
    """

    def __init__(
        self,
        make: Callable[[], Transport],
        freeze: Callable[[], None],
        thaw: Callable[[], None],
        kill: Callable[[], None],
    ) -> None:
        self._make = make
        self.freeze = freeze
        self.thaw = thaw
        self._kill = kill
        self._alive = False
        self.start()

    def start(self) -> None:
        """As `Owner.start`."""
        assert not self._alive, "the owner's last life has not ended"
        self._alive = True
        self.transport = self._make()
        self._regions: dict[int, Region] = {}
        self._memory: dict[int, UInt8Column] = {}

    def create(self, region_id: int, size_bytes: int, seed: int | None = None) -> bytes:
        """As `Owner.create`."""
        region = self.transport.create_region("conformance", region_id, size_bytes)
        if seed is not None:
            region.buffer[:] = pattern(seed, size_bytes)
        self._regions[region_id], self._memory[region_id] = region, region.buffer
        return region.descriptor

    def bytes_of(self, region_id: int, offset: int, length: int) -> UInt8Column:
        """As `Owner.bytes_of`."""
        return self._memory[region_id][offset : offset + length].copy()

    def digest_of(self, region_id: int, offset: int = 0, length: int = -1) -> int:
        """As `Owner.digest_of`."""
        memory = self._memory[region_id]
        return digest(np.ascontiguousarray(memory[offset : memory.size if length < 0 else offset + length]))

    def close_region(self, region_id: int) -> None:
        """As `Owner.close_region`."""
        self._regions.pop(region_id).close()

    def fence(self, identity: bytes) -> bool:
        """As `Owner.fence`."""
        return self.transport.fence(identity)

    def exchange(self, identity: bytes) -> Exchange:
        """As `Owner.exchange`."""
        return lambda hello, _deadline_ns: self.transport.accept(hello, identity)

    def kill(self) -> None:
        """As `Owner.kill`."""
        if self._alive:
            self._alive = False
            self._kill()

    def __enter__(self) -> OwnerInProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._alive:
            self.thaw()
            for region in self._regions.values():
                region.close()
            self.transport.close()
        self.kill()
