"""Sessions and administration: attach, namespaces, status, explain, lists.

Pure. What people and scripts ask for; nothing here is on a hot path.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from memfabric.core import columns, membership
from memfabric.core.leases import LeaseKind
from memfabric.core.messages import (
    MAX_KEYS_PER_REQUEST,
    Attach,
    Attached,
    Blocks,
    Detach,
    Document,
    Done,
    Explain,
    GetView,
    ListBlocks,
    NamespaceCreate,
    NamespaceDelete,
    Namespaces,
    NamespaceSpec,
    ViewReply,
)
from memfabric.core.namespaces import Namespace, check_spec
from memfabric.core.rights import end_lease, namespace_of
from memfabric.core.sessions import Session
from memfabric.core.state import SaveNamespaces, State
from memfabric.core.table import PINNED, SlotState
from memfabric.errors import RefusalCode, RefusedError

_IDENTITY_FIELDS = ("block_bytes", "block_tokens", "segments")


def attach(state: State, peer: bytes, body: Attach, now_ns: int) -> Attached:
    """Open a session; the same connection asking again gets the same one.

    Raises:
        RefusedError: unknown namespace, another fingerprint or block shape (names the fields), too many sessions.
    """
    if body.nonce != peer:
        raise RefusedError(
            RefusalCode.BAD_REQUEST, "the nonce is not this connection's identity; is this a replayed frame?"
        )
    if len(body.client.encode()) > 256:
        raise RefusedError(RefusalCode.BAD_REQUEST, "client name is longer than 256 bytes")
    namespace = _attach_namespace(state, body, now_ns) if body.namespace else None
    session = state.sessions.of_peer(peer)
    wanted = namespace.id if namespace else None
    if session is None:
        session = state.sessions.open(peer, body.client, wanted, now_ns)
    elif session.namespace != wanted:
        raise RefusedError(RefusalCode.BAD_REQUEST, "this connection is attached to another namespace already")
    session.last_seen_ns = now_ns
    return Attached(
        session=session.id,
        max_keys=MAX_KEYS_PER_REQUEST,
        max_lease_ns=state.config.max_lease_ns,
        session_ttl_ns=state.config.session_ttl_ns,
        events=state.config.events_address,
        namespace=state.info(namespace) if namespace else None,
        view=state.cluster.view(namespace, state.config.epoch) if namespace else None,
    )


def _attach_namespace(state: State, body: Attach, now_ns: int) -> Namespace:
    create = body.create
    if create is not None:
        if create.name != body.namespace:
            raise RefusedError(
                RefusalCode.BAD_REQUEST,
                f"attach to {body.namespace!r} would create {create.name!r}; the names must agree",
            )
        check_spec(create)
    existing = state.by_name.get(body.namespace)
    fingerprint = body.fingerprint if body.fingerprint is not None else (create.fingerprint if create else None)
    stored = existing.spec if existing else create
    if stored is not None and fingerprint is not None and stored.fingerprint != fingerprint:
        differences = "; ".join(fingerprint.differences(stored.fingerprint))
        raise RefusedError(
            RefusalCode.FINGERPRINT,
            f"namespace {body.namespace!r} holds KV of another kind: {differences}; use a namespace of its own",
        )
    if existing is not None and create is not None:
        shape = [
            f"{name}: {getattr(create, name)} asked, {getattr(existing.spec, name)} stored"
            for name in _IDENTITY_FIELDS
            if getattr(create, name) != getattr(existing.spec, name)
        ]
        if shape:
            raise RefusedError(
                RefusalCode.FINGERPRINT,
                f"namespace {body.namespace!r} has another block shape: {'; '.join(shape)}",
            )
    if existing is None and create is not None:
        return _create(state, create, now_ns)
    return state.namespace(body.namespace)


def get_view(state: State, session: Session, body: GetView, now_ns: int) -> ViewReply:
    """The current view of the session's namespace."""
    return ViewReply(view=state.cluster.view(namespace_of(state, session), state.config.epoch))


def detach(state: State, session: Session, body: Detach, now_ns: int) -> Done:
    """A client closes its session in good order."""
    end_session(state, session, now_ns, "detached", flushed=True)
    return Done()


def end_session(state: State, session: Session, now_ns: int, why: str, *, flushed: bool = False) -> None:
    """A client is gone: its leases end; blocks it may still be writing (`flushed` false) go to quarantine."""
    for lease in state.leases.of_session(session.id):
        end_lease(state, lease, now_ns, flushed=flushed)
    state.sessions.close(session)
    state.log("debug" if flushed else "info", "session_ended", session=session.id, client=session.client, why=why)


# --- namespaces --------------------------------------------------------------------------------------------------


def namespace_create(state: State, body: NamespaceCreate, now_ns: int) -> Namespaces:
    """Create, or find that exactly this was created before.

    Raises:
        RefusedError: the specification is impossible, or the name has another one.
    """
    check_spec(body.spec)
    existing = state.by_name.get(body.spec.name)
    if existing is None:
        existing = _create(state, body.spec, now_ns)
    elif existing.spec != body.spec:
        fields = ", ".join(
            name for name in body.spec.__struct_fields__ if getattr(body.spec, name) != getattr(existing.spec, name)
        )
        raise RefusedError(
            RefusalCode.NAMESPACE_EXISTS, f"namespace {body.spec.name!r} exists and differs in: {fields}"
        )
    return Namespaces(items=[state.info(existing)])


def _create(state: State, spec: NamespaceSpec, now_ns: int) -> Namespace:
    if len(state.namespaces) >= state.config.max_namespaces:
        raise RefusedError(
            RefusalCode.OVERLOADED,
            f"the server has {len(state.namespaces)} namespaces, its limit; delete some",
        )
    namespace = add_namespace(state, spec)
    membership.first_regions(state, namespace, now_ns)
    state.emit(SaveNamespaces(tuple(known.spec for known in state.namespaces.values())))
    state.log("info", "namespace_created", namespace=spec.name, block_bytes=spec.block_bytes)
    return namespace


def add_namespace(state: State, spec: NamespaceSpec) -> Namespace:
    """Enter a namespace into the books (also those that were saved before)."""
    namespace = Namespace(state.next_namespace_id, spec, state.table)
    state.next_namespace_id += 1
    state.namespaces[namespace.id] = namespace
    state.by_name[spec.name] = namespace
    return namespace


def namespaces(state: State) -> Namespaces:
    """All namespaces, by name."""
    return Namespaces(items=[state.info(state.by_name[name]) for name in sorted(state.by_name)])


def namespace_delete(state: State, body: NamespaceDelete, now_ns: int) -> Done:
    """Drop a namespace.

    Raises:
        RefusedError: unknown; or it holds blocks or has sessions, without `force`.
    """
    namespace = state.namespace(body.name)
    users = [session for session in state.sessions.all() if session.namespace == namespace.id]
    if not body.force and (users or namespace.readable or namespace.writing):
        raise RefusedError(
            RefusalCode.NAMESPACE_BUSY,
            f"namespace {body.name!r} holds {namespace.readable} blocks and has {len(users)} clients attached; "
            "use force to drop them",
        )
    for session in users:
        for lease in state.leases.of_session(session.id):
            end_lease(state, lease, now_ns, flushed=False)
    everything = np.concatenate(
        [state.table.recency.order(namespace.main_list), state.table.recency.order(namespace.window_list)]
    )
    state.drop_readable(namespace, everything, "deleted")
    for lease in state.leases.all():
        if lease.namespace == namespace.id:
            end_lease(state, lease, now_ns, flushed=False)
    for session in users:
        end_session(state, session, now_ns, "namespace deleted")
    membership.retire(state, namespace, now_ns)
    del state.by_name[namespace.spec.name]
    del state.namespaces[namespace.id]
    state.emit(SaveNamespaces(tuple(known.spec for known in state.namespaces.values())))
    state.log("info", "namespace_deleted", namespace=body.name)
    return Done()


# --- looking -----------------------------------------------------------------------------------------------------


def list_blocks(state: State, session: Session, body: ListBlocks, now_ns: int) -> Blocks:
    """A page of readable blocks of the session's namespace, in slot order."""
    namespace = namespace_of(state, session)
    limit = max(1, min(body.limit, MAX_KEYS_PER_REQUEST))
    table = state.table
    regions = np.fromiter(sorted(namespace.regions), np.uint32)
    start = max(0, min(body.cursor, table.capacity))
    mine = (table.state[start:] == SlotState.COMPLETE) & np.isin(table.region[start:], regions)
    slots = (np.nonzero(mine)[0][: limit + 1] + start).astype(np.int32)
    more = len(slots) > limit
    slots = slots[:limit]
    parents = table.valid_parents(slots)
    region, block = state.cluster.locate(slots)
    age = np.uint64(now_ns) - np.minimum(table.last_use_ns[slots], np.uint64(now_ns))
    return Blocks(
        cursor=int(slots[-1]) + 1 if more else 0,
        keys=table.key[slots].tobytes(),
        parents=np.where((parents >= 0)[:, None], table.key[parents], np.uint8(0)).tobytes(),
        region=region.tobytes(),
        block=block.tobytes(),
        tokens=table.tokens[slots].tobytes(),
        reuse=table.reuse[slots].tobytes(),
        age_ns=age.tobytes(),
    )


def explain(state: State, session: Session, body: Explain, now_ns: int) -> Document:
    """The story of a key."""
    namespace = namespace_of(state, session)
    key = columns.keys(body.key, "key")
    if len(key) != 1:
        raise RefusedError(RefusalCode.BAD_REQUEST, "explain takes one key")
    table = state.table
    slot = int(namespace.find(key)[0])
    doc: dict[str, Any] = {"key": body.key.hex(), "namespace": namespace.spec.name, "state": "not stored"}
    if slot < 0:
        doc["why"] = "never stored here, or evicted, removed or lost since; the counters say how often each happened"
        doc["counters"] = dict(namespace.counters)
        return Document(doc=doc)
    one = np.array([slot], np.int32)
    region_number, block = (int(column[0]) for column in state.cluster.locate(one))
    region = state.cluster.regions[region_number]
    parent = int(table.valid_parents(one)[0])
    leases = [lease for lease in state.leases.all() if slot in lease.slots]
    complete = table.state[slot] == SlotState.COMPLETE
    doc.update(
        state=SlotState(int(table.state[slot])).name.lower(),
        readable=bool(namespace.readable_mask(one, now_ns)[0]),
        node=region.node,
        node_state=state.cluster.nodes[region.node].state.name.lower(),
        region=region_number,
        block_index=block,
        generation=f"{int(table.generation[slot]):#x}",
        tokens=int(table.tokens[slot]),
        depth=int(table.depth[slot]),
        parent=table.key[parent].tobytes().hex() if parent >= 0 else None,
        children=int(table.children[slot]),
        reuse=int(table.reuse[slot]),
        age_ns=now_ns - int(table.last_use_ns[slot]) if complete else None,
        read_leases=sum(lease.kind is LeaseKind.READ for lease in leases),
        leases=[
            {"kind": lease.kind.value, "session": lease.session, "ends_in_ns": lease.deadline_ns - now_ns}
            for lease in leases[:20]
        ],
    )
    reasons = []
    pins = int(table.pins[slot])
    if pins & ~int(PINNED):
        reasons.append(_count(pins & ~int(PINNED), "read lease"))
    if pins & int(PINNED):
        reasons.append("it is pinned")
    if table.children[slot]:
        reasons.append(f"it is continued by {_count(int(table.children[slot]), 'block')}")
    if not complete:
        reasons.append("it is being written")
    doc["evictable"] = not reasons
    doc["not_evictable_because"] = reasons
    if complete and namespace.spec.ttl_ns:
        doc["expires_in_ns"] = int(table.last_use_ns[slot]) + namespace.spec.ttl_ns - now_ns
    return Document(doc=doc)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def status(state: State, now_ns: int, started_ns: int) -> Document:
    """The whole pool at a glance; docs/cli.md lists the fields."""
    leases = state.leases.all()
    held = Counter((lease.namespace, lease.kind) for lease in leases)
    sessions = Counter(session.namespace for session in state.sessions.all())
    nodes = []
    for name in sorted(state.cluster.nodes):
        node = state.cluster.nodes[name]
        regions = [state.cluster.regions[number] for number in node.regions]
        nodes.append(
            {
                "name": name,
                "state": node.state.name.lower(),
                "incarnation": node.incarnation,
                "host": node.host,
                "regions": len(regions),
                "regions_assigned": sum(region.namespace is not None for region in regions),
                "regions_failed": sum(region.state.value == "failed" for region in regions),
                "capacity_bytes": sum(region.offer.size_bytes for region in regions),
                "used_blocks": sum(region.block_count - region.free_count for region in regions),
                "capacity_blocks": sum(region.block_count for region in regions),
                "used_bytes": sum(
                    (region.block_count - region.free_count) * region.layout.block_bytes
                    for region in regions
                    if region.layout
                ),
                "heartbeat_age_ns": max(0, now_ns - node.last_seen_ns),
                "transports": list(node.transports),
            }
        )
    spaces = []
    for name in sorted(state.by_name):
        namespace = state.by_name[name]
        spec = namespace.spec
        spaces.append(
            {
                "name": name,
                "id": namespace.id,
                "policy": spec.policy,
                "ttl_ns": spec.ttl_ns,
                "block_bytes": spec.block_bytes,
                "block_tokens": spec.block_tokens,
                "segments": spec.segments,
                "model": spec.fingerprint.model,
                "blocks": namespace.readable,
                "writing": namespace.writing,
                "doomed": namespace.doomed,
                "quarantined": namespace.quarantined,
                "capacity_blocks": state.cluster.capacity_blocks(namespace),
                "quota_bytes": spec.quota_bytes,
                "used_bytes": namespace.used * spec.block_bytes,
                "regions": len(namespace.regions),
                "read_leases": held[namespace.id, LeaseKind.READ],
                "write_leases": held[namespace.id, LeaseKind.WRITE],
                "sessions": sessions[namespace.id],
                "counters": dict(sorted(namespace.counters.items())),
            }
        )
    return Document(
        doc={
            "epoch": state.config.epoch,
            "uptime_ns": now_ns - started_ns,
            "address": state.config.address,
            "events_address": state.config.events_address,
            "nodes": nodes,
            "namespaces": spaces,
            "sessions": len(state.sessions),
            "leases": {
                "read": sum(lease.kind is LeaseKind.READ for lease in leases),
                "write": sum(lease.kind is LeaseKind.WRITE for lease in leases),
            },
            "unassigned_regions": len(state.cluster.unassigned()),
            "table": {
                "slots": state.table.capacity,
                "memory_bytes": state.table.memory_bytes()
                + sum(namespace.index.memory_bytes() for namespace in state.namespaces.values()),
            },
            **dict(sorted(state.counters.items())),
        }
    )
