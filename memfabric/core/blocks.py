"""What sessions do with readable blocks: match, acquire, renew, release, pin, remove, report.

Pure. Every function validates before it changes anything: a refusal leaves the state as it was. Batches are handled in
columns; nothing here loops over blocks in Python.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from memfabric import _native
from memfabric.core import columns
from memfabric.core.leases import LeaseKind, server_deadline_ns
from memfabric.core.messages import (
    Acquire,
    Acquired,
    AcquireStatus,
    Done,
    Match,
    Matched,
    Pin,
    Ping,
    Pinned,
    Release,
    Remove,
    Removed,
    RemoveStatus,
    Renew,
    Renewed,
    ReportFailure,
)
from memfabric.core.rights import end_lease, granted_ttl_ns, namespace_of
from memfabric.core.sessions import Session
from memfabric.core.state import State
from memfabric.core.table import PINNED, SlotState
from memfabric.errors import RefusalCode, RefusedError


def ping(state: State, session: Session, body: Ping, now_ns: int) -> Done:
    """Keep alive, and note reuse that optimistic reads did not report yet."""
    if body.touched:
        namespace = namespace_of(state, session)
        slots = namespace.find(columns.keys(body.touched, "touched"))
        slots = slots[namespace.readable_mask(slots, now_ns)]
        namespace.touch(slots, now_ns)
        namespace.counters["optimistic_hit_blocks"] += len(slots)
    return Done()


def match(state: State, session: Session, body: Match, now_ns: int) -> Matched:
    """Longest readable prefix of a key list."""
    namespace = namespace_of(state, session)
    keys = columns.keys(body.keys)
    slots = namespace.find(keys)
    count = _prefix(namespace.readable_mask(slots, now_ns))
    namespace.touch(slots[:count], now_ns)
    namespace.counters["match_requests"] += 1
    namespace.counters["match_asked_blocks"] += len(keys)
    namespace.counters["match_hit_blocks"] += count
    return Matched(count=count)


def _prefix(mask: npt.NDArray[np.bool_]) -> int:
    return len(mask) if mask.all() else int(np.argmin(mask))


def acquire(state: State, session: Session, body: Acquire, now_ns: int) -> Acquired:
    """Read leases over what is there."""
    namespace = namespace_of(state, session)
    keys = columns.keys(body.keys)
    ttl_ns = granted_ttl_ns(state, session, body.ttl_ns)
    slots = namespace.find(keys)
    mask = namespace.readable_mask(slots, now_ns)
    if body.prefix:
        mask[_prefix(mask) :] = False
    granted = slots[mask]
    namespace.counters["acquire_asked_blocks"] += len(keys)
    namespace.counters["acquire_hit_blocks"] += len(granted)
    lease_id = 0
    if len(granted):
        namespace.touch(granted, now_ns)
        _native.pin(state.table.pins, granted)
        lease_id = state.leases.grant(
            session.id,
            namespace.id,
            LeaseKind.READ,
            granted,
            state.table.generation[granted].copy(),
            server_deadline_ns(now_ns, ttl_ns),
        ).id
    slots = np.where(mask, slots, np.int32(-1)).astype(np.int32)
    region, block = state.cluster.locate(slots)
    generation = np.where(mask, state.table.generation[slots], np.uint64(0))
    status = np.where(mask, np.uint8(AcquireStatus.GRANTED), np.uint8(AcquireStatus.MISSING))
    return Acquired(
        lease=lease_id,
        ttl_ns=ttl_ns,
        status=status.tobytes(),
        region=region.tobytes(),
        block=block.tobytes(),
        generation=generation.tobytes(),
    )


def renew(state: State, session: Session, body: Renew, now_ns: int) -> Renewed:
    """Prolong live leases of this session; ended ones report 0."""
    ttl_ns = min(body.ttl_ns, state.config.max_lease_ns)
    if ttl_ns <= 0:
        raise RefusedError(RefusalCode.BAD_REQUEST, f"a lease needs a ttl above 0, got {body.ttl_ns} ns")
    out = []
    for lease_id in body.leases:
        lease = state.leases.get(lease_id)
        if lease is None or lease.session != session.id or lease.deadline_ns <= now_ns:
            out.append(0)
            continue
        state.leases.renew(lease, server_deadline_ns(now_ns, ttl_ns))
        out.append(ttl_ns)
    return Renewed(ttl_ns=out)


def release(state: State, session: Session, body: Release, now_ns: int) -> Done:
    """End read leases of this session."""
    for lease_id in body.leases:
        lease = state.leases.get(lease_id)
        if lease is not None and lease.session == session.id and lease.kind is LeaseKind.READ:
            end_lease(state, lease, now_ns, flushed=True)
    return Done()


def remove(state: State, session: Session, body: Remove, now_ns: int) -> Removed:
    """Forget readable blocks."""
    namespace = namespace_of(state, session)
    keys = columns.keys(body.keys)
    columns.distinct(keys)
    slots = namespace.find(keys)
    found = (slots >= 0) & (state.table.state[slots] == SlotState.COMPLETE)
    status = np.full(len(keys), RemoveStatus.MISSING, np.uint8)
    leased = (state.table.pins[slots[found]] & ~PINNED) > 0
    status[found] = np.where(leased, np.uint8(RemoveStatus.BUSY), np.uint8(RemoveStatus.REMOVED))
    state.drop_readable(namespace, slots[found], "removed")
    return Removed(status=status.tobytes())


def pin(state: State, session: Session, body: Pin, now_ns: int) -> Pinned:
    """Set or clear the user's pin of readable blocks."""
    namespace = namespace_of(state, session)
    slots = namespace.find(columns.keys(body.keys))
    readable = namespace.readable_mask(slots, now_ns)
    if body.pinned:
        state.table.pins[slots[readable]] |= PINNED
    else:
        state.table.pins[slots[readable]] &= ~PINNED
    return Pinned(status=readable.astype(np.uint8).tobytes())


def report_failure(state: State, session: Session, body: ReportFailure, now_ns: int) -> Removed:
    """A reader saw bytes that do not verify: drop those blocks if they are still that generation."""
    namespace = namespace_of(state, session)
    keys = columns.keys(body.keys)
    columns.distinct(keys)
    generation = columns.column(body.generation, np.uint64, len(keys), "generation")
    slots = namespace.find(keys)
    found = (
        (slots >= 0) & (state.table.state[slots] == SlotState.COMPLETE) & (state.table.generation[slots] == generation)
    )
    if found.any():
        state.log("warning", "corrupt_blocks", namespace=namespace.spec.name, blocks=int(found.sum()))
    state.drop_readable(namespace, slots[found], "corrupt")
    return Removed(status=np.where(found, RemoveStatus.REMOVED, RemoveStatus.MISSING).astype(np.uint8).tobytes())
