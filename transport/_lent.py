"""Regions of transports that lend memory which is there already."""

from __future__ import annotations

import threading
from collections.abc import Callable

from transport.base import Region, UInt8Column


class LentRegion(Region):
    """Memory that this process lends.

    Args:
        withdraw: Ends the registration; what it raises is passed on by `close`, and the region is still open then.
    """

    def __init__(
        self, region_id: int, size_bytes: int, memory: UInt8Column, descriptor: bytes, withdraw: Callable[[], None]
    ) -> None:
        self.region_id = region_id
        self.size_bytes = size_bytes
        self.buffer = memory
        self.descriptor = descriptor
        self._withdraw = withdraw
        self._guard = threading.Lock()
        self._open = True

    def close(self, unlink: bool = True) -> None:
        with self._guard:  # a second caller, too, returns only when it is withdrawn
            if self._open:
                self._withdraw()
                self._open = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.region_id:#x}, {self.size_bytes} bytes>"
