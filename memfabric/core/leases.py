"""Leases: time-bounded rights over batches of blocks, and the quarantine after a writer vanished.

Pure. Responsible for who holds what until when; it changes no slot itself. The server's deadline is later than the
client's: the client counts `ttl_ns` from before it sent the request, the server from when it granted, and
adds the bound on how much the clients' clocks may run slower than its own.
"""

from __future__ import annotations

import dataclasses
import enum
import heapq

import numpy as np
import numpy.typing as npt

from memfabric.core.table import Slots

CLOCK_RATE_SHIFT = 10
"""Clock rates are assumed to differ by less than 1/1024 (NTP slews at most 0.05%; crystals drift by 0.01%)."""
GRANT_MARGIN_NS = 1_000_000


class LeaseKind(enum.Enum):
    """What a lease allows."""

    READ = "read"
    WRITE = "write"


@dataclasses.dataclass(slots=True)
class Lease:
    """One grant over a batch.

    `slots` and `generation` are parallel; an entry whose slot has another generation by now was revoked.
    """

    id: int
    session: int
    namespace: int
    kind: LeaseKind
    slots: Slots
    generation: npt.NDArray[np.uint64]
    deadline_ns: int


def server_deadline_ns(now_ns: int, ttl_ns: int) -> int:
    """When the server may take the blocks back, for a lease that the client believes to last `ttl_ns`."""
    return now_ns + ttl_ns + (ttl_ns >> CLOCK_RATE_SHIFT) + GRANT_MARGIN_NS


class LeaseBook:
    """All live leases, by id, by session and by deadline."""

    def __init__(self, epoch: int) -> None:
        self._next_id = (epoch << 32) + 1
        self._leases: dict[int, Lease] = {}
        self._by_session: dict[int, set[int]] = {}
        self._deadlines: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._leases)

    def grant(
        self,
        session: int,
        namespace: int,
        kind: LeaseKind,
        slots: Slots,
        generation: npt.NDArray[np.uint64],
        deadline_ns: int,
    ) -> Lease:
        """A new lease; ids are never reused within an epoch, nor over epochs."""
        lease = Lease(self._next_id, session, namespace, kind, slots, generation, deadline_ns)
        self._next_id += 1
        self._leases[lease.id] = lease
        self._by_session.setdefault(session, set()).add(lease.id)
        heapq.heappush(self._deadlines, (deadline_ns, lease.id))
        return lease

    def get(self, lease_id: int) -> Lease | None:
        """The lease, or None if it has ended."""
        return self._leases.get(lease_id)

    def renew(self, lease: Lease, deadline_ns: int) -> None:
        """Move the deadline; it never moves to an earlier instant."""
        if deadline_ns > lease.deadline_ns:
            lease.deadline_ns = deadline_ns
            heapq.heappush(self._deadlines, (deadline_ns, lease.id))

    def end(self, lease: Lease) -> None:
        """Forget the lease."""
        del self._leases[lease.id]
        held = self._by_session[lease.session]
        held.discard(lease.id)
        if not held:
            del self._by_session[lease.session]

    def of_session(self, session: int) -> list[Lease]:
        """Live leases of a session, oldest first."""
        return [self._leases[i] for i in sorted(self._by_session.get(session, ()))]

    def count(self, session: int) -> int:
        """How many leases a session holds."""
        return len(self._by_session.get(session, ()))

    def all(self) -> list[Lease]:
        """Every live lease."""
        return list(self._leases.values())

    def due(self, now_ns: int) -> list[Lease]:
        """Leases whose deadline has passed, in order of deadline; the caller ends them."""
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now_ns:
            deadline_ns, lease_id = heapq.heappop(self._deadlines)
            lease = self._leases.get(lease_id)
            if lease is not None and lease.deadline_ns == deadline_ns:
                expired.append(lease)
        return expired

    def next_deadline_ns(self) -> int | None:
        """The earliest instant at which something may expire."""
        while self._deadlines:
            deadline_ns, lease_id = self._deadlines[0]
            lease = self._leases.get(lease_id)
            if lease is not None and lease.deadline_ns == deadline_ns:
                return deadline_ns
            heapq.heappop(self._deadlines)
        return None


@dataclasses.dataclass(order=True, slots=True)
class _Held:
    until_ns: int
    order: int
    slots: Slots = dataclasses.field(compare=False)
    generation: npt.NDArray[np.uint64] = dataclasses.field(compare=False)


class Quarantine:
    """Slots that wait before reuse because a writer that vanished may still write to them. Waiting is not a fence."""

    def __init__(self) -> None:
        self._held: list[_Held] = []
        self._order = 0

    def put(self, slots: Slots, generation: npt.NDArray[np.uint64], until_ns: int) -> None:
        """Hold slots until an instant."""
        heapq.heappush(self._held, _Held(until_ns, self._order, slots, generation))
        self._order += 1

    def due(self, now_ns: int) -> list[tuple[Slots, npt.NDArray[np.uint64]]]:
        """What has waited long enough."""
        out = []
        while self._held and self._held[0].until_ns <= now_ns:
            held = heapq.heappop(self._held)
            out.append((held.slots, held.generation))
        return out

    def next_deadline_ns(self) -> int | None:
        """The earliest end of a wait."""
        return self._held[0].until_ns if self._held else None
