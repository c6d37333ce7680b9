"""What can be set on a memory node."""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memfabric.core.layout import OS_PAGE_BYTES
from memfabric.core.namespaces import check_name
from memfabric.errors import RefusedError, UsageError
from memfabric.server.options import DEFAULT_ADDRESS, check_address
from transport import registry

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
        transports: by which regions are lent beside shared memory: names, or ``auto``: only shared memory while the
            server is on the loopback, else every transport between hosts that can be used here.
        bind: numeric addresses on which transports listen; empty: the one from which the server is reached.
        transport_options: keyword arguments for the transports, by name.
        insecure: allow `bind` addresses that other hosts can reach: nothing on the transports is authenticated yet.
        register_timeout_s: how long to try to reach the server, and to wait for a dead namesake to be declared dead.
        log_level, log_json: see `memfabric.logs`.
    """

    name: str
    server: str = DEFAULT_ADDRESS
    memory_bytes: int = DEFAULT_REGION_BYTES
    region_bytes: int = DEFAULT_REGION_BYTES
    directory: Path = Path("/dev/shm")
    transport: str = "auto"
    bind: tuple[str, ...] = ()
    transport_options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    insecure: bool = False
    register_timeout_s: float = 30.0
    log_level: str = "info"
    log_json: bool = False

    @property
    def region_count(self) -> int:
        """Regions of the arena."""
        return self.memory_bytes // self.region_bytes

    @property
    def transport_names(self) -> list[str]:
        """What `transport` names."""
        return [name.strip() for name in self.transport.split(",") if name.strip()]

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
        unknown = [name for name in self.transport_names if name not in ("auto", *registry.names())]
        if unknown:
            raise UsageError(f"no transport {unknown[0]!r}; there are: auto, {', '.join(registry.names())}")
        for address in self.bind:
            try:
                ipaddress.ip_address(address)
            except ValueError as error:
                raise UsageError(f"bind must be a numeric IP address: {error}") from None
        if not self.register_timeout_s > 0:
            raise UsageError(f"register_timeout_s must be positive, got {self.register_timeout_s}")
