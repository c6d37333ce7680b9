"""What can be set on a memory node."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from memfabric.core.layout import OS_PAGE_BYTES
from memfabric.core.namespaces import check_name
from memfabric.errors import RefusedError, UsageError
from memfabric.server.options import DEFAULT_ADDRESS, check_address

_MIB = 1 << 20
DEFAULT_REGION_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class NodeOptions:
    """Options of `memfabric node`.

    Attributes:
        name: unique among the pool's living nodes.
        server: the metadata server's address.
        memory_bytes: the arena: how much memory the node lends. Backed in full at start.
        region_bytes: size of one region; the arena is cut into these, the rest is left alone.
        directory: where the shared-memory transport keeps regions (tmpfs or hugetlbfs).
        register_timeout_s: how long to try to reach the server, and to wait for a dead namesake to be declared dead.
        log_level, log_json: see `memfabric.logs`.
    """

    name: str
    server: str = DEFAULT_ADDRESS
    memory_bytes: int = DEFAULT_REGION_BYTES
    region_bytes: int = DEFAULT_REGION_BYTES
    directory: Path = Path("/dev/shm")
    register_timeout_s: float = 30.0
    log_level: str = "info"
    log_json: bool = False

    @property
    def region_count(self) -> int:
        """Regions of the arena."""
        return self.memory_bytes // self.region_bytes

    def check(self) -> None:
        """Refuse options that cannot work.

        Raises:
            UsageError: says which and why.
        """
        try:
            check_name("node", self.name)
        except RefusedError as error:
            raise UsageError(str(error)) from None
        check_address(self.server)
        if self.region_bytes < _MIB or self.region_bytes % OS_PAGE_BYTES:
            raise UsageError(
                f"region size must be at least 1 MiB and a multiple of 4 KiB, got {self.region_bytes} bytes"
            )
        if self.memory_bytes < self.region_bytes:
            raise UsageError(
                f"the arena ({self.memory_bytes} bytes) is smaller than one region ({self.region_bytes} bytes); "
                "lend more memory or choose smaller regions"
            )
        if not self.register_timeout_s > 0:
            raise UsageError(f"register_timeout_s must be positive, got {self.register_timeout_s}")
