"""Readers that vanish with leases, and writers that race for the same key."""

from __future__ import annotations

from pathlib import Path

import pytest

from memfabric.client import GetStatus
from memfabric.core.messages import NamespaceSpec
from tests.processes.harness import MIB, MS, Pool, eventually
from tests.processes.records import judge

SPEC = NamespaceSpec(name="readers", block_bytes=65536, segments=2, high_ratio=1.0, low_ratio=1.0)
PUT_STORED, PUT_EXISTS, PUT_PENDING, PUT_NO_SPACE = 0, 1, 2, 3


@pytest.mark.parametrize("ends_by", ["lease", "session"])
def test_pins_of_a_killed_reader_go(tmp_path: Path, ends_by: str) -> None:
    """With its lease if that is short, else with its session."""
    ttl_s, session_ms = (1.0, 600_000) if ends_by == "lease" else (50.0, 1500)
    with Pool(tmp_path, SPEC, session_ttl_ns=session_ms * MS, dead_ns=30_000 * MS) as pool:
        pool.start_node("a", 1 * MIB)
        pool.wait_nodes("a")
        capacity = pool.namespace().capacity_blocks
        reader, writer = pool.puppet("reader"), pool.puppet("writer")
        assert writer.ask("put", chain=1, count=capacity)["status"] == [PUT_STORED] * capacity
        assert reader.ask("acquire", chain=1, count=capacity, ttl_s=ttl_s)["granted"] == [True] * capacity
        put = writer.ask("put", chain=2, count=1)
        assert put["status"] == [PUT_NO_SPACE] and "under read leases" in put["message"], put
        assert writer.ask("remove", chain=1, count=1)["status"] == [2], "busy: freed when the lease ends"
        reader.kill()
        eventually(lambda: writer.ask("put", chain=2, count=capacity)["status"] == [PUT_STORED] * capacity, "room")
        with pool.admin() as admin:
            leases = admin.status()["leases"]
        assert leases["read"] == 0
        pool.shut_down()


def test_frozen_reader_never_takes_what_it_read_after_its_lease_for_good(tmp_path: Path) -> None:
    """It sleeps through its lease, its blocks are reused; what it then reads is refused or right."""
    with Pool(tmp_path, SPEC, session_ttl_ns=1500 * MS, dead_ns=30_000 * MS) as pool:
        pool.start_node("a", 1 * MIB)
        pool.wait_nodes("a")
        capacity = pool.namespace().capacity_blocks
        reader, writer = pool.puppet("reader"), pool.puppet("writer")
        for round_number in range(3):
            old, new = 10 + 2 * round_number, 11 + 2 * round_number
            eventually(
                lambda old=old: set(writer.ask("put", chain=old, count=capacity)["status"]) <= {PUT_STORED, PUT_EXISTS},
                "stored",
            )
            assert all(reader.ask("acquire", chain=old, count=capacity, ttl_s=0.3)["granted"])
            reader.freeze()
            eventually(
                lambda new=new: set(writer.ask("put", chain=new, count=capacity)["status"]) <= {PUT_STORED, PUT_EXISTS},
                "the blocks are reused",
            )
            reader.thaw()
            read = reader.ask("read")
            assert not read["ok"] and read["code"] == "lease_expired", read
            # Known places of the old chain now hold the new one.
            got = reader.ask("get", chain=old, count=capacity)
            assert got["ok"] and not got["wrong"] and set(got["status"]) == {GetStatus.MISSING}
            got = reader.ask("get", chain=new, count=capacity)
            assert got["ok"] and not got["wrong"] and set(got["status"]) == {GetStatus.OK}
        judge(pool.records)
        pool.shut_down()


def test_two_clients_put_the_same_keys_at_once(tmp_path: Path) -> None:
    """Many rounds: exactly one stores each block, the other is told so, and nobody reads half."""
    rounds, blocks = 40, 12
    with Pool(tmp_path, SPEC, dead_ns=30_000 * MS) as pool:
        pool.start_node("a", 8 * MIB)
        pool.start_node("b", 8 * MIB)
        pool.wait_nodes("a", "b")
        writers = [pool.puppet("left"), pool.puppet("right")]
        readers = [pool.puppet("reader"), pool.puppet("reader-2")]
        contested = 0
        for number in range(rounds):
            wait = number % 2 == 0
            for reader in readers:
                reader.say(op="read_on", chain=number, count=blocks)
            for writer in writers:
                writer.say(op="put", chain=number, count=blocks, wait=wait)
            puts = [writer.wait_event("answer") for writer in writers]
            assert all(put["ok"] for put in puts), puts
            winners = []
            for position, pair in enumerate(zip(*(put["status"] for put in puts), strict=True)):
                assert sorted(pair)[0] == PUT_STORED and sorted(pair)[1] in (PUT_EXISTS, PUT_PENDING), (position, pair)
                assert not wait or PUT_PENDING not in pair, "it was to wait"
                winners.append(puts[pair.index(PUT_STORED)]["nonce"])
            contested += len(set(winners)) > 1 or any(PUT_PENDING in put["status"] for put in puts)
            for reader in readers:
                reader.say(op="enough")
                read = reader.wait_event("answer")
                reader.wait_event("answer")
                assert not read["wrong"] and set(read["nonces"]) <= set(winners), read
                assert set(read["statuses"]) <= {"OK", "MISSING"}, read
                got = reader.ask("get", chain=number, count=blocks)
                assert got["nonces"] == winners, got
        print(f"{contested} of {rounds} rounds met")
        judge(pool.records)
        pool.shut_down()


def test_two_clients_reserve_overlapping_chains(tmp_path: Path) -> None:
    """Both hold a part: each commits its own, and the chain is whole."""
    with Pool(tmp_path, SPEC, dead_ns=30_000 * MS) as pool:
        pool.start_node("a", 4 * MIB)
        pool.wait_nodes("a")
        left, right = pool.puppet("left"), pool.puppet("right")
        for chain in range(5):
            assert left.ask("reserve", chain=chain, count=5, ttl_s=20)["granted"] == [True] * 5
            assert right.ask("reserve", chain=chain, count=8, ttl_s=20)["granted"] == [False] * 5 + [True] * 3
            for writer in (right, left):
                writer.ask("write")
            assert right.ask("commit")["status"] == [PUT_PENDING] * 5 + [PUT_STORED] * 3
            assert right.ask("match", chain=chain, count=8)["count"] == 0
            assert left.ask("commit")["status"] == [PUT_STORED] * 5
            assert right.ask("match", chain=chain, count=8)["count"] == 8
            got = right.ask("get", chain=chain, count=8)
            assert got["status"] == [GetStatus.OK] * 8 and not got["wrong"]
            assert len(set(got["nonces"])) == 2
        judge(pool.records)
        pool.shut_down()
