"""Getting and putting blocks, against a block-wise memcpy of the same blocks.

Every turn takes another batch of the working set, and no two actions of a turn take the same one: none finds in a cache
what its neighbour just brought there.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from memfabric import BlockKeys, Client
from memfabric.perf.blocks import Bytes, FreshKeys, Memcpy, aligned, enter_pages, fill, limit_of
from memfabric.perf.pool import BenchPool
from perf.plan import LANES, Plan
from perf.timing import Samples, ratio, summary, take_turns, timed

THREADS = {"one": 1, "auto": 0}
"""The calling thread alone, and as many as pay."""
LEAST_TURNS, MOST_TURNS = 5, 20_000
SPLIT_STEPS = ("reserve", "write", "commit")


@dataclass
class Workload:
    """A working set: some batches of blocks, and a user buffer for each."""

    block_bytes: int
    batch: int
    buffers: list[Bytes]
    keys: list[BlockKeys]

    @property
    def batch_bytes(self) -> int:
        """Payload of one call."""
        return self.block_bytes * self.batch

    @classmethod
    def make(cls, plan: Plan, block_bytes: int, batch: int, memory: Bytes, fresh: FreshKeys) -> Workload:
        """Cut `memory` into user buffers."""
        size = block_bytes * batch
        count = plan.set_count(block_bytes, batch)
        buffers = [memory[at * size : (at + 1) * size].reshape(batch, block_bytes) for at in range(count)]
        return cls(block_bytes, batch, buffers, [fresh(batch) for _ in range(count)])

    def limits(self, client: Client) -> list[Memcpy]:
        """What memcpy does for each batch, where `client` gets it."""
        pairs = zip(self.keys, self.buffers, strict=True)
        return [limit_of(client, keys, buffer, put=False) for keys, buffer in pairs]

    def put_all(self, client: Client) -> BlockKeys:
        """Put the whole working set; returns all its keys."""
        keys = BlockKeys(
            np.concatenate([each.keys for each in self.keys]), np.concatenate([each.parents for each in self.keys])
        )
        result = client.put(keys, [block for buffer in self.buffers for block in buffer])
        _check(result.ok, f"put: {result.message}")
        return keys

    def pick(self, lane: int) -> Callable[[int], int]:
        """Which batch an action takes in a turn: all in turn, each action as far from the others as it goes."""
        count = len(self.buffers)
        start = lane * count // LANES
        return lambda turn: (turn + start) % count


def measure(pool: BenchPool, plan: Plan, tell: Callable[[str], None]) -> dict[str, list[dict[str, Any]]]:
    """The whole grid: ``get`` and ``put``, one record for each combination."""
    memory = aligned(max(size * batch * plan.set_count(size, batch) for size, batch in plan.combinations()))
    fill(memory, seed=1)
    fresh = FreshKeys(seed=2)
    gets, puts = [], []
    for block_bytes, group in itertools.groupby(plan.combinations(), key=lambda each: each[0]):
        for _, batch in group:
            name = f"copies-{block_bytes}-{batch}"
            pool.create(name, block_bytes)
            work = Workload.make(plan, block_bytes, batch, memory, fresh)
            puts.append(_measure_puts(pool, plan, name, work, fresh))
            tell(describe("put", puts[-1]))
            pool.delete(name)
            pool.create(name, block_bytes)
            gets.append(_measure_gets(pool, plan, name, work))
            tell(describe("get", gets[-1]))
            pool.delete(name)
    return {"get": gets, "put": puts}


def describe(what: str, record: dict[str, Any]) -> str:
    """A record in one line."""
    auto = record["threads"]["auto"]
    names = {"verify_off": "unverified", "verify_on": "verified", "put": "whole", "write": "data part"}
    ratios = ", ".join(f"{names[name]} {auto[name]['ratio']['median']:.0%}" for name in names if name in auto)
    shape = f"{record['block_bytes'] // 1024:>5} KiB x {record['batch']:<4}"
    return f"{what} {shape} memcpy {auto['memcpy']['gb_s']:5.1f} GB/s → {ratios}"


# --- get ---


def _measure_gets(pool: BenchPool, plan: Plan, name: str, work: Workload) -> dict[str, Any]:
    actions: dict[str, Callable[[int], int]] = {}
    with ExitStack() as stack:
        clients = {
            (verify, threads): stack.enter_context(pool.connect(name, verify=verify, threads=THREADS[threads]))
            for threads in THREADS
            for verify in (False, True)
        }
        first = clients[False, "one"]
        everything = work.put_all(first)
        for client in clients.values():
            client.prefetch(everything)
            enter_pages(client, writable=False)
        limits = work.limits(first)
        for at, threads in enumerate(THREADS):
            actions[f"memcpy/{threads}"] = _copy_in_turn(limits, work.pick(3 * at), THREADS[threads])
            for shift, verify in ((1, False), (2, True)):
                label = f"{'verify_on' if verify else 'verify_off'}/{threads}"
                actions[label] = _get_in_turn(clients[verify, threads], work, work.pick(3 * at + shift))
        begin_s, busy_s = time.monotonic(), pool.node_cpu_s()
        samples = take_turns(actions, plan.combination_s, LEAST_TURNS, MOST_TURNS, warm_turns=_warm(plan, work))
        node = {"elapsed_s": time.monotonic() - begin_s, "cpu_s": pool.node_cpu_s() - busy_s}
        for client in clients.values():
            counted = client.stats()
            _check(counted["optimistic_blocks"] == counted["get_blocks"], "reading without requests")
        read = sum(client.stats()["get_bytes"] for client in clients.values())
    return {**_record(work, samples), "node": {**node, "bytes_read": read}}


def _copy_in_turn(limits: list[Memcpy], pick: Callable[[int], int], threads: int) -> Callable[[int], int]:
    def action(turn: int) -> int:
        limit = limits[pick(turn)]
        return timed(lambda: limit.run(threads))

    return action


def _get_in_turn(client: Client, work: Workload, pick: Callable[[int], int]) -> Callable[[int], int]:
    def action(turn: int) -> int:
        at = pick(turn)
        keys, buffer = work.keys[at], work.buffers[at]
        return timed(lambda: client.get(keys, buffer))

    return action


# --- put ---


class _Putter:
    """Puts each batch again and again under fresh keys; what was there is removed outside the timed part."""

    def __init__(self, work: Workload, fresh: FreshKeys, first: Client) -> None:
        self._work, self._fresh, self._first = work, fresh, first
        self.splits: dict[str, Samples] = {}
        self.limits: list[Memcpy | None] = [None] * len(work.buffers)

    def _prepare(self, at: int) -> BlockKeys:
        if self.limits[at] is not None:
            self._first.remove(self._work.keys[at])
        self._work.keys[at] = self._fresh(self._work.batch)
        return self._work.keys[at]

    def _note(self, at: int, client: Client) -> None:
        self.limits[at] = limit_of(client, self._work.keys[at], self._work.buffers[at], put=True)

    def fill(self) -> None:
        """Put everything once."""
        self._work.put_all(self._first)
        for at in range(len(self.limits)):
            self._note(at, self._first)

    def put(self, client: Client, pick: Callable[[int], int]) -> Callable[[int], int]:
        """The whole call."""

        def action(turn: int) -> int:
            at = pick(turn)
            keys, buffer = self._prepare(at), self._work.buffers[at]
            done = []
            taken = timed(lambda: done.append(client.put(keys, buffer)))
            _check(done[0].ok, f"put: {done[0].message}")
            self._note(at, client)
            return taken

        return action

    def split(self, client: Client, pick: Callable[[int], int], label: str) -> Callable[[int], int]:
        """The same in its three steps; returns the data part, keeps the others in `splits`."""
        steps = self.splits.setdefault(label, {name: [] for name in SPLIT_STEPS})

        def action(turn: int) -> int:
            at = pick(turn)
            keys, buffer = self._prepare(at), self._work.buffers[at]
            held = []
            steps["reserve"].append(timed(lambda: held.append(client.reserve(keys))))
            with held[0] as lease:
                steps["write"].append(timed(lambda: lease.write(buffer)))
                steps["commit"].append(timed(lambda: lease.commit()))
            self._note(at, client)
            return steps["write"][-1]

        return action

    def copy(self, pick: Callable[[int], int], threads: int) -> Callable[[int], int]:
        """memcpy over what a put wrote."""

        def action(turn: int) -> int:
            limit = self.limits[pick(turn)]
            assert limit is not None, "every batch was put before"
            return timed(lambda: limit.run(threads))

        return action


def _measure_puts(pool: BenchPool, plan: Plan, name: str, work: Workload, fresh: FreshKeys) -> dict[str, Any]:
    with ExitStack() as stack:
        clients = {threads: stack.enter_context(pool.connect(name, threads=THREADS[threads])) for threads in THREADS}
        first = clients["one"]
        putter = _Putter(work, fresh, first)
        putter.fill()
        for client in clients.values():
            enter_pages(client, writable=True)
        actions: dict[str, Callable[[int], int]] = {}
        for at, threads in enumerate(THREADS):
            client = clients[threads]
            actions[f"memcpy/{threads}"] = putter.copy(work.pick(3 * at), THREADS[threads])
            actions[f"put/{threads}"] = putter.put(client, work.pick(3 * at + 1))
            actions[f"write/{threads}"] = putter.split(client, work.pick(3 * at + 2), threads)
        samples = take_turns(actions, plan.combination_s, LEAST_TURNS, MOST_TURNS, warm_turns=_warm(plan, work))
        kept = len(samples["memcpy/one"])
        for threads, steps in putter.splits.items():
            for step in ("reserve", "commit"):
                samples[f"{step}/{threads}"] = steps[step][-kept:]
    return _record(work, samples)


# --- both ---


def _warm(plan: Plan, work: Workload) -> int:
    """Once through the working set, but no longer than it pays."""
    return min(len(work.buffers), max(2, math.ceil(plan.combination_s * 100)))


def _record(work: Workload, samples: Samples) -> dict[str, Any]:
    threads: dict[str, dict[str, Any]] = {}
    for label, taken in samples.items():
        what, _, count = label.partition("/")
        measured: dict[str, Any] = summary(taken)
        measured["gb_s"] = round(work.batch_bytes / measured["p50_us"] / 1e3, 3)
        if what != "memcpy":
            measured["ratio"] = ratio(samples[f"memcpy/{count}"], taken)
        threads.setdefault(count, {})[what] = measured
    return {
        "block_bytes": work.block_bytes,
        "batch": work.batch,
        "working_set_bytes": work.batch_bytes * len(work.buffers),
        "threads": threads,
    }


def _check(good: bool, what: str) -> None:
    """A benchmark of something that does not work would be worth nothing.

    Raises:
        RuntimeError: not good.
    """
    if not good:
        raise RuntimeError(f"{what} went wrong; no figure is taken")
