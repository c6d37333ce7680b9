"""One reader and two at the same time, each a process of its own, against as many processes that memcpy."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.context import SpawnContext
from multiprocessing.synchronize import Barrier
from typing import Any

import numpy as np

from memfabric import BlockKeys
from memfabric.perf.blocks import FreshKeys, aligned, enter_pages, fill, limit_of
from memfabric.perf.pool import BenchPool
from perf.copies import Workload
from perf.plan import Plan, size_text

PHASES = ("memcpy", "verify_off", "verify_on")
ROUNDS = 7
START_TIMEOUT_S = 60.0
Rates = dict[str, list[float]]
"""Bytes per second of each round, by phase."""


def measure(pool: BenchPool, plan: Plan, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """Records for each shape of batches and number of readers."""
    records = []
    for block_bytes, batch in plan.reader_shapes:
        name = f"readers-{block_bytes}-{batch}"
        pool.create(name, block_bytes)
        memory = aligned(plan.set_count(block_bytes, batch) * block_bytes * batch)
        fill(memory, seed=5)
        work = Workload.make(plan, block_bytes, batch, memory, FreshKeys(seed=6))
        with pool.connect(name) as client:
            work.put_all(client)
        raw = [keys.keys.tobytes() for keys in work.keys]
        for readers in (1, 2):
            record: dict[str, Any] = {"block_bytes": block_bytes, "batch": batch, "readers": readers}
            record.update(_run(pool, plan, name, block_bytes, raw, readers))
            records.append(record)
            tell(
                f"{readers} reader(s), {size_text(block_bytes)} x {batch}: memcpy {record['memcpy_gb_s']:.1f} GB/s, "
                f"unverified {record['verify_off_ratio']:.0%}, verified {record['verify_on_ratio']:.0%}"
            )
        pool.delete(name)
    return records


def _run(pool: BenchPool, plan: Plan, name: str, block_bytes: int, raw: list[bytes], readers: int) -> dict[str, float]:
    context: SpawnContext = multiprocessing.get_context("spawn")
    together = context.Barrier(readers)
    results = context.SimpleQueue()
    arguments = (pool.address, str(pool.directory), name, block_bytes, raw, plan.reader_s, together, results)
    processes = [context.Process(target=_read, args=arguments, daemon=True) for _ in range(readers)]
    for process in processes:
        process.start()
    try:
        everyone = [_take(results, processes) for _ in processes]
    finally:
        for process in processes:
            process.join(5.0)
            if process.is_alive():
                process.kill()
    total = {phase: np.sum([rates[phase] for rates in everyone], axis=0) for phase in PHASES}
    found = {f"{phase}_gb_s": round(float(np.median(total[phase])) / 1e9, 3) for phase in PHASES}
    for phase in PHASES[1:]:
        found[f"{phase}_ratio"] = round(float(np.median(total[phase] / total["memcpy"])), 4)
    return found


def _take(results: Any, processes: list[Any]) -> Rates:
    """The next result; a reader that failed has said why on standard error.

    Raises:
        RuntimeError: a reader ended without one.
    """
    end_s = time.monotonic() + START_TIMEOUT_S
    while results.empty():
        failed = [process.exitcode for process in processes if process.exitcode not in (None, 0)]
        if failed or time.monotonic() > end_s:
            raise RuntimeError(f"a reader failed (exit codes {failed})")
        time.sleep(0.01)
    rates: Rates = results.get()
    return rates


def _read(
    address: str,
    directory: str,
    name: str,
    block_bytes: int,
    raw: list[bytes],
    phase_s: float,
    together: Barrier,
    results: Any,
) -> None:
    """A reader's whole life."""
    import memfabric

    chains = [BlockKeys.chain(np.frombuffer(keys, np.uint8).reshape(-1, 16)) for keys in raw]
    batch = len(chains[0])
    memory = aligned(len(chains) * batch * block_bytes).reshape(len(chains), batch, block_bytes)
    with ExitStack() as stack:
        off, on = (
            stack.enter_context(
                memfabric.connect(
                    address, namespace=name, verify=verify, copy_threads=1, timeout_s=30.0, shm_directory=directory
                )
            )
            for verify in (False, True)
        )
        for client in (off, on):
            for keys in chains:
                client.prefetch(keys)
            enter_pages(client, writable=False)
        limits = [limit_of(off, keys, buffer, put=False) for keys, buffer in zip(chains, memory, strict=True)]
        work: dict[str, Callable[[int], object]] = {
            "memcpy": lambda at: limits[at].run(1),
            "verify_off": lambda at: off.get(chains[at], memory[at]),
            "verify_on": lambda at: on.get(chains[at], memory[at]),
        }
        rates: Rates = {phase: [] for phase in PHASES}
        for round_ in range(-1, ROUNDS):  # the first is the warm-up
            for phase in PHASES:
                together.wait(START_TIMEOUT_S)
                rate = _copy_for(phase_s, work[phase], len(chains), batch * block_bytes)
                if round_ >= 0:
                    rates[phase].append(rate)
    results.put(rates)


def _copy_for(phase_s: float, work: Callable[[int], object], count: int, size_bytes: int) -> float:
    """Copy batches in turn for some time; bytes per second."""
    begin = time.perf_counter()
    turns = 0
    while (taken := time.perf_counter() - begin) < phase_s:
        work(turns % count)
        turns += 1
    return turns * size_bytes / taken
