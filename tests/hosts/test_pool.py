"""The whole pool between hosts over UCX and TCP: load, and cables that are cut under it and restored.

Host 0 has the metadata server, hosts 1 and 2 a memory node each, host 3 the clients. Every process has its own network;
they share this machine's memory, so the transport is forced.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memfabric.client import GetStatus, PutStatus
from memfabric.core.messages import NamespaceSpec
from memfabric.testing.hosts import Hosts
from tests.processes.harness import MIB, MS, Child, Pool, eventually
from tests.processes.load import Load

pytest.importorskip("libucx", reason="UCX's libraries are not installed (extra `ucx`)")

SPEC = NamespaceSpec(name="hosts", block_bytes=64 << 10, segments=4)
META, FIRST, SECOND, CLIENTS = range(4)
DEAD_NS = 1200 * MS


@pytest.fixture
def network() -> Iterator[Hosts]:
    with Hosts(4) as made:
        yield made


@pytest.fixture
def pool(network: Hosts, tmp_path: Path) -> Iterator[Pool]:
    address = f"tcp://{network[META].address}:0"
    options = {"insecure": True, "dead_ns": DEAD_NS, "heartbeat_ns": 200 * MS}
    made = Pool(tmp_path, SPEC, transport="ucx", address=address, **options)
    with network[META].inside(), made:
        for host, name in ((FIRST, "first"), (SECOND, "second")):
            with network[host].inside():
                made.start_node(name, 16 * MIB, 8 * MIB)
        made.wait_nodes("first", "second")
        yield made


def puppet(pool: Pool, network: Hosts, **arguments: Any) -> Child:
    with network[CLIENTS].inside():
        return pool.puppet(**arguments)


def test_blocks_travel_between_hosts(pool: Pool, network: Hosts) -> None:
    writer, reader = puppet(pool, network), puppet(pool, network, name="reader")
    stored = writer.ask("put", chain=1, count=40)
    assert stored["status"] == [PutStatus.STORED] * 40, stored
    for leased in (False, True):
        got = reader.ask("get", chain=1, count=40, leased=leased)
        assert got["status"] == [GetStatus.OK] * 40, got
        assert set(got["nonces"]) == {stored["nonce"]}
        assert not got["wrong"]
    paths = reader.ask("stats")["stats"]["paths"]
    assert {(path["node"], path["transport"]) for path in paths} == {("first", "ucx"), ("second", "ucx")}, paths
    pool.shut_down()


def test_a_cut_cable_of_the_clients_ends_calls_in_time_and_heals(pool: Pool, network: Hosts) -> None:
    client = puppet(pool, network, timeout_s=2.0)
    stored = client.ask("put", chain=1, count=20)
    assert client.ask("get", chain=1, count=20)["status"] == [GetStatus.OK] * 20
    network.cut(CLIENTS)
    begun_s = time.monotonic()
    got = client.ask("get", chain=1, count=20)  # known places: asks nobody first
    assert not got.get("wrong")
    assert got.get("status", []) != [GetStatus.OK] * 20, "bytes came through a cut cable"
    lost = client.ask("put", chain=2, count=20)
    assert not lost["ok"] or PutStatus.STORED not in lost["status"], lost
    assert time.monotonic() - begun_s < 30.0, "calls with a deadline of 2 s hung"
    network.restore(CLIENTS)

    def back() -> bool:
        again = client.ask("get", chain=1, count=20)
        return bool(
            again["ok"] and again["status"] == [GetStatus.OK] * 20 and set(again["nonces"]) == {stored["nonce"]}
        )

    eventually(back, "the client reads again")
    assert client.ask("put", chain=3, count=20)["status"] == [PutStatus.STORED] * 20
    pool.shut_down()


def test_a_node_behind_a_cut_cable_is_a_miss_and_comes_back_as_another(pool: Pool, network: Hosts) -> None:
    client = puppet(pool, network, timeout_s=2.0)
    assert client.ask("put", chain=1, count=64)["status"] == [PutStatus.STORED] * 64
    network.cut(FIRST)
    pool.wait_nodes("second")

    def only_misses() -> bool:
        got = client.ask("get", chain=1, count=64)
        assert not got.get("wrong")
        return got["ok"] and set(got["status"]) == {GetStatus.OK, GetStatus.MISSING}

    eventually(only_misses, "blocks of the lost node are misses, the others are there")
    network.restore(FIRST)
    pool.wait_nodes("first", "second")
    assert client.ask("put", chain=2, count=64)["status"] == [PutStatus.STORED] * 64
    got = client.ask("get", chain=2, count=64)
    assert got["status"] == [GetStatus.OK] * 64, got
    pool.shut_down()


def test_cables_are_cut_and_restored_under_load(
    pool: Pool, network: Hosts, fault_seed: int, fault_seconds: float
) -> None:
    pick = random.Random(fault_seed)
    print(f"seed {fault_seed}: run again with MEMFABRIC_FAULT_SEED={fault_seed}")
    with network[CLIENTS].inside():
        load = Load(pool, seed=fault_seed, chains=6, chain_blocks=24, timeout_s=2.0, pause_s=0.02).start(1, 2)
        end_s = time.monotonic() + fault_seconds
        while time.monotonic() < end_s:
            number = pick.choice([FIRST, SECOND, CLIENTS, META])
            network.cut(number)
            seconds = pick.choice([0.1, 0.5, 2.5])
            print(f"cable {number} cut for {seconds} s")
            time.sleep(seconds)
            network.restore(number)
            time.sleep(pick.uniform(0.2, 1.5))
        pool.wait_nodes("first", "second")
        time.sleep(2.0)
        total = load.finish()
    assert total["get.OK"] > 0, total
    assert total["put.STORED"] > 0, total
    pool.shut_down()
