"""How long one get of one 64 KiB block takes, from Python."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from memfabric import Client
from memfabric.perf.blocks import FreshKeys, aligned, enter_pages, fill
from memfabric.perf.pool import BenchPool
from perf.copies import Workload
from perf.plan import KIB, Plan, size_text
from perf.timing import histogram, summary, take_turns, timed

BLOCK_BYTES = 64 * KIB
NAMESPACE = "latency"
LEASED_SHARE = 8
"""Leased reads ask the server twice and take many times as long: one for so many optimistic ones."""


def measure(pool: BenchPool, plan: Plan, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """Optimistic and leased, verified and not; one block again and again, and blocks of the working set in turn."""
    pool.create(NAMESPACE, BLOCK_BYTES)
    memory = aligned(plan.working_set_bytes)
    fill(memory, seed=3)
    work = Workload.make(plan, BLOCK_BYTES, 1, memory, FreshKeys(seed=4))
    records = []
    with ExitStack() as stack:
        clients = {verify: stack.enter_context(pool.connect(NAMESPACE, verify=verify)) for verify in (True, False)}
        everything = work.put_all(clients[True])
        for client in clients.values():
            client.prefetch(everything)
            enter_pages(client, writable=False)
        limits = work.limits(clients[True])
        count = len(limits)
        for place, step in (("cache", 0), ("memory", 1)):
            actions: dict[str, Callable[[int], int]] = {
                "memcpy": lambda turn, step=step: timed(lambda: limits[turn * step % count].run(1)),  # type: ignore[misc]
            }
            for lane, verify in ((1, True), (2, False)):
                start = lane * count // 3
                label = "verified" if verify else "unverified"
                actions[label] = _one(clients[verify], work, start, step, leased=False)
            samples = take_turns(actions, 60.0, plan.latency_count, plan.latency_count, warm_turns=200)
            for label, taken in samples.items():
                records.append(_record("optimistic" if label != "memcpy" else "memcpy", label, place, taken))
        few = max(100, plan.latency_count // LEASED_SHARE)
        for label, client in (("verified", clients[True]), ("unverified", clients[False])):
            action = _one(client, work, 0, 1, leased=True)
            taken = take_turns({label: action}, 60.0, few, few, warm_turns=20)[label]
            records.append(_record("leased", label, "memory", taken))
    pool.delete(NAMESPACE)
    for record in records:
        tell(
            f"one {size_text(BLOCK_BYTES)} block, {record['mode']}, {record['check']}, from {record['from']}: "
            f"p50 {record['p50_us']:.1f} µs, p99 {record['p99_us']:.1f} µs"
        )
    return records


def _one(client: Client, work: Workload, start: int, step: int, *, leased: bool) -> Callable[[int], int]:
    def action(turn: int) -> int:
        at = (start + turn * step) % len(work.keys)
        keys, buffer = work.keys[at], work.buffers[at]
        return timed(lambda: client.get(keys, buffer, leased=leased))

    return action


def _record(mode: str, check: str, place: str, taken: list[int]) -> dict[str, Any]:
    return {"mode": mode, "check": check, "from": place, **summary(taken), "histogram": histogram(taken)}
