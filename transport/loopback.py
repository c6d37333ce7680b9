"""Owners and clients in one process, over a simulated fabric: deterministic, with every fault that a real one has.

    fabric = Fabric(seed=7, faults=[Tear(probability=0.3), Drop(owner="node", probability=0.01)])
    node, client = LoopbackTransport(fabric, "node"), LoopbackTransport(fabric, "client")

A `Profile` says which real transport is simulated: its order, fences, what it detects, whether it is one-sided. Faults
are data (`transport._loopback_faults`, all exported here), or calls of the fabric: `stall`, `kill`, `cut`, …

Time is the fabric's: deadlines are instants on its clock, which stands still unless somebody moves it. `Pending.wait`,
`disconnect` and `flush` do so, event by event, until they are done; `Pending.poll` and `connect` do not. A simulation
that has events of its own puts them in the same queue with `Fabric.call_at`, polls, and moves time with `Fabric.step`.

Nothing leaves the process, so both sides must be made with the same `Fabric` object. Without one (as through
`transport.create("loopback")`) a transport gets one of its own, with a random seed and on CLOCK_MONOTONIC, and serves
as both sides.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from transport import _digests, base
from transport._loopback_fabric import Clock, Fabric, MonotonicClock
from transport._loopback_faults import (
    ANY,
    FOREVER_NS,
    PROFILES,
    Chance,
    Death,
    Delay,
    Drop,
    Fault,
    HostFault,
    LinkFault,
    Partition,
    Profile,
    Reorder,
    Restart,
    Stall,
    Tear,
    schedule,
)
from transport._loopback_messages import (
    VERSION,
    Descriptor,
    Hello,
    Welcome,
    check_columns,
    decode_descriptor,
    decode_hello,
    decode_welcome,
    encode,
)
from transport._loopback_wire import Connection, Flight, Lent, Life, LoopbackPending, Operation
from transport.base import (
    DONE,
    NOT_DONE,
    NOT_WRITABLE,
    OUT_OF_BOUNDS,
    REGION_GONE,
    Batch,
    Capabilities,
    Exchange,
    Finished,
    Pending,
    Region,
    Transport,
    UInt8Column,
)
from transport.errors import (
    DescriptorError,
    NotConnectedError,
    TimedOutError,
    TransportError,
    UnreachableError,
    UnsupportedError,
)

__all__ = [
    "ANY",
    "FOREVER_NS",
    "PROFILES",
    "Chance",
    "Clock",
    "Death",
    "Delay",
    "Drop",
    "Fabric",
    "Fault",
    "HostFault",
    "LinkFault",
    "LoopbackRegion",
    "LoopbackTransport",
    "MonotonicClock",
    "Partition",
    "Profile",
    "Reorder",
    "Restart",
    "Stall",
    "Tear",
    "schedule",
]

_MAX_REGION_BYTES = 1 << 46
_ADDRESSES = 1 << 64


class LoopbackRegion(Region):
    """Memory that is lent on a fabric."""

    def __init__(self, life: Life, lent: Lent, descriptor: bytes) -> None:
        self.region_id = lent.region_id
        self.size_bytes = lent.size_bytes
        self.buffer = lent.memory
        self.descriptor = descriptor
        self._life = life
        self._lent = lent

    def close(self, unlink: bool = True) -> None:
        with self._life.fabric.guard:
            if "region" in self._life.profile.fences:
                self._lent.denied = True
            if unlink:
                self._lent.withdrawn = True
                self._life.regions.pop(self._lent.serial, None)

    def __repr__(self) -> str:
        return f"<LoopbackRegion {self.region_id:#x}, {self.size_bytes} bytes>"


class _Route:
    """From a client to one owner: the connection that there is, and how to make another."""

    def __init__(self, life: Life, connection: Connection, exchange: Exchange | None) -> None:
        self.life = life
        self.connection = connection
        self.exchange = exchange


class _Handle:
    """What `connect` made."""

    def __init__(self, lent: Lent, route: _Route, writable: bool) -> None:
        self.lent = lent
        self.route = route
        self.writable = writable
        self.end = lent.size_bytes


class LoopbackTransport(Transport):
    """See the module. Thread-safe.

    Args:
        fabric: That of the owners and clients it shall meet; None: one of its own.
        host: Where it is, for faults. Transports of a host stall and die together.
        profile: What it simulates: one, or the label of one in `PROFILES`.

    Raises:
        ValueError: No such profile.
        UnsupportedError: The host is dead.
    """

    def __init__(self, fabric: Fabric | None = None, host: str = "here", profile: Profile | str = "verbs") -> None:
        super().__init__()
        if isinstance(profile, str):
            if profile not in PROFILES:
                raise ValueError(f"there is no profile {profile[:64]!r}; there are {', '.join(PROFILES)}")
            profile = PROFILES[profile]
        self.fabric = fabric or Fabric(int.from_bytes(os.urandom(8), "big"), clock=MonotonicClock())
        self.profile = profile
        with self.fabric.guard:
            self._host = self.fabric.host(host)
            if self._host.dead:
                raise UnsupportedError(f"host {host} is dead; it wants a restart first")
            self._host.members.append(self)
            self.identity = self.fabric.draw_bytes("identity")
            self._life = Life(self.fabric, self._host, profile, self.fabric.draw_bytes("owner"))
            self.fabric.lives[self._life.nonce] = self._life
        self._capabilities = Capabilities(
            name="loopback",
            one_sided=profile.one_sided,
            data_path=f"simulated, as {profile.label}",
            hosts=True,
            inline_digest=profile.inline_digest,
            ordered=profile.ordered,
            zero_copy=False,
            fences=profile.fences,
            detects=profile.detects,
            kinds=frozenset({"cpu"}),
            region_kinds=frozenset({"cpu"}),
            needs_exchange=profile.needs_exchange,
            max_region_bytes=_MAX_REGION_BYTES,
            max_operation_bytes=_MAX_REGION_BYTES,
        )
        self._serial = 0
        self._handles: dict[int, _Handle] = {}
        self._routes: dict[bytes, _Route] = {}
        self._flights: dict[Flight, None] = {}
        self._posted = 0
        self._connects = 0
        self._ended = ""

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    def _die(self, keep_memory: bool) -> None:
        """Its host has died."""
        self._ended = f"its host {self._host.name} has died"
        for flight in list(self._flights):
            operations = list(flight.operations.values())
            flight.cut_off(TimedOutError("the client died"))
            for operation in operations:
                if not self.profile.outlives_client and not operation.over:
                    operation.drop()
        self._life.die(keep_memory)

    def _check_open(self) -> None:
        if self._ended:
            raise TransportError(f"this transport can't be used any more: {self._ended}")

    # Owner's side

    def register(self, memory: UInt8Column, region_id: int) -> LoopbackRegion:
        if not 0 <= region_id < _ADDRESSES:
            raise ValueError(f"region_id {region_id} must be from 0 to 2^64 - 1")
        if memory.dtype != np.uint8 or memory.ndim != 1 or not memory.flags.c_contiguous or not memory.flags.writeable:
            raise ValueError("memory must be a writable one-dimensional contiguous array of uint8")
        if not memory.size:
            raise ValueError("memory must have at least 1 byte")
        with self.fabric.guard:
            self._check_open()
            self._serial += 1
            lent = Lent(region_id, self._serial, memory)
            self._life.regions[lent.serial] = lent
            told = self._describe(self._life, lent)
            self.fabric.note(f"lend {self._host.name} {region_id:x} {memory.size}")
        return LoopbackRegion(self._life, lent, encode(told))

    @staticmethod
    def _describe(life: Life, lent: Lent) -> Descriptor:
        return Descriptor(
            "loopback",
            VERSION,
            life.profile.label,
            life.host.name,
            life.nonce,
            lent.region_id,
            lent.serial,
            lent.size_bytes,
        )

    def create_region(
        self,
        name: str,
        region_id: int,
        size_bytes: int,
        *,
        mode: int = 0o600,
        progress: Callable[[int], None] | None = None,
    ) -> LoopbackRegion:
        return self.register(base.private_memory(name, region_id, size_bytes, _MAX_REGION_BYTES, progress), region_id)

    def accept(self, hello: bytes, identity: bytes) -> bytes:
        if not self.profile.needs_exchange:
            return super().accept(hello, identity)
        if len(identity) != base.IDENTITY_BYTES:
            raise DescriptorError(f"an identity is {base.IDENTITY_BYTES} bytes, not {len(identity)}")
        told = decode_hello(hello)
        with self.fabric.guard:
            self._check_open()
            if told.owner != self._life.nonce:
                raise DescriptorError("a hello for another life of this owner")
            return encode(Welcome(self._life.nonce, self._life.admit(identity).number))

    def fence(self, identity: bytes) -> bool:
        if "client" not in self.profile.fences:
            return super().fence(identity)
        if len(identity) != base.IDENTITY_BYTES:
            raise ValueError(f"an identity is {base.IDENTITY_BYTES} bytes, not {len(identity)}")
        with self.fabric.guard:
            self._check_open()
            self.fabric.note(f"fence {self._host.name} {identity.hex()}")
            return self._life.fence(identity)

    # Client's side

    def connect(
        self, descriptor: bytes, *, writable: bool, exchange: Exchange | None = None, deadline_ns: int = 0
    ) -> int:
        """As `Transport.connect`. Does not move the clock: who can't be reached now is an error at once."""
        told = decode_descriptor(descriptor)
        with self.fabric.guard:
            self._check_open()
            life = self.fabric.lives.get(told.owner)
            if not isinstance(life, Life):
                raise UnreachableError("the region's owner is on another fabric: loopback stays in one process")
            if life.dead:
                raise UnreachableError(f"the region's owner on host {life.host.name} has ended")
            if life.profile != self.profile:
                raise UnreachableError(f"the region is lent as {life.profile.label}, this is {self.profile.label}")
            lent = life.regions.get(told.serial)
            if lent is None or told != self._describe(life, lent):
                raise UnreachableError(f"region {told.region_id:#x} was withdrawn, or is not the one described")
            silent = self._silent(life)
            if silent:
                raise UnreachableError(silent)
            route = self._routes.get(life.nonce)
        if route is None or route.connection.broken:
            # Outside of the guard: an exchange may be answered by another thread.
            connection = self._join(life, exchange, deadline_ns)
            with self.fabric.guard:
                route = self._routes.setdefault(life.nonce, _Route(life, connection, exchange))
                route.connection = connection
        with self.fabric.guard:
            self._check_open()
            route.exchange = exchange or route.exchange
            handle = next(number for number in range(len(self._handles) + 1) if number not in self._handles)
            self._handles[handle] = _Handle(lent, route, writable)
            return handle

    def _silent(self, life: Life) -> str:
        """Why an owner does not answer a client that would connect; empty: it does."""
        if self.fabric.is_cut(self._host.name, life.host.name):
            return f"{self._host.name} and {life.host.name} are parted"
        if life.host.stalled and (life.profile.needs_exchange or not life.profile.one_sided):
            return f"host {life.host.name} does not answer"
        return ""

    def _join(self, life: Life, exchange: Exchange | None, deadline_ns: int) -> Connection:
        """A connection with an owner that is there."""
        self._connects += 1
        if not self.profile.needs_exchange:
            with self.fabric.guard:
                return life.admit(self.identity)
        if exchange is None:
            raise UnreachableError(f"loopback as {self.profile.label} needs an exchange to connect")
        welcome = exchange(encode(Hello("loopback", VERSION, life.nonce)), deadline_ns)
        told = decode_welcome(welcome)
        with self.fabric.guard:
            found = life.connections.get(told.number)
            if told.owner != life.nonce or found is None or found.identity != self.identity:
                raise UnreachableError("the welcome is for another client or another life of the owner")
            return found

    def _handle(self, handle: int) -> _Handle:
        found = self._handles.get(handle)
        if found is None:
            raise NotConnectedError(f"handle {handle} is not connected")
        return found

    def disconnect(self, handle: int) -> None:
        with self.fabric.guard:
            route = self._handle(handle).route
            users = [flight for flight in self._flights if handle in flight.handles]
            del self._handles[handle]
        for flight in users:
            self.fabric.run_while(lambda flight=flight: not flight.over, flight.deadline_ns)  # type: ignore[misc]
        with self.fabric.guard:
            if not any(each.route is route for each in self._handles.values()):
                self._routes.pop(route.life.nonce, None)
                route.connection.broken = route.connection.broken or "the client has disconnected"
                route.connection.let_go()

    def size_of(self, handle: int) -> int:
        found = self._handles.get(handle)
        return 0 if found is None else found.lent.size_bytes

    def mapped(self, handle: int) -> UInt8Column:
        self._handle(handle)
        return super().mapped(handle)

    def post_read(self, batch: Batch, deadline_ns: int = 0, threads: int = 0) -> Pending:
        return self._post(False, batch, deadline_ns, threads)

    def post_write(self, batch: Batch, deadline_ns: int = 0, threads: int = 0) -> Pending:
        return self._post(True, batch, deadline_ns, threads)

    def _post(self, write: bool, batch: Batch, deadline_ns: int, threads: int) -> Pending:
        if not 0 <= threads <= 64:
            raise ValueError(f"threads must be 0 to 64, got {threads}")
        if batch.kind != "cpu":
            raise UnsupportedError(f"loopback copies from and to CPU memory only, not {batch.kind!r}")
        check_columns(batch)
        _digests.check_groups(batch)
        fabric = self.fabric
        with fabric.guard:
            self._check_open()
            rows = self._admit(write, batch)
            now_ns = fabric.now_ns()
            if write:
                _digests.fill_posted(batch)
            late = bool(deadline_ns) and deadline_ns <= now_ns
            if late or not rows:
                return self._finish(batch, late)
            self._posted += 1
            flight = Flight(
                fabric,
                self._host,
                f"{self._host.name}/{self._host.life}/{self._posted}",
                batch,
                write,
                deadline_ns or now_ns + self.profile.limit_ns,
            )
            flight.handles = set(batch.region.tolist())
            flight.on_end = self._flight_ended
            self._flights[flight] = None
            fabric.push(flight.deadline_ns, flight, flight.expire)
            self._send(flight, rows, threads == 1 and self.profile.ordered)
            return LoopbackPending(flight)

    def _flight_ended(self, flight: Flight) -> None:
        self._flights.pop(flight, None)

    def _finish(self, batch: Batch, late: bool) -> Pending:
        """Of a batch with nothing to send."""
        batch.status[:] = NOT_DONE if late else DONE
        batch.error = TimedOutError(f"the deadline passed before any of {len(batch)} operations") if late else None
        if late and not len(batch):
            batch.error = None
        _digests.fill(batch)
        return Finished(0 if late else len(batch))

    def _admit(self, write: bool, batch: Batch) -> list[tuple[int, int, int, int]]:
        """(local, handle, offset, length) of the operations; the whole batch is refused for one that is wrong.

        Nothing where all are empty.
        """
        rows = list(
            zip(batch.local.tolist(), batch.region.tolist(), batch.offset.tolist(), batch.length.tolist(), strict=True)
        )
        handles, wrong = self._handles, {}
        moving = False
        for index, (local, number, offset, length) in enumerate(rows):
            handle = handles.get(number)
            if handle is None:
                wrong[index] = REGION_GONE
            elif offset + length > handle.end or (length and (not local or local + length > _ADDRESSES)):
                wrong[index] = OUT_OF_BOUNDS
            elif write and not handle.writable:
                wrong[index] = NOT_WRITABLE
            elif length:
                moving = True
        if wrong:
            batch.status[:] = NOT_DONE
            for index, status in wrong.items():
                batch.status[index] = status
            raise base.refusal("write" if write else "read", batch, next(iter(wrong.values())), self.size_of)
        return rows if moving else []

    def _send(self, flight: Flight, rows: list[tuple[int, int, int, int]], in_line: bool) -> None:
        ways: dict[_Route, Any] = {}
        handles = self._handles
        for index, (local, number, offset, length) in enumerate(rows):
            handle = handles[number]
            route = handle.route
            if not length:
                flight.decide(index, DONE, None)
                continue
            if route not in ways:
                ways[route] = self._way(flight, route)
            way = ways[route]
            if isinstance(way, TransportError):
                continue
            operation = Operation(flight, index, route.connection, handle.lent, way, (local, offset, length))
            flight.operations[index] = operation
            operation.send(in_line)
        for route, way in ways.items():
            if isinstance(way, TransportError):
                mine = [index for index, row in enumerate(rows) if row[3] and handles[row[1]].route is route]
                self._unsent(flight, route, mine, way)

    def _way(self, flight: Flight, route: _Route) -> Any:
        """The weather between here and an owner, the connection made anew if it was lost; or the error."""
        life = route.life
        if route.connection.broken:
            if life.gone or (life.dead and self.profile.needs_exchange):
                return UnreachableError(f"the connection to host {life.host.name} was lost and its owner has ended")
            silent = self._silent(life)
            if silent:
                return TimedOutError(silent)
            try:
                route.connection = self._join(life, route.exchange, flight.deadline_ns)
            except TransportError as error:
                return error
        return self.fabric.weather(self._host.name, life.host.name)

    def _unsent(self, flight: Flight, route: _Route, indices: list[int], error: TransportError) -> None:
        """Operations without a connection: refused after the time of a round trip, or never answered at all."""
        flight.error = flight.error or error
        if isinstance(error, TimedOutError):
            return

        def refuse() -> None:
            for index in indices:
                flight.decide(index, NOT_DONE, error)

        weather = self.fabric.weather(self._host.name, route.life.host.name)
        self.fabric.push(self.fabric.now_ns() + weather.way_ns() + weather.way_ns(), flight, refuse)

    def flush(self, deadline_ns: int = 0) -> bool:
        flights = list(self._flights)
        until_ns = deadline_ns or self.fabric.now_ns() + self.profile.limit_ns
        return self.fabric.run_while(lambda: not all(flight.over for flight in flights), until_ns)

    def info(self) -> dict[str, str]:
        return {"profile": self.profile.label, "host": self._host.name, "seed": str(self.fabric.seed)}

    def stats(self) -> dict[str, int | str]:
        return {
            "connections": len(self._routes),
            "connects": self._connects,
            "clients": len({each.identity for each in self._life.connections.values()}),
            "batches": self._posted,
        }

    def close(self) -> None:
        with self.fabric.guard:
            if self._ended:
                return
            for flight in list(self._flights):
                flight.cut_off(TimedOutError("the transport was closed"))
        for handle in list(self._handles):
            self.disconnect(handle)
        self._ended = "it was closed"
