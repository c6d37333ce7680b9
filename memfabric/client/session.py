"""The client's side of the protocol: sessions, tokens, resends, outcomes.

Pure: no socket, clock or thread; time is an argument. `link.Link` feeds it frames and instants, sends what
`next_outgoing` gives, and hands out what `take_events` returns.

Every request gets a sequence number; with the session it is the idempotency token. A request that is not
answered is sent again with the same token until its deadline. Then it ends: as not done if it never left or
changes nothing, as unknown otherwise. Invariant: every submitted call is settled exactly once. A lease that
arrives after its call has ended is given back at once, so that nothing leaks.

When the server no longer knows the session (it restarted, or we were silent for too long), a new one is
opened under a new nonce. Calls that are not bound to a lease of the old session are sent again there; the
others end.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable

import msgspec

from memfabric import wire
from memfabric.client.calls import Answer, Call, Event, Joined, Opened, State, refusal, unlike
from memfabric.core.messages import (
    Abort,
    Acquired,
    Attach,
    Attached,
    Body,
    Commit,
    Detach,
    NamespaceCreate,
    NamespaceDelete,
    NamespaceSpec,
    NodeDrain,
    Pin,
    Ping,
    Refused,
    Release,
    Remove,
    Renew,
    Reply,
    ReplyBody,
    Request,
    Reserved,
)
from memfabric.errors import (
    MemfabricError,
    OutcomeUnknownError,
    RefusalCode,
    RefusedError,
    UnavailableError,
)

RESEND_NS = 250_000_000
"""First wait before a request is sent again; doubles up to `MAX_RESEND_NS`."""
MAX_RESEND_NS = 2_000_000_000
MAX_IN_FLIGHT = 64
"""Requests sent and not answered; the server remembers the answers to at least twice as many."""
PING_NS = 1_000_000_000
ATTACH_RETRY_NS = 200_000_000
REMEMBERED_ABANDONED = 1024

_BOUND_TO_LEASE = (Commit, Abort, Renew, Release, Detach)
_CHANGES = (Commit, Remove, Pin, NamespaceCreate, NamespaceDelete, NodeDrain)
"""Requests whose loss after sending leaves the pool in one of two states. A lost Reserve or Acquire ends by
itself."""


class Session:
    """Protocol state of one client. Not thread-safe: one owner."""

    def __init__(self, attach: Attach, address: str, nonce: Callable[[], bytes]) -> None:
        self._attach = attach
        self._address = address
        self._nonce = nonce
        self.state = State.REFUSED
        self.session = 0
        self.epoch = 0
        self.session_ttl_ns = 0
        self.refusal: MemfabricError | None = None
        self.counts = {"requests": 0, "pings": 0, "resends": 0, "attaches": 0, "bad_frames": 0, "leases_given_back": 0}
        self._sequence = 0
        self._attach_sequence = 0
        self._attach_at_ns = 0
        self._hopeful = False
        self._attaching: Call | None = None
        self._namespace: NamespaceSpec | None = None
        self._waiting: deque[Call] = deque()
        self._flight: dict[int, Call] = {}
        self._outgoing: deque[Call] = deque()
        self._abandoned: OrderedDict[int, None] = OrderedDict()
        self._events: list[Event] = []
        self._ping_ns = 0
        self._heard_ns = 0

    # --- from the owner ---

    def open(self, now_ns: int) -> None:
        """Open a session, under a fresh identity."""
        nonce = self._nonce()
        self.state = State.ATTACHING
        self.session = 0
        self._sequence = 0
        self._flight.clear()
        self._outgoing.clear()
        self._abandoned.clear()
        self._events.append(Opened(nonce))
        self._attaching = Call(msgspec.structs.replace(self._attach, nonce=nonce), deadline_ns=0)
        self._enqueue(self._attaching)

    def submit(self, call: Call, now_ns: int) -> None:
        """Take a call; it is settled by its deadline."""
        if self.state is State.REFUSED and now_ns >= self._attach_at_ns:
            self.open(now_ns)
        self._waiting.append(call)
        self._pump()

    def next_outgoing(self) -> tuple[Call, bytes] | None:
        """The next frame to send. Tell `sent` when it has left, `unsent` when it could not."""
        while self._outgoing:
            call = self._outgoing.popleft()
            call.queued = False
            if call.done:
                continue
            try:
                return call, wire.encode(Request(session=self.session, sequence=call.sequence, body=call.body))
            except (wire.FrameError, OverflowError) as error:
                self._flight.pop(call.sequence, None)
                self._settle(call, RefusedError(RefusalCode.TOO_LARGE, f"the request cannot be sent: {error}"))
        return None

    def sent(self, call: Call, now_ns: int) -> None:
        """A frame has left."""
        call.sends += 1
        if isinstance(call.body, Ping):
            self.counts["pings"] += 1
        elif call.sends == 1:
            call.sent_ns = now_ns
            self.counts["requests"] += 1
        else:
            self.counts["resends"] += 1
        call.resend_ns = now_ns + min(RESEND_NS << min(call.sends - 1, 8), MAX_RESEND_NS)
        if isinstance(call.body, Ping):
            self._flight.pop(call.sequence, None)  # never repeated: the next one does as well
            call.done = True

    def unsent(self, call: Call) -> None:
        """A frame could not leave yet; it is the next one again."""
        call.queued = True
        self._outgoing.appendleft(call)

    def received(self, frame: bytes, now_ns: int) -> None:
        """Take a frame from the server; anything may be in it."""
        try:
            reply = wire.decode(frame, Reply)
        except wire.FrameError as error:
            self.counts["bad_frames"] += 1
            if self.state is State.ATTACHING and error.version is not None:
                self._refused(RefusedError(RefusalCode.VERSION, str(error)), 0, now_ns)
            return
        self._heard_ns = now_ns
        if self.state is State.ATTACHING:
            self._attach_answer(reply, now_ns)
        elif self.state is State.ATTACHED and reply.session == self.session:
            self._answer(reply, now_ns)

    def touched(self, keys: bytes, now_ns: int) -> None:
        """Send a ping that carries reuse to report (may be empty)."""
        self._ping_ns = now_ns + (PING_NS if keys else min(PING_NS, max(1, self.session_ttl_ns // 4)))
        self._waiting.appendleft(Call(Ping(touched=keys), deadline_ns=now_ns + PING_NS))
        self._pump()

    def ping_due(self, now_ns: int) -> bool:
        """Whether it is time for `touched`."""
        return self.state is State.ATTACHED and now_ns >= self._ping_ns

    def tick(self, now_ns: int) -> None:
        """Let time pass: end calls that are over, repeat those that are not answered."""
        for call in [c for c in self._waiting if 0 < c.deadline_ns <= now_ns]:
            self._waiting.remove(call)
            self._settle(call, self._too_late(call))
        for call in list(self._flight.values()):
            if call.deadline_ns <= now_ns:
                del self._flight[call.sequence]
                if call.sends:
                    self._abandon(call)
                self._settle(call, self._too_late(call))
            elif call.sends and call.resend_ns <= now_ns and not call.queued:
                call.resend_ns = now_ns + MAX_RESEND_NS
                self._enqueue_again(call)
        attaching = self._attaching
        if attaching is not None and attaching.sends and attaching.resend_ns <= now_ns and not attaching.queued:
            self._enqueue_again(attaching)
        if self._wants_to_attach() and now_ns >= self._attach_at_ns:
            self.open(now_ns)
        self._pump()

    @property
    def refused_for_good(self) -> bool:
        """The server will not have us, and waiting does not help."""
        return self.state is State.REFUSED and self.refusal is not None and not self._hopeful

    def next_deadline_ns(self) -> int | None:
        """When `tick` or `touched` is due next; None when nothing waits."""
        times = [call.deadline_ns for call in self._waiting if call.deadline_ns]
        for call in self._flight.values():
            times.append(call.deadline_ns)
            if call.sends and not call.queued:
                times.append(call.resend_ns)
        if self._attaching is not None and self._attaching.sends and not self._attaching.queued:
            times.append(self._attaching.resend_ns)
        if self.state is State.ATTACHED:
            times.append(self._ping_ns)
        if self._wants_to_attach():
            times.append(self._attach_at_ns)
        return min(times) if times else None

    def cancelled(self, call: Call) -> None:
        """The owner no longer wants the answer."""
        if call.done:
            return
        call.done = True
        if call in self._waiting:
            self._waiting.remove(call)
        elif self._flight.pop(call.sequence, None) is not None and call.sends:
            self._abandon(call)
        self._pump()

    def stop(self, error: MemfabricError) -> None:
        """End every call with an error."""
        calls = [*self._waiting, *self._flight.values()]
        self._waiting.clear()
        self._flight.clear()
        self._outgoing.clear()
        for call in calls:
            self._settle(call, error)

    def take_events(self) -> list[Event]:
        """What happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    # --- inside ---

    def _enqueue(self, call: Call) -> None:
        self._sequence += 1
        call.sequence, call.sends, call.sent_ns = self._sequence, 0, 0
        if call is self._attaching:
            self._attach_sequence = call.sequence
        else:
            self._flight[call.sequence] = call
        self._enqueue_again(call)

    def _enqueue_again(self, call: Call) -> None:
        call.queued = True
        self._outgoing.append(call)

    def _wants_to_attach(self) -> bool:
        return self.state is State.REFUSED and (self._hopeful or bool(self._waiting))

    def _pump(self) -> None:
        while self.state is State.ATTACHED and self._waiting and len(self._flight) < MAX_IN_FLIGHT:
            self._enqueue(self._waiting.popleft())

    def _settle(self, call: Call, end: Answer | MemfabricError) -> None:
        call.done = True
        if call.settle is not None:
            call.settle(end)

    def _abandon(self, call: Call) -> None:
        self._abandoned[call.sequence] = None
        while len(self._abandoned) > REMEMBERED_ABANDONED:
            self._abandoned.popitem(last=False)

    def _too_late(self, call: Call) -> MemfabricError:
        kind = type(call.body).__name__.lower()
        if self.state is State.REFUSED and self.refusal is not None:
            return self.refusal
        if not call.sends:
            return UnavailableError(
                f"no metadata server answers at {self._address} (the {kind} request never left); is one running there? "
                "`memfabric up` starts a pool on this machine"
            )
        if isinstance(call.body, _CHANGES):
            return OutcomeUnknownError(
                f"{kind} was sent to {self._address} and not answered in time: it may or may not have happened "
                f"(token: session {self.session:#x}, request {call.sequence}). It is safe to do it again; "
                "match(), explain() or a listing show what is true"
            )
        return UnavailableError(f"the metadata server at {self._address} did not answer {kind} in time")

    def _attach_answer(self, reply: Reply, now_ns: int) -> None:
        if reply.sequence != self._attach_sequence:
            return
        body = reply.body
        if isinstance(body, Refused):
            self._refused(refusal(body), body.retry_after_ns, now_ns)
        elif isinstance(body, Attached) and (why := unlike(self._namespace, self._attach, body)):
            self._refused(RefusedError(RefusalCode.FINGERPRINT, why), 0, now_ns)
        elif isinstance(body, Attached):
            self._namespace = body.namespace.spec if body.namespace else None
            self.state = State.ATTACHED
            self._attaching = None
            self.refusal = None
            self.session, self.epoch, self.session_ttl_ns = body.session, reply.epoch, body.session_ttl_ns
            self._ping_ns = now_ns + min(PING_NS, max(1, body.session_ttl_ns // 4))
            self.counts["attaches"] += 1
            self._events.append(Joined(body, reply.epoch))
            self._pump()

    def _refused(self, error: MemfabricError, retry_after_ns: int, now_ns: int) -> None:
        self.state = State.REFUSED
        self.refusal = error
        self._attaching = None
        self._outgoing.clear()
        self._attach_at_ns = now_ns + (retry_after_ns or ATTACH_RETRY_NS)
        self._hopeful = retry_after_ns > 0
        if not retry_after_ns:  # waiting cannot help
            waiting, self._waiting = self._waiting, deque()
            for call in waiting:
                self._settle(call, error)

    def _answer(self, reply: Reply, now_ns: int) -> None:
        body = reply.body
        if isinstance(body, Refused) and body.code == RefusalCode.UNKNOWN_SESSION:
            self._lost(reply.sequence, body, now_ns)
            return
        call = self._flight.pop(reply.sequence, None)
        if call is None:
            if reply.sequence in self._abandoned:
                del self._abandoned[reply.sequence]
                self._give_back(body, now_ns)
            return
        if isinstance(body, Refused):
            self._settle(call, refusal(body))
        else:
            self._settle(call, Answer(body, call.sent_ns, reply.epoch))
        self._pump()

    def _give_back(self, body: ReplyBody, now_ns: int) -> None:
        """A lease that came after its call had ended."""
        if isinstance(body, Acquired) and body.lease:
            give: Body = Release(leases=[body.lease])
        elif isinstance(body, Reserved) and body.lease:
            give = Abort(lease=body.lease)
        else:
            return
        self.counts["leases_given_back"] += 1
        self._waiting.append(Call(give, deadline_ns=now_ns + body.ttl_ns))
        self._pump()

    def _lost(self, sequence: int, refused: Refused, now_ns: int) -> None:
        """The session is gone, and its leases with it."""
        repeat: list[Call] = []
        for call in self._flight.values():
            if isinstance(call.body, Ping):
                continue
            if not isinstance(call.body, _BOUND_TO_LEASE):
                repeat.append(call)
            elif isinstance(call.body, Commit) and (call.sequence != sequence or call.sends > 1) and call.sends:
                # An earlier copy may have been done before the session ended.
                self._settle(call, self._too_late(call))
            else:
                self._settle(
                    call,
                    RefusedError(
                        RefusalCode.UNKNOWN_SESSION,
                        "the metadata server no longer knows this session (it restarted, or this client was silent "
                        f"for too long), so its leases are over: {refused.message}",
                    ),
                )
        self._waiting = deque(c for c in self._waiting if self._survives(c, refused))
        self._waiting.extendleft(reversed(repeat))
        self.open(now_ns)

    def _survives(self, call: Call, refused: Refused) -> bool:
        if isinstance(call.body, _BOUND_TO_LEASE):
            self._settle(call, refusal(refused))
            return False
        return True
