"""The world that loopback transports share: one clock, one queue of events, hosts, links, faults.

Knows nothing of batches and regions (`transport._loopback_wire`), nor of the surface (`transport.loopback`).

Invariants:
- Nothing here sleeps, starts threads, reads a clock of the system or draws from anything but the seed. The same seed
  and the same calls give the same history, byte for byte. (Threads may share a fabric; then the calls differ.)
- The clock moves only by events and by what its user asks for, and never back.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterable
from typing import Literal, Protocol

from transport._loopback_faults import (
    FOREVER_NS,
    Death,
    Delay,
    Drop,
    Fault,
    LinkFault,
    Partition,
    Reorder,
    Restart,
    Stall,
    Tear,
)

_COMPACT = 1024


class Clock:
    """Simulated time: stands still unless it is moved. Other clocks are subclasses."""

    def __init__(self, start_ns: int = 0) -> None:
        self._now_ns = start_ns

    def now_ns(self) -> int:
        return self._now_ns

    def advance_to(self, at_ns: int) -> None:
        """Move on; never back."""
        self._now_ns = max(self._now_ns, at_ns)


class MonotonicClock(Clock):
    """CLOCK_MONOTONIC, or further where waiting has moved it: for deadlines of that clock. Not deterministic."""

    def now_ns(self) -> int:
        self._now_ns = max(self._now_ns, time.monotonic_ns())
        return self._now_ns


class Subject(Protocol):
    """What an event is about; the event is void once that is over."""

    @property
    def over(self) -> bool: ...


class Member(Protocol):
    """A transport, as its host sees it."""

    def _die(self, keep_memory: bool) -> None: ...


class _Always:
    over = False


class Held(Protocol):
    """An operation that waits for a stalled host."""

    over: bool
    client_host: Host

    def perform(self) -> None: ...

    def drop(self) -> None: ...


class Host:
    """One simulated host; made by the first who names it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.stalled = 0
        self.dead = False
        self.life = 0
        self.members: list[Member] = []
        self.held: list[Held] = []


class Weather:
    """What operations of one batch to one owner may meet: the faults that apply when it is posted."""

    __slots__ = ("_answers", "_delays", "_drops", "_latency_ns", "_random", "_reorders", "_tears")

    def __init__(self, latency_ns: int, rng: random.Random, faults: list[LinkFault]) -> None:
        self._latency_ns = latency_ns
        self._random = rng.random
        self._delays = [each for each in faults if isinstance(each, Delay)]
        self._reorders = [each for each in faults if isinstance(each, Reorder)]
        self._drops = [each for each in faults if isinstance(each, Drop) and each.what == "request"]
        self._answers = [each for each in faults if isinstance(each, Drop) and each.what == "answer"]
        self._tears = [each for each in faults if isinstance(each, Tear)]

    def way_ns(self) -> int:
        """How long one way takes."""
        way_ns = self._latency_ns
        for each in self._delays:
            if self._random() < each.probability:
                way_ns += each.least_ns + int(self._random() * (each.most_ns - each.least_ns + 1))
        return way_ns

    def held_back_ns(self) -> int:
        """By how much a request is made late, so that others overtake it."""
        return sum(int(self._random() * each.most_ns) for each in self._reorders if self._random() < each.probability)

    def loses_request(self) -> bool:
        return any(self._random() < each.probability for each in self._drops)

    def loses_answer(self) -> bool:
        return any(self._random() < each.probability for each in self._answers)

    def pieces(self, offset: int, length: int) -> list[tuple[int, int, int]]:
        """(start within the operation, length, ns after its arrival) of its parts, in the order of performance."""
        for tear in self._tears:
            if self._random() < tear.probability:
                return self._torn(tear, offset, length)
        return [(0, length, 0)]

    def _torn(self, tear: Tear, offset: int, length: int) -> list[tuple[int, int, int]]:
        first, last = offset // 64 + 1, (offset + length - 1) // 64
        lines = last - first + 1  # boundaries between lines, where it may be cut
        cuts = {(first + int(self._random() * lines)) * 64 - offset for _ in range(tear.pieces - 1)} if lines else set()
        edges = [0, *sorted(cuts), length]
        parts = [(self._random(), start, end - start) for start, end in itertools.pairwise(edges)]
        instants = sorted(int(self._random() * (tear.most_ns + 1)) for _ in parts)
        return [(start, size, at) for (_, start, size), at in zip(sorted(parts), instants, strict=True)]


class Fabric:
    """Joins `LoopbackTransport` objects; see the module. Thread-safe.

    Args:
        seed: Of everything that is drawn, names of owners and clients too: fabrics of one world have different seeds.
        clock: Moved by the fabric; whoever shares it sees the same time.
        latency_ns: Each way, without faults.
        faults: As given to `inject`.
        trace: Keep the history as lines in `trace`; else only its digest.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        clock: Clock | None = None,
        latency_ns: int = 1000,
        faults: Iterable[Fault] = (),
        trace: bool = False,
    ) -> None:
        if latency_ns < 0:
            raise ValueError(f"latency_ns must be at least 0, got {latency_ns}")
        self.seed = seed
        self.clock = clock or Clock()
        self.latency_ns = latency_ns
        self.rng = random.Random(seed)
        self.guard = threading.RLock()
        self.trace: list[str] | None = [] if trace else None
        self.lives: dict[bytes, object] = {}
        """Owners, by what their descriptors name them; kept by the transports."""
        self._history = hashlib.blake2b(digest_size=16)
        self._queue: list[tuple[int, int, int, Subject, Callable[[], None]]] = []
        self._pushed = 0
        self._void = 0
        self._drawn = 0
        self._hosts: dict[str, Host] = {}
        self._cuts: dict[frozenset[str], int] = {}
        self._link_faults: list[LinkFault] = []
        self.inject(*faults)

    # --- time ---

    def now_ns(self) -> int:
        """The clock's time."""
        return self.clock.now_ns()

    def next_event_ns(self) -> int | None:
        """When the next event is due; None: nothing will happen by itself."""
        with self.guard:
            self._drop_void()
            return self._queue[0][0] if self._queue else None

    def step(self) -> bool:
        """Let the next event happen, the clock moved to its instant; False: there is none."""
        with self.guard:
            self._drop_void()
            if not self._queue:
                return False
            at_ns, _, _, _, action = heapq.heappop(self._queue)
            self.clock.advance_to(at_ns)
            action()
            return True

    def run_until(self, at_ns: int) -> None:
        """Let everything happen that is due by then, and move the clock there."""
        while True:
            with self.guard:
                next_ns = self.next_event_ns()
                if next_ns is None or next_ns > at_ns:
                    self.clock.advance_to(at_ns)
                    return
                self.step()

    def run_for(self, duration_ns: int) -> None:
        """As `run_until`, from now."""
        self.run_until(self.now_ns() + duration_ns)

    def run_while(self, condition: Callable[[], bool], until_ns: int) -> bool:
        """Step while a condition holds and nothing later than an instant is due; whether it ceased to hold."""
        while True:
            with self.guard:
                if not condition():
                    return True
                next_ns = self.next_event_ns()
                if next_ns is None or next_ns > until_ns:
                    self.clock.advance_to(until_ns)
                    return not condition()
                self.step()

    def call_at(self, at_ns: int, action: Callable[[], None]) -> None:
        """Have something done by the queue, at an instant or now if that has passed."""
        self.push(at_ns, _Always, action)

    def push(self, at_ns: int, subject: Subject, action: Callable[[], None]) -> None:
        """As `call_at`, unless the subject is over by then. Equal instants: in an order drawn from the seed."""
        with self.guard:
            self._pushed += 1
            at_ns = max(at_ns, self.clock.now_ns())
            heapq.heappush(self._queue, (at_ns, self.rng.getrandbits(32), self._pushed, subject, action))

    def voided(self) -> None:
        """Told of each subject that is over with an event in the queue, so that those don't pile up."""
        self._void += 1
        if self._void > _COMPACT and self._void * 2 > len(self._queue):
            self._queue = [entry for entry in self._queue if not entry[3].over]
            heapq.heapify(self._queue)
            self._void = 0

    def _drop_void(self) -> None:
        while self._queue and self._queue[0][3].over:
            heapq.heappop(self._queue)

    # --- history ---

    def note(self, line: str) -> None:
        """Add to the history."""
        line = f"{self.clock.now_ns()} {line}\n"
        self._history.update(line.encode())
        if self.trace is not None:
            self.trace.append(line[:-1])

    def history(self) -> str:
        """A digest of all that has happened."""
        return self._history.hexdigest()

    def draw_bytes(self, purpose: str) -> bytes:
        """16 bytes, different each time; they depend on the seed alone."""
        with self.guard:
            self._drawn += 1
            return hashlib.blake2b(f"{self.seed}/{purpose}/{self._drawn}".encode(), digest_size=16).digest()

    # --- hosts and links ---

    def host(self, name: str) -> Host:
        """By its name; made if there is none."""
        with self.guard:
            return self._hosts.setdefault(name, Host(name))

    def weather(self, client: str, owner: str) -> Weather:
        """What befalls operations between two hosts now."""
        now_ns = self.clock.now_ns()
        faults = [each for each in self._link_faults if each.applies(client, owner, now_ns)]
        return Weather(self.latency_ns, self.rng, faults)

    def is_cut(self, one: str, other: str) -> bool:
        """Whether two hosts can't reach each other."""
        return bool(self._cuts) and self._cuts.get(frozenset((one, other)), 0) > 0

    # --- faults ---

    def inject(self, *faults: Fault) -> None:
        """Faults of links hold from now on as they say; those of hosts happen at their instants.

        Raises:
            TypeError: It is no fault.
        """
        for fault in faults:
            if isinstance(fault, LinkFault):
                with self.guard:
                    self._link_faults.append(fault)
            elif isinstance(fault, Stall):
                self.call_at(fault.at_ns, functools.partial(self._stall_for, fault))
            elif isinstance(fault, Death):
                self.call_at(fault.at_ns, functools.partial(self.kill, fault.host, fault.memory))
            elif isinstance(fault, Restart):
                self.call_at(fault.at_ns, functools.partial(self.restart, fault.host))
            elif isinstance(fault, Partition):
                self.call_at(fault.at_ns, functools.partial(self._cut_for, fault))
            else:
                raise TypeError(f"{fault!r} is not a fault")

    def _stall_for(self, fault: Stall) -> None:
        host = self.host(fault.host)
        if host.dead:
            return
        self.stall(fault.host)
        if fault.for_ns < FOREVER_NS:
            life = host.life
            self.call_at(self.now_ns() + fault.for_ns, lambda: self.wake(fault.host) if host.life == life else None)

    def _cut_for(self, fault: Partition) -> None:
        self.cut(fault.one, fault.other)
        if fault.for_ns < FOREVER_NS:
            self.call_at(self.now_ns() + fault.for_ns, functools.partial(self.heal, fault.one, fault.other))

    def calm(self) -> None:
        """End all faults of links and all partitions; for the part of a test where everything must come right."""
        with self.guard:
            self._link_faults.clear()
            self._cuts.clear()
            self.note("calm")

    def stall(self, name: str) -> None:
        """Stop a host. Stalls add up: it goes on when each was ended."""
        with self.guard:
            self.host(name).stalled += 1
            self.note(f"stall {name}")

    def wake(self, name: str) -> None:
        """End one stall of a host; nothing if it is not stalled."""
        with self.guard:
            host = self.host(name)
            if host.stalled:
                host.stalled -= 1
                self.note(f"wake {name}")
            if not host.stalled:
                held, host.held = host.held, []
                for operation in held:
                    self.push(self.now_ns(), operation, operation.perform)

    def kill(self, name: str, memory: Literal["gone", "kept"] = "gone") -> None:
        """End a host's life; nothing if it has ended."""
        with self.guard:
            host = self.host(name)
            if host.dead:
                return
            host.dead = True
            self.note(f"kill {name} {memory}")
            members, host.members = host.members, []
            for member in members:
                member._die(memory == "kept")
            held, host.held = host.held, []
            for operation in held:
                if operation.client_host is host:
                    operation.drop()
                else:
                    self.push(self.now_ns(), operation, operation.perform)
            host.stalled = 0

    def restart(self, name: str) -> None:
        """Begin a host's next life."""
        with self.guard:
            self.kill(name)
            host = self.host(name)
            host.dead = False
            host.life += 1
            self.note(f"restart {name}")

    def cut(self, one: str, other: str) -> None:
        """Part two hosts; partitions of the same two add up."""
        with self.guard:
            pair = frozenset((one, other))
            self._cuts[pair] = self._cuts.get(pair, 0) + 1
            self.note(f"cut {one} {other}")

    def heal(self, one: str, other: str) -> None:
        """End one partition of two hosts; nothing if there is none."""
        with self.guard:
            pair = frozenset((one, other))
            if self._cuts.get(pair, 0):
                self._cuts[pair] -= 1
                self.note(f"heal {one} {other}")
