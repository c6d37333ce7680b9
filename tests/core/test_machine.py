"""A stateful model of clients, nodes and time against the core: the rights that the promise rests on."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from memfabric.core import messages as m
from memfabric.core.keys import BlockKeys
from tests.core.harness import MS, Harness, chain, columns

QUARANTINE_MS = 3000
CHAINS = [chain(seed, 12) for seed in range(4)]
# Two chains that share their first six blocks, as prompts with one system prompt do.
CHAINS.append(
    BlockKeys.chain(np.concatenate([CHAINS[0].keys[:6], chain(99, 6).keys])),
)
chains = st.integers(0, len(CHAINS) - 1)
heads = st.integers(1, 12).map(lambda count: slice(0, count))
middles = st.tuples(st.integers(0, 11), st.integers(1, 12)).map(lambda pair: slice(pair[0], pair[0] + pair[1]))
slices = st.one_of(heads, heads, middles)

Place = tuple[int, int]
"""Region number and block index: unique within an epoch."""


@dataclasses.dataclass
class Held:
    lease: int
    session: int
    keys: list[bytes]
    places: list[Place]
    generation: list[int]
    until_ns: int


class CoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.h = Harness(quarantine_ns=QUARANTINE_MS * MS, max_lease_ns=20_000 * MS, session_ttl_ns=10**15)
        self.sessions: list[tuple[int, bytes]] = []
        self.writes: list[Held] = []
        self.reads: list[Held] = []
        self.late_writers: dict[Place, int] = {}
        """Places a vanished writer may still write to, and until when the server must keep them unused."""
        self.committed: dict[bytes, tuple[Place, int]] = {}
        self.last_generation: dict[Place, int] = {}
        self.node_of: dict[int, str] = {}
        self.dead_regions: set[int] = set()

    @initialize(
        policy=st.sampled_from(["lru", "window-lru", "ttl"]),
        ttl_ms=st.sampled_from([0, 5000]),
        quota=st.sampled_from([0, 10]),
        nodes=st.integers(1, 3),
    )
    def start(self, policy: str, ttl_ms: int, quota: int, nodes: int) -> None:
        for i in range(nodes):
            self.h.join(f"n{i}", regions=1)
        ttl_ms = 5000 if policy == "ttl" else ttl_ms
        for peer in (b"c0", b"c1"):
            session = self.h.attach(policy=policy, ttl_ns=ttl_ms * MS, quota_bytes=quota * (64 << 10), peer=peer)
            self.sessions.append((session, peer))
        self.map_regions()

    def map_regions(self) -> None:
        for number, region in self.h.core.state.cluster.regions.items():
            self.node_of[number] = region.node
        self.dead_regions = set(self.node_of) - set(self.h.core.state.cluster.regions)

    def alive(self, place: Place) -> bool:
        return place[0] not in self.dead_regions

    # --- writing ---

    @rule(chain=chains, part=slices, who=st.integers(0, 1), ttl_ms=st.integers(50, 5000))
    def reserve(self, chain: int, part: slice, who: int, ttl_ms: int) -> None:
        keys = CHAINS[chain][part]
        session, peer = self.sessions[who]
        reply = self.h.reserve(session, keys, ttl_ms=ttl_ms, peer=peer)
        self.map_regions()
        if reply is None:  # parked for a region; the answer comes with time
            sequence = self.h.last_sequence
            self.h.tick(2500)
            self.expire()
            assert isinstance(self.h.replies[sequence], m.Reserved), "a parked reservation was never answered"
            return  # its lease began at an instant in between that is not known here: it simply expires
        assert isinstance(reply, m.Reserved), reply
        status, region, block, generation = columns(reply)
        granted = np.nonzero(status == m.ReserveStatus.GRANTED)[0]
        places = [(int(region[i]), int(block[i])) for i in granted]
        assert len(set(places)) == len(places), "one block granted twice in a batch"
        for place, new in zip(places, generation[granted], strict=True):
            assert int(new) > self.last_generation.get(place, 0), "generation went back or stayed"
            self.last_generation[place] = int(new)
            for held in self.reads:
                assert place not in held.places or self.h.now_ns >= held.until_ns, "granted under a read lease"
            for held in self.writes:
                assert place not in held.places or self.h.now_ns >= held.until_ns, "two writers on one block"
            assert self.h.now_ns >= self.late_writers.get(place, 0), "reused before its quarantine was over"
        for i in np.nonzero(status == m.ReserveStatus.EXISTS)[0]:
            assert keys[int(i)] in self.committed, "says it exists, but it was never committed"
        if len(granted):
            self.writes.append(
                Held(
                    reply.lease,
                    who,
                    [keys[int(i)] for i in granted],
                    places,
                    [int(generation[i]) for i in granted],
                    self.h.now_ns + min(ttl_ms, 20_000) * MS,
                )
            )

    @rule(chain=chains, part=slices, who=st.integers(0, 1))
    def put(self, chain: int, part: slice, who: int) -> None:
        """What writers mostly do; without it the pool would stay empty."""
        self.reserve(chain, part, who, 5000)
        if self.writes and self.writes[-1].until_ns == self.h.now_ns + 5000 * MS:
            self.finish(self.writes[-1], partly=False)

    @rule(chain=chains, part=slices, who=st.integers(0, 1))
    def put_and_read(self, chain: int, part: slice, who: int) -> None:
        self.put(chain, part, who)
        self.acquire(chain, part, 1 - who, False, 4000)

    @precondition(lambda self: self.writes)
    @rule(data=st.data(), partly=st.booleans())
    def commit(self, data: st.DataObject, partly: bool) -> None:
        self.finish(data.draw(st.sampled_from(self.writes)), partly)

    def finish(self, held: Held, partly: bool) -> None:
        self.writes.remove(held)
        session, peer = self.sessions[held.session]
        mask = [not partly or i % 2 == 0 for i in range(len(held.keys))]
        reply = self.h.ask(m.Commit(lease=held.lease, stored=bytes(mask)), session=session, peer=peer)
        if self.h.now_ns < held.until_ns:
            assert isinstance(reply, m.Committed), "refused within the client's view of the lease"
        if isinstance(reply, m.Committed):
            for i, status in enumerate(reply.status):
                if status == m.CommitStatus.STORED:
                    assert mask[i]
                    self.committed[held.keys[i]] = (held.places[i], held.generation[i])
        else:
            self.vanish(held)
        assert self.h.repeat(self.h.last_sequence) == reply, "the same token got another answer"

    @precondition(lambda self: self.writes)
    @rule(data=st.data(), flushed=st.booleans())
    def abort(self, data: st.DataObject, flushed: bool) -> None:
        held = data.draw(st.sampled_from(self.writes))
        self.writes.remove(held)
        session, peer = self.sessions[held.session]
        reply = self.h.ask(m.Abort(lease=held.lease, flushed=flushed), session=session, peer=peer)
        if isinstance(reply, m.Refused) or not flushed:
            self.vanish(held)

    def vanish(self, held: Held) -> None:
        for place in held.places:
            self.late_writers[place] = held.until_ns + QUARANTINE_MS * MS

    @precondition(lambda self: self.writes)
    @rule(data=st.data())
    def someone_elses_lease(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from(self.writes))
        session, peer = self.sessions[1 - held.session]
        for body in (m.Commit(lease=held.lease, stored=b"\1" * len(held.keys)), m.Abort(lease=held.lease)):
            assert isinstance(self.h.ask(body, session=session, peer=peer), m.Refused)

    # --- reading ---

    @rule(chain=chains, part=slices, who=st.integers(0, 1), prefix=st.booleans(), ttl_ms=st.integers(50, 5000))
    def acquire(self, chain: int, part: slice, who: int, prefix: bool, ttl_ms: int) -> None:
        keys = CHAINS[chain][part]
        session, peer = self.sessions[who]
        matched = self.h.match(session, keys, peer=peer)
        reply = self.h.acquire(session, keys, ttl_ms=ttl_ms, prefix=prefix, peer=peer)
        assert isinstance(reply, m.Acquired), reply
        status, region, block, generation = columns(reply)
        granted = np.nonzero(status == m.AcquireStatus.GRANTED)[0]
        leading = len(status) if status.all() else int(np.argmin(status))
        assert leading == matched, "match and acquire disagree"
        if prefix:
            assert len(granted) == matched
        places = []
        for i in granted:
            place = (int(region[i]), int(block[i]))
            assert self.committed[keys[int(i)]] == (place, int(generation[i])), "location of another write"
            places.append(place)
        if len(granted):
            names = [keys[int(i)] for i in granted]
            until_ns = self.h.now_ns + ttl_ms * MS
            self.reads.append(Held(reply.lease, who, names, places, [int(generation[i]) for i in granted], until_ns))

    @precondition(lambda self: self.reads)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from(self.reads))
        self.reads.remove(held)
        session, peer = self.sessions[held.session]
        assert self.h.ask(m.Release(leases=[held.lease]), session=session, peer=peer) == m.Done()

    @precondition(lambda self: self.reads or self.writes)
    @rule(data=st.data(), ttl_ms=st.integers(50, 5000))
    def renew(self, data: st.DataObject, ttl_ms: int) -> None:
        held = data.draw(st.sampled_from(self.reads + self.writes))
        session, peer = self.sessions[held.session]
        reply = self.h.ask(m.Renew(leases=[held.lease], ttl_ns=ttl_ms * MS), session=session, peer=peer)
        assert isinstance(reply, m.Renewed)
        if reply.ttl_ns[0]:
            held.until_ns = max(held.until_ns, self.h.now_ns + reply.ttl_ns[0])
        else:
            assert self.h.now_ns >= held.until_ns or not all(self.alive(place) for place in held.places)

    # --- everything else ---

    @rule(chain=chains, at=st.integers(0, 11))
    def remove(self, chain: int, at: int) -> None:
        keys = CHAINS[chain][at : at + 1]
        session, peer = self.sessions[0]
        reply = self.h.ask(m.Remove(keys=keys.keys.tobytes()), session=session, peer=peer)
        assert isinstance(reply, m.Removed)
        for key in keys:
            self.committed.pop(key, None)
        assert self.h.match(session, keys, peer=peer) == 0

    @rule(ms=st.sampled_from([1, 60, 700, 4000, 9000]))
    def time_passes(self, ms: int) -> None:
        self.h.tick(ms)
        self.expire()

    def expire(self) -> None:
        self.map_regions()
        for held in list(self.writes):
            if self.h.now_ns > held.until_ns + 100 * MS:
                self.writes.remove(held)
                self.vanish(held)
        self.reads = [held for held in self.reads if self.h.now_ns < held.until_ns + 10_000 * MS]

    @precondition(lambda self: len(self.h.nodes) > 1)
    @rule(data=st.data(), orderly=st.booleans(), back=st.booleans())
    def node_goes(self, data: st.DataObject, orderly: bool, back: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.h.nodes)))
        incarnation = self.h.nodes.pop(name)
        if orderly:
            self.h.ask(m.Unregister(node=name, incarnation=incarnation), peer=name.encode())
        else:
            self.h.tick(2200)
            late = self.h.ask(m.Heartbeat(node=name, incarnation=incarnation), peer=name.encode())
            assert isinstance(late, m.Refused)
        self.expire()
        assert not any(region.node == name for region in self.h.core.state.cluster.regions.values())
        if back:
            assert isinstance(self.h.join(name, regions=1), m.Registered)
            self.map_regions()

    @rule(data=st.data(), chain=chains, undo=st.integers(0, 3))
    def drain(self, data: st.DataObject, chain: int, undo: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.h.nodes)))
        session, peer = self.sessions[0]
        assert self.h.ask(m.NodeDrain(node=name), session=session, peer=peer) == m.Done()
        before = len(self.writes)
        self.reserve(chain, slice(0, 12), 0, 1000)
        for held in self.writes[before:]:
            assert all(self.node_of[region] != name for region, _ in held.places), "new block on a draining node"
        if undo:
            assert self.h.ask(m.NodeDrain(node=name, undo=True), session=session, peer=peer) == m.Done()

    @rule(sequence=st.integers(1, 50))
    def replay(self, sequence: int) -> None:
        """An old frame comes again, from its own peer and from a stranger: nothing may change."""
        if sequence not in self.h._requests:
            return
        _peer, request = self.h._requests[sequence]
        if isinstance(request.body, (m.Commit, m.Reserve, m.Acquire, m.Remove, m.Abort)):
            stranger = self.h.ask(request.body, session=request.session, peer=b"stranger", sequence=10**9)
            assert isinstance(stranger, m.Refused)
            del self.h._requests[10**9]
            leases = len(self.h.core.state.leases)
            self.h.repeat(sequence)
            assert len(self.h.core.state.leases) <= leases


TestCore = CoreMachine.TestCase
TestCore.settings = settings(
    max_examples=100, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
