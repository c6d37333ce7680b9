"""A seeded random schedule of kills and freezes of every role, under load."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from memfabric.client import GetStatus
from memfabric.core.messages import NamespaceSpec
from memfabric.errors import MemfabricError
from tests.processes import payload
from tests.processes.harness import MIB, MS, Pool, eventually
from tests.processes.load import Load

DEAD_S = 1.2


class Chaos:
    """Injects one fault at a time, and undoes what has to be undone."""

    def __init__(self, pool: Pool, load: Load, seed: int) -> None:
        self.pool, self.load = pool, load
        self.random = random.Random(seed)
        self.log: list[str] = []
        self.faults: dict[str, tuple[int, Callable[[], str]]] = {
            "kill node": (3, self.kill_node),
            "freeze node shortly": (2, lambda: self.freeze_node(0.1, 0.4)),
            "freeze node beyond death": (3, lambda: self.freeze_node(1.6, 3.0)),
            "kill server": (2, self.kill_server),
            "freeze server": (3, self.freeze_server),
            "kill worker": (4, self.kill_worker),
            "freeze worker": (4, self.freeze_worker),
            "freeze several": (4, self.freeze_several),
            "kill server and node": (2, self.kill_server_and_node),
            "kill node behind a frozen server": (2, self.kill_node_unnoticed),
        }

    def step(self) -> None:
        names = list(self.faults)
        name = self.random.choices(names, [self.faults[n][0] for n in names])[0]
        self.log.append(f"{name}: {self.faults[name][1]()}")
        time.sleep(self.random.uniform(0.0, 0.6))

    def pause(self, low_s: float, high_s: float) -> float:
        seconds = self.random.uniform(low_s, high_s)
        time.sleep(seconds)
        return seconds

    def kill_node(self) -> str:
        name = self.random.choice(sorted(self.pool.nodes))
        self.pool.nodes[name].kill()
        self.pause(0.0, 2 * DEAD_S)
        self.pool.start_node(name, 2 * MIB, MIB)
        return name

    def freeze_node(self, low_s: float, high_s: float) -> str:
        name = self.random.choice(sorted(self.pool.nodes))
        self.pool.nodes[name].freeze()
        seconds = self.pause(low_s, high_s)
        self.pool.nodes[name].thaw()
        return f"{name} {seconds:.2f} s"

    def kill_server(self) -> str:
        self.pool.server.kill()
        seconds = self.pause(0.0, 1.5)
        self.pool.start_server()
        return f"{seconds:.2f} s"

    def freeze_server(self) -> str:
        self.pool.server.freeze()
        seconds = self.pause(0.1, 2.5)
        self.pool.server.thaw()
        return f"{seconds:.2f} s"

    def kill_worker(self) -> str:
        name = self.random.choice(sorted(self.load.workers))
        self.load.kill(name)
        return f"{name}, replaced by {self.load.add(name.split('-')[0])}"

    def freeze_worker(self) -> str:
        name = self.random.choice(sorted(self.load.workers))
        self.load.workers[name].freeze()
        seconds = self.pause(0.1, 1.5)
        self.load.workers[name].thaw()
        return f"{name} {seconds:.2f} s"

    def freeze_several(self) -> str:
        """Any of the processes, woken in any order."""
        everybody = {"server": self.pool.server, **self.pool.nodes, **self.load.workers}
        names = self.random.sample(sorted(everybody), self.random.randint(2, len(everybody)))
        for name in names:
            everybody[name].freeze()
            self.pause(0.0, 0.2)
        seconds = self.pause(0.0, 2.0)
        self.random.shuffle(names)
        for name in names:
            everybody[name].thaw()
            self.pause(0.0, 0.2)
        return f"{', '.join(names)} {seconds:.2f} s"

    def kill_server_and_node(self) -> str:
        name = self.random.choice(sorted(self.pool.nodes))
        victims = [self.pool.server, self.pool.nodes[name]]
        self.random.shuffle(victims)
        for victim in victims:
            victim.kill()
            self.pause(0.0, 0.2)
        self.pool.start_server()
        self.pause(0.0, 0.5)
        self.pool.start_node(name, 2 * MIB, MIB)
        return name

    def kill_node_unnoticed(self) -> str:
        name = self.random.choice(sorted(self.pool.nodes))
        self.pool.server.freeze()
        self.pause(0.0, 0.3)
        self.pool.nodes[name].kill()
        self.pause(0.0, 1.5)
        self.pool.server.thaw()
        self.pool.start_node(name, 2 * MIB, MIB)
        return name


@pytest.mark.parametrize("transport", ["shm", "ucx"])
def test_random_faults(tmp_path: Path, fault_seed: int, fault_seconds: float, transport: str) -> None:
    if transport == "ucx":
        pytest.importorskip("libucx", reason="UCX's libraries are not installed (extra `ucx`)")
    spec = NamespaceSpec(name="chaos", block_bytes=32768, segments=4)
    print(
        f"rerun with: MEMFABRIC_FAULT_SEED={fault_seed} MEMFABRIC_FAULT_SECONDS={fault_seconds:g} "
        f"python -m pytest tests/processes/test_random_faults.py -k {transport}"
    )
    with Pool(
        tmp_path,
        spec,
        transport=transport,
        heartbeat_ns=200 * MS,
        dead_ns=int(DEAD_S * 1e9),
        session_ttl_ns=2000 * MS,
        quarantine_ns=200 * MS,
    ) as pool:
        for name in ("a", "b"):
            pool.start_node(name, 2 * MIB, MIB)
        load = Load(pool, seed=fault_seed, chains=16, chain_blocks=12, timeout_s=2.0, pause_s=0.002)
        load.start(writers=2, readers=2)
        chaos = Chaos(pool, load, fault_seed)
        end_s = time.monotonic() + fault_seconds
        try:
            while time.monotonic() < end_s:
                chaos.step()
            _works_again(pool)
            total = load.finish()
        finally:
            print("\n".join(chaos.log))
        pool.shut_down()
    print(dict(total))
    assert total["put.STORED"] > 100 and total["get.OK"] > 100


def _works_again(pool: Pool) -> None:
    """After the last fault the pool serves everybody again, by itself."""
    pool.wait_nodes(*pool.nodes)
    ids, keys = payload.chain(60_000, 4)
    blocks = payload.fill_many(ids, 7, pool.spec.block_bytes)
    with pool.connect() as client:

        def round_trip() -> bool:
            try:
                client.put(keys, blocks, wait=True, timeout_s=5.0)
                result = client.get(keys, leased=True)
            except MemfabricError as error:
                print(f"not yet: {error}")
                return False
            for position, key_id in enumerate(ids):
                if result.status[position] == GetStatus.OK:
                    assert payload.check(key_id, result.out[position]) == (7, "")
            return result.ok

        eventually(round_trip, "the pool stores and finds again")
