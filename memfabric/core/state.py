"""The metadata server's whole state, its configuration and its effects.

Pure data: the services (`blocks`, `membership`, `admin`) work on a `State`; `ServerCore` feeds them events. Nothing
here reads a clock: every function that needs the time is given ``now_ns`` (the server's monotonic clock).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np

from memfabric.core.cluster import Cluster
from memfabric.core.commands import Commands
from memfabric.core.leases import LeaseBook, LeaseKind, Quarantine
from memfabric.core.messages import (
    Command,
    KvEvent,
    NamespaceInfo,
    NamespaceSpec,
    Reply,
    Request,
    View,
)
from memfabric.core.namespaces import Namespace
from memfabric.core.sessions import Sessions
from memfabric.core.table import PINNED, BlockTable, Slots, SlotState
from memfabric.errors import RefusalCode, RefusedError

_MS = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How a metadata server behaves. All times are durations in nanoseconds.

    Attributes:
        epoch: this incarnation of the service; greater than every earlier one.
        address, events_address: where clients reach the request and the event socket (told to them).
        heartbeat_ns: how often nodes report.
        dead_ns: silence after which a node is out of the view.
        session_ttl_ns: silence after which a client's session and leases end.
        max_lease_ns: longest lease granted.
        quarantine_ns: how long blocks of a vanished writer wait beyond its lease before reuse. It bounds how late a
            stopped writer may wake without its blocks being in use by another; checksums catch it beyond that.
        park_ns: how long a reservation waits for a region that is being assigned.
        view_interval_ns: how often views are published again, so that a lost message heals.
        max_sessions, max_namespaces, max_leases: bounds (leases per session).
    """

    epoch: int
    address: str = ""
    events_address: str = ""
    heartbeat_ns: int = 500 * _MS
    dead_ns: int = 2000 * _MS
    session_ttl_ns: int = 30_000 * _MS
    max_lease_ns: int = 60_000 * _MS
    quarantine_ns: int = 10_000 * _MS
    park_ns: int = 2000 * _MS
    view_interval_ns: int = 1000 * _MS
    max_sessions: int = 10_000
    max_namespaces: int = 1000
    max_leases: int = 16_384


# --- events and effects ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Received:
    """A request arrived from a connection (`peer` is its identity)."""

    peer: bytes
    request: Request


@dataclasses.dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Paused:
    """The server itself did not run for a while: the silence of others in that time proves nothing.

    Leases are not prolonged: their holders count on their own clocks.
    """

    lost_ns: int


Event = Received | Tick | Paused


@dataclasses.dataclass(frozen=True, slots=True)
class Send:
    """Send a message to one connection."""

    peer: bytes
    message: Reply | Command


@dataclasses.dataclass(frozen=True, slots=True)
class Publish:
    """Publish a message under a topic."""

    topic: bytes
    message: View | KvEvent


@dataclasses.dataclass(frozen=True, slots=True)
class SaveNamespaces:
    """The set of namespaces changed; keep it where a restarted server finds it."""

    specs: tuple[NamespaceSpec, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Log:
    """Something a person may want to know. `fields` are plain values."""

    level: str
    event: str
    fields: dict[str, Any]


Effect = Send | Publish | SaveNamespaces | Log


def topic(kind: str, namespace: str) -> bytes:
    """PUB topic of a namespace; ends with a zero byte so that no name is a prefix of another."""
    return f"{kind}/{namespace}".encode() + b"\0"


class State:
    """Everything the server knows, and what it is about to do (`effects`)."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.table = BlockTable(config.epoch)
        self.cluster = Cluster(self.table)
        self.leases = LeaseBook(config.epoch)
        self.quarantine = Quarantine()
        self.sessions = Sessions(config.epoch, config.max_sessions)
        self.namespaces: dict[int, Namespace] = {}
        self.by_name: dict[str, Namespace] = {}
        self.retiring: dict[int, Namespace] = {}
        """Deleted namespaces whose regions still wait for a quarantine."""
        self.next_namespace_id = 1
        self.commands = Commands()
        self.counters: Counter[str] = Counter()
        self.effects: list[Effect] = []

    def emit(self, effect: Effect) -> None:
        """Queue an effect of the event at hand."""
        self.effects.append(effect)

    def log(self, level: str, event: str, **fields: Any) -> None:
        """Queue a log line."""
        self.effects.append(Log(level, event, fields))

    # --- namespaces ---

    def namespace(self, name: str) -> Namespace:
        """The namespace of a name.

        Raises:
            RefusedError: unknown; the message lists the known ones.
        """
        found = self.by_name.get(name)
        if found is None:
            known = ", ".join(sorted(self.by_name)[:10]) or "none yet"
            raise RefusedError(
                RefusalCode.UNKNOWN_NAMESPACE,
                f"namespace {name!r} does not exist (known: {known}); "
                "create it with `memfabric namespace create` or connect(create=…)",
            )
        return found

    def owner(self, namespace: int) -> Namespace:
        """The namespace of an id, also one that is being retired."""
        found = self.namespaces.get(namespace)
        return found if found is not None else self.retiring[namespace]

    def info(self, namespace: Namespace) -> NamespaceInfo:
        """A namespace for the wire."""
        return NamespaceInfo(
            id=namespace.id,
            spec=namespace.spec,
            blocks=namespace.readable,
            writing=namespace.writing,
            quarantined=namespace.quarantined,
            capacity_blocks=self.cluster.capacity_blocks(namespace),
            regions=len(namespace.regions),
            counters=dict(namespace.counters),
        )

    # --- slots on their way out ---

    def publish_removed(self, namespace: Namespace, slots: Slots, cause: str) -> None:
        """Tell listeners that blocks stopped being readable, and count why."""
        if not len(slots):
            return
        namespace.counters[f"{cause}_blocks"] += len(slots)
        namespace.events += 1
        self.emit(
            Publish(
                topic("kv", namespace.spec.name) + b"removed",
                KvEvent(
                    epoch=self.config.epoch,
                    sequence=namespace.events,
                    namespace=namespace.spec.name,
                    removed=self.table.key[slots].tobytes(),
                    cause=cause,
                ),
            )
        )

    def drop_readable(self, namespace: Namespace, slots: Slots, cause: str) -> None:
        """COMPLETE slots become invisible now; free at once, or with their last read lease."""
        if not len(slots):
            return
        table = self.table
        namespace.index.erase(table.key, slots)
        self.publish_removed(namespace, slots, cause)
        table.pins[slots] &= ~PINNED
        pinned = table.pins[slots] > 0
        held = slots[pinned]
        if len(held):
            table.recency.remove(held)
            table.unlink(held)
            table.state[held] = SlotState.DOOMED
            namespace.doomed += len(held)
        self._release(slots[~pinned])

    def drop_writing(self, namespace: Namespace, slots: Slots, until_ns: int | None) -> None:
        """WRITING slots that will not be committed: free now, or after a quarantine that ends at `until_ns`."""
        if not len(slots):
            return
        table = self.table
        namespace.index.erase(table.key, slots)
        namespace.writing -= len(slots)
        if until_ns is None:
            self._release(slots)
            return
        table.unlink(slots)
        table.state[slots] = SlotState.QUARANTINED
        namespace.quarantined += len(slots)
        self.quarantine.put(slots, table.generation[slots].copy(), until_ns)

    def release_doomed(self, namespace: Namespace, slots: Slots) -> None:
        """DOOMED slots whose last lease ended."""
        namespace.doomed -= len(slots)
        self._release(slots)

    def release_quarantined(self, namespace: Namespace, slots: Slots) -> None:
        """QUARANTINED slots that waited long enough."""
        namespace.quarantined -= len(slots)
        self._release(slots)

    def _release(self, slots: Slots) -> None:
        if len(slots):
            self.table.free(slots)
            self.cluster.give(slots)

    def check_invariants(self) -> None:
        """Raise AssertionError when any part contradicts another. O(slots); for tests."""
        self.table.check_invariants()
        self.cluster.check_invariants()
        for namespace in [*self.namespaces.values(), *self.retiring.values()]:
            namespace.check_invariants()
        pins = np.zeros(self.table.capacity, np.int64)
        for lease in self.leases.all():
            assert lease.session in self.sessions, "a lease of no session"
            live = self.table.generation[lease.slots] == lease.generation
            if lease.kind is LeaseKind.READ:
                np.add.at(pins, lease.slots[live], 1)
            else:
                assert (self.table.state[lease.slots[live]] == SlotState.WRITING).all()
        assert (pins == (self.table.pins & ~PINNED)).all(), "pins do not match the read leases"
