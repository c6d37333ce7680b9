"""Garbage, truncated, oversized, foreign, hostile and replayed frames on every socket. Nothing crashes."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

import memfabric
from memfabric import wire
from memfabric.client import GetStatus
from memfabric.core import messages as m
from memfabric.core.messages import NamespaceSpec
from memfabric.errors import MemfabricError, RefusedError, UnavailableError
from tests.processes import payload
from tests.processes.harness import MIB, MS, Pool, eventually
from tests.processes.load import Load

SPEC = NamespaceSpec(name="wire", block_bytes=16384, segments=2)
BIG = 2**64 - 1
ME, YOU = b"\x01" + b"m" * 15, b"\x01" + b"y" * 15


@contextmanager
def _dealer(address: str, identity: bytes = ME) -> Iterator[zmq.Socket[bytes]]:
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 500
    dealer.set(zmq.ROUTING_ID, identity)
    dealer.connect(address)
    try:
        yield dealer
    finally:
        dealer.close()
        context.term()


def _ask(dealer: zmq.Socket[bytes], session: int, sequence: int, body: Any) -> Any:
    """The answer to this very request; whatever else comes before it is dropped."""
    dealer.send(wire.encode(m.Request(session=session, sequence=sequence, body=body)))
    return _answer(dealer, sequence)


def _answer(dealer: zmq.Socket[bytes], sequence: int, timeout_s: float = 20.0) -> Any:
    while dealer.poll(timeout_s * 1000):
        message = wire.decode(dealer.recv(), m.Reply, m.Command)
        if isinstance(message, m.Reply) and message.sequence == sequence:
            return message.body
    raise AssertionError("no answer")


def _host_port(address: str) -> tuple[str, int]:
    host, port = address.removeprefix("tcp://").rsplit(":", 1)
    return host, int(port)


def _alive(pool: Pool) -> None:
    """Server and nodes run, nobody was buried, and a fresh client stores and finds."""
    assert pool.server.alive and all(node.alive for node in pool.nodes.values())
    ids, keys = payload.chain(random.randrange(30_000, 60_000), 3)
    with pool.connect() as client:

        def served() -> bool:
            """Whatever else was reserved may crowd it out again until those leases end; wrong bytes it never sees."""
            stored = client.put(keys, payload.fill_many(ids, 7, pool.spec.block_bytes), wait=True)
            result = client.get(keys, leased=True)
            found = np.nonzero(result.status == GetStatus.OK)[0].tolist()
            assert all(payload.check(ids[n], result.out[n]) == (7, "") for n in found)
            return stored.ok and result.ok

        eventually(served, "a fresh client stores and finds")


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with Pool(tmp_path, SPEC, dead_ns=30_000 * MS, max_lease_ns=3000 * MS) as pool:  # a hostile lease ends in time
        pool.start_node("a", 4 * MIB, 2 * MIB)
        pool.wait_nodes("a")
        yield pool
        _alive(pool)
        pool.shut_down()


def _damaged(pick: random.Random) -> Iterator[bytes]:
    """Frames that are none, and good frames cut, stretched and flipped."""
    good = [
        wire.encode(m.Request(session=1, sequence=1, body=body))
        for body in (
            m.Attach(nonce=bytes(16), namespace="wire"),
            m.Acquire(keys=bytes(range(64)), ttl_ns=10**9),
            m.Reserve(keys=bytes(64), parents=bytes(64), tokens=bytes(16), ttl_ns=10**9),
            m.Register(node="x", incarnation=1, host="h", regions=[]),
        )
    ]
    yield from (
        b"",
        b"\0",
        b"M",
        b"MF",
        b"MF\x01",
        b"MF\x01Q",
        b"MF\x01R",
        b"MF\x02Q\x80",
        b"MF\xffQ",
        b"GET / HTTP/1.0",
    )
    yield b"MF\x01Q" + b"\xdd\xff\xff\xff\xff"  # an array of 2^32 - 1
    yield b"MF\x01Q" + b"\x91" * 100_000  # arrays in arrays
    yield b"MF\x01Q" + b"\x81\xa1a" * 50_000
    yield os.urandom(1 << 20)
    for frame in good:
        for cut in range(len(frame)):
            yield frame[:cut]
        for _ in range(300):
            raw = bytearray(frame)
            for _ in range(pick.randint(1, 4)):
                raw[pick.randrange(4, len(raw))] = pick.randrange(256)
            yield bytes(raw)
        yield frame + b"more"


def test_garbage_on_the_request_socket(pool: Pool, fault_seed: int) -> None:
    print(f"rerun with: MEMFABRIC_FAULT_SEED={fault_seed}")
    pick = random.Random(fault_seed)
    load = Load(pool, seed=1, chains=4, chain_blocks=8).start(writers=1, readers=1)
    with _dealer(pool.address) as dealer:
        for frame in _damaged(pick):
            dealer.send(frame)
            if pick.random() < 0.05:
                dealer.send_multipart([frame, b"", frame])
            while dealer.poll(0):
                dealer.recv()
        body = _ask(dealer, 0, 99, m.Attach(nonce=ME, namespace="wire"))
        assert isinstance(body, m.Attached), "the same connection is still served"
    total = load.finish()
    assert not [name for name in total if "Unavailable" in name or "OutcomeUnknown" in name]


def test_another_protocol_version_is_told_so(pool: Pool) -> None:
    with _dealer(pool.address) as dealer:
        dealer.send(b"MF\x07Q\x80")
        body = _answer(dealer, 0)
        assert isinstance(body, m.Refused) and body.code == "version" and "7" in body.message and "1" in body.message


def test_an_oversized_frame_costs_its_sender_the_connection_only(pool: Pool) -> None:
    with _dealer(pool.address) as dealer:
        dealer.send(b"MF\x01Q" + bytes(m.MAX_FRAME_BYTES + 1))
        assert not dealer.poll(500)
    _alive(pool)


@pytest.mark.parametrize("port", ["requests", "events"])
def test_garbage_below_the_frames(pool: Pool, port: str) -> None:
    """Bytes that are no ZeroMQ, from plain TCP connections; and messages sent to a publisher."""
    with _dealer(pool.address) as dealer:
        attached = _ask(dealer, 0, 1, m.Attach(nonce=ME, namespace="wire"))
    address = pool.address if port == "requests" else attached.events
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)
    noises = [b"", b"\0", os.urandom(64), b"GET / HTTP/1.1\r\n\r\n", greeting, greeting[:20], os.urandom(100_000)]
    noises += [greeting + os.urandom(2000), greeting + b"\x02" + b"\xff" * 8 + b"x" * 1000]
    held = []
    for noise in noises * 3:
        with socket.create_connection(_host_port(address), timeout=5) as raw:
            try:
                raw.sendall(noise)
                raw.settimeout(0.05)
                raw.recv(4096)
            except OSError:
                pass
        half = socket.create_connection(_host_port(address), timeout=5)
        held.append(half)  # says nothing, stays
    context = zmq.Context()
    for kind in (zmq.XSUB, zmq.DEALER, zmq.PUSH, zmq.SUB):
        peer = context.socket(kind)
        peer.linger = 0
        peer.connect(address)
        if kind == zmq.SUB:
            peer.set(zmq.SUBSCRIBE, b"x" * 100_000)
        else:
            try:
                for _ in range(10):
                    peer.send(os.urandom(1000), zmq.NOBLOCK)
            except zmq.ZMQError:
                pass
        time.sleep(0.05)
        peer.close()
    context.term()
    _alive(pool)
    for half in held:
        half.close()


def test_replayed_frames_have_no_second_effect(pool: Pool) -> None:
    _, keys = payload.chain(1, 4)
    with _dealer(pool.address) as one, _dealer(pool.address, YOU) as two:
        attach = m.Attach(nonce=ME, namespace="wire")
        attached = _ask(one, 0, 1, attach)
        session = attached.session
        assert _ask(one, 0, 1, attach).session == session, "the same connection, the same session"
        reserve = m.Reserve(
            keys=keys.keys.tobytes(), parents=keys.parents.tobytes(), tokens=b"\x10\0\0\0" * 4, ttl_ns=20 * 10**9
        )
        granted = _ask(one, session, 2, reserve)
        for _ in range(5):
            assert _ask(one, session, 2, reserve) == granted, "one lease, however often it is asked for"
        assert pool.namespace().writing == 4
        commit = m.Commit(lease=granted.lease, stored=b"\1" * 4)
        # From another connection the same bytes mean nothing.
        stolen = _ask(two, session, 3, commit)
        assert isinstance(stolen, m.Refused) and stolen.code == "unknown_session"
        stolen = _ask(two, 0, 1, attach)
        assert isinstance(stolen, m.Refused) and stolen.code == "bad_request"
        own = _ask(two, 0, 1, m.Attach(nonce=YOU, namespace="wire"))
        stolen = _ask(two, own.session, 2, commit)
        assert isinstance(stolen, m.Refused) and stolen.code == "not_your_lease"
        done = _ask(one, session, 3, commit)
        assert list(done.status) == [m.CommitStatus.STORED] * 4
        removed = _ask(one, session, 4, m.Remove(keys=keys.keys.tobytes()))
        assert list(removed.status) == [m.RemoveStatus.REMOVED] * 4
        assert _ask(one, session, 3, commit) == done, "answered from memory"
        assert _ask(one, session, 4, m.Remove(keys=keys.keys.tobytes())) == removed
        assert pool.namespace().blocks == 0
        # Much later it is refused, not done again.
        for sequence in range(10, 400):
            _ask(one, session, sequence, m.Release(leases=[]))
        late = _ask(one, session, 2, reserve)
        assert isinstance(late, m.Refused) and late.code == "stale_token"
        assert pool.namespace().writing == 0


def _hostile(pick: random.Random, session: int) -> m.Request:
    """A request that is well formed and nonsense."""

    def number() -> int:
        return pick.choice([0, 1, -1, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63), BIG, pick.getrandbits(40)])

    def column(width: int) -> bytes:
        return pick.randbytes(pick.choice([0, 1, width, width * 3, width * 3 + 1, width * 8192, width * 8193]))

    def text() -> str:
        return pick.choice(["", "wire", "a", "x" * 64, "x" * 65, "y" * 100_000, "ä\0ö", "../../etc", "\ud7ff", "a b"])

    def ratio() -> float:
        return pick.choice([0.0, 1.0, -1.0, 0.5, 1e308, float("nan"), float("inf")])

    def spec() -> NamespaceSpec:
        return NamespaceSpec(
            name=text(),
            block_bytes=number(),
            block_tokens=number(),
            segments=number(),
            quota_bytes=number(),
            policy=pick.choice(["lru", "window-lru", "ttl", "", "none"]),
            window_ratio=ratio(),
            ttl_ns=number(),
            high_ratio=ratio(),
            low_ratio=ratio(),
            partial=pick.random() < 0.5,
        )

    keys = pick.choice([payload.chain(pick.randrange(8), 3)[1].keys.tobytes(), column(16)])
    bodies: list[Callable[[], Any]] = [
        lambda: m.Attach(nonce=column(16), client=text(), namespace=text(), create=pick.choice([None, spec()])),
        lambda: m.Ping(touched=column(16)),
        lambda: m.Match(keys=keys),
        lambda: m.Acquire(keys=keys, ttl_ns=number(), prefix=pick.random() < 0.5),
        lambda: m.Reserve(keys=keys, parents=column(16), tokens=column(4), ttl_ns=number()),
        lambda: m.Reserve(
            keys=keys, parents=pick.randbytes(len(keys)), tokens=b"\x10\0\0\0" * (len(keys) // 16), ttl_ns=number()
        ),
        lambda: m.Commit(lease=number(), stored=column(1)),
        lambda: m.Abort(lease=number(), flushed=pick.random() < 0.5),
        lambda: m.Renew(leases=[number() for _ in range(5)], ttl_ns=number()),
        lambda: m.Release(leases=[number() for _ in range(5)]),
        lambda: m.Remove(keys=keys),
        lambda: m.ReportFailure(keys=keys, generation=column(8)),
        lambda: m.ListBlocks(cursor=number(), limit=number()),
        lambda: m.Explain(key=column(16)),
        lambda: m.NamespaceCreate(spec=spec()),
        lambda: m.NamespaceDelete(name=text() if text() != "wire" else "", force=False),
        lambda: m.NodeDrain(node=text(), undo=True),
        lambda: m.Heartbeat(node=text(), incarnation=number()),
        lambda: m.CommandDone(node=text(), incarnation=number(), command=number(), error=text()),
        lambda: m.Introduce(node=text(), incarnation=number(), identity=column(16), hello=pick.randbytes(40)),
        lambda: m.Unregister(node=text(), incarnation=number()),
    ]
    while True:
        try:
            request = m.Request(
                session=pick.choice([session, session, 0, number()]), sequence=number(), body=pick.choice(bodies)()
            )
            wire.encode(request)
            return request
        except (wire.FrameError, OverflowError, UnicodeEncodeError):
            continue


def test_well_formed_nonsense(pool: Pool, fault_seed: int) -> None:
    """Every request kind with every kind of impossible value: answered or ignored, and the server goes on."""
    print(f"rerun with: MEMFABRIC_FAULT_SEED={fault_seed}")
    pick = random.Random(fault_seed)
    with _dealer(pool.address) as dealer:
        session = _ask(dealer, 0, 1, m.Attach(nonce=ME, namespace="wire")).session
        for _ in range(1200):
            request = _hostile(pick, session)
            dealer.send(wire.encode(request))
            if not dealer.poll(20_000):
                pytest.fail(f"no answer to {str(request)[:2000]}; server alive: {pool.server.alive}")
            dealer.recv()


@pytest.mark.parametrize("size_bytes", [1, 4096, 5000, 1 << 44])
def test_a_lying_node_does_not_take_the_server_down(pool: Pool, size_bytes: int) -> None:
    """It offers regions of absurd sizes, and says to every command that it is done."""
    tiny = NamespaceSpec(name="tiny", block_bytes=1, block_tokens=1)
    with pool.admin() as admin:
        admin.namespace_create(tiny)
    with _dealer(pool.address) as dealer:
        offer = [m.RegionOffer(region_id=77, size_bytes=size_bytes, descriptor=b"nowhere")]
        body = _ask(dealer, 0, 1, m.Register(node="liar", incarnation=5, host="h", regions=offer))
        assert isinstance(body, m.Registered)
        end_s = time.monotonic() + 1.3  # a command is sent again after a second
        while time.monotonic() < end_s and pool.server.alive:
            if not dealer.poll(100):
                continue
            message = wire.decode(dealer.recv(), m.Reply, m.Command)
            if isinstance(message, m.Command):
                done = m.CommandDone(node="liar", incarnation=5, command=message.command)
                dealer.send(wire.encode(m.Request(session=0, sequence=9, body=done)))
        assert pool.server.alive, pool.server.log_tail()
        assert isinstance(_ask(dealer, 0, 10, m.Unregister(node="liar", incarnation=5)), m.Done)


# --- clients and nodes that talk to something else -----------------------------------------------------------------


class FakeServer:
    """Answers whatever comes with what `reply` makes of it."""

    def __init__(self, reply: Callable[[bytes], list[bytes]]) -> None:
        self.context = zmq.Context()
        self.router = self.context.socket(zmq.ROUTER)
        self.router.linger = 0
        self.address = f"tcp://127.0.0.1:{self.router.bind_to_random_port('tcp://127.0.0.1')}"
        self.requests = 0
        self._reply, self._stop = reply, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            if self.router.poll(50):
                peer, *frames = self.router.recv_multipart()
                self.requests += 1
                for answer in self._reply(frames[-1] if frames else b""):
                    self.router.send_multipart([peer, answer], zmq.NOBLOCK)

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(5)
        self.router.close()
        self.context.term()


def _attached(frame: bytes, **changes: Any) -> bytes:
    """A plausible answer to an attach, with some of it changed."""
    request = wire.decode(frame, m.Request)
    fields: dict[str, Any] = {
        "session": 1,
        "max_keys": 8192,
        "max_lease_ns": 10**10,
        "session_ttl_ns": 10**10,
        "events": "tcp://127.0.0.1:1",
        "namespace": m.NamespaceInfo(id=1, spec=SPEC),
        "view": m.View(epoch=1, version=1, namespace="wire", nodes=[], regions=[]),
        **changes,
    }
    body = m.Attached(**fields)
    return wire.encode(m.Reply(session=0, sequence=request.sequence, epoch=1, body=body))


_BAD_ANSWERS: dict[str, Callable[[bytes], list[bytes]]] = {
    "nothing": lambda _: [],
    "noise": lambda _: [os.urandom(100), b"", b"MF\x01R" + os.urandom(50)],
    "truncated": lambda frame: [_attached(frame)[:cut] for cut in range(60)],
    "echo": lambda frame: [frame],
    "oversized": lambda _: [b"MF\x01R" + bytes(m.MAX_FRAME_BYTES)],
    "another version": lambda _: [b"MF\x09R\x80"],
    "another sequence": lambda frame: [
        wire.encode(m.Reply(session=0, sequence=987, epoch=1, body=m.Done())),
        wire.encode(m.Reply(session=0, sequence=987, epoch=1, body=m.Refused(code="x", message="y"))),
    ],
    "another answer": lambda frame: [
        wire.encode(m.Reply(session=0, sequence=wire.decode(frame, m.Request).sequence, epoch=1, body=m.Done()))
    ],
    "refusal": lambda frame: [
        wire.encode(
            m.Reply(
                session=0,
                sequence=wire.decode(frame, m.Request).sequence,
                epoch=1,
                body=m.Refused(code="unknown_namespace", message="no such namespace"),
            )
        )
    ],
}


@pytest.mark.parametrize("kind", sorted(_BAD_ANSWERS))
def test_connect_to_what_is_no_server(kind: str) -> None:
    """A clear error within the deadline, whatever answers."""
    with FakeServer(_BAD_ANSWERS[kind]) as fake:
        begun_s = time.monotonic()
        with pytest.raises((UnavailableError, RefusedError)) as caught:
            memfabric.connect(fake.address, namespace="wire", timeout_s=0.6)
        assert time.monotonic() - begun_s < 30 and str(caught.value)
        if kind == "another version":
            assert caught.value.code == "version" and "version 9" in str(caught.value)  # type: ignore[attr-defined]
        if kind == "refusal":
            assert caught.value.code == "unknown_namespace"  # type: ignore[attr-defined]


@pytest.mark.parametrize("noise", [b"", b"HTTP/1.0 200 OK\r\n\r\n", os.urandom(5000)], ids=["silent", "http", "random"])
def test_connect_to_plain_tcp(noise: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stop = threading.Event()

        def answer() -> None:
            listener.settimeout(0.1)
            held = []
            while not stop.is_set():
                try:
                    peer, _ = listener.accept()
                except OSError:
                    continue
                held.append(peer)
                try:
                    peer.sendall(noise)
                except OSError:
                    pass
            for peer in held:
                peer.close()

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        try:
            with pytest.raises(UnavailableError):
                memfabric.connect(f"tcp://127.0.0.1:{listener.getsockname()[1]}", namespace="x", timeout_s=0.6)
        finally:
            stop.set()
            thread.join(5)


_LIES: dict[str, dict[str, Any]] = {
    "zero segments": {"namespace": m.NamespaceInfo(id=1, spec=msgspec.structs.replace(SPEC, segments=0))},
    "no block": {"namespace": m.NamespaceInfo(id=1, spec=msgspec.structs.replace(SPEC, block_bytes=0))},
    "negative block": {"namespace": m.NamespaceInfo(id=1, spec=msgspec.structs.replace(SPEC, block_bytes=-5))},
    "huge block": {"namespace": m.NamespaceInfo(id=1, spec=msgspec.structs.replace(SPEC, block_bytes=BIG))},
    "no namespace": {"namespace": None, "view": None},
    "negative numbers": {"max_keys": -1, "max_lease_ns": -1, "session_ttl_ns": -1},
    "huge numbers": {"max_keys": BIG, "max_lease_ns": BIG, "session_ttl_ns": BIG},
    "events nowhere": {"events": "\0 no address"},
    "events odd": {"events": "inproc://x" * 1000},
    "view": {
        "view": m.View(
            epoch=BIG,
            version=-1,
            namespace="wire",
            nodes=[],
            regions=[
                m.RegionView(
                    number=number,
                    region_id=number,
                    node="n",
                    incarnation=1,
                    size_bytes=size,
                    block_bytes=16384,
                    segments=2,
                    descriptor=os.urandom(100),
                )
                for number, size in ((-1, 5), (BIG, BIG), (1, 0), (2, -(2**63)), (3, 1 << 30))
            ],
        )
    },
}


@pytest.mark.parametrize("lie", sorted(_LIES))
def test_a_lying_server_gets_an_error_not_a_crash(lie: str) -> None:
    """It attaches clients to nonsense; whatever they then do ends in time, with an error of ours."""

    def reply(frame: bytes) -> list[bytes]:
        request = wire.decode(frame, m.Request)
        if isinstance(request.body, m.Attach):
            return [_attached(frame, **_LIES[lie])]
        n = len(getattr(request.body, "keys", b"")) // 16
        body: Any = m.Done()
        if isinstance(request.body, (m.Acquire, m.Reserve)):
            kind = m.Acquired if isinstance(request.body, m.Acquire) else m.Reserved
            granted = b"\1" if kind is m.Acquired else b"\0"
            places = {"region": struct.pack("<I", 3) * n, "block": b"\xff" * 4 * n, "generation": b"\xff" * 8 * n}
            body = kind(lease=BIG, ttl_ns=BIG, status=granted * n, **places)
        return [wire.encode(m.Reply(session=request.session, sequence=request.sequence, epoch=1, body=body))]

    with FakeServer(reply) as fake:
        try:
            client = memfabric.connect(fake.address, namespace="wire", timeout_s=1.0)
        except MemfabricError:
            return
        with client:
            ids, keys = payload.chain(1, 3)
            blocks = payload.fill_many(ids, 7, SPEC.block_bytes)
            for call in (
                lambda: client.get(keys),
                lambda: client.put(keys, blocks),
                lambda: client.match(keys),
                lambda: client.prefetch(keys),
                lambda: client.remove(keys),
                lambda: client.acquire(keys).read(),
                lambda: client.reserve(keys).write(blocks),
            ):
                try:
                    result = call()
                except MemfabricError:
                    continue
                status = getattr(result, "status", None)
                assert status is None or not (status == GetStatus.OK).all() or type(result).__name__ != "GetResult"


def test_garbage_to_a_node(tmp_path: Path, fault_seed: int) -> None:
    """Its server answers nonsense, then is replaced by a real one at the same address: the node works."""
    pick = random.Random(fault_seed)
    frames = list(_damaged(pick))
    command = m.Command(command=1, epoch=1, incarnation=1, body=m.Unassign(region_id=1))
    frames += [wire.encode(command), wire.encode(m.Reply(session=0, sequence=BIG, epoch=1, body=m.Done()))]
    odd = [m.Matched(count=5), m.Done(), m.Refused(code="what", message="why", retry_after_ns=BIG)]
    always = [wire.encode(m.Reply(session=0, sequence=0, epoch=1, body=body)) for body in odd]
    with Pool(tmp_path, SPEC, dead_ns=30_000 * MS, max_lease_ns=3000 * MS) as pool:  # a hostile lease ends in time
        pool.server.kill()
        with FakeServer(lambda _: always + [pick.choice(frames) for _ in range(20)]) as fake:
            node = pool.spawn("node-a", "node", **{**pool.node_arguments("a", 2 * MIB), "server": fake.address})
            end_s = time.monotonic() + 20
            while fake.requests < 6 and node.alive and time.monotonic() < end_s:
                time.sleep(0.05)
            assert node.alive, node.log_tail()
            assert fake.requests >= 6
            assert node.terminate() == 0
        assert not pool.region_files()
        pool.start_server()
        pool.start_node("a", 2 * MIB)
        with pool.admin() as admin:
            admin.namespace_create(SPEC)
        pool.wait_nodes("a")
        _alive(pool)
        pool.shut_down()


@pytest.mark.parametrize("heartbeat_ns", [0, -(2**63), BIG])
def test_a_node_under_a_server_that_asks_for_odd_heartbeats(tmp_path: Path, heartbeat_ns: int) -> None:
    """It is taken, told nonsense, and ends in good order when it is told to."""

    def reply(frame: bytes) -> list[bytes]:
        request = wire.decode(frame, m.Request)
        known = isinstance(request.body, m.Register)
        body: Any = m.Registered(heartbeat_ns=heartbeat_ns, dead_ns=BIG) if known else m.Done()
        return [wire.encode(m.Reply(session=0, sequence=request.sequence, epoch=1, body=body))]

    with Pool(tmp_path, SPEC) as pool:
        with FakeServer(reply) as fake:
            node = pool.spawn("node-a", "node", **{**pool.node_arguments("a", 2 * MIB), "server": fake.address})
            node.wait_event("ready")
            time.sleep(0.2)
            assert node.terminate() == 0
        pool.shut_down()
