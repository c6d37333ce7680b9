"""Getting blocks: from known places first, then under a lease.

An optimistic read asks nobody: it goes to the place that is known from before and believes only what
verifies. Whatever is unknown or fails there is asked for: the server leases it, so that it stays as it is,
and it is read and checked again. Bytes that fail are never reported as a success.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from memfabric import _native
from memfabric.client.copying import Copied, Positions, read_blocks
from memfabric.client.effects import Operation, Work
from memfabric.client.engine import Engine
from memfabric.client.memory import Memory
from memfabric.client.places import Place
from memfabric.client.results import GetResult, GetStatus, PinResult, PrefetchResult, RemoveResult, StatusColumn
from memfabric.client.verify import HeaderCheck
from memfabric.core.keys import KeyArray
from memfabric.core.messages import (
    Acquire,
    Acquired,
    AcquireStatus,
    GetView,
    Match,
    Matched,
    Pin,
    Pinned,
    Remove,
    Removed,
    ReportFailure,
    Reserved,
    ViewReply,
)
from memfabric.errors import MemfabricError

CONNECT_BYTES = 1 << 30
"""What connecting counts as: it may wait for another host, so never on an event loop."""
LEASE_TRIES = 3
"""Leases taken for a part whose reads end after the lease; then the blocks are reported as expired."""
PART_BYTES = 1 << 30
"""Payload of one lease, so that a huge batch does not outlive it."""


@dataclasses.dataclass(slots=True)
class Granted:
    """Blocks under a read lease.

    Attributes:
        positions: which of the asked keys were granted.
        place: where they are; slot -1 where the region is not in the view.
        lease: its id, 0 when nothing was granted.
        deadline_ns: when it ends, on this process's CLOCK_MONOTONIC, counted from before the request left.
    """

    positions: Positions
    place: Place
    lease: int
    deadline_ns: int


def parts(engine: Engine, count: int, part_bytes: int = PART_BYTES) -> list[slice]:
    """Cut a batch into what one request and one lease shall carry."""
    step = max(1, min(engine.max_keys, part_bytes // engine.shape.block_bytes))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def get(
    engine: Engine, keys: KeyArray, memory: Memory, out: Any, leased: bool, deadline_ns: int
) -> Operation[GetResult]:
    """Read blocks into memory; see `Client.get`."""
    n = len(keys)
    status = np.full(n, GetStatus.MISSING, np.uint8)
    todo: Positions | None = None
    optimistic = 0
    if n and not leased:
        for part in parts(engine, n):
            whole = part.stop - part.start == n
            rest, good = yield from _optimistic(
                engine,
                keys if whole else keys[part],
                memory if whole else memory.select(part),
                status[part],
                deadline_ns,
            )
            optimistic += good
            if rest is not None:
                rest = rest + part.start
                todo = rest if todo is None else np.concatenate([todo, rest])
        if todo is None:
            engine.count(gets=1, get_blocks=n, get_bytes=n * engine.shape.block_bytes, optimistic_blocks=n)
            return GetResult(status, out, n * engine.shape.block_bytes, n)
    else:
        todo = np.arange(n)
    messages: dict[str, None] = {}
    for part in parts(engine, len(todo)):
        message = yield from _leased(engine, keys, memory, status, todo[part], deadline_ns)
        if message:
            messages[message] = None
    found = int((status == GetStatus.OK).sum())
    engine.count(
        gets=1,
        get_blocks=found,
        get_bytes=found * engine.shape.block_bytes,
        optimistic_blocks=optimistic,
        leased_blocks=found - optimistic,
        missing_blocks=int((status == GetStatus.MISSING).sum()),
        corrupt_blocks=int((status == GetStatus.CORRUPT).sum()),
        unreachable_blocks=int((status == GetStatus.UNREACHABLE).sum()),
    )
    return GetResult(status, out, found * engine.shape.block_bytes, optimistic, "; ".join(messages))


def _optimistic(
    engine: Engine, keys: KeyArray, memory: Memory, status: StatusColumn, deadline_ns: int
) -> Operation[tuple[Positions | None, int]]:
    """Read what is known; returns the positions that are still to be read (None: none), and how many were
    good."""
    known, place = engine.places.find(keys)
    if not len(place):
        return np.arange(len(keys)), 0
    yield from usable(engine, place, False, deadline_ns)  # what cannot be reached is not read, and asked for
    at: Positions | None = None
    if known is not None:
        at = np.nonzero(known)[0]
        keys, memory = keys[at], memory.select(at)
    copied: Copied = yield Work(
        lambda: read_blocks(engine, keys, place, memory, deadline_ns, engine.settings.verify),
        len(keys) * engine.shape.block_bytes,
    )
    if copied.good == len(keys):
        engine.places.touch(keys)
        if at is None:
            status[:] = GetStatus.OK
            return None, len(keys)
        status[at] = GetStatus.OK
    else:
        ok = copied.checks == HeaderCheck.OK
        status[ok if at is None else at[ok]] = GetStatus.OK
        engine.places.touch(keys[ok])
        engine.places.forget(keys[~ok])
        engine.count(stale_places=int((~ok).sum()))
    return np.nonzero(status != GetStatus.OK)[0], copied.good


def acquire(engine: Engine, keys: KeyArray, ttl_ns: int, deadline_ns: int, prefix: bool = False) -> Operation[Granted]:
    """Lease blocks and find their regions. The caller gives the lease back."""
    reply, answer = yield from engine.call(
        Acquire(keys=keys.tobytes(), ttl_ns=ttl_ns, prefix=prefix), Acquired, deadline_ns
    )
    if reply.lease:
        engine.hold(reply.lease, writing=False)
    try:
        mask = columns(reply.status, np.uint8, len(keys)) == AcquireStatus.GRANTED
        at = np.nonzero(mask)[0]
        place = yield from locate(engine, reply, answer.epoch, len(keys), at, deadline_ns)
    except BaseException:
        if reply.lease:
            engine.give_back(reply.lease, writing=False)
        raise
    return Granted(at, place, reply.lease, answer.sent_ns + reply.ttl_ns)


def locate(
    engine: Engine, reply: Acquired | Reserved, epoch: int, count: int, at: Positions, deadline_ns: int
) -> Operation[Place]:
    """Places from a reply's columns; asks for the view when a region's number is new."""
    numbers = columns(reply.region, np.uint32, count)[at]
    slots = engine.regions.slots_of(numbers, epoch)
    if len(slots) and slots.min() < 0:
        view, _ = yield from engine.call(GetView(), ViewReply, deadline_ns)
        engine.on_view(view.view)
        slots = engine.regions.slots_of(numbers, epoch)
    block, generation = columns(reply.block, np.uint32, count), columns(reply.generation, np.uint64, count)
    return Place(slots, block[at], generation[at])


def columns(raw: bytes, dtype: Any, count: int) -> npt.NDArray[Any]:
    """A column of a reply.

    Raises:
        MemfabricError: it has another length than it must.
    """
    if len(raw) != count * np.dtype(dtype).itemsize:
        raise MemfabricError(f"the server sent a column of {len(raw)} bytes for {count} blocks; is it another release?")
    return np.frombuffer(raw, dtype)


def usable(engine: Engine, place: Place, writable: bool, deadline_ns: int) -> Operation[npt.NDArray[np.bool_]]:
    """Connect to the regions where that was not done yet; which of the places can be reached."""
    mask: npt.NDArray[np.bool_] = place.slot >= 0
    slots = place.slot[mask]
    if engine.regions.ready(slots, writable):
        return mask
    mask[mask] = yield Work(lambda: engine.regions.map(slots, writable, deadline_ns), CONNECT_BYTES)
    return mask


def why_not(engine: Engine, place: Place, reachable: npt.NDArray[np.bool_]) -> str:
    """Why some places cannot be reached."""
    slots = place.slot[~reachable]
    unknown = ["the region is not in the pool's view"] if (slots < 0).any() else []
    known = engine.regions.why_not(slots[slots >= 0]) if (slots >= 0).any() else ""
    return "; ".join([*unknown, *([known] if known else [])])


def _leased(
    engine: Engine, keys: KeyArray, memory: Memory, status: StatusColumn, todo: Positions, deadline_ns: int
) -> Operation[str]:
    """Read some blocks under leases, setting their status; returns a message about what went wrong."""
    for _ in range(LEASE_TRIES):
        granted = yield from acquire(engine, keys[todo], engine.lease_ns(None), deadline_ns)
        status[todo] = GetStatus.MISSING
        if not granted.lease:
            return ""
        try:
            at = todo[granted.positions]
            message, late = yield from _read_granted(
                engine, keys[at], memory.select(at), granted, status, at, deadline_ns
            )
        finally:
            engine.give_back(granted.lease, writing=False)
        if not late:
            return message
        todo = at[status[at] == GetStatus.EXPIRED]
        if time.monotonic_ns() >= deadline_ns:
            break
    return "the lease ended before the blocks were read"


def _read_granted(
    engine: Engine,
    keys: KeyArray,
    memory: Memory,
    granted: Granted,
    status: StatusColumn,
    at: Positions,
    deadline_ns: int,
) -> Operation[tuple[str, bool]]:
    """Read what is leased; (message, whether the lease ended before all had landed)."""
    place, message = granted.place, ""
    reachable = yield from usable(engine, place, False, deadline_ns)
    if not reachable.all():
        status[at[~reachable]] = GetStatus.UNREACHABLE
        message = why_not(engine, place, reachable)
        pick = np.nonzero(reachable)[0]
        keys, memory, place, at = keys[pick], memory.select(pick), place.select(pick), at[pick]
    if not len(keys):
        return message, False
    until_ns = min(granted.deadline_ns, deadline_ns)
    copied = yield from checked_read(engine, keys, place, memory, until_ns)
    if time.monotonic_ns() >= granted.deadline_ns:
        status[at] = GetStatus.EXPIRED
        return message, True
    ok = copied.checks == HeaderCheck.OK
    status[at[ok]] = GetStatus.OK
    engine.places.learn(keys[ok], place.select(ok))
    if ok.all():
        return message, False
    unread = copied.checks == HeaderCheck.NOT_READ
    status[at[unread]] = GetStatus.UNREACHABLE
    bad = ~ok & ~unread
    status[at[bad]] = GetStatus.CORRUPT
    if bad.any():
        yield from report(engine, keys[bad], place.select(bad), deadline_ns)
        kinds = ", ".join(HeaderCheck(kind).name for kind in np.unique(copied.checks[bad]))
        copied = dataclasses.replace(copied, message=f"did not verify under a valid lease ({kinds})")
    return "; ".join(text for text in (message, copied.message) if text), False


def checked_read(engine: Engine, keys: KeyArray, place: Place, memory: Memory, until_ns: int) -> Operation[Copied]:
    """Read leased blocks; those that do not verify are read a second time."""
    verify = engine.settings.verify
    copied: Copied = yield Work(
        lambda: read_blocks(engine, keys, place, memory, until_ns, verify), len(keys) * engine.shape.block_bytes
    )
    if copied.good == len(keys):
        return copied
    again = np.nonzero((copied.checks != HeaderCheck.OK) & (copied.checks != HeaderCheck.NOT_READ))[0]
    if not len(again):
        return copied
    engine.count(verification_retries=len(again))
    second: Copied = yield Work(
        lambda: read_blocks(engine, keys[again], place.select(again), memory.select(again), until_ns, verify),
        len(again) * engine.shape.block_bytes,
    )
    copied.checks[again] = second.checks
    return dataclasses.replace(copied, good=int((copied.checks == HeaderCheck.OK).sum()))


def report(engine: Engine, keys: KeyArray, place: Place, deadline_ns: int) -> Operation[None]:
    """Tell the server which blocks do not verify, so that nobody is sent there again."""
    first = _native.first_positions(np.ascontiguousarray(keys)) == np.arange(len(keys), dtype=np.int32)
    keys, generation = keys[first], place.generation[first]
    engine.places.forget(keys)
    yield from engine.call(ReportFailure(keys=keys.tobytes(), generation=generation.tobytes()), Removed, deadline_ns)


# --- without payload
# ---------------------------------------------------------------------------------------------


def match(engine: Engine, keys: KeyArray, deadline_ns: int) -> Operation[int]:
    """Longest readable prefix, in blocks."""
    total = 0
    for part in parts(engine, len(keys), part_bytes=1 << 62):
        reply, _ = yield from engine.call(Match(keys=keys[part].tobytes()), Matched, deadline_ns)
        total += reply.count
        if reply.count < part.stop - part.start:
            break
    engine.count(matches=1)
    return total


def remove(engine: Engine, keys: KeyArray, deadline_ns: int) -> Operation[RemoveResult]:
    """Forget blocks."""
    status = np.zeros(len(keys), np.uint8)
    for part in parts(engine, len(keys), part_bytes=1 << 62):
        engine.places.forget(keys[part])
        reply, _ = yield from engine.call(Remove(keys=keys[part].tobytes()), Removed, deadline_ns)
        status[part] = columns(reply.status, np.uint8, part.stop - part.start)
        engine.places.forget(keys[part])  # a get of another thread may have learned it meanwhile
    return RemoveResult(status)


def pin(engine: Engine, keys: KeyArray, pinned: bool, deadline_ns: int) -> Operation[PinResult]:
    """Set or clear pins."""
    found = np.zeros(len(keys), np.bool_)
    for part in parts(engine, len(keys), part_bytes=1 << 62):
        reply, _ = yield from engine.call(Pin(keys=keys[part].tobytes(), pinned=pinned), Pinned, deadline_ns)
        found[part] = columns(reply.status, np.uint8, part.stop - part.start) != 0
    return PinResult(found)


def prefetch(engine: Engine, keys: KeyArray, deadline_ns: int) -> Operation[PrefetchResult]:
    """Learn places without reading."""
    found = np.zeros(len(keys), np.bool_)
    for part in parts(engine, len(keys), part_bytes=1 << 62):
        some = keys[part]
        granted = yield from acquire(engine, some, engine.lease_ns(None), deadline_ns)
        if not granted.lease:
            continue
        try:
            reachable = yield from usable(engine, granted.place, False, deadline_ns)
            at = granted.positions[reachable]
            engine.places.learn(some[at], granted.place.select(reachable))
            found[part.start + at] = True
        finally:
            engine.give_back(granted.lease, writing=False)
    return PrefetchResult(found)
