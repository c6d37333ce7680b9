"""A pool that runs: whether its server answers, and whether its nodes can be reached from here."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

from memfabric import units
from memfabric.client import AdminClient
from memfabric.core.messages import PROTOCOL_VERSION
from memfabric.doctor.findings import Finding, Severity, TransportVerdict, shown
from memfabric.doctor.system import System
from memfabric.errors import MemfabricError

AREA = "pool"
_ROUNDS = 5
_SLOW_NS = 5_000_000
"""A request takes well under a millisecond on one host, and some hundred microseconds more over a network."""

Status = Callable[[str, float], tuple[dict[str, Any], int]]


def ask(address: str, timeout_s: float) -> tuple[dict[str, Any], int]:
    """(status document, shortest time of a request in nanoseconds).

    Raises:
        MemfabricError: the server does not answer, or refuses.
    """
    shortest_ns = 1 << 62
    with AdminClient(address, timeout_s=timeout_s, name="doctor") as admin:
        for _ in range(_ROUNDS):
            started_ns = time.monotonic_ns()
            document = admin.status()
            shortest_ns = min(shortest_ns, time.monotonic_ns() - started_ns)
    return document, shortest_ns


def pool(
    system: System, address: str, timeout_s: float, transports: Collection[TransportVerdict], status: Status = ask
) -> Iterator[Finding]:
    """Attach as an administrator, look, and leave."""
    told = shown(address)
    try:
        document, shortest_ns = status(address, timeout_s)
    except MemfabricError as error:
        what = shown(str(error), 300)
        yield Finding(
            AREA,
            Severity.PROBLEM,
            what if told in what else f"{told}: {what}",
            "without its metadata server a pool cannot be used",
            (f"memfabric status --address {told} # is it the address that the server printed?",),
        )
        return
    nodes = [each for each in document.get("nodes") or [] if isinstance(each, dict)]
    words = f"{told} answers in {units.format_duration(shortest_ns)}, protocol {PROTOCOL_VERSION}"
    words += f"; {len(nodes)} {'node' if len(nodes) == 1 else 'nodes'}"
    slow = shortest_ns > _SLOW_NS
    why = "every prompt costs such a round; run the server near its clients" if slow else ""
    yield Finding(AREA, Severity.WARNING if slow else Severity.OK, words, why)
    here = system.text(system.proc / "sys/kernel/random/boot_id")
    usable = {each.name for each in transports if each.usable}
    for node in nodes:
        yield from _node(node, here, usable)


def _node(node: dict[str, Any], here: str | None, usable: set[str]) -> Iterator[Finding]:
    """Whether a node's blocks can be reached from here."""
    name, state = shown(str(node.get("name"))), node.get("state")
    if state == "dead":
        yield Finding(AREA, Severity.WARNING, f"node {name} is dead", "its blocks are lost until it comes back")
        return
    lends = [each for each in node.get("transports") or [] if isinstance(each, str)]
    same_host = here is not None and node.get("host") == here
    if not lends or (same_host and usable & set(lends)) or (usable - {"shm"}) & set(lends):
        return
    way = "this host" if same_host else "another host"
    yield Finding(
        AREA,
        Severity.PROBLEM,
        f"node {name} on {way} lends over {', '.join(shown(each, 20) for each in lends)}; "
        f"here there is {', '.join(sorted(usable)) or 'nothing'}",
        "its blocks cannot be read or written from here",
        (f"memfabric node --name {name} --transport ucx --insecure ... # on that host",),
    )
