"""Operations on their way between loopback transports: connections, flights (batches that are under way), operations.

What an operation goes through: sent → arrives → is performed, in one or several pieces → is answered. Each can be held
up by a stalled host, or fail to happen.

Invariants:
- A flight that is over is final: its statuses never change again and none of its operations touches local memory. What
  a write carries was copied when it was posted, so it may land later all the same.
- `DONE` is said of operations that were performed whole; `NOT_DONE` and `DENIED` only of those no byte of which was
  or ever will be performed.
- On a connection that was fenced nothing is performed.
"""

from __future__ import annotations

import ctypes
import zlib
from collections import deque
from collections.abc import Callable

from transport import _digests
from transport._loopback_fabric import Fabric, Host, Weather
from transport._loopback_faults import Profile
from transport.base import DENIED, DONE, NOT_DONE, PEER_LOST, TIMED_OUT, Batch, Pending, UInt8Column
from transport.errors import PeerLostError, TimedOutError, TransportError, UnreachableError

_UNDECIDED = 255


class Lent:
    """A region, as its owner's life keeps it and operations refer to it."""

    __slots__ = ("address", "denied", "memory", "region_id", "serial", "size_bytes", "withdrawn")

    def __init__(self, region_id: int, serial: int, memory: UInt8Column) -> None:
        self.region_id = region_id
        self.serial = serial
        self.memory = memory  # kept for operations that come after the region was closed
        self.address: int = memory.ctypes.data
        self.size_bytes: int = memory.size
        self.withdrawn = False
        self.denied = False


class Life:
    """One owner: what a descriptor leads to. Ends with its host."""

    def __init__(self, fabric: Fabric, host: Host, profile: Profile, nonce: bytes) -> None:
        self.fabric = fabric
        self.host = host
        self.profile = profile
        self.nonce = nonce
        self.dead = False
        self.gone = False
        self.regions: dict[int, Lent] = {}
        self.connections: dict[int, Connection] = {}
        self.accepted = 0

    def admit(self, identity: bytes) -> Connection:
        """A new connection of one client."""
        self.accepted += 1
        made = Connection(self, identity, self.accepted)
        self.connections[made.number] = made
        return made

    def fence(self, identity: bytes) -> bool:
        """Cut all connections of one client; whether there were any."""
        cut = [each for each in self.connections.values() if each.identity == identity]
        for each in cut:
            each.fence()
        return bool(cut)

    def die(self, keep_memory: bool) -> None:
        """End. Without the memory, all that is under way here is lost."""
        self.dead = True
        self.gone = not (keep_memory and self.profile.one_sided)
        if self.gone:
            for each in list(self.connections.values()):
                each.fence()


class Connection:
    """Between one client and one owner's life."""

    def __init__(self, life: Life, identity: bytes, number: int) -> None:
        self.life = life
        self.fabric = life.fabric
        self.profile = life.profile
        self.identity = identity
        self.number = number
        self.broken = ""
        """Why the client uses it no more; empty: it does."""
        self.fenced = False
        self.operations: dict[Operation, None] = {}
        self.line: deque[Operation] = deque()

    def fence(self) -> None:
        """From now on nothing is performed; the client notices if its transport can."""
        self.fenced = True
        self.life.connections.pop(self.number, None)
        for operation in list(self.operations):
            operation.lose("death", "the owner ended the connection")
        self.line.clear()

    def retire(self, why: str, flight: Flight) -> None:
        """The client gives it up because of one flight; others that are in order behind it are lost with it.

        What is under way may still land, until the owner fences the client.
        """
        if not self.broken:
            self.broken = why
            for each in {operation.flight: None for operation in self.line if operation.flight is not flight}:
                each.lose_all(self, f"the connection was given up: {why}")
        if self.line and (self.line[0].lost or self.line[0].over):
            self.block()
        self.let_go()

    def block(self) -> None:
        """Nothing that stands in line is performed any more: what was before it never will be."""
        for operation in self.line:
            operation.over = True
            self.operations.pop(operation, None)
        self.line.clear()
        self.let_go()

    def let_go(self) -> None:
        """Forget it at the owner once nothing can come over it any more."""
        if self.broken and not self.operations:
            self.life.connections.pop(self.number, None)


class Operation:
    """One read or write under way."""

    __slots__ = (
        "_crc", "_pieces", "address", "arrives_ns", "client_host", "connection", "data", "fabric", "flight", "in_line",
        "index", "lent", "local", "lost", "name", "offset", "over", "performed", "weather",
    )  # fmt: skip

    def __init__(
        self,
        flight: Flight,
        index: int,
        connection: Connection,
        lent: Lent,
        weather: Weather,
        row: tuple[int, int, int],
    ) -> None:
        local, offset, length = row
        self.flight = flight
        self.index = index
        self.connection = connection
        self.fabric = connection.fabric
        self.client_host = flight.host
        self.lent = lent
        self.weather = weather
        self.local = local
        self.offset = offset
        self.address = lent.address + offset
        self.data = ctypes.string_at(local, length) if flight.write else None
        self.over = False
        """Nothing of it is performed any more."""
        self.performed = False
        """Of which something was performed."""
        self.lost = weather.loses_request()
        self._pieces = weather.pieces(offset, length)
        self._pieces.reverse()
        self.in_line = False
        self.arrives_ns = 0
        self.name = f"{flight.number}.{index}"

    def send(self, in_line: bool) -> None:
        """Set out; in line: not performed before those that set out before it."""
        fabric, connection = self.fabric, self.connection
        connection.operations[self] = None
        self.arrives_ns = fabric.clock.now_ns() + self.weather.way_ns()
        if not in_line:
            self.arrives_ns += self.weather.held_back_ns()
        if in_line:
            self.in_line = True
            connection.line.append(self)
            if connection.line[0] is not self:
                return
        self._start()

    def _start(self) -> None:
        if not self.lost:
            self.fabric.push(self.arrives_ns + self._pieces[-1][2], self, self.perform)
        elif self.in_line and self.connection.broken:
            self.connection.block()

    def perform(self) -> None:
        """Its next piece, or what keeps it from that."""
        fabric, connection, life = self.fabric, self.connection, self.connection.life
        if self.client_host.stalled:
            self.client_host.held.append(self)
            return
        if life.host.stalled and not connection.profile.one_sided and not life.dead:
            life.host.held.append(self)
            return
        if connection.fenced or life.gone:
            self.lose("death", "the owner is no more" if life.gone else "the owner ended the connection")
            return
        if fabric.is_cut(self.client_host.name, life.host.name):
            self.lose("link", f"{self.client_host.name} and {life.host.name} are parted")
            return
        if self.lent.denied:
            self._deny()
            return
        start, length, at_ns = self._pieces.pop()
        self.performed = True
        if self.data is None:
            data = ctypes.string_at(self.address + start, length)
            ctypes.memmove(self.local + start, data, length)
        else:
            data = self.data[start : start + length]
            ctypes.memmove(self.address + start, data, length)
        verb = "read" if self.data is None else "late write" if self.flight.over else "write"
        fabric.note(f"{verb} {self.name} {self.lent.region_id:x}+{self.offset + start}:{length} {zlib.crc32(data):08x}")
        if self._pieces:
            fabric.push(fabric.clock.now_ns() + self._pieces[-1][2] - at_ns, self, self.perform)
            return
        self.end()
        if not self.flight.over and not self.weather.loses_answer():
            fabric.push(fabric.clock.now_ns() + self.weather.way_ns(), self.flight, self._answered)

    def end(self) -> None:
        """Nothing of it is performed any more; the next in line may be."""
        self.over = True
        connection = self.connection
        connection.operations.pop(self, None)
        if self.in_line and connection.line and connection.line[0] is self:
            connection.line.popleft()
            # Those that were given up have been taken out of their turn, never before it.
            while connection.line and connection.line[0].over:
                connection.line.popleft()
            if connection.line:
                connection.line[0]._start()
        connection.let_go()

    def drop(self) -> None:
        """It never set out, nor did what stands in line behind it."""
        self.over = True
        self.connection.operations.pop(self, None)
        if self.in_line:
            self.connection.block()

    def _deny(self) -> None:
        self.end()
        what = f"region {self.lent.region_id:#x} was withdrawn"
        if self.performed:
            self._tell(PEER_LOST, PeerLostError(f"{what} while the operation was under way"))
        else:
            self._tell(DENIED, UnreachableError(what))

    def lose(self, failure: str, why: str) -> None:
        """Nothing of it is performed any more, and the client learns it if it can detect such a failure.

        One that is lost on its way keeps its place in line: what comes behind it must not overtake it.
        """
        self.over = True
        self.connection.operations.pop(self, None)
        self.fabric.note(f"lost {self.name}")
        if failure in self.connection.profile.detects:
            delay_ns = 1 + int(self.fabric.rng.random() * self.connection.profile.detect_ns)
            error = PeerLostError(why)
            self.fabric.push(self.fabric.clock.now_ns() + delay_ns, self.flight, lambda: self._noticed(error))

    def _noticed(self, error: PeerLostError) -> None:
        self.connection.retire(str(error), self.flight)
        self.flight.decide(self.index, PEER_LOST, error)

    def _tell(self, status: int, error: TransportError) -> None:
        fabric, flight, index = self.fabric, self.flight, self.index
        at_ns = fabric.clock.now_ns() + self.weather.way_ns()
        fabric.push(at_ns, flight, lambda: flight.decide(index, status, error))

    def _answered(self) -> None:
        if self.fabric.is_cut(self.client_host.name, self.connection.life.host.name):
            self.lose("link", "the answer was lost: the hosts are parted")
            return
        self.flight.decide(self.index, DONE, None)


class Flight:
    """A batch under way, or at its end."""

    def __init__(self, fabric: Fabric, host: Host, number: str, batch: Batch, write: bool, deadline_ns: int) -> None:
        self.fabric = fabric
        self.host = host
        self.number = number
        self.batch = batch
        self.write = write
        self.deadline_ns = deadline_ns
        self.statuses = [_UNDECIDED] * len(batch)
        self.operations: dict[int, Operation] = {}
        self.left = len(batch)
        self.done = 0
        self.over = False
        self.disowned = False
        self.handles: set[int] = set()
        self.error: TransportError | None = None
        self.on_end: Callable[[Flight], None] | None = None

    def decide(self, index: int, status: int, error: TransportError | None) -> None:
        """One operation is terminal; nothing if it is already."""
        if self.over or self.statuses[index] != _UNDECIDED:
            return
        self.statuses[index] = status
        if status == DONE:
            self.done += 1
        elif self.error is None:
            self.error = error
        operation = self.operations.get(index)
        if operation is not None and not operation.over:
            if operation.lost:
                operation.over = True
                operation.connection.operations.pop(operation, None)
            elif not self.write:
                operation.end()  # so that it touches local memory no more; writes go on for themselves
        self.left -= 1
        if not self.left:
            self._settle()

    def lose_all(self, connection: Connection, why: str) -> None:
        """What is not decided yet of one connection is lost."""
        for index, operation in list(self.operations.items()):
            if operation.connection is connection:
                self.decide(index, PEER_LOST, PeerLostError(why))

    def expire(self) -> None:
        """The deadline has come."""
        self.cut_off(TimedOutError(f"the deadline passed after {self.done} of {len(self.statuses)} operations"))

    def cut_off(self, error: TransportError) -> None:
        """End now: what was begun is unknown, the connections that carry it are given up."""
        if self.over:
            return
        carriers: dict[Connection, None] = {}
        undecided = [index for index, status in enumerate(self.statuses) if status == _UNDECIDED]
        for index in undecided:
            operation = self.operations.get(index)
            if operation is not None:
                carriers[operation.connection] = None
            self.decide(index, NOT_DONE if operation is None else TIMED_OUT, error)
        for connection in carriers:
            connection.retire(str(error), self)

    def disown(self) -> None:
        """End without a look at local memory, which may be no more."""
        self.disowned = True
        self.cut_off(TimedOutError("nobody waits for the batch any more"))

    def _settle(self) -> None:
        batch = self.batch
        self.over = True
        batch.status[:] = self.statuses
        batch.error = self.error
        if self.write:
            _digests.drop_unfinished(batch)
        elif not self.disowned:
            _digests.fill(batch)
        self.fabric.note(f"end {self.number} {bytes(self.statuses).hex()}")
        self.fabric.voided()
        if self.on_end is not None:
            self.on_end(self)


class LoopbackPending(Pending):
    """A batch on a fabric: waiting for it moves the fabric's clock."""

    def __init__(self, flight: Flight) -> None:
        self._flight = flight

    def poll(self) -> bool:
        """Whether it is terminal; lets happen what is due by the clock, which it does not move."""
        flight = self._flight
        if not flight.over:
            flight.fabric.run_until(flight.fabric.now_ns())
        return flight.over

    def wait(self) -> int:
        flight = self._flight
        if not flight.over:
            flight.fabric.run_while(lambda: not flight.over, flight.deadline_ns)
        return flight.done

    def abandon(self) -> int:
        flight = self._flight
        with flight.fabric.guard:
            flight.cut_off(TimedOutError("the batch was abandoned"))
        return flight.done

    def __del__(self) -> None:
        # Nobody can know any more when it ends, so nobody keeps its memory for it.
        flight = self._flight
        if not flight.over:
            with flight.fabric.guard:
                flight.disown()
