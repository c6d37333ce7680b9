"""The metadata server is killed, frozen, and started again."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest

import memfabric
from memfabric.client import GetStatus
from memfabric.core.messages import NamespaceSpec
from memfabric.errors import OutcomeUnknownError, RefusedError, UnavailableError
from tests.processes import payload
from tests.processes.harness import MIB, Pool, eventually
from tests.processes.load import Load

SPEC = NamespaceSpec(name="server", block_bytes=32768, segments=2)


def test_killed_server_known_places_are_read_on_and_all_come_back_by_themselves(tmp_path: Path) -> None:
    with Pool(tmp_path, SPEC) as pool:
        for name in ("a", "b"):
            pool.start_node(name)
        pool.wait_nodes("a", "b")
        load = Load(pool, seed=1, chains=8, chain_blocks=8, timeout_s=1.0).start(writers=1, readers=1)
        with pool.connect(timeout_s=0.4) as client:
            ids, keys = payload.chain(1000, 16)
            assert client.put(keys, payload.fill_many(ids, 7, SPEC.block_bytes), timeout_s=20.0).ok
            pool.server.kill()
            for _ in range(20):
                result = client.get(keys)
                assert result.ok and result.optimistic_count == 16
                assert all(payload.check(i, result.out[n]) == (7, "") for n, i in enumerate(ids))
            for call in (
                lambda: client.match(keys),
                lambda: client.get(keys, leased=True),
                lambda: client.get(payload.chain(1001, 2)[1]),
                lambda: client.put(payload.chain(1001, 2)[1], payload.fill_many([1, 2], 1, SPEC.block_bytes)),
                lambda: client.acquire(keys),
                lambda: client.reserve(payload.chain(1002, 2)[1]),
                lambda: client.remove(keys),
                lambda: client.prefetch(keys),
            ):
                with pytest.raises((UnavailableError, OutcomeUnknownError)):
                    call()
            pool.start_server()
            pool.wait_nodes("a", "b")
            # The cache starts empty: the regions are fresh.
            assert client.get(keys, leased=True, timeout_s=20.0).status.tolist() == [GetStatus.MISSING] * 16
            assert client.put(keys, payload.fill_many(ids, 8, SPEC.block_bytes), timeout_s=20.0, wait=True).ok
            result = client.get(keys, timeout_s=20.0)
            assert result.ok
            assert all(payload.check(i, result.out[n]) == (8, "") for n, i in enumerate(ids))
        before = pool.namespace().counters["committed_blocks"]
        eventually(lambda: pool.namespace().counters["committed_blocks"] > before, "the load's writer works again")
        total = load.finish()
        assert total["stats.attaches"] >= 4
        pool.shut_down()


def test_server_killed_again_and_again_under_load(tmp_path: Path) -> None:
    """Each time in the middle of requests; a restart within the same second as the death included."""
    with Pool(tmp_path, SPEC, heartbeat_ns=100_000_000) as pool:
        pool.start_node("a", 4 * MIB, 2 * MIB)
        load = Load(pool, seed=2, chains=8, chain_blocks=8, timeout_s=2.0).start(writers=2, readers=2)
        for pause_s in (0.0, 0.7, 0.1, 0.0):
            pool.server.kill()
            pool.start_server()
            pool.wait_nodes("a")
            time.sleep(pause_s)
        total = load.finish()
        assert total["put.STORED"] > 0 and total["get.OK"] > 0
        pool.shut_down()


def test_frozen_server_nobody_is_declared_dead_and_leases_hold(tmp_path: Path) -> None:
    """Frozen for longer than nodes and sessions may be silent."""
    with Pool(tmp_path, SPEC, dead_ns=1_500_000_000, session_ttl_ns=3_000_000_000) as pool:
        for name in ("a", "b"):
            pool.start_node(name)
        pool.wait_nodes("a", "b")
        load = Load(pool, seed=3, chains=8, chain_blocks=8, timeout_s=2.0).start(writers=1, readers=2)
        holder = pool.puppet("holder", timeout_s=30.0)
        writing = pool.puppet("writing", timeout_s=30.0)
        assert holder.ask("put", chain=1000, count=8)["status"] == [0] * 8
        assert holder.ask("acquire", chain=1000, count=8, ttl_s=40)["granted"] == [True] * 8
        assert writing.ask("reserve", chain=1001, count=4, ttl_s=40)["granted"] == [True] * 4
        with pool.connect() as client:
            ids, keys = payload.chain(1000, 8)
            client.prefetch(keys)
            pool.server.freeze()
            end_s = time.monotonic() + 5.0
            while time.monotonic() < end_s:
                result = client.get(keys)
                assert result.ok and result.optimistic_count == 8
                assert not any(payload.check(i, result.out[n])[1] for n, i in enumerate(ids))
                assert holder.ask("read")["status"] == [GetStatus.OK] * 8
                time.sleep(0.05)
            assert writing.ask("write")["ok"]
            pool.server.thaw()
            assert writing.ask("commit") == {"event": "answer", "ok": True, "status": [0] * 4}
            assert holder.ask("read")["status"] == [GetStatus.OK] * 8
            assert client.get(payload.chain(1001, 4)[1], leased=True).ok
        with pool.admin() as admin:
            status = admin.status()
            assert {node["state"] for node in status["nodes"]} == {"active"} and len(status["nodes"]) == 2
        assert "node_died" not in pool.server.log_tail(100_000)
        for puppet in (holder, writing):
            assert puppet.ask("stats")["stats"]["attaches"] == 1, "its session was kept"
        assert load.finish()["stats.attaches"] == 3, "the workers' sessions were kept"
        pool.shut_down()


def test_namespaces_outlive_the_server_in_its_state_directory(tmp_path: Path) -> None:
    with Pool(tmp_path, SPEC, state_dir=str(tmp_path / "state")) as pool:
        pool.start_node("a")
        puppet = pool.puppet()
        assert puppet.ask("put", chain=1, count=2)["status"] == [0, 0]
        for _ in range(2):
            pool.server.kill()
            pool.start_server()
            assert pool.namespace().spec == SPEC
        pool.wait_nodes("a")
        eventually(lambda: puppet.ask("put", chain=1, count=2)["status"] in ([0, 0], [1, 1]), "puts work again")
        pool.shut_down()


@pytest.mark.parametrize("change", ["fingerprint", "block_bytes", "block_tokens", "segments"])
def test_namespace_that_is_another_after_a_restart_is_not_used(tmp_path: Path, change: str) -> None:
    """Somebody else creates it differently before this client is back: an error that says so, no mixed-up KV."""
    values = {
        "fingerprint": memfabric.Fingerprint(model="another"),
        "block_bytes": 65536,
        "block_tokens": 32,
        "segments": 4,
    }
    other = msgspec.structs.replace(SPEC, **{change: values[change]})
    with Pool(tmp_path, SPEC) as pool:
        pool.start_node("a")
        pool.wait_nodes("a")
        # Without `create` and fingerprint: it takes the namespace's own on trust, the first time.
        client = memfabric.connect(pool.address, namespace=SPEC.name, shm_directory=str(pool.directory), timeout_s=20.0)
        with client:
            ids, keys = payload.chain(1, 2)
            blocks = payload.fill_many(ids, 7, SPEC.block_bytes)
            assert client.put(keys, blocks).ok
            pool.server.freeze()
            pool.server.kill()
            pool.spec = other
            pool.start_server()
            with pool.admin() as admin:
                admin.namespace_create(other)
            pool.wait_nodes("a")
            for call in (lambda: client.put(keys, blocks), lambda: client.get(keys, leased=True)):
                with pytest.raises(RefusedError, match=r"another|unknown_namespace|does not exist") as refused:
                    call()
                assert refused.value.code in ("fingerprint", "unknown_namespace")
            assert client.namespace == SPEC
        pool.shut_down()
