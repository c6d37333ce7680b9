"""Client processes: writers and readers that run on their own, and puppets that do what the test says.

Every call is under a watchdog in C (`faulthandler`), which needs no GIL: a call that never ends ends the process, with
all stacks in its log. Reads are checked byte by byte against what the payload itself says (`payload`).
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import select
import signal
import sys
import threading
import time
from collections import Counter
from typing import Any

import numpy as np

import memfabric
from memfabric.client import GetStatus, PutStatus
from memfabric.client.buffers import resolve
from memfabric.client.copying import write_headers, write_payload
from memfabric.core.keys import BlockKeys
from memfabric.core.layout import BlockState
from memfabric.core.messages import Commit, NamespaceSpec
from memfabric.errors import MemfabricError, OutcomeUnknownError, RefusedError, UnavailableError
from tests.processes import payload
from tests.processes.records import Recorder
from tests.processes.roles import say

HANG_S = 60.0
"""Longest life of any call, above its own deadline. Frozen processes and starved machines fit in it."""

NOTHING = object()
"""A call's outcome: it certainly did not happen."""


class Worker:
    """A client, its records and its counts."""

    def __init__(
        self,
        *,
        address: str,
        directory: str,
        spec: dict[str, Any],
        records: str,
        writer: int,
        timeout_s: float = 5.0,
        seed: int = 0,
        connect_s: float = 30.0,
        transport: str = "auto",
    ) -> None:
        self.spec = NamespaceSpec(**spec)
        self.random = random.Random(seed)
        self.recorder = Recorder(records)
        self.writer, self.attempts = writer, 0
        self.timeout_s = timeout_s
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._armed_s = 0.0
        self._watch()
        self.address, self.directory, self.transport_name = address, directory, transport
        self.client = self._connect(connect_s)

    def _connect(self, connect_s: float) -> memfabric.Client:
        """The server may be down just now: try for a while."""
        end_s = time.monotonic() + connect_s
        while True:
            self._watch()
            try:
                return memfabric.connect(
                    self.address,
                    namespace=self.spec.name,
                    create=self.spec,
                    timeout_s=self.timeout_s,
                    shm_directory=self.directory,
                    transport=self.transport_name,
                )
            except UnavailableError:
                if time.monotonic() > end_s:
                    raise

    def _watch(self) -> None:
        now_s = time.monotonic()
        if now_s - self._armed_s > 1.0:
            self._armed_s = now_s
            faulthandler.dump_traceback_later(HANG_S + self.timeout_s, exit=True)

    def nonce(self) -> int:
        self.attempts += 1
        return payload.nonce_of(self.writer, self.attempts)

    def attempt(self, what: str, call: Any) -> Any:
        """Run a call; expected errors are counted, others end the worker.

        Returns:
            The result; `NOTHING` after an error that promises that nothing happened; None after any other.
        """
        self._watch()
        self.counts[f"calls.{what}"] += 1
        begun_s = time.monotonic()
        try:
            result = call()
        except RefusedError as error:
            self.counts[f"refused.{error.code}.{what}"] += 1
            result = NOTHING
        except (UnavailableError, OutcomeUnknownError) as error:
            self.counts[f"{type(error).__name__}.{what}"] += 1
            result = None
        self.counts["slowest_ms"] = max(self.counts["slowest_ms"], int((time.monotonic() - begun_s) * 1000))
        self._watch()
        return result

    def check(self, ids: list[int], status: Any, out: Any) -> None:
        """Hold every block that was reported as good against what it must be."""
        for position, key_id in enumerate(ids):
            self.counts[f"get.{GetStatus(int(status[position])).name}"] += 1
            if status[position] == GetStatus.OK:
                self.check_block(key_id, np.frombuffer(out[position], np.uint8))

    def check_block(self, key_id: int, block: Any) -> int:
        nonce, wrong = payload.check(key_id, block)
        if wrong:
            self.wrong.append(wrong)
            self.counts["WRONG"] += 1
        else:
            self.recorder.seen(key_id, nonce)
        return nonce

    def count_put(self, ids: list[int], nonce: int, status: Any) -> None:
        self.recorder.outcome(ids, nonce, [bool(s == PutStatus.STORED) for s in status])
        for value in status:
            self.counts[f"put.{PutStatus(int(value)).name}"] += 1

    def report(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        say(event="report", counts=dict(self.counts), wrong=self.wrong[:20], stats=self.client.stats())
        self.client.close()


def told_to_stop() -> bool:
    return bool(select.select([0], [], [], 0)[0])


# --- load --------------------------------------------------------------------------------------------------------


def writer(*, chains: int, chain_blocks: int, pause_s: float = 0.0, removes: bool = True, **arguments: Any) -> None:
    """Puts chains in every way there is, until told to stop."""
    worker = Worker(**arguments)
    say(event="ready")
    pick, client = worker.random, worker.client
    while not told_to_stop():
        chain, count = pick.randrange(chains), pick.randint(1, chain_blocks)
        ids, keys = payload.chain(chain, count)
        way = pick.random()
        if way < 0.04 and removes:
            worker.attempt("remove", lambda keys=keys: client.remove(keys))
            continue
        nonce = worker.nonce()
        blocks = payload.fill_many(ids, nonce, worker.spec.block_bytes)
        worker.recorder.attempt(ids, nonce)
        if way < 0.7:
            data = list(blocks) if pick.random() < 0.3 else blocks
            wait = pick.random() < 0.2
            result = worker.attempt("put", lambda k=keys, d=data, w=wait: client.put(k, d, wait=w))
        else:
            result = worker.attempt("reserve", lambda k=keys, b=blocks: _piecewise(worker, k, b))
        if result is NOTHING:
            worker.recorder.outcome(ids, nonce, [False] * len(ids))
        elif result is not None:
            worker.count_put(ids, nonce, result.status)
        if pause_s:
            time.sleep(pick.random() * pause_s)
    worker.report()


def _piecewise(worker: Worker, keys: Any, blocks: Any) -> Any:
    """Reserve, write segment by segment, then commit; or abort now and then."""
    segments, size = worker.spec.segments, worker.spec.block_bytes // worker.spec.segments
    with worker.client.reserve(keys, ttl_s=worker.random.choice([0.3, 2.0, 10.0])) as lease:
        order = list(range(segments))
        worker.random.shuffle(order)
        for s in order:
            part = np.ascontiguousarray(blocks[:, s * size : (s + 1) * size])
            lease.write(part, segments=slice(s, s + 1))
        if worker.random.random() < 0.2:
            lease.abort()
            worker.counts["aborts"] += 1
            return NOTHING
        return lease.commit()


def reader(*, chains: int, chain_blocks: int, pause_s: float = 0.0, **arguments: Any) -> None:
    """Reads prefixes in every way there is, until told to stop; everything read is checked."""
    worker = Worker(**arguments)
    say(event="ready")
    pick, client, size = worker.random, worker.client, worker.spec.block_bytes
    while not told_to_stop():
        start, count = pick.randrange(chain_blocks), pick.randint(1, chain_blocks)
        ids, keys = payload.chain(pick.randrange(chains), min(count, chain_blocks - start), start)
        way = pick.random()
        if way < 0.75:
            leased = pick.random() < 0.3
            out: Any = np.empty((len(ids), size), np.uint8)
            if pick.random() < 0.3:
                out = [bytearray(size) for _ in ids]
            result = worker.attempt("get", lambda k=keys, o=out, le=leased: client.get(k, o, leased=le))
            if result is not None and result is not NOTHING:
                worker.counts["optimistic"] += result.optimistic_count
                worker.check(ids, result.status, out)
        elif way < 0.9:
            worker.attempt("acquire", lambda i=ids, k=keys: _hold(worker, i, k))
        elif way < 0.95:
            worker.attempt("match", lambda k=keys: client.match(k))
        else:
            worker.attempt("prefetch", lambda k=keys: client.prefetch(k))
        if pause_s:
            time.sleep(pick.random() * pause_s)
    worker.report()


def _hold(worker: Worker, ids: list[int], keys: Any) -> bool:
    """Read under one lease: whole, by segments, and in place."""
    with worker.client.acquire(keys, ttl_s=worker.random.choice([0.2, 5.0])) as lease:
        size, segments = worker.spec.block_bytes, worker.spec.segments
        parts = []
        for s in range(segments):
            result = lease.read(segments=slice(s, s + 1))
            parts.append((result.status == GetStatus.OK, np.asarray(result.out).reshape(len(ids), size // segments)))
        good = np.all([ok for ok, _ in parts], axis=0)
        for position in np.nonzero(good)[0]:
            worker.check_block(ids[position], np.concatenate([part[position] for _, part in parts]))
        held = np.nonzero(lease.granted)[0]
        if len(held):
            position = int(held[worker.random.randrange(len(held))])
            try:
                seen = np.array(np.frombuffer(lease.view(position), np.uint8))
                right = lease.check(position)
            except UnavailableError:
                return True
            worker.counts["views"] += 1
            if right:
                worker.check_block(ids[position], seen)
    return True


# --- puppets -----------------------------------------------------------------------------------------------------


class Puppet(Worker):
    """Does one thing at a time, when told; leases stay open between commands."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.lease: Any = None
        self.ids: list[int] = []
        self.nonce_now = 0

    def run(self) -> None:
        say(event="ready")
        for line in sys.stdin:
            command = json.loads(line)
            op = command.pop("op")
            if op == "exit":
                break
            self._watch()
            try:
                answer = getattr(self, f"do_{op}")(**command)
                say(event="answer", ok=True, **answer)
            except MemfabricError as error:
                code = getattr(error, "code", "")
                say(event="answer", ok=False, error=type(error).__name__, code=code, message=str(error))
        faulthandler.cancel_dump_traceback_later()
        self.client.close()

    def do_put(self, chain: int, count: int, start: int = 0, wait: bool = False, timeout_s: float | None = None) -> Any:
        ids, keys = payload.chain(chain, count, start)
        nonce = self.nonce()
        blocks = payload.fill_many(ids, nonce, self.spec.block_bytes)
        self.recorder.attempt(ids, nonce)
        result = self.client.put(keys, blocks, wait=wait, timeout_s=timeout_s)
        self.count_put(ids, nonce, result.status)
        return {"status": result.status.tolist(), "nonce": nonce, "message": result.message}

    def do_get(self, chain: int, count: int, start: int = 0, leased: bool = False) -> Any:
        ids, keys = payload.chain(chain, count, start)
        result = self.client.get(keys, leased=leased)
        nonces = [
            self.check_block(i, result.out[n]) if result.status[n] == GetStatus.OK else 0 for n, i in enumerate(ids)
        ]
        return {
            "status": result.status.tolist(),
            "nonces": nonces,
            "optimistic": result.optimistic_count,
            "wrong": self.wrong,
            "message": result.message,
        }

    def do_read_on(self, chain: int, count: int) -> Any:
        """Read the same blocks, mostly without asking, until the next command comes."""
        nonces: set[int] = set()
        statuses: Counter[str] = Counter()
        while not told_to_stop():
            got = self.do_get(chain, count, leased=self.random.random() < 0.1)
            nonces.update(nonce for nonce in got["nonces"] if nonce)
            statuses.update(GetStatus(status).name for status in got["status"])
        return {"nonces": sorted(nonces), "statuses": dict(statuses), "wrong": self.wrong}

    def do_enough(self) -> Any:
        return {}

    def do_acquire(self, chain: int, count: int, ttl_s: float) -> Any:
        self.ids, keys = payload.chain(chain, count)
        self.lease = self.client.acquire(keys, ttl_s=ttl_s)
        return {"granted": self.lease.granted.tolist()}

    def do_read(self) -> Any:
        result = self.lease.read()
        for position in np.nonzero(result.status == GetStatus.OK)[0]:
            self.check_block(self.ids[position], np.asarray(result.out)[position])
        return {"status": result.status.tolist(), "wrong": self.wrong}

    def do_release(self) -> Any:
        self.lease.release()
        return {}

    def do_reserve(self, chain: int, count: int, ttl_s: float) -> Any:
        self.ids, keys = payload.chain(chain, count)
        self.nonce_now = self.nonce()
        self.blocks = payload.fill_many(self.ids, self.nonce_now, self.spec.block_bytes)
        self.recorder.attempt(self.ids, self.nonce_now)
        self.lease = self.client.reserve(keys, ttl_s=ttl_s)
        return {
            "granted": self.lease.granted.tolist(),
            "status": self.lease.status.tolist(),
            "nonce": self.nonce_now,
            "message": self.lease.message,
        }

    def do_write(self, first: int = 0, last: int | None = None, freeze_after_s: float | None = None) -> Any:
        """Write segments ``first … last``; a thread stops this process so long after the copy began."""
        last = self.spec.segments if last is None else last
        size = self.spec.block_bytes // self.spec.segments
        part = np.ascontiguousarray(self.blocks[:, first * size : last * size])

        def freeze() -> None:
            time.sleep(freeze_after_s or 0.0)
            os.kill(os.getpid(), signal.SIGSTOP)

        if freeze_after_s is not None:
            threading.Thread(target=freeze, daemon=True).start()
        begun_s = time.monotonic()
        written = self.lease.write(part, segments=slice(first, last))
        return {"written": written, "seconds": time.monotonic() - begun_s}

    def do_commit(self) -> Any:
        result = self.lease.commit()
        self.count_put(self.ids, self.nonce_now, result.status)
        return {"status": result.status.tolist()}

    def do_abort(self) -> Any:
        self.lease.abort()
        return {}

    def do_refused(self) -> Any:
        """The test knows that the open reservation was not committed."""
        self.recorder.outcome(self.ids, self.nonce_now, [False] * len(self.ids))
        return {}

    def do_raw_commit(self) -> Any:
        """Commit as a writer would that never looks at a clock: only the server can refuse it."""
        held, engine = self.lease._held, self.client._engine
        mask = b"\1" * int(self.lease.granted.sum())
        deadline_ns = time.monotonic_ns() + 10**10
        for lease in held.lease_ids:
            engine.link.submit(Commit(lease=lease, stored=mask), deadline_ns).result()
        return {}

    def do_worst_writer(self, stop_before: str) -> Any:
        """From now on every write of the named kind stops this process first, and forgets its deadline.

        This is a writer that was stopped between its look at the clock and the copy: all of it lands late.
        """
        engine, segments = self.client._engine, self.spec.segments
        self.transport = transport = engine.transport

        class Late:
            def __getattr__(self, name: str) -> Any:
                return getattr(transport, name)

            def write(self, batch: Any, deadline_ns: int = 0, threads: int = 0) -> int:
                is_header = int(batch.length.max()) < engine.shape.block_bytes // segments
                if is_header == (stop_before == "header"):
                    os.kill(os.getpid(), signal.SIGSTOP)
                return transport.write(batch, 0, threads)

        engine.transport = Late()
        return {}

    def do_late_complete(self) -> Any:
        """Write payload and COMPLETE headers of the open reservation now, whatever the time is."""
        held, engine = self.lease._held, self.client._engine
        engine.transport = self.transport
        memory = resolve(self.blocks, len(self.ids), engine.shape, writable=False)
        total = 0
        for start, reservation in held.reservations:
            at, place = held._reachable(start, reservation)
            some = BlockKeys(held.keys.keys[at], held.keys.parents[at])
            copied = write_payload(engine, place, memory.select(at), 0)
            total += write_headers(engine, some, place, held.tokens[at], BlockState.COMPLETE, copied.digests, 0).good
        return {"written": total}

    def do_stats(self) -> Any:
        return {"stats": self.client.stats()}

    def do_match(self, chain: int, count: int) -> Any:
        return {"count": self.client.match(payload.chain(chain, count)[1])}

    def do_remove(self, chain: int, count: int, start: int = 0) -> Any:
        return {"status": self.client.remove(payload.chain(chain, count, start)[1]).status.tolist()}

    def do_fork(self, how: str) -> Any:
        """Use everything in a forked child, and end it in one of several ways; what it said."""
        faulthandler.cancel_dump_traceback_later()  # its thread is not forked, and a child's exit would wait for it
        read_fd, write_fd = os.pipe()
        keys = payload.chain(1, 2)[1]
        child = os.fork()
        if child == 0:
            said = []
            for call in (lambda: self.client.get(keys), self.lease.read, lambda: self.client.match(keys)):
                try:
                    call()
                    said.append("worked")
                except Exception as error:  # noqa: BLE001  # its name is the answer
                    said.append(type(error).__name__)
            os.write(write_fd, " ".join(said).encode())
            self.client.close()
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "_exit":
                os._exit(0)
            self.lease.release()
            raise SystemExit(0)
        os.close(write_fd)
        with os.fdopen(read_fd) as pipe:
            said_by_child = pipe.read()
        os.waitpid(child, 0)
        return {"child": said_by_child}

    def do_hang(self, after_s: float) -> Any:
        """What the watchdog is for."""
        faulthandler.dump_traceback_later(after_s, exit=True)
        time.sleep(600)


def puppet(**arguments: Any) -> None:
    Puppet(**arguments).run()


ROLES = {"writer": writer, "reader": reader, "puppet": puppet}
