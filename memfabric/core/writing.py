"""What sessions do to write blocks: reserve, commit, abort; and how room is made.

Pure. Every function validates before it changes anything: a refusal leaves the state as it was. Batches are handled in
columns; nothing here loops over blocks in Python.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from memfabric.core import columns, membership, placement
from memfabric.core.cluster import misfit
from memfabric.core.leases import LeaseKind, server_deadline_ns
from memfabric.core.messages import (
    Abort,
    Commit,
    CommitStatus,
    Committed,
    Done,
    KvEvent,
    Reserve,
    Reserved,
    ReserveStatus,
    Written,
)
from memfabric.core.namespaces import Namespace
from memfabric.core.rights import end_lease, granted_ttl_ns, live_lease, namespace_of, still_valid
from memfabric.core.sessions import Session
from memfabric.core.state import Publish, State, topic
from memfabric.core.table import NO_SLOTS, PINNED, Slots, SlotState
from memfabric.errors import RefusalCode, RefusedError

PRESSURE_RETRY_NS = 20_000_000
"""How long a writer should wait when all space is under leases that will end."""


class Parked(Exception):  # noqa: N818  # not an error: the request waits
    """The reservation waits for a region that is being assigned; ask again when something changed."""


def reserve(state: State, session: Session, body: Reserve, now_ns: int, *, may_park: bool) -> Reserved:
    """Write leases over fresh blocks, for the keys that are not there yet.

    Raises:
        RefusedError: malformed, a key twice, partial blocks where they are not wanted. Nothing happened.
        Parked: space is being made by assigning a region; only with `may_park`. Nothing happened yet.
    """
    namespace = namespace_of(state, session)
    table = state.table
    keys = columns.keys(body.keys)
    parents = columns.column(body.parents, np.uint8, len(keys) * 16, "parents").reshape(-1, 16)
    tokens = columns.column(body.tokens, np.uint32, len(keys), "tokens")
    columns.distinct(keys)
    _check_tokens(namespace, tokens)
    ttl_ns = granted_ttl_ns(state, session, body.ttl_ns)

    slots = namespace.find(keys)
    readable = namespace.readable_mask(slots, now_ns)
    stale = (slots >= 0) & (table.state[slots] == SlotState.COMPLETE) & ~readable
    new = (slots < 0) | stale
    need = int(new.sum())
    status = np.full(len(keys), ReserveStatus.GRANTED, np.uint8)
    status[readable] = ReserveStatus.EXISTS
    status[~new & ~readable] = ReserveStatus.PENDING

    if may_park and need > state.cluster.free_blocks(namespace) and membership.grow(state, namespace, now_ns):
        raise Parked
    state.drop_readable(namespace, slots[stale], "expired")
    namespace.touch(slots[readable], now_ns)
    table.pins[slots[readable]] += np.uint32(1)  # what we report as existing must not be evicted to make room
    make_room(state, namespace, need)
    table.pins[slots[readable]] -= np.uint32(1)
    free = state.cluster.free_blocks(namespace)
    quota_left = _quota_left(namespace, need)
    allowed = min(need, free, quota_left)
    refusal = ReserveStatus.QUOTA if quota_left < min(need, free) else ReserveStatus.NO_SPACE

    positions = np.nonzero(new)[0]
    status[positions[allowed:]] = refusal
    slots[positions] = -1
    granted = positions[:allowed]
    fresh = _allocate(state, namespace, keys, parents, tokens, slots, granted)
    namespace.counters["reserved_blocks"] += allowed
    namespace.counters["no_space_blocks"] += need - allowed
    lease_id = 0
    if allowed:
        lease_id = state.leases.grant(
            session.id,
            namespace.id,
            LeaseKind.WRITE,
            fresh,
            table.generation[fresh].copy(),
            server_deadline_ns(now_ns, ttl_ns),
        ).id
    shown = np.full(len(keys), -1, np.int32)
    shown[granted] = fresh
    region, block = state.cluster.locate(shown)
    generation = np.where(shown >= 0, table.generation[shown], np.uint64(0))
    short = allowed < need
    return Reserved(
        lease=lease_id,
        ttl_ns=ttl_ns,
        status=status.tobytes(),
        region=region.tobytes(),
        block=block.tobytes(),
        generation=generation.tobytes(),
        message=_what_holds_space(state, namespace, refusal) if short else "",
        retry_after_ns=PRESSURE_RETRY_NS if short and _will_free(namespace, state) else 0,
    )


def _check_tokens(namespace: Namespace, tokens: npt.NDArray[np.uint32]) -> None:
    spec = namespace.spec
    if (tokens > spec.block_tokens).any() or (tokens == 0).any():
        raise RefusedError(
            RefusalCode.BAD_REQUEST, f"a block of namespace {spec.name!r} has 1 to {spec.block_tokens} tokens"
        )
    if not spec.partial and (tokens < spec.block_tokens).any():
        position = int(np.argmax(tokens < spec.block_tokens))
        raise RefusedError(
            RefusalCode.BAD_REQUEST,
            f"block {position} has {int(tokens[position])} of {spec.block_tokens} tokens; namespace {spec.name!r} "
            "takes whole blocks only (a partial tail cannot be shared by a longer prompt)",
        )


def _quota_left(namespace: Namespace, need: int) -> int:
    quota = namespace.quota_blocks
    return need if quota is None else max(0, quota - namespace.used)


def make_room(state: State, namespace: Namespace, need: int) -> None:
    """Evict until `need` blocks are free and within the quota, or nothing more can go."""
    if namespace.quota_blocks is not None:
        need = min(need, namespace.quota_blocks)
    while True:
        short = need - min(state.cluster.free_blocks(namespace), _quota_left(namespace, need))
        if short <= 0:
            return
        victims = namespace.victims(short)
        if not len(victims):
            return
        state.drop_readable(namespace, victims, "evicted")


def _allocate(
    state: State,
    namespace: Namespace,
    keys: npt.NDArray[np.uint8],
    parents: npt.NDArray[np.uint8],
    tokens: npt.NDArray[np.uint32],
    slots: Slots,
    granted: npt.NDArray[np.int64],
) -> Slots:
    """Place, link and index new blocks; `slots` holds the existing ones of the batch, -1 elsewhere."""
    if not len(granted):
        return NO_SLOTS
    table = state.table
    # A parent is either there already or is the key just before in this batch: links can never form a cycle.
    found = namespace.find(np.ascontiguousarray(parents[granted]))
    previous = granted - 1
    chained = (previous >= 0) & (parents[granted] == keys[previous]).all(axis=1)
    is_new = np.zeros(len(keys), np.bool_)
    is_new[granted] = True
    in_batch = chained & is_new[previous]
    found[in_batch] = -1

    depth = np.where(found >= 0, table.depth[found] + np.uint32(1), np.uint32(0))
    stripe = np.where(found >= 0, table.stripe[found], _stripe(keys[granted]))
    # Inside a run of new blocks, depth counts on from the run's first block, and the stripe is that block's.
    run_start = np.maximum.accumulate(np.where(in_batch, 0, np.arange(len(granted))))
    depth = (depth[run_start] + (np.arange(len(granted)) - run_start)).astype(np.uint32)
    stripe = stripe[run_start].astype(np.uint16)

    nodes = list(state.cluster.usable(namespace).values())
    fresh = placement.place(nodes, stripe, depth)
    table.allocate(fresh)
    table.key[fresh] = keys[granted]
    table.tokens[fresh] = tokens[granted]
    table.depth[fresh] = depth
    table.stripe[fresh] = stripe
    table.last_use_ns[fresh] = 0
    own = np.full(len(keys), -1, np.int32)
    own[granted] = fresh
    table.link(fresh, np.where(in_batch, own[previous], found).astype(np.int32))
    namespace.index.insert(table.key, fresh)
    namespace.writing += len(fresh)
    return fresh


def _stripe(keys: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint16]:
    """A hash of a chain's first key: Fibonacci hashing of its first 8 bytes (Knuth, TAOCP 3, §6.4)."""
    low = np.ascontiguousarray(keys).view(np.uint64)[:, 0]
    stripe: npt.NDArray[np.uint16] = (low * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(48)).astype(np.uint16)
    return stripe


def _will_free(namespace: Namespace, state: State) -> bool:
    return bool(namespace.writing or namespace.doomed or namespace.quarantined or len(state.leases))


def _what_holds_space(state: State, namespace: Namespace, refusal: ReserveStatus) -> str:
    """The sentence a writer gets when it is refused for space."""
    spec = namespace.spec
    complete = namespace.readable
    leased = pinned = 0
    for number in namespace.regions:
        region = state.cluster.regions[number]
        pins = state.table.pins[region.base : region.base + region.block_count]
        leased += int(((pins & ~PINNED) > 0).sum())
        pinned += int((pins >= PINNED).sum())
    held = (
        f"{complete} readable ({leased} under read leases, {pinned} pinned), {namespace.writing} being written, "
        f"{namespace.quarantined} in quarantine"
    )
    if refusal is ReserveStatus.QUOTA:
        return (
            f"namespace {spec.name!r} is at its quota of {namespace.quota_blocks} blocks: {held}; nothing is evictable"
        )
    capacity = state.cluster.capacity_blocks(namespace)
    others = {
        other.spec.name: len(other.regions)
        for other in state.namespaces.values()
        if other.regions and other is not namespace
    }
    if capacity:
        text = f"namespace {spec.name!r} holds {namespace.used} of its {capacity} blocks: {held}; nothing is evictable"
    else:
        text = f"namespace {spec.name!r} has no region"
    if not state.cluster.regions:
        return text + "; no memory node is registered (start one with `memfabric node`)"
    unfit = [why for region in state.cluster.unassigned() if (why := misfit(region, namespace))]
    if unfit:
        return text + f"; {len(unfit)} unassigned regions do not fit: {unfit[0]}"
    taken = ", ".join(f"{name} {count}" for name, count in sorted(others.items())) or "none"
    return text + f"; no region is left to assign (regions held by other namespaces: {taken})"


def commit(state: State, session: Session, body: Commit, now_ns: int) -> Committed:
    """Make written blocks readable.

    Raises:
        RefusedError: the lease is another session's, or it has ended: then nothing of it became readable.
    """
    lease = live_lease(state, session, body.lease, LeaseKind.WRITE, now_ns)
    table = state.table
    written = columns.column(body.stored, np.uint8, len(lease.slots), "stored")
    if (written > Written.UNKNOWN).any():
        raise RefusedError(RefusalCode.BAD_REQUEST, f"stored: {int(written.max())} is none of 0, 1, 2")
    mask = written == Written.YES
    namespace = state.namespaces[lease.namespace]
    valid = still_valid(state, lease)
    stored = lease.slots[mask & valid]
    status = np.full(len(mask), CommitStatus.SKIPPED, np.uint8)
    status[mask] = CommitStatus.STORED
    status[~valid] = CommitStatus.LOST
    state.leases.end(lease)
    state.drop_writing(namespace, lease.slots[(written == Written.NO) & valid], None)
    until_ns = max(now_ns, lease.deadline_ns) + state.config.quarantine_ns
    state.drop_writing(namespace, lease.slots[(written == Written.UNKNOWN) & valid], until_ns)
    if len(stored):
        table.state[stored] = SlotState.COMPLETE
        namespace.writing -= len(stored)
        namespace.completed(stored, now_ns)
        namespace.counters["committed_blocks"] += len(stored)
        namespace.events += 1
        parents = table.valid_parents(stored)
        state.emit(
            Publish(
                topic("kv", namespace.spec.name) + b"stored",
                KvEvent(
                    epoch=state.config.epoch,
                    sequence=namespace.events,
                    namespace=namespace.spec.name,
                    stored=table.key[stored].tobytes(),
                    stored_parents=np.where((parents >= 0)[:, None], table.key[parents], np.uint8(0)).tobytes(),
                ),
            )
        )
    return Committed(status=status.tobytes())


def abort(state: State, session: Session, body: Abort, now_ns: int) -> Done:
    """End a reservation without storing; the blocks wait in quarantine unless the writer is sure that it stopped."""
    lease = live_lease(state, session, body.lease, LeaseKind.WRITE, now_ns)
    end_lease(state, lease, now_ns, flushed=body.flushed)
    return Done()
