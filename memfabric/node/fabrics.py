"""By which transports a node lends its regions beside shared memory, and where they listen.

Nothing on them is authenticated yet. So what others could reach needs `insecure`, and by default they listen only where
the server is reached from.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

from memfabric.errors import UsageError
from memfabric.node.options import NodeOptions
from memfabric.server.options import split_tcp
from transport import Transport, registry
from transport.errors import TransportError

AUTO = ("verbs", "ucx")
"""What `auto` lends over between hosts, where it can be used."""
_LISTENING = ("ucx",)
"""Transports that take `addresses`."""


def make_fabrics(options: NodeOptions) -> tuple[dict[str, Transport], dict[str, str]]:
    """Make the transports; they listen from the first registration on.

    Returns:
        The transports by name, and why others that `auto` would have taken cannot be used here.

    Raises:
        UsageError: One that was named cannot be used, or it would be reachable for others without `insecure`.
    """
    names = [name for name in options.transport_names if name != "shm"]
    automatic = "auto" in names
    local = is_local(options.server)
    if automatic:
        names = [name for name in names if name != "auto"] + ([] if local else list(AUTO))
    made: dict[str, Transport] = {}
    missing: dict[str, str] = {}
    try:
        for name in dict.fromkeys(names):
            given: dict[str, Any] = dict(options.transport_options.get(name, {}))
            if name in _LISTENING:
                given.setdefault("addresses", list(options.bind) or [near_address(options.server)])
                _check_reach(given["addresses"], options.insecure)
            try:
                made[name] = registry.create(name, **given)
            except (TransportError, ValueError, TypeError) as error:
                if not automatic:
                    raise UsageError(f"transport {name}: {error}") from error
                missing[name] = str(error)
    except BaseException:
        for each in made.values():
            each.close()
        raise
    return made, missing


def _check_reach(addresses: list[str], insecure: bool) -> None:
    open_ = [address for address in addresses if not ipaddress.ip_address(address).is_loopback]
    if open_ and not insecure:
        raise UsageError(
            f"a transport would listen on {', '.join(open_)}, where other hosts reach it, and nothing on it is "
            "authenticated yet; bind a loopback address, or allow it with --insecure"
        )


def is_local(server: str) -> bool:
    """Whether the server's address is one that only this host reaches."""
    if not server.startswith("tcp://"):
        return True
    try:
        return ipaddress.ip_address(near_address(server)).is_loopback
    except UsageError:
        return False


def near_address(server: str) -> str:
    """This host's address from which the server is reached.

    Raises:
        UsageError: The server's name is not known, or no way leads there.
    """
    if not server.startswith("tcp://"):
        return "127.0.0.1"
    host, port = split_tcp(server)
    host = host.strip("[]")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, int(port) or 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:  # connecting a datagram socket sends nothing
            probe.connect(address)
            return str(probe.getsockname()[0])
    except (OSError, ValueError) as error:
        raise UsageError(f"no address of this host leads to {server}: {error}; name one with --bind") from error
