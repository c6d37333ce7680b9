"""The metadata server: time per request at a full table, alone and over the wire, and memory per block.

Alone: the pure core in a process of its own, fed with frames and asked for frames, just as the server's loop does; no
socket, nobody else. Over the wire: a client of the running pool, whose table is as full.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from memfabric import BlockKeys, Client, NamespaceSpec, wire
from memfabric.client import AdminClient
from memfabric.core import messages as m
from memfabric.core.layout import HEADER_BASE_BYTES, SUPERBLOCK_BYTES, plan_region
from memfabric.core.server import ServerCore
from memfabric.core.state import Publish, Received, Send, ServerConfig
from memfabric.perf import machine
from memfabric.perf.blocks import FreshKeys
from memfabric.perf.pool import BenchPool
from perf.plan import GIB, KIB, Plan
from perf.timing import summary

COUNTS = (512, 4096)
"""Keys per request."""
REQUESTS = ("match", "acquire", "reserve", "commit", "reserve+commit")
Measured = tuple[dict[str, Any], list[dict[str, Any]]]
"""Memory per block, and a record for each kind and size of request."""
BLOCK_TOKENS = 16
TTL_NS = 10**10
CLIENT = b"\1" + bytes(15)
"""The identity of the only connection."""
CORE_BLOCK_BYTES = 4 * KIB
SPARE_RATIO = 1.05
"""Places for blocks beyond those that are stored, so that requests under measurement find room."""
NAMESPACE = "metadata"


def reserve_of(keys: BlockKeys) -> m.Reserve:
    """A request for fresh blocks."""
    tokens = np.full(len(keys), BLOCK_TOKENS, np.uint32)
    return m.Reserve(keys=keys.keys.tobytes(), parents=keys.parents.tobytes(), tokens=tokens.tobytes(), ttl_ns=TTL_NS)


class Core:
    """A server core without a server."""

    def __init__(self, capacity_blocks: int) -> None:
        forever_ns = 10**15  # nobody sends heartbeats here
        self._core = ServerCore(ServerConfig(epoch=1, dead_ns=forever_ns, session_ttl_ns=forever_ns))
        self._sequence = 0
        self._session = 0
        count = -(-capacity_blocks // plan_region(GIB, CORE_BLOCK_BYTES, 1).block_count)
        size = -(-capacity_blocks // count) * (CORE_BLOCK_BYTES + HEADER_BASE_BYTES) + 4 * SUPERBLOCK_BYTES
        regions = [m.RegionOffer(region_id=at + 1, size_bytes=size, descriptor=b"d") for at in range(count)]
        self.ask(m.Register(node="n", incarnation=1, host="h", regions=regions), b"node")
        spec = m.NamespaceSpec(name="ns", block_bytes=CORE_BLOCK_BYTES, high_ratio=1.0, low_ratio=1.0)
        attached, _ = self.ask(m.Attach(nonce=CLIENT, namespace="ns", create=spec))
        self._session = attached.session

    def ask(self, body: Any, peer: bytes = CLIENT) -> tuple[Any, int]:
        """The answer, and the nanoseconds from the request's bytes to the answer's."""
        self._sequence += 1
        session = self._session if peer == CLIENT else 0
        frame = wire.encode(m.Request(session=session, sequence=self._sequence, body=body))
        now_ns = time.monotonic_ns()
        begin = time.perf_counter_ns()
        effects = self._core.handle(Received(peer, wire.decode(frame, m.Request)), now_ns)
        for effect in effects:
            if isinstance(effect, (Send, Publish)):
                wire.encode(effect.message)
        taken = time.perf_counter_ns() - begin
        answer = None
        for effect in effects:
            if isinstance(effect, Send) and isinstance(effect.message, m.Reply):
                answer = effect.message.body
            elif isinstance(effect, Send) and isinstance(effect.message, m.Command):
                self.ask(m.CommandDone(node="n", incarnation=1, command=effect.message.command), b"node")
        if isinstance(answer, m.Refused):
            raise RuntimeError(f"{type(body).__name__} was refused: {answer.message}")
        return answer, taken

    def put(self, keys: BlockKeys) -> tuple[int, int]:
        """Reserve and commit; nanoseconds of each."""
        reserved, reserve_ns = self.ask(reserve_of(keys))
        granted = np.frombuffer(reserved.status, np.uint8) == m.ReserveStatus.GRANTED
        if not granted.all():
            raise RuntimeError(f"the core granted {int(granted.sum())} of {len(keys)} blocks: {reserved.message}")
        _, commit_ns = self.ask(m.Commit(lease=reserved.lease, stored=b"\1" * len(keys)))
        return reserve_ns, commit_ns

    def table_bytes(self) -> int:
        """Memory of the table and its indexes, as the server accounts it."""
        status, _ = self.ask(m.GetStatus())
        return int(status.doc["table"]["memory_bytes"])


def _core_work(table_blocks: int, repeats: int, results: Any) -> None:
    """Runs in a process of its own, so that its memory is the core's."""
    fresh = FreshKeys(seed=7)
    before = machine.resident_bytes()
    core = Core(int(table_blocks * SPARE_RATIO))
    known: list[BlockKeys] = []
    for start in range(0, table_blocks, max(COUNTS)):
        keys = fresh(min(max(COUNTS), table_blocks - start))
        core.put(keys)
        if len(known) < repeats:
            known.append(keys)
    kept = sum(keys.keys.nbytes + keys.parents.nbytes for keys in known)
    memory = {
        "blocks": table_blocks,
        "accounted_bytes_per_block": round(core.table_bytes() / table_blocks, 1),
        "resident_bytes_per_block": round((machine.resident_bytes() - before - kept) / table_blocks, 1),
    }
    times = []
    for count in COUNTS:
        samples: dict[str, list[int]] = {name: [] for name in REQUESTS}
        for turn in range(repeats):
            keys = known[turn % len(known)][:count]
            matched, taken = core.ask(m.Match(keys=keys.keys.tobytes()))
            if matched.count != len(keys):
                raise RuntimeError(f"matched {matched.count} of {len(keys)} blocks")
            samples["match"].append(taken)
            acquired, taken = core.ask(m.Acquire(keys=keys.keys.tobytes(), ttl_ns=TTL_NS))
            samples["acquire"].append(taken)
            core.ask(m.Release(leases=[acquired.lease]))
            keys = fresh(count)
            reserve_ns, commit_ns = core.put(keys)
            samples["reserve"].append(reserve_ns)
            samples["commit"].append(commit_ns)
            samples["reserve+commit"].append(reserve_ns + commit_ns)
            core.ask(m.Remove(keys=keys.keys.tobytes()))
        times += [_record(name, count, taken) for name, taken in samples.items()]
    results.put((memory, times))


def measure_core(plan: Plan, tell: Callable[[str], None]) -> Measured:
    """Memory per block, and server time per request."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=_core_work, args=(plan.table_blocks, plan.core_repeats, results), daemon=True)
    process.start()
    while results.empty():
        if process.exitcode is not None and results.empty():
            raise RuntimeError(f"the process of the core ended with {process.exitcode}")
        time.sleep(0.02)
    memory, times = results.get()
    process.join()
    for record in times:
        tell(_describe("core", record))
    return memory, times


def measure_wire(pool: BenchPool, plan: Plan, tell: Callable[[str], None]) -> Measured:
    """Memory that the server's process takes per block, and round trips from a client."""
    fresh = FreshKeys(seed=8)
    # Blocks that nobody writes, of a size that fills the pool's regions: the table has as many slots as regions hold.
    block_bytes = max(8, int(pool.total_bytes / (plan.table_blocks * SPARE_RATIO)) - HEADER_BASE_BYTES)
    spec = NamespaceSpec(name=NAMESPACE, block_bytes=block_bytes, high_ratio=1.0, low_ratio=1.0)
    with AdminClient(pool.address) as admin:
        admin.namespace_create(spec)
    samples: dict[int, dict[str, list[int]]] = {}
    with pool.connect(NAMESPACE) as client:
        before = machine.resident_bytes(pool.pids["meta"])
        known = []
        for start in range(0, plan.table_blocks, max(COUNTS)):
            keys = fresh(min(max(COUNTS), plan.table_blocks - start))
            _put(client, keys)
            known.append(keys)
        with AdminClient(pool.address) as admin:
            slots = int(admin.status()["table"]["slots"])
        grown = machine.resident_bytes(pool.pids["meta"]) - before
        for count in COUNTS:
            taken = samples[count] = {name: [] for name in ("match", "acquire", "reserve+commit")}
            for turn in range(-3, plan.wire_repeats):
                keys = known[turn % (len(known) - 1)][:count]
                times = _round_trips(client, keys, fresh(count))
                if turn >= 0:
                    for name, each in times.items():
                        taken[name].append(each)
    pool.delete(NAMESPACE)
    per_block = round(grown / plan.table_blocks, 1)
    memory = {"blocks": plan.table_blocks, "slots": slots, "resident_bytes_per_block": per_block}
    records = [_record(name, count, taken) for count, group in samples.items() for name, taken in group.items()]
    for record in records:
        tell(_describe("round trip", record))
    return memory, records


def _put(client: Client, keys: BlockKeys) -> int:
    """Reserve and commit without writing; nanoseconds. Nobody ever reads these blocks."""
    begin = time.perf_counter_ns()
    reserved = _ask(client, reserve_of(keys))
    granted = len(reserved.status) - np.count_nonzero(np.frombuffer(reserved.status, np.uint8))
    _ask(client, m.Commit(lease=reserved.lease, stored=b"\1" * granted))
    taken = time.perf_counter_ns() - begin
    if granted != len(keys):
        raise RuntimeError(f"the server granted {granted} of {len(keys)} blocks: {reserved.message}")
    return taken


def _round_trips(client: Client, keys: BlockKeys, new: BlockKeys) -> dict[str, int]:
    begin = time.perf_counter_ns()
    matched = client.match(keys)
    match_ns = time.perf_counter_ns() - begin
    if matched != len(keys):
        raise RuntimeError(f"matched {matched} of {len(keys)} blocks")
    begin = time.perf_counter_ns()
    lease = client.acquire(keys)
    acquire_ns = time.perf_counter_ns() - begin
    lease.release()
    put_ns = _put(client, new)
    client.remove(new)
    return {"match": match_ns, "acquire": acquire_ns, "reserve+commit": put_ns}


def _ask(client: Client, body: m.Body) -> Any:
    """One request over the client's own connection."""
    answer = client._engine.link.submit(body, time.monotonic_ns() + 30 * 10**9).result()
    return answer.body


def _record(name: str, count: int, taken: list[int]) -> dict[str, Any]:
    found = summary(taken)
    return {"request": name, "keys": count, **found, "blocks_per_s": round(count / found["p50_us"] * 1e6)}


def _describe(where: str, record: dict[str, Any]) -> str:
    return (
        f"{where}: {record['request']} of {record['keys']} keys: p50 {record['p50_us'] / 1e3:.3f} ms, "
        f"{record['blocks_per_s'] / 1e6:.2f} million blocks/s"
    )
