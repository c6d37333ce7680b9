"""Starting what cannot start, stopping in good order, and clients that are closed, forked or too early."""

from __future__ import annotations

import shutil
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest

import memfabric
from memfabric.client import GetStatus
from memfabric.core.messages import NamespaceSpec
from memfabric.errors import RefusedError, UnavailableError, UsageError
from tests.processes import payload
from tests.processes.harness import MIB, MS, Child, EndedError, Pool, eventually
from tests.processes.load import Load

SPEC = NamespaceSpec(name="life", block_bytes=16384, segments=2)


def _fails(child: Child) -> dict[str, str]:
    """How a child that must not start ended."""
    failed = child.wait_event("failed")
    assert child.process.wait(30) == 3
    return {key: str(failed[key]) for key in ("error", "code", "message")}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_everything_cleanly_under_load(tmp_path: Path, number: int) -> None:
    """Nodes first, server first, all at once: nothing is left in shared memory, and everybody ends with 0."""
    with Pool(tmp_path, SPEC) as pool:
        for name in ("a", "b", "c"):
            pool.start_node(name, 4 * MIB, 2 * MIB)
        pool.wait_nodes("a", "b", "c")
        load = Load(pool, seed=1, chains=4, chain_blocks=8, timeout_s=1.0).start(writers=1, readers=1)
        time.sleep(0.5)
        assert len(pool.region_files()) == 6
        pool.nodes["a"].process.send_signal(number)
        assert pool.nodes["a"].process.wait(30) == 0
        assert len(pool.region_files()) == 4
        pool.wait_nodes("b", "c")  # at once: it said goodbye
        pool.server.process.send_signal(number)
        assert pool.server.process.wait(30) == 0
        # Without a server the nodes still end, and take their memory along.
        for name in ("b", "c"):
            pool.nodes[name].process.send_signal(number)
        for name in ("b", "c"):
            assert pool.nodes[name].process.wait(30) == 0
        assert not pool.region_files()
        load.finish()
        pool.shut_down()


def test_a_node_stopped_while_it_waits_for_the_server(tmp_path: Path) -> None:
    with Pool(tmp_path, SPEC) as pool:
        pool.server.kill()
        node = pool.spawn("node-early", "node", **pool.node_arguments("early", 4 * MIB))
        eventually(pool.region_files, "its memory is backed")
        time.sleep(0.3)
        assert node.terminate() == 0
        pool.shut_down()


def test_a_node_waits_for_a_server_that_comes_later(tmp_path: Path) -> None:
    with Pool(tmp_path, SPEC) as pool:
        pool.server.kill()
        node = pool.spawn("node-early", "node", **pool.node_arguments("early", 4 * MIB))
        eventually(pool.region_files, "its memory is backed")
        pool.start_server()
        node.wait_event("ready")
        pool.shut_down()


def test_no_server_at_all(tmp_path: Path) -> None:
    with Pool(tmp_path, SPEC) as pool:
        pool.server.kill()
        arguments = {**pool.node_arguments("lonely", 2 * MIB), "register_timeout_s": 1.0}
        failed = _fails(pool.spawn("node-lonely", "node", **arguments))
        assert failed["error"] == "UnavailableError" and pool.address in failed["message"]
        for make in (
            lambda: memfabric.connect(pool.address, namespace="x", timeout_s=0.5),
            lambda: memfabric.client.AdminClient(pool.address, timeout_s=0.5),
        ):
            with pytest.raises(UnavailableError, match="memfabric up"):
                make()
        pool.shut_down()


def test_taken_port(tmp_path: Path) -> None:
    with Pool(tmp_path, SPEC) as pool:
        failed = _fails(pool.spawn("server-2", "server", address=pool.address))
        assert failed["error"] == "UnavailableError" and pool.address in failed["message"]
        with socket.create_server(("127.0.0.1", 0)) as other:
            address = f"tcp://127.0.0.1:{other.getsockname()[1]}"
            assert _fails(pool.spawn("server-3", "server", address=address))["error"] == "UnavailableError"
        pool.start_node("a")
        pool.shut_down()


def test_state_directory_of_a_living_server(tmp_path: Path) -> None:
    with Pool(tmp_path, SPEC, state_dir=str(tmp_path / "state")) as pool:
        second = pool.spawn("server-2", "server", address="tcp://127.0.0.1:0", state_dir=str(tmp_path / "state"))
        failed = _fails(second)
        assert failed["error"] == "UnavailableError" and "state" in failed["message"]
        pool.shut_down()


def test_two_nodes_with_one_name(tmp_path: Path) -> None:
    """The second is refused, and the first is not harmed."""
    with Pool(tmp_path, SPEC, dead_ns=30_000 * MS) as pool:
        pool.start_node("twin")
        pool.wait_nodes("twin")
        with pool.connect() as client:
            ids, keys = payload.chain(1, 4)
            assert client.put(keys, payload.fill_many(ids, 7, SPEC.block_bytes)).ok
            before = {path.name for path in pool.region_files()}
            arguments = {**pool.node_arguments("twin", 2 * MIB), "register_timeout_s": 1.5}
            failed = _fails(pool.spawn("node-twin-2", "node", **arguments))
            assert failed["code"] == "node_name_taken" and "twin" in failed["message"]
            assert {path.name for path in pool.region_files()} == before
            assert client.get(keys, leased=True).ok
        pool.shut_down()


def test_more_memory_than_there_is(tmp_path: Path) -> None:
    """Refused at the start, with numbers, and nothing is left behind."""
    with Pool(tmp_path, SPEC) as pool:
        free = shutil.disk_usage("/dev/shm").free
        failed = _fails(
            pool.spawn("node-fat", "node", **pool.node_arguments("fat", (free + 1024 * MIB) // 4096 * 4096))
        )
        assert failed["error"] == "OutOfMemoryError" and "memory" in failed["message"], failed
        assert not pool.region_files()
        failed = _fails(pool.spawn("node-fat-2", "node", **pool.node_arguments("fat", 1 << 45, 16 * MIB << 16)))
        assert failed["error"] == "OutOfMemoryError"
        assert not pool.region_files()
        pool.shut_down()


@pytest.mark.parametrize(
    "wrong",
    [{"name": "../x"}, {"name": ""}, {"memory_bytes": 0}, {"region_bytes": MIB + 1}, {"server": "here"}],
    ids=lambda wrong: "-".join(wrong),
)
def test_impossible_node_options(tmp_path: Path, wrong: dict[str, object]) -> None:
    with Pool(tmp_path, SPEC) as pool:
        failed = _fails(pool.spawn("node-odd", "node", **{**pool.node_arguments("odd", 2 * MIB), **wrong}))
        assert failed["error"] == "UsageError" and failed["message"]
        pool.shut_down()


def test_killed_while_backing_memory(tmp_path: Path) -> None:
    """kill -9 at any moment of the start: the next start sweeps whatever there is."""
    with Pool(tmp_path, SPEC, dead_ns=1000 * MS) as pool:
        for delay_s in (0.15, 0.25, 0.35, 0.5):
            node = pool.spawn("node-short", "node", **pool.node_arguments("short", 256 * MIB, 32 * MIB))
            time.sleep(delay_s)
            node.kill()
        pool.start_node("short", 2 * MIB)
        assert len(pool.region_files()) == 1
        pool.shut_down()


def test_blocks_too_large_for_the_regions_do_not_use_the_regions_up(tmp_path: Path) -> None:
    """A namespace that fits nowhere is told so; the others go on, whatever it asks for."""
    with Pool(tmp_path, SPEC, dead_ns=30_000 * MS) as pool:
        pool.start_node("a", 4 * MIB, 1 * MIB)
        pool.wait_nodes("a")
        large = NamespaceSpec(name="large", block_bytes=2 * MIB)
        with memfabric.connect(
            pool.address, namespace="large", create=large, shm_directory=str(pool.directory), timeout_s=20.0
        ) as client:
            for number in range(5):
                put = client.put(payload.chain(number, 1)[1], np.zeros((1, 2 * MIB), np.uint8))
                assert put.status.tolist() == [3] and "larger regions" in put.message, put
        with pool.connect() as client:
            ids, keys = payload.chain(1, 160)  # more than two regions
            assert client.put(keys, payload.fill_many(ids, 7, SPEC.block_bytes), wait=True).ok
        with pool.admin() as admin:
            (node,) = admin.nodes()
        assert node["regions_failed"] == 0
        pool.shut_down()


def test_use_after_close_and_closing_twice(tmp_path: Path) -> None:
    with Pool(tmp_path, SPEC, dead_ns=30_000 * MS) as pool:
        pool.start_node("a")
        pool.wait_nodes("a")
        client = pool.connect()
        ids, keys = payload.chain(1, 2)
        blocks = payload.fill_many(ids, 7, SPEC.block_bytes)
        assert client.put(keys, blocks).ok
        lease, writing = client.acquire(keys), client.reserve(payload.chain(2, 2)[1])
        view = lease.view(0)
        client.close()
        client.close()
        for call in (
            lambda: client.get(keys),
            lambda: client.put(keys, blocks),
            lambda: client.match(keys),
            lambda: client.acquire(keys),
            lambda: client.reserve(keys),
            lambda: client.remove(keys),
            lambda: client.prefetch(keys),
            lease.read,
            lambda: lease.view(0),
            lease.renew,
            lambda: writing.write(blocks),
            writing.commit,
        ):
            with pytest.raises(UsageError, match="closed"):
                call()
        lease.release()
        writing.abort()
        assert bytes(view) == payload.fill(ids[0], 7, SPEC.block_bytes).tobytes(), "a view outlives its client"
        eventually(lambda: pool.namespace().writing == 0, "its reservation was given back")
        pool.shut_down()


@pytest.mark.parametrize("how", ["_exit", "exit", "killed"])
def test_forked_client_is_refused_and_does_not_hurt_the_parent(tmp_path: Path, how: str) -> None:
    with Pool(tmp_path, SPEC, dead_ns=30_000 * MS) as pool:
        pool.start_node("a")
        pool.wait_nodes("a")
        puppet = pool.puppet("parent")
        assert puppet.ask("put", chain=1, count=4)["status"] == [0] * 4
        assert puppet.ask("acquire", chain=1, count=4, ttl_s=30)["granted"] == [True] * 4
        assert puppet.ask("fork", how=how) == {
            "event": "answer",
            "ok": True,
            "child": "UsageError UsageError UsageError",
        }
        assert puppet.ask("read")["status"] == [GetStatus.OK] * 4
        assert puppet.ask("get", chain=1, count=4)["status"] == [GetStatus.OK] * 4
        assert puppet.ask("put", chain=2, count=4)["status"] == [0] * 4
        assert puppet.ask("stats")["stats"]["attaches"] == 1
        pool.shut_down()


def test_clients_refused_at_the_door(tmp_path: Path) -> None:
    with Pool(tmp_path, SPEC) as pool:
        with pytest.raises(RefusedError) as unknown:
            memfabric.connect(pool.address, namespace="nobody", timeout_s=10.0)
        assert unknown.value.code == "unknown_namespace" and "life" in str(unknown.value)
        other = memfabric.Fingerprint(model="other")
        with pytest.raises(RefusedError) as differs:
            memfabric.connect(pool.address, namespace="life", fingerprint=other, timeout_s=10.0)
        assert differs.value.code == "fingerprint" and "model" in str(differs.value)
        pool.shut_down()


def test_harness_notices_a_hang(tmp_path: Path) -> None:
    """The watchdog works: a call that does not end is found out."""
    with Pool(tmp_path, SPEC) as pool:
        puppet = pool.puppet("sleepy")
        puppet.say(op="hang", after_s=0.3)
        with pytest.raises(EndedError, match="ended with 1"):
            puppet.wait_event("answer")
        assert "Timeout" in puppet.log_tail() and "do_hang" in puppet.log_tail()
        pool.shut_down()
