"""Directed tests of the server core: one sentence of the contract each."""

from __future__ import annotations

import numpy as np
import pytest

from memfabric.core import messages as m
from memfabric.core.fingerprint import Fingerprint
from memfabric.core.keys import BlockKeys
from memfabric.core.leases import server_deadline_ns
from memfabric.core.state import Paused
from memfabric.errors import RefusalCode
from tests.core.harness import BLOCK_BYTES, MS, REGION_BYTES, Harness, chain, columns

STORED, EXISTS, PENDING, NO_SPACE, QUOTA = 0, 1, 2, 3, 4


@pytest.fixture
def h() -> Harness:
    harness = Harness()
    harness.join("a", regions=1)
    harness.join("b", regions=1)
    return harness


# --- put and get -------------------------------------------------------------------------------------------------


def test_a_block_is_readable_only_after_commit(h: Harness) -> None:
    session, keys = h.attach(), chain(1, 4)
    reserved = h.reserve(session, keys)
    assert h.match(session, keys) == 0
    assert h.ask(m.Commit(lease=reserved.lease, stored=b"\1\1\0\1"), session=session).status == bytes([0, 0, 1, 0])
    assert h.match(session, keys) == 2
    status, _, _, _ = columns(h.acquire(session, keys))
    assert status.tolist() == [1, 1, 0, 1]


def test_the_same_key_twice_at_once_has_one_winner(h: Harness) -> None:
    session, keys = h.attach(), chain(1, 3)
    other = h.attach(peer=b"other")
    first = h.reserve(session, keys)
    assert columns(h.reserve(other, keys, peer=b"other"))[0].tolist() == [PENDING] * 3
    h.ask(m.Commit(lease=first.lease, stored=b"\1\1\1"), session=session)
    assert h.put(other, keys, peer=b"other").tolist() == [EXISTS] * 3


def test_an_aborted_write_frees_at_once_a_vanished_one_after_quarantine(h: Harness) -> None:
    session, keys = h.attach(), chain(1, 30)  # all blocks of both regions
    reserved = h.reserve(session, keys, ttl_ms=1000)
    h.ask(m.Abort(lease=reserved.lease, flushed=True), session=session)
    reserved = h.reserve(session, keys, ttl_ms=1000)
    assert columns(reserved)[0].tolist() == [STORED] * 30
    h.tick(1100)
    assert h.info().quarantined == 30
    again = h.reserve(session, chain(2, 1))
    assert columns(again)[0].tolist() == [NO_SPACE]
    assert "30 in quarantine" in again.message
    assert again.retry_after_ns > 0
    h.tick(h.core.state.config.quarantine_ns / MS + 100)
    assert h.put(session, chain(2, 1)).tolist() == [STORED]


def test_a_late_commit_is_refused_and_stores_nothing(h: Harness) -> None:
    session, keys = h.attach(), chain(1, 2)
    reserved = h.reserve(session, keys, ttl_ms=500)
    h.tick(600)
    reply = h.ask(m.Commit(lease=reserved.lease, stored=b"\1\1"), session=session)
    assert reply.code == RefusalCode.LEASE_EXPIRED
    assert h.match(session, keys) == 0


def test_a_stale_commit_cannot_publish_a_newer_put_of_the_same_client(h: Harness) -> None:
    session, keys = h.attach(), chain(1, 1)
    old = h.reserve(session, keys, ttl_ms=500)
    h.tick(600)
    new = h.reserve(session, keys)
    assert h.ask(m.Commit(lease=old.lease, stored=b"\1"), session=session).code == RefusalCode.LEASE_EXPIRED
    assert h.match(session, keys) == 0
    assert h.ask(m.Commit(lease=new.lease, stored=b"\1"), session=session).status == b"\0"


def test_the_server_waits_longer_than_the_client_believes() -> None:
    assert server_deadline_ns(0, 10_000 * MS) > 10_000 * MS * 1.0005


def test_a_read_lease_keeps_blocks_and_a_removed_one_goes_with_its_last_lease(h: Harness) -> None:
    session, keys = h.attach(), chain(1, 2)
    h.put(session, keys)
    lease = h.acquire(session, keys)
    assert h.ask(m.Remove(keys=keys.keys.tobytes()), session=session).status == bytes([m.RemoveStatus.BUSY] * 2)
    assert h.match(session, keys) == 0
    assert h.core.state.by_name["ns"].doomed == 2
    h.ask(m.Release(leases=[lease.lease]), session=session)
    assert h.core.state.by_name["ns"].used == 0


def test_a_failure_report_drops_only_that_generation(h: Harness) -> None:
    session, keys = h.attach(), chain(1, 1)
    h.put(session, keys)
    generation = columns(h.acquire(session, keys))[3]
    stale = m.ReportFailure(keys=keys.keys.tobytes(), generation=(generation - 1).tobytes())
    assert h.ask(stale, session=session).status == bytes([m.RemoveStatus.MISSING])
    assert h.match(session, keys) == 1
    report = m.ReportFailure(keys=keys.keys.tobytes(), generation=generation.tobytes())
    assert h.ask(report, session=session).status == bytes([m.RemoveStatus.REMOVED])
    assert h.match(session, keys) == 0
    assert h.info().counters["corrupt_blocks"] == 1


def test_kv_events_have_no_gaps_and_say_why(h: Harness) -> None:
    session = h.attach()
    h.put(session, chain(1, 3))
    h.ask(m.Remove(keys=chain(1, 3).keys.tobytes()), session=session)
    events = [p.message for p in h.published if isinstance(p.message, m.KvEvent)]
    assert [event.sequence for event in events] == [1, 2]
    topics = [p.topic for p in h.published if isinstance(p.message, m.KvEvent)]
    assert topics == [b"kv/ns\0stored", b"kv/ns\0removed"]
    assert events[0].stored == chain(1, 3).keys.tobytes()
    assert events[0].stored_parents == chain(1, 3).parents.tobytes()
    assert events[1].removed == chain(1, 3).keys.tobytes()
    assert events[1].cause == "removed"


# --- eviction ----------------------------------------------------------------------------------------------------


def test_leaves_go_before_their_parents_and_the_oldest_chain_first(h: Harness) -> None:
    session = h.attach(high_ratio=1.0, low_ratio=1.0)
    for seed in (1, 2):
        h.put(session, chain(seed, 12))
        h.tick(10)
    h.match(session, chain(1, 12))  # chain 2 is the older one now
    assert h.put(session, chain(3, 10)).tolist() == [STORED] * 10
    assert h.match(session, chain(1, 12)) == 12
    assert h.match(session, chain(2, 12)) == 8  # lost its last four


def test_a_shared_prefix_outlives_its_branches(h: Harness) -> None:
    session = h.attach(high_ratio=1.0, low_ratio=1.0)
    trunk = chain(1, 6)
    branches = [BlockKeys.chain(np.concatenate([trunk.keys, chain(seed, 8).keys])) for seed in (10, 11, 12)]
    for branch in branches:
        h.put(session, branch)
        h.tick(10)
    h.put(session, chain(4, 8))
    assert h.match(session, branches[0]) == 6
    assert h.match(session, branches[2]) == 14


def test_nothing_evictable_says_what_holds_the_space(h: Harness) -> None:
    session, keys = h.attach(), chain(1, 30)
    h.put(session, keys)
    h.acquire(session, keys)
    reply = h.reserve(session, chain(2, 2))
    assert columns(reply)[0].tolist() == [NO_SPACE, NO_SPACE]
    assert "30 readable (30 under read leases, 0 pinned)" in reply.message
    assert h.match(session, keys) == 30


def test_pinned_blocks_outlive_eviction_and_ttl_until_unpinned_or_removed(h: Harness) -> None:
    session = h.attach(ttl_ns=1000 * MS)
    keys = chain(1, 4)
    h.put(session, keys)
    pin = m.Pin(keys=keys.keys.tobytes() + chain(9, 1).keys.tobytes())
    assert h.ask(pin, session=session).status == b"\1\1\1\1\0"
    h.tick(3000)
    assert h.match(session, keys) == 4
    assert h.put(session, chain(2, 30)).tolist() == [STORED] * 26 + [NO_SPACE] * 4
    assert h.match(session, keys) == 4
    assert "it is pinned" in h.ask(m.Explain(key=keys[3]), session=session).doc["not_evictable_because"]
    assert h.ask(m.Pin(keys=keys[3], pinned=False), session=session).status == b"\1"
    assert h.ask(m.Remove(keys=keys[2]), session=session).status == bytes([m.RemoveStatus.REMOVED])
    h.tick(3000)
    assert h.info().blocks == 2
    assert h.match(session, keys) == 2


def test_quota_evicts_own_blocks_only(h: Harness) -> None:
    session = h.attach(quota_bytes=4 * BLOCK_BYTES, high_ratio=1.0, low_ratio=1.0)
    h.put(session, chain(1, 4))
    h.tick(10)
    assert h.put(session, chain(2, 3)).tolist() == [STORED] * 3
    assert h.info().blocks == 4
    assert h.match(session, chain(1, 4)) == 1
    reply = h.reserve(session, chain(3, 6))
    assert columns(reply)[0].tolist() == [STORED] * 4 + [QUOTA] * 2
    assert "quota" in reply.message


def test_blocks_reported_as_existing_are_not_evicted_for_the_same_batch(h: Harness) -> None:
    session = h.attach(high_ratio=1.0, low_ratio=1.0)
    h.put(session, chain(1, 28))
    longer = BlockKeys.chain(np.concatenate([chain(1, 28).keys, chain(2, 10).keys]))
    assert h.put(session, longer).tolist() == [EXISTS] * 28 + [STORED] * 2 + [NO_SPACE] * 8
    assert h.match(session, longer) == 30


def test_watermark_makes_room_ahead_of_need(h: Harness) -> None:
    session = h.attach(high_ratio=0.8, low_ratio=0.5)
    h.put(session, chain(1, 28))
    h.tick(200)
    assert h.info().blocks == 15
    assert h.match(session, chain(1, 28)) == 15


def test_window_lru_keeps_reused_blocks_through_a_scan(h: Harness) -> None:
    for policy, survives in (("window-lru", 8), ("lru", 0)):
        session = h.attach(policy, peer=policy.encode(), policy=policy, quota_bytes=20 * BLOCK_BYTES)
        peer = policy.encode()
        h.put(session, chain(1, 8), peer=peer)
        h.tick(10)
        assert h.match(session, chain(1, 8), peer=peer) == 8
        for seed in range(20, 26):
            h.tick(10)
            h.put(session, chain(seed, 8), peer=peer)
        assert h.match(session, chain(1, 8), peer=peer) == survives
        h.ask(m.NamespaceDelete(name=policy, force=True), session=session, peer=peer)


def test_ttl_since_last_use_and_since_writing(h: Harness) -> None:
    for policy, survives in (("lru", 4), ("ttl", 0)):
        session = h.attach(policy, peer=policy.encode(), policy=policy, ttl_ns=1000 * MS)
        h.put(session, chain(1, 4), peer=policy.encode())
        h.tick(700)
        assert h.match(session, chain(1, 4), peer=policy.encode()) == 4
        h.tick(700)
        assert h.match(session, chain(1, 4), peer=policy.encode()) == survives
        h.tick(1200)
        assert h.info(policy).blocks == 0
        assert h.info(policy).counters["expired_blocks"] == 4


def test_a_chain_is_spread_over_nodes_in_runs(h: Harness) -> None:
    big = Harness()
    for name in ("a", "b", "c"):
        big.join(name, regions=8)
    session = big.attach(block_bytes=4096)
    _, region, _, _ = columns(big.reserve(session, chain(1, 192)))
    nodes = [big.core.state.cluster.regions[int(number)].node for number in region]
    runs = [nodes[i : i + 16] for i in range(0, 192, 16)]
    assert all(len(set(run)) == 1 for run in runs)
    assert sorted(run[0] for run in runs) == ["a"] * 4 + ["b"] * 4 + ["c"] * 4


# --- nodes -------------------------------------------------------------------------------------------------------


def test_a_silent_node_is_dead_in_time_and_its_blocks_are_misses(h: Harness) -> None:
    session, keys = h.attach(), chain(1, 30)
    h.put(session, keys)
    lease = h.acquire(session, keys)
    incarnation = h.nodes.pop("a")
    h.tick(2150)
    status, _, _, _ = columns(h.acquire(session, keys))
    assert status.sum() == 15
    assert h.info().counters["lost_blocks"] == 15
    late = h.ask(m.Heartbeat(node="a", incarnation=incarnation), peer=b"a")
    assert late.code == RefusalCode.STALE_INCARNATION
    assert h.ask(m.Release(leases=[lease.lease]), session=session) == m.Done()
    views = [p.message for p in h.published if isinstance(p.message, m.View)]
    assert [node.name for node in views[-1].nodes] == ["b"]


def test_a_write_to_a_dead_node_is_reported_lost(h: Harness) -> None:
    session, keys = h.attach(), chain(1, 30)
    reserved = h.reserve(session, keys)
    h.nodes.pop("a")
    h.tick(2150)
    done = h.ask(m.Commit(lease=reserved.lease, stored=b"\1" * 30), session=session)
    assert sorted(done.status) == [m.CommitStatus.STORED] * 15 + [m.CommitStatus.LOST] * 15


def test_two_nodes_with_one_name(h: Harness) -> None:
    incarnation = h.nodes["a"]
    reply = h.join("a", incarnation=99)
    assert reply.code == RefusalCode.NODE_NAME_TAKEN
    assert "alive" in reply.message
    h.nodes["a"] = incarnation
    h.nodes.pop("a")
    h.tick(2150)
    assert isinstance(h.join("a", incarnation=99), m.Registered)


def test_a_pause_of_the_server_kills_nobody(h: Harness) -> None:
    h.attach()
    h.now_ns += 60_000 * MS
    h._handle(Paused(60_000 * MS))
    assert {node.state for node in h.core.state.cluster.nodes.values()} == {m.NodeState.ACTIVE}
    assert len(h.core.state.sessions) == 1


def test_a_full_namespace_waits_for_a_region_that_is_being_assigned() -> None:
    h = Harness()
    h.join("a", regions=3)
    session = h.attach()
    h.deaf.add("a")
    assert h.put(session, chain(1, 8)).tolist() == [STORED] * 8  # over half full: another region is asked for
    assert h.reserve(session, chain(2, 10)) is None  # parked
    sequence = h.last_sequence
    assert h.repeat(sequence) is None  # a retry of a parked request does not park twice
    h.deaf.clear()
    h.tick(1100)  # the command is sent again and answered now
    assert columns(h.replies[sequence])[0].tolist() == [STORED] * 10


def test_a_parked_reservation_is_answered_even_if_the_node_never_does() -> None:
    h = Harness()
    h.join("a", regions=3)
    session = h.attach()
    h.deaf.add("a")
    h.put(session, chain(1, 15))
    h.acquire(session, chain(1, 15))
    assert h.reserve(session, chain(2, 4)) is None
    sequence = h.last_sequence
    h.tick(2200)
    assert columns(h.replies[sequence])[0].tolist() == [NO_SPACE] * 4


def test_a_namespace_without_room_gets_its_share_of_regions_from_the_largest() -> None:
    h = Harness()
    h.join("a", regions=4)
    first = h.attach("first", peer=b"1")
    for seed in range(4):
        h.put(first, chain(seed, 15), peer=b"1")
        h.tick(10)
    assert h.info("first").regions == 4
    h.acquire(first, chain(3, 15), peer=b"1")
    second = h.attach("second", peer=b"2")
    h.reserve(second, chain(9, 4), peer=b"2")  # waits while a region is emptied and scrubbed
    granted = [reply for reply in h.replies.values() if isinstance(reply, m.Reserved)][-1]
    assert columns(granted)[0].tolist() == [STORED] * 4
    assert h.match(first, chain(3, 15), peer=b"1") == 15  # what is under lease, and hot, stays
    assert h.match(first, chain(0, 15), peer=b"1") == 0
    assert h.put(second, chain(10, 15), peer=b"2").tolist() == [STORED] * 15
    h.tick(300)
    assert (h.info("first").regions, h.info("second").regions) == (2, 2)


def test_a_region_changes_hands_scrubbed_and_only_after_quarantine() -> None:
    h = Harness()
    h.join("a", regions=1)
    session = h.attach("one")
    h.put(session, chain(1, 3))
    h.reserve(session, chain(2, 3), ttl_ms=60_000)  # still writing when the namespace goes
    admin = h.ask(m.Attach(nonce=b"admin"), peer=b"admin").session
    refused = h.ask(m.NamespaceDelete(name="one"), session=admin, peer=b"admin")
    assert refused.code == RefusalCode.NAMESPACE_BUSY
    assert h.ask(m.NamespaceDelete(name="one", force=True), session=admin, peer=b"admin") == m.Done()
    other = h.attach("two", peer=b"two")
    reply = h.reserve(other, chain(5, 1), peer=b"two")
    assert columns(reply)[0].tolist() == [NO_SPACE]
    h.tick(75_000)
    assert h.put(h.attach("two", peer=b"two2"), chain(5, 1), peer=b"two2").tolist() == [STORED]
    assigned = [command.body for command in h.commands if isinstance(command.body, m.Assign)]
    assert [(body.namespace, body.scrub) for body in assigned] == [("one", False), ("two", True)]


# --- sessions and bad input --------------------------------------------------------------------------------------


def test_the_same_token_has_one_effect(h: Harness) -> None:
    session, keys = h.attach(), chain(1, 3)
    reply = h.reserve(session, keys)
    assert h.repeat(h.last_sequence) == reply
    assert len(h.core.state.leases) == 1


def test_a_forgotten_token_is_refused_not_executed_again(h: Harness) -> None:
    session = h.attach()
    h.reserve(session, chain(1, 1))
    first = h.last_sequence
    for i in range(300):
        h.ask(m.Release(leases=[i]), session=session)
    assert h.repeat(first).code == RefusalCode.STALE_TOKEN
    assert len(h.core.state.leases) == 1


def test_attach_is_idempotent_and_sessions_belong_to_their_connection(h: Harness) -> None:
    session = h.attach()
    assert h.attach() == session
    replayed = h.ask(m.Attach(nonce=b"client", namespace="ns"), peer=b"thief")
    assert replayed.code == RefusalCode.BAD_REQUEST
    reply = h.ask(m.Match(keys=b"k" * 16), session=session, peer=b"thief")
    assert reply.code == RefusalCode.UNKNOWN_SESSION


def test_a_client_that_detaches_leaves_nothing(h: Harness) -> None:
    session, keys = h.attach(), chain(1, 3)
    h.put(session, keys)
    h.acquire(session, keys)
    h.reserve(session, chain(2, 3))
    assert h.ask(m.Detach(), session=session) == m.Done()
    assert len(h.core.state.sessions) == len(h.core.state.leases) == 0
    assert h.core.state.by_name["ns"].used == 3


def test_a_silent_client_loses_its_leases(h: Harness) -> None:
    session, keys = h.attach(), chain(1, 3)
    h.put(session, keys)
    h.acquire(session, keys, ttl_ms=60_000)
    h.tick(31_000)
    assert len(h.core.state.leases) == 0
    assert h.ask(m.Match(keys=keys.keys.tobytes()), session=session).code == RefusalCode.UNKNOWN_SESSION


def test_another_fingerprint_is_refused_by_field_name(h: Harness) -> None:
    fingerprint = Fingerprint(model="m", dtype="bfloat16", layers=2)
    h.attach(fingerprint=fingerprint)
    other = Fingerprint(model="m", dtype="float32", layers=2)
    reply = h.ask(m.Attach(nonce=b"x", namespace="ns", fingerprint=other), peer=b"x")
    assert reply.code == RefusalCode.FINGERPRINT
    assert "dtype: 'float32' asked, 'bfloat16' stored" in reply.message
    assert "layers" not in reply.message
    spec = m.NamespaceSpec(name="ns", block_bytes=2 * BLOCK_BYTES, fingerprint=fingerprint)
    reply = h.ask(m.Attach(nonce=b"x", namespace="ns", create=spec), peer=b"x")
    assert reply.code == RefusalCode.FINGERPRINT
    assert "block_bytes" in reply.message


def test_unknown_namespace_names_the_known_ones(h: Harness) -> None:
    h.attach("known")
    reply = h.ask(m.Attach(nonce=b"x", namespace="typo"), peer=b"x")
    assert reply.code == RefusalCode.UNKNOWN_NAMESPACE
    assert "known" in reply.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "../etc"),
        ("name", ""),
        ("name", "a b"),
        ("name", "x" * 65),
        ("name", "ümlaut"),
        ("block_bytes", 0),
        ("block_bytes", -1),
        ("block_bytes", 1 << 40),
        ("block_tokens", 0),
        ("segments", 0),
        ("segments", 7),
        ("policy", "magic"),
        ("quota_bytes", -1),
        ("quota_bytes", 1),
        ("ttl_ns", -5),
        ("window_ratio", 0.0),
        ("high_ratio", 2.0),
        ("low_ratio", float("nan")),
    ],
)
def test_an_impossible_namespace_is_refused_and_not_there(h: Harness, field: str, value: object) -> None:
    spec = m.NamespaceSpec(**{"name": "ns", "block_bytes": BLOCK_BYTES, field: value})
    admin = h.ask(m.Attach(nonce=b"admin"), peer=b"admin").session
    reply = h.ask(m.NamespaceCreate(spec=spec), session=admin, peer=b"admin")
    assert isinstance(reply, m.Refused)
    assert not h.core.state.namespaces


KEY = chain(1, 1).keys.tobytes()
TOKENS = np.full(1, 16, np.uint32).tobytes()


@pytest.mark.parametrize(
    "body",
    [
        m.Match(keys=b""),
        m.Match(keys=b"short"),
        m.Match(keys=b"x" * 16 * 8193),
        m.Acquire(keys=KEY, ttl_ns=0),
        m.Acquire(keys=KEY, ttl_ns=-1),
        m.Reserve(keys=KEY, parents=b"", tokens=TOKENS, ttl_ns=1),
        m.Reserve(keys=KEY, parents=KEY, tokens=b"", ttl_ns=1),
        m.Reserve(keys=KEY * 2, parents=KEY * 2, tokens=TOKENS * 2, ttl_ns=1),
        m.Reserve(keys=bytes(16), parents=KEY, tokens=TOKENS, ttl_ns=1),
        m.Reserve(keys=KEY, parents=bytes(16), tokens=np.full(1, 17, np.uint32).tobytes(), ttl_ns=1),
        m.Reserve(keys=KEY, parents=bytes(16), tokens=np.full(1, 0, np.uint32).tobytes(), ttl_ns=1),
        m.Reserve(keys=KEY, parents=bytes(16), tokens=np.full(1, 9, np.uint32).tobytes(), ttl_ns=1),
        m.Commit(lease=12345, stored=b"\1"),
        m.Abort(lease=-1),
        m.Renew(leases=[1], ttl_ns=0),
        m.Remove(keys=KEY + KEY),
        m.ReportFailure(keys=KEY, generation=b"\0"),
        m.Explain(key=KEY + KEY),
        m.NamespaceDelete(name="nope"),
        m.NodeDrain(node="nope"),
    ],
)
def test_bad_requests_are_refused_and_change_nothing(h: Harness, body: object) -> None:
    session = h.attach()
    before = h.info(), len(h.core.state.leases)
    reply = h.ask(body, session=session)
    assert isinstance(reply, m.Refused), reply
    assert reply.message
    assert (h.info(), len(h.core.state.leases)) == before


def test_a_key_that_names_itself_or_a_later_one_as_parent_makes_no_cycle(h: Harness) -> None:
    session = h.attach(high_ratio=1.0, low_ratio=1.0)
    keys = chain(1, 2).keys
    loop = BlockKeys(keys, np.ascontiguousarray(keys[::-1]))
    assert h.put(session, loop).tolist() == [STORED, STORED]
    own = BlockKeys(chain(2, 1).keys, chain(2, 1).keys)
    assert h.put(session, own).tolist() == [STORED]
    for seed in range(10, 20):
        h.tick(5)
        assert h.put(session, chain(seed, 10)).tolist() == [STORED] * 10  # everything stayed evictable
    assert h.match(session, own) == 0


def test_register_refuses_nonsense(h: Harness) -> None:
    offer = m.RegionOffer(region_id=10**6, size_bytes=REGION_BYTES, descriptor=b"d")
    bad = [
        m.Register(node="../x", incarnation=1, host="h", regions=[offer]),
        m.Register(node="c", incarnation=1, host="h", regions=[offer, offer]),
        m.Register(
            node="c",
            incarnation=1,
            host="h",
            regions=[m.RegionOffer(region_id=5000, size_bytes=-1, descriptor=b"")],
        ),
        m.Register(
            node="c",
            incarnation=1,
            host="h",
            regions=[m.RegionOffer(region_id=1, size_bytes=REGION_BYTES, descriptor=b"d")],  # node a's region
        ),
    ]
    for body in bad:
        assert isinstance(h.ask(body, peer=b"c"), m.Refused)
    assert set(h.core.state.cluster.nodes) == {"a", "b"}


def test_explain_and_list_tell_the_story(h: Harness) -> None:
    session, keys = h.attach(), chain(1, 5)
    h.put(session, keys)
    h.acquire(session, keys[4:])
    doc = h.ask(m.Explain(key=keys[4]), session=session).doc
    assert doc["state"] == "complete"
    assert doc["depth"] == 4
    assert doc["parent"] == keys[3].hex()
    assert not doc["evictable"]
    assert doc["not_evictable_because"] == ["1 read lease"]
    assert h.ask(m.Explain(key=chain(9, 1)[0]), session=session).doc["state"] == "not stored"
    seen: list[bytes] = []
    cursor = 0
    while True:
        page = h.ask(m.ListBlocks(cursor=cursor, limit=2), session=session)
        seen += list(BlockKeys.chain(np.frombuffer(page.keys, np.uint8).reshape(-1, 16)))
        cursor = page.cursor
        if not cursor:
            break
    assert sorted(seen) == sorted(keys)
