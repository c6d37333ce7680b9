"""Reads and writes between a client's memory and a region, by batches of a transport."""

from __future__ import annotations

import time
from collections import deque
from typing import NoReturn

import numpy as np

import transport
from memfabric.errors import MemfabricError, UsageError
from memfabric.perf import messages
from memfabric.perf.memory import Memory, WrongBytesError
from memfabric.perf.work import Clock, Copies, Sockets, Work, await_start
from transport import Batch, Pending, Transport

OPERATION_NS = 30_000_000_000
"""Deadline of one operation."""


class RawWork(Work):
    """See the module. Every batch has its own memory, and its own blocks of the region."""

    def __init__(
        self, through: Transport, handle: int, kind: str, sockets: Sockets | None, order: messages.Prepare
    ) -> None:
        """Write the working set, read it back, and look at it.

        Raises:
            UsageError: the transport does not take this kind of memory. WrongBytesError: other bytes came back.
            MemfabricError: an operation failed.
        """
        able = through.capabilities
        if kind not in able.kinds:
            kinds = ", ".join(sorted(able.kinds))
            raise UsageError(f"transport {able.name} does not take memory of kind {kind} here, only {kinds}")
        self._through, self._order, self._sockets = through, order, sockets
        self._write = order.op == "write"
        self._memcpy: Copies | None = None
        self.blocks, self.size_bytes = order.batch, order.batch * order.block_bytes
        self._memory = Memory(kind, order.set_count, order.batch, order.block_bytes)
        # The memory that a batch reads into or writes from is the batch's until it ends.
        self._batches = self._make_batches(handle, kind)
        through.prepare(self._memory.address, self._memory.size_bytes)
        try:
            self._try_out()
            self._memcpy = self._limit(handle, kind, able.zero_copy)
        except BaseException:
            self.close()
            raise
        limits = ["memcpy"] if self._memcpy is not None else []
        limits += ["socket"] if sockets is not None else []
        if sockets is not None:
            self.socket(0)  # grows its memory
        able = through.capabilities  # some know more of their path once they are connected
        self.ready = messages.Ready(
            data_path=able.data_path, one_sided=able.one_sided, mapped=able.zero_copy, limits=limits
        )

    def _make_batches(self, handle: int, kind: str) -> list[Batch]:
        order = self._order
        start, room = order.span
        count = order.set_count * order.batch
        assert count * order.block_bytes <= room, "the sweep lends enough"
        places = np.arange(count, dtype=np.uint64)
        if order.random_order:
            places = np.random.default_rng(order.seed).permutation(places)
        self._offsets = np.uint64(start) + places * np.uint64(order.block_bytes)
        self._local = np.uint64(self._memory.address) + np.arange(count, dtype=np.uint64) * np.uint64(order.block_bytes)
        made = []
        for at in range(0, count, order.batch):
            part = slice(at, at + order.batch)
            made.append(
                Batch(
                    self._local[part],
                    np.full(order.batch, handle, np.int32),
                    self._offsets[part],
                    np.full(order.batch, order.block_bytes, np.uint64),
                    np.arange(order.batch, dtype=np.int32) if order.verify else None,
                    np.zeros(order.batch, np.uint64) if order.verify else None,
                    kind=kind,
                )
            )
        return made

    def _try_out(self) -> None:
        self._memory.fill(self._order.seed)
        for batch in self._batches:
            self._wait(self._post(batch, write=True), batch)
        written = [None if batch.digest is None else batch.digest.copy() for batch in self._batches]
        self._memory.clear()
        for batch, digests in zip(self._batches, written, strict=True):
            self._wait(self._post(batch, write=False), batch)
            if digests is not None and (digests != batch.digest).any():
                raise WrongBytesError("the digests of what was read are not those of what was written")
        self._memory.check(self._order.seed)

    def _limit(self, handle: int, kind: str, zero_copy: bool) -> Copies | None:
        """memcpy between the same places where they can be mapped, else to another piece of memory."""
        if kind != "cpu":
            return None
        order = self._order
        if zero_copy:
            remote = np.uint64(self._through.mapped(handle).ctypes.data) + self._offsets
        else:
            self._other = Memory(kind, order.set_count, order.batch, order.block_bytes)
            self._other.fill(order.seed)
            remote = self._local - np.uint64(self._memory.address) + np.uint64(self._other.address)
        destination, source = (remote, self._local) if self._write else (self._local, remote)
        return Copies(destination, source, order.block_bytes, order.batch, order.threads)

    def op(self, turn: int) -> int:
        batch = self._batches[turn % len(self._batches)]
        begin = time.perf_counter_ns()
        pending = self._post(batch, write=self._write)
        done = pending.wait()
        taken = time.perf_counter_ns() - begin
        if done != len(batch):
            self._fail(batch)
        return taken

    def many(self, start_ns: int, end_ns: int) -> messages.Ran:
        if self._order.depth == 1:
            return super().many(start_ns, end_ns)
        clock = Clock()
        flying: deque[tuple[Pending, Batch, int]] = deque()
        await_start(start_ns)
        begin = time.perf_counter_ns()
        turn = 0
        try:
            while not turn or time.monotonic_ns() < end_ns:
                batch = self._batches[turn % len(self._batches)]
                posted = time.perf_counter_ns()
                flying.append((self._post(batch, write=self._write), batch, posted))
                turn += 1
                if len(flying) == self._order.depth:
                    self._land(flying, clock)
            while flying:
                self._land(flying, clock)
        finally:
            for pending, _, _ in flying:
                pending.abandon()
        return clock.ran(self.blocks, self.size_bytes, time.perf_counter_ns() - begin)

    def _land(self, flying: deque[tuple[Pending, Batch, int]], clock: Clock) -> None:
        pending, batch, posted = flying.popleft()
        self._wait(pending, batch)
        clock.note(time.perf_counter_ns() - posted)

    def memcpy(self, turn: int) -> int:
        assert self._memcpy is not None
        return self._memcpy(turn)

    def socket(self, turn: int) -> int:
        assert self._sockets is not None
        return self._sockets.move(self.size_bytes, fetch=not self._write)

    def close(self) -> None:
        self._through.forget(self._memory.address, self._memory.size_bytes)

    def _post(self, batch: Batch, *, write: bool) -> Pending:
        post = self._through.post_write if write else self._through.post_read
        return post(batch, time.monotonic_ns() + OPERATION_NS, self._order.threads)

    def _wait(self, pending: Pending, batch: Batch) -> None:
        if pending.wait() != len(batch):
            self._fail(batch)

    @staticmethod
    def _fail(batch: Batch) -> NoReturn:
        done = int((batch.status == transport.base.DONE).sum())
        raise MemfabricError(f"{done} of {len(batch)} operations of a batch were done: {batch.error}")
