"""Memory nodes that are killed, frozen, and come back."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from memfabric.client import GetStatus
from memfabric.core.messages import NamespaceSpec
from tests.processes import payload
from tests.processes.harness import MIB, MS, Pool, eventually
from tests.processes.load import Load

SPEC = NamespaceSpec(name="nodes", block_bytes=65536, segments=4)
CHAINS, BLOCKS = 12, 8


def _pool(scratch: Path, **options: int) -> Pool:
    return Pool(scratch, SPEC, **{"heartbeat_ns": 200 * MS, "dead_ns": 1200 * MS, **options})


def _put_chains(pool: Pool, nonce: int) -> None:
    with pool.connect() as client:
        for number in range(CHAINS):
            ids, keys = payload.chain(1000 + number, BLOCKS)
            result = client.put(keys, payload.fill_many(ids, nonce, SPEC.block_bytes), wait=True)
            assert result.ok, result


def _read_chains(client: object, *, leased: bool) -> dict[int, int]:
    """How often each status came; everything that is OK is checked."""
    counts: dict[int, int] = {}
    for number in range(CHAINS):
        ids, keys = payload.chain(1000 + number, BLOCKS)
        result = client.get(keys, leased=leased)  # type: ignore[attr-defined]
        for position, key_id in enumerate(ids):
            status = int(result.status[position])
            counts[status] = counts.get(status, 0) + 1
            if status == GetStatus.OK:
                nonce, wrong = payload.check(key_id, np.asarray(result.out[position]))
                assert not wrong, wrong
                assert nonce == 7
    return counts


def test_killed_node_blocks_become_misses_others_stay_and_it_joins_again(tmp_path: Path) -> None:
    with _pool(tmp_path) as pool:
        for name in ("a", "b"):
            pool.start_node(name, 16 * MIB)
        pool.wait_nodes("a", "b")
        _put_chains(pool, 7)
        load = Load(pool, seed=1, chains=8, chain_blocks=8).start(writers=1, readers=2)
        with pool.connect() as client:
            assert _read_chains(client, leased=True) == {GetStatus.OK: CHAINS * BLOCKS}
            pool.nodes["a"].kill()
            # Its memory is still mapped here: until the view says otherwise, known places may be read, rightly.
            assert set(_read_chains(client, leased=False)) <= {GetStatus.OK, GetStatus.MISSING, GetStatus.UNREACHABLE}
            pool.wait_nodes("b")
            after = _read_chains(client, leased=True)
            assert set(after) == {GetStatus.OK, GetStatus.MISSING}, "the other node's blocks stay"
            assert after == _read_chains(client, leased=False) == _read_chains(client, leased=True)

            left = {path.name for path in pool.region_files()}
            pool.start_node("a", 16 * MIB)
            pool.wait_nodes("a", "b")
            now = {path.name for path in pool.region_files()}
            gone = left - now
            assert len(gone) == 1, "what the killed node left was swept"
            assert gone.pop().startswith("memfabric.a.")
            assert len(now) == 2
            result = client.put(payload.chain(1000, BLOCKS)[1], np.zeros((BLOCKS, SPEC.block_bytes), np.uint8))
            assert result.ok
        load.finish()
        pool.shut_down()


def test_restart_of_a_killed_node_waits_for_its_own_death(tmp_path: Path) -> None:
    """Started again at once, under the same name, it waits until the server has given the old life up."""
    with _pool(tmp_path) as pool:
        pool.start_node("a")
        pool.wait_nodes("a")
        for _ in range(3):
            pool.nodes["a"].kill()
            pool.start_node("a")
        pool.wait_nodes("a")
        assert len(pool.region_files()) == 1
        pool.shut_down()


def test_frozen_node_comes_back_as_a_new_incarnation_with_fresh_regions(tmp_path: Path) -> None:
    with _pool(tmp_path) as pool:
        for name in ("a", "b"):
            pool.start_node(name, 16 * MIB)
        pool.wait_nodes("a", "b")
        _put_chains(pool, 7)
        load = Load(pool, seed=2, chains=8, chain_blocks=8).start(writers=1, readers=1)
        with pool.connect() as client:
            before = {path.name for path in pool.region_files()}
            incarnation = _incarnation(pool, "a")
            pool.nodes["a"].freeze()
            # Its processor takes no part in reads: until it is declared dead, everything can be read.
            assert _read_chains(client, leased=False).get(GetStatus.MISSING, 0) < CHAINS * BLOCKS
            pool.wait_nodes("b")
            frozen = _read_chains(client, leased=True)
            assert set(frozen) == {GetStatus.OK, GetStatus.MISSING}
            pool.nodes["a"].thaw()
            pool.wait_nodes("a", "b")
            assert _incarnation(pool, "a") != incarnation
            fresh = {path.name for path in pool.region_files()}
            assert len(fresh) == 2 and len(fresh & before) == 1, "the old region is gone"
            assert _read_chains(client, leased=True) == frozen, "nothing of the old life came back"
            assert pool.nodes["a"].alive
        load.finish()
        pool.shut_down()


def _incarnation(pool: Pool, name: str) -> int:
    with pool.connect() as client:
        views = client._engine.regions._known
        return max(known.view.incarnation for known in views if known.view.node == name)


def test_short_freeze_of_a_node_is_not_its_death(tmp_path: Path) -> None:
    with _pool(tmp_path, dead_ns=20_000 * MS) as pool:
        pool.start_node("a", 16 * MIB)
        pool.wait_nodes("a")
        _put_chains(pool, 7)
        with pool.connect() as client:
            for _ in range(3):
                pool.nodes["a"].freeze()
                assert _read_chains(client, leased=False) == {GetStatus.OK: CHAINS * BLOCKS}
                assert _read_chains(client, leased=True) == {GetStatus.OK: CHAINS * BLOCKS}
                time.sleep(0.2)
                pool.nodes["a"].thaw()
        pool.shut_down()


def test_nodes_killed_again_and_again_under_load(tmp_path: Path) -> None:
    """Every death falls into reads and writes that are under way."""
    with _pool(tmp_path, heartbeat_ns=100 * MS, dead_ns=600 * MS) as pool:
        for name in ("a", "b"):
            pool.start_node(name, 8 * MIB, 2 * MIB)
        load = Load(pool, seed=3, chains=10, chain_blocks=16).start(writers=2, readers=2)
        for round_number in range(4):
            name = "ab"[round_number % 2]
            pool.nodes[name].kill()
            time.sleep(0.2 * (round_number % 3))
            pool.start_node(name, 8 * MIB, 2 * MIB)
        total = load.finish()
        assert total["get.OK"] > 0 and total["put.STORED"] > 0
        pool.shut_down()


def test_last_node_dies_while_a_client_holds_leases(tmp_path: Path) -> None:
    with _pool(tmp_path) as pool:
        pool.start_node("a", 16 * MIB)
        pool.wait_nodes("a")
        writing, reading = pool.puppet("writing"), pool.puppet("reading")
        assert reading.ask("put", chain=1, count=4)["status"] == [0] * 4
        assert reading.ask("acquire", chain=1, count=4, ttl_s=20)["granted"] == [True] * 4
        assert writing.ask("reserve", chain=2, count=4, ttl_s=20)["granted"] == [True] * 4
        assert writing.ask("write", first=0, last=2)["ok"]
        pool.nodes["a"].kill()
        pool.wait_nodes()
        # The bytes are mapped, or gone: never wrong. The commit must not claim anything.
        read = reading.ask("read")
        assert not read.get("wrong")
        writing.ask("write", first=2)
        commit = writing.ask("commit")
        assert not commit["ok"] or set(commit["status"]) <= {5, 6}, commit
        assert writing.ask("get", chain=2, count=4, leased=True)["status"] == [GetStatus.MISSING] * 4
        put = writing.ask("put", chain=3, count=2)
        assert put["status"] == [3, 3] and "no memory node" in put["message"], put
        pool.start_node("a", 16 * MIB)
        eventually(lambda: writing.ask("put", chain=3, count=2)["status"] == [0, 0], "puts work again")
        pool.shut_down()
