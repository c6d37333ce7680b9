"""The metadata server as a pure machine: events in, effects out, time passed in.

``handle(event, now_ns) -> effects``, ``next_deadline_ns()``, ``check_invariants()``. The same core runs in the
server process,
in tests and in simulation. It never reads a clock, a file or a socket, and it never fails on what a peer sends: a
request is done, or refused with the state unchanged.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from memfabric.core import admin, blocks, introductions, membership, rights, writing
from memfabric.core import messages as m
from memfabric.core.namespaces import Namespace
from memfabric.core.sessions import Session
from memfabric.core.state import Effect, Event, Paused, Received, Send, ServerConfig, State
from memfabric.errors import RefusedError

_SESSION_HANDLERS: dict[type, Callable[[State, Session, Any, int], Any]] = {
    m.Ping: blocks.ping,
    m.Match: blocks.match,
    m.Acquire: blocks.acquire,
    m.Commit: writing.commit,
    m.Abort: writing.abort,
    m.Renew: blocks.renew,
    m.Release: blocks.release,
    m.Remove: blocks.remove,
    m.Detach: admin.detach,
    m.Pin: blocks.pin,
    m.ReportFailure: blocks.report_failure,
    m.GetView: admin.get_view,
    m.ListBlocks: admin.list_blocks,
    m.Explain: admin.explain,
    m.NamespaceCreate: lambda state, _session, body, now_ns: admin.namespace_create(state, body, now_ns),
    m.NamespaceList: lambda state, _session, _body, _now_ns: admin.namespaces(state),
    m.NamespaceDelete: lambda state, _session, body, now_ns: admin.namespace_delete(state, body, now_ns),
    m.NodeDrain: lambda state, _session, body, now_ns: membership.drain(state, body, now_ns),
}
_NODE_HANDLERS: dict[type, Callable[[State, bytes, Any, int], m.ReplyBody]] = {
    m.Register: membership.register,
    m.Heartbeat: membership.heartbeat,
    m.CommandDone: membership.command_done,
    m.Unregister: lambda state, _peer, body, now_ns: membership.unregister(state, body, now_ns),
}
_REPEATABLE = (m.Ping, m.Detach, m.Match, m.GetView, m.ListBlocks, m.Explain, m.NamespaceList, m.GetStatus)
"""Requests whose repetition does no harm: their answers are not kept."""
MAX_PARKED = 1024
EVICT_STEP = 4096
"""Most blocks evicted ahead of need in one step, so that requests never wait long behind it."""
SWEEP_NS = 100_000_000
"""Shortest time between two sweeps for expired blocks, also when pinned ones cannot go yet."""


@dataclasses.dataclass(slots=True)
class _ParkedReserve:
    peer: bytes
    session: Session
    request: m.Request
    until_ns: int


class ServerCore:
    """One metadata server."""

    def __init__(self, config: ServerConfig, specs: tuple[m.NamespaceSpec, ...] = (), *, now_ns: int = 0) -> None:
        """A server that knows the namespaces in `specs` and, so far, no nodes."""
        self.state = State(config)
        self._started_ns = now_ns
        self._parked: deque[_ParkedReserve] = deque()
        self._over: set[int] = set()
        """Namespaces in which room may have to be made."""
        self._next_views_ns = now_ns
        self._next_sweep_ns = now_ns
        for spec in specs:
            admin.add_namespace(self.state, spec)

    def handle(self, event: Event, now_ns: int) -> list[Effect]:
        """Process one event at an instant of the server's monotonic clock.

        Returns:
            What the shell must do, in order.
        """
        state = self.state
        state.effects = []
        if isinstance(event, Paused):
            for node in state.cluster.nodes.values():
                node.last_seen_ns = min(now_ns, node.last_seen_ns + event.lost_ns)
            for session in state.sessions.all():
                session.last_seen_ns = min(now_ns, session.last_seen_ns + event.lost_ns)
        self._time_passes(now_ns)
        if isinstance(event, Received):
            self._receive(event.peer, event.request, now_ns)
        self._unpark(now_ns)
        self._keep_ahead(now_ns)
        return state.effects

    def next_deadline_ns(self) -> int | None:
        """When `Tick` is due at the latest; None while nothing can happen by itself."""
        state = self.state
        candidates = [
            state.leases.next_deadline_ns(),
            state.quarantine.next_deadline_ns(),
            self._parked[0].until_ns if self._parked else None,
            0 if self._over else None,
        ]
        if len(state.sessions) or state.cluster.nodes or state.namespaces or state.retiring:
            candidates.append(self._next_sweep_ns)
        return min((at for at in candidates if at is not None), default=None)

    def check_invariants(self) -> None:
        """Raise AssertionError if the state contradicts itself. O(slots); for tests."""
        self.state.check_invariants()

    # --- time ---

    def _time_passes(self, now_ns: int) -> None:
        state = self.state
        for lease in state.leases.due(now_ns):
            namespace = state.namespaces.get(lease.namespace)
            if namespace is not None:
                namespace.counters["expired_leases"] += 1
            rights.end_lease(state, lease, now_ns, flushed=False)
        for slots, generation in state.quarantine.due(now_ns):
            still = slots[state.table.generation[slots] == generation]
            for number in np.unique(state.table.region[still]):
                mine = still[state.table.region[still] == number]
                owner = state.cluster.regions[int(number)].namespace
                assert owner is not None, "quarantined blocks in a region of nobody"
                state.release_quarantined(state.owner(owner), mine)
        if now_ns >= self._next_sweep_ns:
            self._next_sweep_ns = now_ns + SWEEP_NS
            self._sweep(now_ns)

    def _sweep(self, now_ns: int) -> None:
        """What need not be exact to the nanosecond: silence of clients and nodes, time to live, growth, views."""
        state = self.state
        for session in state.sessions.all():
            if now_ns - session.last_seen_ns >= state.config.session_ttl_ns:
                admin.end_session(state, session, now_ns, "silent")
        membership.bury(state, now_ns)
        introductions.expire(state, now_ns)
        membership.resend_commands(state, now_ns)
        membership.return_retired(state, now_ns)
        for namespace in state.namespaces.values():
            state.drop_readable(namespace, namespace.expired(now_ns, EVICT_STEP), "expired")
            self._over.add(namespace.id)
        if now_ns >= self._next_views_ns:
            self._next_views_ns = now_ns + state.config.view_interval_ns
            attached = {session.namespace for session in state.sessions.all()}
            for namespace in state.namespaces.values():
                if namespace.id in attached:
                    membership.publish_view(state, namespace)

    def _keep_ahead(self, now_ns: int) -> None:
        """Make room before it is needed, a step at a time, in the namespaces where something changed."""
        state = self.state
        for namespace_id in sorted(self._over):
            namespace = state.namespaces.get(namespace_id)
            if namespace is None or not self._step_ahead(namespace, now_ns):
                self._over.discard(namespace_id)

    def _step_ahead(self, namespace: Namespace, now_ns: int) -> bool:
        """Grow into another region if there is one, else evict down to the low watermark; whether more is to do."""
        state = self.state
        capacity = state.cluster.capacity_blocks(namespace)
        growing = namespace.used > membership.GROW_RATIO * capacity and membership.grow(state, namespace, now_ns)
        want = namespace.over_high_watermark(capacity)
        if growing or not want:
            return False
        victims = namespace.victims(min(want, EVICT_STEP))
        state.drop_readable(namespace, victims, "evicted")
        return len(victims) > 0 and want > EVICT_STEP

    # --- requests ---

    def _receive(self, peer: bytes, request: m.Request, now_ns: int) -> None:
        self.state.counters["requests"] += 1
        try:
            body = self._dispatch(peer, request, now_ns)
        except RefusedError as error:
            self.state.counters["refused"] += 1
            body = refusal(error)
        if body is not None:
            self._reply(peer, request, body)

    def _dispatch(self, peer: bytes, request: m.Request, now_ns: int) -> m.ReplyBody | None:
        state, body = self.state, request.body
        node_handler = _NODE_HANDLERS.get(type(body))
        if node_handler is not None:
            return node_handler(state, peer, body, now_ns)
        if isinstance(body, m.Attach):
            return admin.attach(state, peer, body, now_ns)
        session = state.sessions.get(request.session, peer, now_ns)
        if isinstance(body, _REPEATABLE):
            if isinstance(body, m.GetStatus):
                return admin.status(state, now_ns, self._started_ns)
            reply: m.ReplyBody = _SESSION_HANDLERS[type(body)](state, session, body, now_ns)
            return reply
        known = session.remembered(request.sequence)
        if known is not None:
            return known
        if any(parked.session is session and parked.request.sequence == request.sequence for parked in self._parked):
            return None
        if isinstance(body, m.Introduce):
            introductions.introduce(state, session, request.sequence, peer, body, now_ns)
            return None
        try:
            done = self._execute(session, request, now_ns, may_park=len(self._parked) < MAX_PARKED)
        except writing.Parked:
            until_ns = now_ns + state.config.park_ns
            self._parked.append(_ParkedReserve(peer, session, request, until_ns))
            return None
        session.remember(request.sequence, done)
        return done

    def _execute(self, session: Session, request: m.Request, now_ns: int, *, may_park: bool) -> m.ReplyBody:
        """A request with an effect; its refusal is an answer to remember too."""
        try:
            if isinstance(request.body, m.Reserve):
                if session.namespace is not None:
                    self._over.add(session.namespace)
                return writing.reserve(self.state, session, request.body, now_ns, may_park=may_park)
            reply: m.ReplyBody = _SESSION_HANDLERS[type(request.body)](self.state, session, request.body, now_ns)
            return reply
        except RefusedError as error:
            self.state.counters["refused"] += 1
            return refusal(error)

    def _reply(self, peer: bytes, request: m.Request, body: m.ReplyBody) -> None:
        state = self.state
        state.emit(
            Send(
                peer,
                m.Reply(session=request.session, sequence=request.sequence, epoch=state.config.epoch, body=body),
            )
        )

    def _unpark(self, now_ns: int) -> None:
        """Try waiting reservations again, each of them once."""
        for _ in range(len(self._parked)):
            parked = self._parked.popleft()
            if parked.session.id not in self.state.sessions:
                continue
            try:
                body = self._execute(parked.session, parked.request, now_ns, may_park=now_ns < parked.until_ns)
            except writing.Parked:
                self._parked.append(parked)
                continue
            parked.session.remember(parked.request.sequence, body)
            self._reply(parked.peer, parked.request, body)


def refusal(error: RefusedError) -> m.Refused:
    """An error for the wire."""
    return m.Refused(
        code=error.code,
        message=str(error),
        retry_after_ns=0 if error.retry_after_s is None else max(1, int(error.retry_after_s * 1e9)),
    )
