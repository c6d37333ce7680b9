"""The client's protocol machine, with a hand-made server and a hand-made clock."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from memfabric import wire
from memfabric.client.calls import Answer, Call, Joined, Opened, State
from memfabric.client.session import MAX_IN_FLIGHT, RESEND_NS, Session
from memfabric.core import messages as m
from memfabric.errors import (
    MemfabricError,
    OutcomeUnknownError,
    RefusalCode,
    RefusedError,
    UnavailableError,
)

MS = 1_000_000
S = 1000 * MS
FAR = 10**18


class Desk:
    """A session under test, what it sent, and a server that answers when told to."""

    def __init__(self) -> None:
        counter = itertools.count(1)
        self.now_ns = S
        self.session = Session(m.Attach(nonce=b"", namespace="x"), "tcp://server", lambda: b"nonce%d" % next(counter))
        self.sent: list[m.Request] = []
        self.connected = True
        self.next_session = itertools.count(100)
        self.epoch = 7
        self.session.open(self.now_ns)

    def work(self) -> None:
        self.session.tick(self.now_ns)
        while self.connected and (outgoing := self.session.next_outgoing()) is not None:
            call, frame = outgoing
            self.sent.append(wire.decode(frame, m.Request))
            self.session.sent(call, self.now_ns)

    def pass_time(self, duration_ns: int) -> None:
        self.now_ns += duration_ns
        self.work()

    def reply(self, request: m.Request, body: m.ReplyBody) -> None:
        frame = wire.encode(m.Reply(session=request.session, sequence=request.sequence, epoch=self.epoch, body=body))
        self.session.received(frame, self.now_ns)
        self.work()

    def attach(self, session_ttl_ns: int = 30 * S) -> None:
        self.work()
        request = self.sent.pop()
        assert isinstance(request.body, m.Attach) and request.session == 0
        self.reply(request, self.attached(session_ttl_ns))

    def attached(self, session_ttl_ns: int = 30 * S) -> m.Attached:
        return m.Attached(
            session=next(self.next_session),
            max_keys=8192,
            max_lease_ns=60 * S,
            session_ttl_ns=session_ttl_ns,
            events="",
            namespace=m.NamespaceInfo(id=1, spec=m.NamespaceSpec(name="x", block_bytes=64)),
        )

    def submit(self, body: m.Body, timeout_ns: int = 5 * S) -> list[Answer | MemfabricError]:
        ends: list[Answer | MemfabricError] = []
        self.call = Call(body, self.now_ns + timeout_ns, ends.append)
        self.session.submit(self.call, self.now_ns)
        self.work()
        return ends


def refused(code: str, retry_after_ns: int = 0) -> m.Refused:
    return m.Refused(code=code, message=f"because of {code}", retry_after_ns=retry_after_ns)


@pytest.fixture
def desk() -> Desk:
    desk = Desk()
    desk.attach()
    return desk


def test_attach_gives_a_session_and_identity_is_the_nonce() -> None:
    desk = Desk()
    desk.work()
    assert desk.session.take_events() == [Opened(b"nonce1")]
    body = desk.sent[0].body
    assert isinstance(body, m.Attach) and body.nonce == b"nonce1"
    desk.attach()
    assert desk.session.state is State.ATTACHED
    assert [type(event) for event in desk.session.take_events()] == [Joined]


def test_calls_wait_for_the_session_and_then_leave_in_order() -> None:
    desk = Desk()
    ends = [desk.submit(m.Match(keys=bytes([i]))) for i in range(3)]
    desk.attach()
    assert [request.body for request in desk.sent] == [m.Match(keys=bytes([i])) for i in range(3)]
    assert [request.sequence for request in desk.sent] == [2, 3, 4]
    desk.reply(desk.sent[1], m.Matched(count=5))
    assert [len(end) for end in ends] == [0, 1, 0]
    answer = ends[1][0]
    assert isinstance(answer, Answer) and answer.body == m.Matched(count=5) and answer.epoch == 7


def test_an_unanswered_request_is_repeated_with_the_same_token(desk: Desk) -> None:
    ends = desk.submit(m.Match(keys=b"k"))
    first_sent_ns = desk.now_ns
    desk.pass_time(RESEND_NS - 1)
    assert len(desk.sent) == 1
    desk.pass_time(1)
    desk.pass_time(2 * RESEND_NS)
    assert len(desk.sent) == 3 and len({(r.session, r.sequence) for r in desk.sent}) == 1
    desk.reply(desk.sent[-1], m.Matched(count=1))
    desk.reply(desk.sent[-1], m.Matched(count=1))
    assert len(ends) == 1
    assert isinstance(ends[0], Answer) and ends[0].sent_ns == first_sent_ns, "leases count from the first sending"


def test_what_never_left_did_not_happen() -> None:
    desk = Desk()
    desk.connected = False
    ends = desk.submit(m.Commit(lease=1, stored=b"\1"), 100 * MS)
    desk.pass_time(200 * MS)
    assert isinstance(ends[0], UnavailableError) and "never left" in str(ends[0])
    assert "memfabric up" in str(ends[0])


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (m.Commit(lease=1, stored=b""), OutcomeUnknownError),
        (m.Remove(keys=b""), OutcomeUnknownError),
        (m.NamespaceDelete(name="x"), OutcomeUnknownError),
        (m.Match(keys=b""), UnavailableError),
        (m.Acquire(keys=b"", ttl_ns=1), UnavailableError),
        (m.Reserve(keys=b"", parents=b"", tokens=b"", ttl_ns=1), UnavailableError),
    ],
)
def test_silence_is_unknown_for_what_changes_the_pool(desk: Desk, body: m.Body, kind: type) -> None:
    ends = desk.submit(body, S)
    desk.pass_time(2 * S)
    assert len(ends) == 1 and isinstance(ends[0], kind)
    if kind is OutcomeUnknownError:
        assert "request 2" in str(ends[0]) and hex(desk.sent[0].session) in str(ends[0])


LATE = {
    "acquire": (
        m.Acquire(keys=b"", ttl_ns=1),
        m.Acquired(lease=9, ttl_ns=S, status=b"", region=b"", block=b"", generation=b""),
        m.Release(leases=[9]),
    ),
    "reserve": (
        m.Reserve(keys=b"", parents=b"", tokens=b"", ttl_ns=1),
        m.Reserved(lease=9, ttl_ns=S, status=b"", region=b"", block=b"", generation=b""),
        m.Abort(lease=9),
    ),
}


@pytest.mark.parametrize("kind", LATE)
@pytest.mark.parametrize("how", ["deadline", "cancelled"])
def test_a_lease_that_comes_too_late_is_given_back_once(desk: Desk, kind: str, how: str) -> None:
    body, reply, give_back = LATE[kind]
    ends = desk.submit(body, S)
    request = desk.sent.pop()
    if how == "deadline":
        desk.pass_time(2 * S)
    else:
        desk.session.cancelled(desk.call)
    assert len(ends) == (how == "deadline")
    desk.sent.clear()
    desk.reply(request, reply)
    desk.reply(request, reply)
    assert [sent.body for sent in desk.sent] == [give_back]


def test_a_repeated_answer_gives_no_lease_back(desk: Desk) -> None:
    body, reply, _ = LATE["acquire"]
    ends = desk.submit(body)
    request = desk.sent.pop()
    desk.reply(request, reply)
    desk.reply(request, reply)
    assert len(ends) == 1 and desk.sent == []


def test_a_lost_session_is_replaced_and_what_is_safe_is_repeated(desk: Desk) -> None:
    reads = desk.submit(m.Match(keys=b"k"))
    commits = desk.submit(m.Commit(lease=5, stored=b"\1"))
    renews = desk.submit(m.Renew(leases=[5], ttl_ns=1))
    match, commit, _ = desk.sent
    desk.sent.clear()
    desk.epoch = 8
    desk.reply(match, refused(RefusalCode.UNKNOWN_SESSION))
    assert isinstance(commits[0], OutcomeUnknownError), "the old server may have done it"
    assert isinstance(renews[0], RefusedError) and renews[0].code == RefusalCode.UNKNOWN_SESSION
    assert desk.session.state is State.ATTACHING and not reads
    desk.reply(commit, m.Committed(status=b"\0"))
    desk.attach()
    again = desk.sent.pop()
    assert again.body == match.body and again.session != match.session
    desk.reply(match, m.Matched(count=3))
    assert not reads, "an answer to the old session is not this one's"
    desk.reply(again, m.Matched(count=4))
    assert isinstance(reads[0], Answer) and reads[0].body == m.Matched(count=4) and reads[0].epoch == 8


def test_a_commit_refused_at_its_first_sending_did_not_happen(desk: Desk) -> None:
    ends = desk.submit(m.Commit(lease=5, stored=b"\1"))
    desk.reply(desk.sent.pop(), refused(RefusalCode.UNKNOWN_SESSION))
    assert isinstance(ends[0], RefusedError) and ends[0].code == RefusalCode.UNKNOWN_SESSION
    repeated = Desk()
    repeated.attach()
    ends = repeated.submit(m.Commit(lease=5, stored=b"\1"))
    repeated.pass_time(RESEND_NS)
    repeated.reply(repeated.sent.pop(), refused(RefusalCode.UNKNOWN_SESSION))
    assert isinstance(ends[0], OutcomeUnknownError), "the first copy may have been done"


def test_a_refusal_is_passed_on_with_its_advice(desk: Desk) -> None:
    ends = desk.submit(m.Match(keys=b""))
    desk.reply(desk.sent.pop(), refused(RefusalCode.OVERLOADED, 50 * MS))
    assert isinstance(ends[0], RefusedError)
    assert (ends[0].code, ends[0].retry_after_s) == (RefusalCode.OVERLOADED, 0.05)


def test_a_refused_attach_ends_waiting_calls_and_is_tried_again_later() -> None:
    desk = Desk()
    ends = desk.submit(m.Match(keys=b""))
    desk.reply(desk.sent.pop(), refused(RefusalCode.FINGERPRINT))
    assert isinstance(ends[0], RefusedError) and ends[0].code == RefusalCode.FINGERPRINT
    assert desk.session.refused_for_good
    desk.pass_time(10 * S)
    assert desk.sent == [], "not by itself"
    ends = desk.submit(m.Match(keys=b""))
    desk.attach()
    desk.reply(desk.sent.pop(), m.Matched(count=0))
    assert isinstance(ends[0], Answer)


def test_a_refused_attach_with_advice_is_repeated_by_itself() -> None:
    desk = Desk()
    ends = desk.submit(m.Match(keys=b""))
    desk.reply(desk.sent.pop(), refused(RefusalCode.OVERLOADED, S))
    assert not ends and not desk.session.refused_for_good
    desk.pass_time(S - 1)
    assert desk.sent == []
    desk.pass_time(1)
    desk.attach()
    assert len(desk.sent) == 1


def test_a_server_of_another_version_is_named() -> None:
    desk = Desk()
    desk.work()
    frame = bytearray(wire.encode(m.Reply(session=0, sequence=1, epoch=1, body=m.Done())))
    frame[2] = 9
    desk.session.received(bytes(frame), desk.now_ns)
    assert isinstance(desk.session.refusal, RefusedError) and desk.session.refusal.code == RefusalCode.VERSION
    assert "version 9" in str(desk.session.refusal)


def test_in_flight_requests_are_bounded(desk: Desk) -> None:
    for _ in range(MAX_IN_FLIGHT + 10):
        desk.submit(m.Match(keys=b""), FAR)
    assert len(desk.sent) == MAX_IN_FLIGHT
    desk.reply(desk.sent[0], m.Matched(count=0))
    assert len(desk.sent) == MAX_IN_FLIGHT + 1


def test_pings_keep_the_session_alive_and_are_never_repeated(desk: Desk) -> None:
    assert not desk.session.ping_due(desk.now_ns)
    desk.pass_time(S)
    assert desk.session.ping_due(desk.now_ns)
    desk.session.touched(b"k" * 16, desk.now_ns)
    desk.work()
    assert [sent.body for sent in desk.sent] == [m.Ping(touched=b"k" * 16)]
    desk.pass_time(900 * MS)
    assert len(desk.sent) == 1 and not desk.session.ping_due(desk.now_ns)
    desk.reply(desk.sent[0], refused(RefusalCode.UNKNOWN_SESSION))
    assert desk.session.state is State.ATTACHING


def test_a_request_too_large_for_a_frame_is_refused(desk: Desk) -> None:
    ends = desk.submit(m.Match(keys=bytes(m.MAX_FRAME_BYTES)))
    assert isinstance(ends[0], RefusedError) and ends[0].code == RefusalCode.TOO_LARGE
    ends = desk.submit(m.Match(keys=b""))
    desk.reply(desk.sent.pop(), m.Matched(count=0))
    assert isinstance(ends[0], Answer)


def test_garbage_changes_nothing(desk: Desk) -> None:
    ends = desk.submit(m.Match(keys=b""))
    for frame in (b"", b"MF", b"MF\x01R\xc1", b"x" * 1000):
        desk.session.received(frame, desk.now_ns)
    assert not ends and desk.session.counts["bad_frames"] == 4
    desk.reply(desk.sent.pop(), m.Matched(count=0))
    assert len(ends) == 1


BODIES: list[Any] = [
    m.Match(keys=b""),
    m.Acquire(keys=b"", ttl_ns=1),
    m.Reserve(keys=b"", parents=b"", tokens=b"", ttl_ns=1),
    m.Commit(lease=3, stored=b""),
    m.Renew(leases=[3], ttl_ns=1),
    m.Remove(keys=b""),
]


class SessionMachine(RuleBasedStateMachine):
    """Whatever the server and the network do: each call ends once, in time, and no lease leaks."""

    def __init__(self) -> None:
        super().__init__()
        self.desk = Desk()
        self.calls: list[tuple[Call, list[Any]]] = []
        self.cancelled: set[int] = set()
        self.granted: set[int] = set()
        self.unheard: set[int] = set()
        self.lease = itertools.count(50)
        self.alive = 0
        """The session that the server knows; 0 for none."""
        self.memory: dict[tuple[int, int], m.ReplyBody] = {}

    @rule(which=st.sampled_from(range(len(BODIES))), timeout_ms=st.sampled_from([50, 400, 3000]))
    def submit(self, which: int, timeout_ms: int) -> None:
        ends = self.desk.submit(BODIES[which], timeout_ms * MS)
        self.calls.append((self.desk.call, ends))

    @rule(duration_ms=st.sampled_from([1, 100, 300, 1000]))
    def wait(self, duration_ms: int) -> None:
        self.desk.pass_time(duration_ms * MS)

    @rule()
    def switch_connection(self) -> None:
        self.desk.connected = not self.desk.connected
        self.desk.work()

    @rule()
    def server_forgets(self) -> None:
        self.alive = 0
        self.granted.clear()
        self.desk.epoch += 1

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        waiting = [i for i, (_, ends) in enumerate(self.calls) if not ends and i not in self.cancelled]
        if waiting:
            which = data.draw(st.sampled_from(waiting))
            self.cancelled.add(which)
            self.desk.session.cancelled(self.calls[which][0])

    @rule(data=st.data(), drop=st.booleans())
    def serve(self, data: st.DataObject, drop: bool) -> None:
        if not self.desk.sent:
            return
        request = data.draw(st.sampled_from(self.desk.sent))
        self.desk.sent.remove(request)
        body = self.answer(request)
        if not drop:
            self.desk.reply(request, body)
        elif isinstance(body, (m.Acquired, m.Reserved)):
            self.unheard.add(body.lease)  # if nobody asks again, it ends with its time

    def answer(self, request: m.Request) -> m.ReplyBody:
        body = request.body
        if isinstance(body, m.Attach):
            attached = self.memory.get((0, hash(body.nonce)))
            if not isinstance(attached, m.Attached) or attached.session != self.alive:
                attached = self.desk.attached()
                self.memory[0, hash(body.nonce)] = attached
                self.alive = attached.session
                self.granted.clear()
            return attached
        if request.session != self.alive or not self.alive:
            return refused(RefusalCode.UNKNOWN_SESSION)
        token = (request.session, request.sequence)
        if token not in self.memory:
            self.memory[token] = self.execute(body)
        return self.memory[token]

    def execute(self, body: m.Body) -> m.ReplyBody:
        if isinstance(body, (m.Acquire, m.Reserve)):
            lease = next(self.lease)
            self.granted.add(lease)
            kind = m.Acquired if isinstance(body, m.Acquire) else m.Reserved
            return kind(lease=lease, ttl_ns=FAR, status=b"", region=b"", block=b"", generation=b"")
        if isinstance(body, m.Release):
            self.granted -= set(body.leases)
        if isinstance(body, m.Abort):
            self.granted.discard(body.lease)
        return m.Done()

    @invariant()
    def every_call_ends_once_and_in_time(self) -> None:
        for i, (call, ends) in enumerate(self.calls):
            assert len(ends) <= 1
            if i not in self.cancelled and call.deadline_ns <= self.desk.now_ns:
                assert len(ends) == 1
            if i in self.cancelled:
                assert not ends

    def teardown(self) -> None:
        desk = self.desk
        desk.connected = True
        for _ in range(100):
            desk.pass_time(500 * MS)
            while desk.sent:
                request = desk.sent.pop(0)
                desk.reply(request, self.answer(request))
        answered = {
            end.body.lease
            for _, ends in self.calls
            for end in ends
            if isinstance(end, Answer) and isinstance(end.body, (m.Acquired, m.Reserved))
        }
        assert self.granted <= answered | self.unheard, "a lease that nobody holds was not given back"


TestSession = SessionMachine.TestCase
TestSession.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
