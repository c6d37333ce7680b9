"""The rights of a session: its namespace, its leases, and what happens when they end.

Pure. Shared by `blocks` (reading and housekeeping) and `writing`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from memfabric import _native
from memfabric.core.leases import Lease, LeaseKind
from memfabric.core.namespaces import Namespace
from memfabric.core.sessions import Session
from memfabric.core.state import State
from memfabric.core.table import SlotState
from memfabric.errors import RefusalCode, RefusedError


def namespace_of(state: State, session: Session) -> Namespace:
    """The session's namespace.

    Raises:
        RefusedError: an administrative session, or the namespace was deleted.
    """
    if session.namespace is None:
        raise RefusedError(RefusalCode.NOT_ALLOWED, "this session has no namespace; attach to one to work on blocks")
    found = state.namespaces.get(session.namespace)
    if found is None:
        raise RefusedError(RefusalCode.UNKNOWN_NAMESPACE, "the session's namespace was deleted")
    return found


def granted_ttl_ns(state: State, session: Session, ttl_ns: int) -> int:
    """The ttl that a session gets.

    Raises:
        RefusedError: not positive, or the session holds too many leases.
    """
    if ttl_ns <= 0:
        raise RefusedError(RefusalCode.BAD_REQUEST, f"a lease needs a ttl above 0, got {ttl_ns} ns")
    if state.leases.count(session.id) >= state.config.max_leases:
        raise RefusedError(
            RefusalCode.OVERLOADED,
            f"this session holds {state.config.max_leases} leases, its limit; release some",
            retry_after_s=0.1,
        )
    return min(ttl_ns, state.config.max_lease_ns)


def live_lease(state: State, session: Session, lease_id: int, kind: LeaseKind, now_ns: int) -> Lease:
    """The session's lease of a kind.

    Raises:
        RefusedError: it has ended, is another session's, or of the other kind.
    """
    lease = state.leases.get(lease_id)
    if lease is None:
        raise RefusedError(
            RefusalCode.LEASE_EXPIRED if lease_id >> 32 == state.config.epoch else RefusalCode.UNKNOWN_LEASE,
            f"lease {lease_id:#x} has ended (expired, committed, released or revoked)",
        )
    if lease.session != session.id:
        raise RefusedError(RefusalCode.NOT_YOUR_LEASE, f"lease {lease_id:#x} belongs to another session")
    if lease.kind is not kind:
        raise RefusedError(RefusalCode.BAD_REQUEST, f"lease {lease_id:#x} is a {lease.kind.value} lease")
    if lease.deadline_ns <= now_ns:
        raise RefusedError(
            RefusalCode.LEASE_EXPIRED,
            f"lease {lease_id:#x} expired {(now_ns - lease.deadline_ns) / 1e6:.1f} ms ago",
        )
    return lease


def still_valid(state: State, lease: Lease) -> npt.NDArray[np.bool_]:
    """Which of its blocks the lease still covers: those whose generation has not changed."""
    valid: npt.NDArray[np.bool_] = state.table.generation[lease.slots] == lease.generation
    return valid


def end_lease(state: State, lease: Lease, now_ns: int, *, flushed: bool) -> None:
    """End a lease, whatever the reason; a writer that may still write (`flushed` false) leaves its blocks in
    quarantine."""
    state.leases.end(lease)
    namespace = state.namespaces.get(lease.namespace)
    if namespace is None:
        return
    if lease.kind is LeaseKind.READ:
        freed = _native.unpin(state.table.pins, lease.slots, lease.generation, state.table.generation)
        doomed = freed[state.table.state[freed] == SlotState.DOOMED]
        if len(doomed):
            state.release_doomed(namespace, doomed)
        return
    slots = lease.slots[still_valid(state, lease)]
    until_ns = None if flushed else max(now_ns, lease.deadline_ns) + state.config.quarantine_ns
    state.drop_writing(namespace, slots, until_ns)
