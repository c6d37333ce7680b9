"""What can be set on a metadata server."""

from __future__ import annotations

import dataclasses
import ipaddress
from pathlib import Path

from memfabric.errors import UsageError

DEFAULT_ADDRESS = "tcp://127.0.0.1:7170"
_MS = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Options of `memfabric meta`. Durations in nanoseconds.

    Attributes:
        address: where requests are taken, ``tcp://HOST:PORT`` or ``ipc://PATH``; port 0 or ``*`` picks a free one.
        state_dir: where the epoch and the namespaces are kept over restarts; None keeps nothing: after a restart,
            namespaces exist again when a client that may create them attaches.
        heartbeat_ns, dead_ns: how often nodes report, and the silence after which one is dead.
        session_ttl_ns: the silence after which a client's leases end.
        max_lease_ns: longest lease granted.
        quarantine_ns: how long blocks of a vanished writer wait beyond its lease.
        insecure: allow an address that other hosts can reach; traffic is neither encrypted nor authenticated.
        log_level, log_json: see `memfabric.logs`.
    """

    address: str = DEFAULT_ADDRESS
    state_dir: Path | None = None
    heartbeat_ns: int = 500 * _MS
    dead_ns: int = 2000 * _MS
    session_ttl_ns: int = 30_000 * _MS
    max_lease_ns: int = 60_000 * _MS
    quarantine_ns: int = 10_000 * _MS
    insecure: bool = False
    log_level: str = "info"
    log_json: bool = False

    def check(self) -> None:
        """Refuse options that cannot work.

        Raises:
            UsageError: says which and why.
        """
        for name in ("heartbeat_ns", "dead_ns", "session_ttl_ns", "max_lease_ns", "quarantine_ns"):
            if not 0 < getattr(self, name) < 2**62:
                raise UsageError(f"{name} must be positive, got {getattr(self, name)}")
        if self.dead_ns < 2 * self.heartbeat_ns:
            raise UsageError(
                f"dead_ns ({self.dead_ns}) must be at least twice heartbeat_ns ({self.heartbeat_ns}), "
                "or living nodes are declared dead"
            )
        check_address(self.address)
        if not self.insecure and not is_local(self.address):
            raise UsageError(
                f"{self.address} can be reached from other hosts, and nothing on it is authenticated; "
                "bind to 127.0.0.1, or say --insecure on a network that you trust"
            )


def split_tcp(address: str) -> tuple[str, str]:
    """Host and port of ``tcp://HOST:PORT``."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return host, port


def check_address(address: str) -> None:
    """Refuse what ZeroMQ would not understand.

    Raises:
        UsageError: with an example.
    """
    if address.startswith("ipc://") and 0 < len(address) - 6 <= 90:
        return
    host, port = split_tcp(address)
    if address.startswith("tcp://") and host and (port == "*" or (port.isdecimal() and int(port) < 65536)):
        return
    raise UsageError(f"address {address!r} is not understood; use tcp://HOST:PORT, for example {DEFAULT_ADDRESS}")


def is_local(address: str) -> bool:
    """Whether only this host can reach the address."""
    if address.startswith("ipc://"):
        return True
    host = split_tcp(address)[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
