"""Addresses of servers: which one is meant, whether it is one, how it looks from here."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from memfabric.errors import UsageError

DEFAULT_ADDRESS = "tcp://127.0.0.1:7170"
ADDRESS_VARIABLE = "MEMFABRIC_ADDRESS"


def server_address(address: str | None) -> str:
    """The address asked for, or the environment's, or the default."""
    return address or os.environ.get(ADDRESS_VARIABLE, "") or DEFAULT_ADDRESS


def check_address(address: str) -> None:
    """Refuse what ZeroMQ would not understand.

    Raises:
        UsageError: with an example.
    """
    if address.startswith("ipc://") and len(address) > len("ipc://"):
        return
    try:
        parts = urlsplit(address)
        if parts.scheme == "tcp" and parts.hostname and parts.port and not parts.path:
            return
    except ValueError:
        pass
    raise UsageError(f"address {address!r} is not understood; use tcp://HOST:PORT, for example tcp://127.0.0.1:7170")


def reachable(events: str, server: str) -> str:
    """The events address as seen from here: a server bound to all interfaces names none of them."""
    for wildcard in ("tcp://0.0.0.0:", "tcp://[::]:"):
        if events.startswith(wildcard) and server.startswith("tcp://"):
            return f"{server.rpartition(':')[0]}:{events.rpartition(':')[2]}"
    return events
