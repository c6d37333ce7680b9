"""Leases held by the caller: several reads, zero-copy views, layer-wise reads and writes under one grant.

The logic, as operations; `sync` and `aio` put methods around it. A lease belongs to the client that took it.
It counts from before its request left, so this side always stops earlier than the server.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from memfabric.client.buffers import new_output, resolve, segment_range
from memfabric.client.copying import Copied, read_blocks, write_headers, write_payload
from memfabric.client.effects import Operation, Work
from memfabric.client.engine import Engine
from memfabric.client.places import Place
from memfabric.client.reading import Granted, acquire, checked_read, parts, report, usable, why_not
from memfabric.client.results import GetResult, GetStatus, PutResult, PutStatus, StatusColumn
from memfabric.client.verify import HeaderCheck
from memfabric.client.writing import Reservation, Tokens, commit, reserve
from memfabric.core.keys import BlockKeys, KeyArray
from memfabric.core.layout import BlockState
from memfabric.core.messages import CommitStatus, Renew, Renewed
from memfabric.errors import RefusalCode, RefusedError, UnavailableError, UsageError


def _expired(what: str) -> RefusedError:
    return RefusedError(RefusalCode.LEASE_EXPIRED, f"the {what} lease has expired; take a new one", retry_after_s=0.0)


class Held:
    """What read and write leases share: ids, deadline, renewal, end."""

    kind = ""

    def __init__(self, engine: Engine, lease_ids: list[int], deadline_ns: int) -> None:
        self.engine = engine
        self.unknown = False
        """Write leases: whether something that was written may still arrive."""
        self.lease_ids = lease_ids
        self.deadline_ns = deadline_ns
        self.ended = False

    def check(self) -> None:
        """Refuse to go on with a lease that is over.

        Raises:
            UsageError: released, committed or aborted. RefusedError: expired.
        """
        self.engine.check_open()
        if self.ended:
            raise UsageError(f"this {self.kind} lease was ended already")
        if self.lease_ids and time.monotonic_ns() >= self.deadline_ns:
            raise _expired(self.kind)

    def renew(self, ttl_s: float | None, deadline_ns: int) -> Operation[int]:
        """Prolong; returns the new deadline."""
        self.check()
        if not self.lease_ids:
            return self.deadline_ns
        reply, answer = yield from self.engine.call(
            Renew(leases=self.lease_ids, ttl_ns=self.engine.lease_ns(ttl_s)), Renewed, deadline_ns
        )
        if len(reply.ttl_ns) != len(self.lease_ids) or min(reply.ttl_ns) <= 0:
            self.deadline_ns = 0
            raise _expired(self.kind)
        self.deadline_ns = answer.sent_ns + min(reply.ttl_ns)
        return self.deadline_ns

    def end(self) -> None:
        """Give the lease back, without waiting. Idempotent."""
        if not self.ended:
            self.ended = True
            for lease in self.lease_ids:
                if lease in self.engine.leases:
                    self.engine.give_back(lease, writing=self.kind == "write", flushed=not self.unknown)


class HeldRead(Held):
    """Blocks that stay as they are until the deadline."""

    kind = "read"

    def __init__(self, engine: Engine, keys: KeyArray, grants: list[tuple[int, Granted]]) -> None:
        super().__init__(
            engine,
            [granted.lease for _, granted in grants if granted.lease],
            min((granted.deadline_ns for _, granted in grants if granted.lease), default=0),
        )
        self.keys = keys
        self.positions = np.concatenate([np.zeros(0, np.intp), *(g.positions + start for start, g in grants)])
        self.place = Place(
            np.concatenate([np.zeros(0, np.int32), *(g.place.slot for _, g in grants)]),
            np.concatenate([np.zeros(0, np.uint32), *(g.place.block for _, g in grants)]),
            np.concatenate([np.zeros(0, np.uint64), *(g.place.generation for _, g in grants)]),
        )
        self.granted = np.zeros(len(keys), np.bool_)
        self.granted[self.positions] = True
        self._copies: dict[int, npt.NDArray[np.uint8]] = {}

    def read(self, out: Any, segments: slice | None, deadline_ns: int) -> Operation[GetResult]:
        """Read the granted blocks, or some segments of each, into the caller's memory."""
        self.check()
        engine, n = self.engine, len(self.keys)
        first, count = segment_range(segments, engine.shape)
        out = new_output(n, engine.shape, count) if out is None else out
        memory = resolve(out, n, engine.shape, writable=True, first=first, segment_count=count)
        status = np.full(n, GetStatus.MISSING, np.uint8)
        at, place, message = self.positions, self.place, ""
        reachable = yield from usable(engine, place, False, deadline_ns)
        if not reachable.all():
            status[at[~reachable]] = GetStatus.UNREACHABLE
            message = why_not(engine, place, reachable)
            at, place = at[reachable], place.select(reachable)
        if len(at):
            until_ns = min(self.deadline_ns, deadline_ns)
            keys = self.keys[at]
            copied = yield from checked_read(engine, keys, place, memory.select(at), until_ns)
            if time.monotonic_ns() >= self.deadline_ns:
                raise _expired(self.kind)
            status[at] = np.where(copied.checks == HeaderCheck.OK, np.uint8(GetStatus.OK), np.uint8(GetStatus.CORRUPT))
            unread = copied.checks == HeaderCheck.NOT_READ
            status[at[unread]] = GetStatus.UNREACHABLE
            message = "; ".join(text for text in (message, copied.message) if text)
            bad = status[at] == GetStatus.CORRUPT
            if bad.any():
                yield from report(engine, keys[bad], place.select(bad), deadline_ns)
                message = message or "did not verify under a valid lease"
        found = int((status == GetStatus.OK).sum())
        size = found * count * engine.shape.segment_bytes
        engine.count(gets=1, get_blocks=found, get_bytes=size, leased_blocks=found)
        return GetResult(status, out, size, 0, message)

    def view(self, index: int, segments: slice | None) -> memoryview:
        """The block's own memory, read-only; where the transport has no view of it, a copy that is read now."""
        self.check()
        start, size = self._range(index, segments)
        engine, slot = self.engine, int(self.place.slot[self._at(index)])
        if engine.regions.zero_copy(slot):
            return engine.regions.mapped(slot)[start : start + size].data
        block, _ = self._range(index, None)
        copy = self._read_block(index)
        if copy is None:
            raise UnavailableError(f"block {index} cannot be read: it did not arrive whole by the lease's deadline")
        self._copies[index] = copy
        return copy[start - block : start - block + size].data.toreadonly()

    def verify(self, index: int) -> bool:
        """Whether the block in the pool is, right now and under a valid lease, exactly what was committed; and where
        `view` gave a copy, whether that is it."""
        self.check()
        now = self._read_block(index)
        copy = self._copies.get(index)
        same = now is not None and (copy is None or bool(np.array_equal(now, copy)))
        return same and time.monotonic_ns() < self.deadline_ns

    def _read_block(self, index: int) -> npt.NDArray[np.uint8] | None:
        """A verified copy of a block; None where there is none to be had. Blocks for the length of a read."""
        self._range(index, None)
        engine = self.engine
        out = new_output(1, engine.shape, engine.shape.segments)
        memory = resolve(out, 1, engine.shape, writable=True, first=0, segment_count=engine.shape.segments)
        place = self.place.select(np.array([self._at(index)]))
        copied = read_blocks(engine, self.keys[index : index + 1], place, memory, self.deadline_ns, True)
        return np.asarray(out).reshape(-1) if copied.good == 1 else None

    def _at(self, index: int) -> int:
        if not 0 <= index < len(self.keys):
            raise UsageError(f"index {index} is not one of the lease's {len(self.keys)} keys")
        if not self.granted[index]:
            raise UsageError(f"block {index} was not granted (it is not in the pool)")
        return int(np.searchsorted(self.positions, index))

    def _range(self, index: int, segments: slice | None) -> tuple[int, int]:
        """Offset in the region and length, once the region is mapped."""
        at, shape = self._at(index), self.engine.shape
        first, count = segment_range(segments, shape)
        place = self.place.select(np.array([at]))
        slots = place.slot[place.slot >= 0]
        if not len(slots) or not self.engine.regions.map(slots, False, self.deadline_ns).all():
            raise UnavailableError(f"block {index}: {why_not(self.engine, place, np.zeros(1, np.bool_))}")
        data_offset = int(self.engine.regions.table(False)[place.slot[0], 1])
        start = data_offset + int(place.block[0]) * shape.block_bytes + first * shape.segment_bytes
        return start, count * shape.segment_bytes


def hold_read(
    engine: Engine, keys: KeyArray, ttl_s: float | None, prefix: bool, deadline_ns: int
) -> Operation[HeldRead]:
    """Take read leases over a batch."""
    ttl_ns = engine.lease_ns(ttl_s)
    grants: list[tuple[int, Granted]] = []
    try:
        for part in parts(engine, len(keys), part_bytes=1 << 62):
            granted = yield from acquire(engine, keys[part], ttl_ns, deadline_ns, prefix)
            grants.append((part.start, granted))
            if prefix and len(granted.positions) < part.stop - part.start:
                break
    except BaseException:
        for _, granted in grants:
            if granted.lease:
                engine.give_back(granted.lease, writing=False)
        raise
    return HeldRead(engine, keys, grants)


class HeldWrite(Held):
    """Fresh blocks that only this client may write, until the deadline."""

    kind = "write"

    def __init__(
        self, engine: Engine, keys: BlockKeys, tokens: Tokens, reservations: list[tuple[int, Reservation]]
    ) -> None:
        super().__init__(
            engine,
            [r.lease for _, r in reservations if r.lease],
            min((r.deadline_ns for _, r in reservations if r.lease), default=0),
        )
        self.keys = keys
        self.tokens = tokens
        self.reservations = reservations
        self.status: StatusColumn = np.concatenate([np.zeros(0, np.uint8), *(r.status for _, r in reservations)])
        self.granted: npt.NDArray[np.bool_] = self.status == PutStatus.STORED
        self.message = "; ".join(dict.fromkeys(r.message for _, r in reservations if r.message))
        shape = engine.shape
        self.written = np.zeros((len(keys), shape.segments), np.bool_)
        self.digests = np.zeros((len(keys), shape.segments), np.uint64)

    def begin(self) -> Operation[None]:
        """Write the headers' first state, so that no reader takes the old contents for complete."""
        for start, reservation in self.reservations:
            at, place = self._reachable(start, reservation)
            if len(at):
                some = BlockKeys(self.keys.keys[at], self.keys.parents[at])
                yield from self._work(
                    lambda some=some, place=place, at=at: write_headers(  # type: ignore[misc]
                        self.engine, some, place, self.tokens[at], BlockState.WRITING, None, self.deadline_ns
                    ),
                    len(at) * self.engine.header_stride,
                )

    def _work(self, write: Callable[[], Copied], size_bytes: int) -> Operation[Copied]:
        """Write; if it is interrupted, or cannot tell what became of it, so does the lease's end."""
        before, self.unknown = self.unknown, True
        copied: Copied = yield Work(write, size_bytes)
        self.unknown = before or copied.unknown
        return copied

    def write(self, blocks: Any, segments: slice | None) -> Operation[int]:
        """Write the granted blocks, or some segments of each; returns how many blocks were written."""
        self.check()
        engine = self.engine
        first, count = segment_range(segments, engine.shape)
        memory = resolve(blocks, len(self.keys), engine.shape, writable=False, first=first, segment_count=count)
        total, message = 0, ""
        for start, reservation in self.reservations:
            at, place = self._reachable(start, reservation)
            if not len(at):
                continue
            part = memory.select(at)
            self.written[at, first : first + count] = False
            copied = yield from self._work(
                lambda place=place, part=part: write_payload(engine, place, part, self.deadline_ns),  # type: ignore[misc]
                len(at) * count * engine.shape.segment_bytes,
            )
            if time.monotonic_ns() >= self.deadline_ns:
                raise _expired(self.kind)
            ok = copied.checks == HeaderCheck.OK
            assert copied.digests is not None
            self.digests[at, first : first + count] = copied.digests.reshape(len(at), count)
            self.written[at[ok], first : first + count] = True
            total += int(ok.sum())
            message = message or copied.message
        self.message = self.message or message
        return total

    def commit(self, deadline_ns: int) -> Operation[PutResult]:
        """Publish the blocks of which every segment was written."""
        self.check()
        engine = self.engine
        try:
            for start, reservation in self.reservations:
                if reservation.lease:
                    yield from self._commit(start, reservation, deadline_ns)
        finally:
            self.end()
        stored = int((self.status == PutStatus.STORED).sum())
        size = stored * engine.shape.block_bytes
        engine.count(puts=1, put_blocks=stored, put_bytes=size)
        return PutResult(self.status, size, self.message)

    def _commit(self, start: int, reservation: Reservation, deadline_ns: int) -> Operation[None]:
        engine = self.engine
        positions = start + reservation.granted
        whole = self.written[positions].all(axis=1)
        done = np.zeros(len(positions), np.bool_)
        pick = np.nonzero(whole)[0]
        if len(pick) < reservation.reachable.sum():
            self.message = self.message or "some blocks were not written whole and were given back"
        self.status[positions[reservation.reachable]] = PutStatus.LOST
        if len(pick):
            at = positions[pick]
            some, place = BlockKeys(self.keys.keys[at], self.keys.parents[at]), reservation.place.select(pick)
            digests = np.ascontiguousarray(self.digests[at]).reshape(-1)
            copied = yield from self._work(
                lambda: write_headers(
                    engine, some, place, self.tokens[at], BlockState.COMPLETE, digests, self.deadline_ns
                ),
                len(at) * engine.header_stride,
            )
            done[pick] = copied.checks == HeaderCheck.OK
        if time.monotonic_ns() >= self.deadline_ns:
            raise _expired(self.kind)
        outcome = yield from commit(engine, reservation, done, self.unknown, deadline_ns)
        stored = outcome == CommitStatus.STORED
        self.status[positions[stored]] = PutStatus.STORED
        engine.places.learn(self.keys.keys[positions[stored]], reservation.place.select(stored))

    def _reachable(self, start: int, reservation: Reservation) -> tuple[npt.NDArray[np.intp], Place]:
        pick = np.nonzero(reservation.reachable)[0]
        return start + reservation.granted[pick], reservation.place.select(pick)


def hold_write(
    engine: Engine, keys: BlockKeys, tokens: Tokens, ttl_s: float | None, deadline_ns: int
) -> Operation[HeldWrite]:
    """Take write leases over a batch and begin their headers."""
    ttl_ns = engine.lease_ns(ttl_s)
    reservations: list[tuple[int, Reservation]] = []
    held: HeldWrite | None = None
    try:
        for part in parts(engine, len(keys), part_bytes=1 << 62):
            reservation = yield from reserve(engine, keys[part], tokens[part], ttl_ns, deadline_ns)
            reservations.append((part.start, reservation))
        held = HeldWrite(engine, keys, tokens, reservations)
        yield from held.begin()
    except BaseException:
        for _, reservation in reservations:
            if reservation.lease:
                flushed = held is None or not held.unknown
                engine.give_back(reservation.lease, writing=True, flushed=flushed)
        raise
    return held
