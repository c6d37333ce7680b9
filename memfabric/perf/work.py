"""What a client does at a point, and how it is timed. Runs in a sweep's client processes."""

from __future__ import annotations

import abc
import time

import numpy as np

import transport
from memfabric.errors import UsageError
from memfabric.perf import messages
from memfabric.perf.blocks import Addresses, Bytes, aligned
from memfabric.perf.histogram import Histogram
from memfabric.perf.stream import PART_BYTES, Stream

_FLUSH = 1 << 14
KEY_BYTES = 16


class Work(abc.ABC):
    """A point that is ready.

    Attributes:
        blocks: of one operation. size_bytes: its payload; 0 for requests.
        ready: what is known of it, for the answer to `Prepare`.
    """

    blocks: int
    size_bytes: int
    ready: messages.Ready

    @abc.abstractmethod
    def op(self, turn: int) -> int:
        """Do the operation once; the nanoseconds it took."""

    def many(self, start_ns: int, end_ns: int) -> messages.Ran:
        """Do the operation until `end_ns`."""
        return repeat(self.op, start_ns, end_ns, self.blocks, self.size_bytes)

    @abc.abstractmethod
    def memcpy(self, turn: int) -> int:
        """memcpy as many blocks of the same size; the nanoseconds it took."""

    @abc.abstractmethod
    def socket(self, turn: int) -> int:
        """Move as many bytes through a socket, or make as many round trips; the nanoseconds it took."""

    @abc.abstractmethod
    def close(self) -> None:
        """Give everything back."""

    def run(self, command: messages.Run) -> messages.Ran:
        """Do what a command says.

        Raises:
            UsageError: it was not offered.
        """
        end_ns = command.start_ns + command.window_ns
        if command.what == "op":
            return self.many(command.start_ns, end_ns)
        if command.what not in self.ready.limits:
            raise UsageError(f"{command.what} cannot be run here")
        action = self.memcpy if command.what == "memcpy" else self.socket
        return repeat(action, command.start_ns, end_ns, self.blocks, self.size_bytes)


class Copies:
    """memcpy of one batch after the other, between two columns of addresses."""

    def __init__(self, destination: Addresses, source: Addresses, block_bytes: int, batch: int, threads: int) -> None:
        self._sides = [destination.reshape(-1, batch), source.reshape(-1, batch)]
        self._length = np.full(batch, block_bytes, np.uint64)
        self._threads = threads

    def __call__(self, turn: int) -> int:
        destination, source = self._sides
        at = turn % len(source)
        begin = time.perf_counter_ns()
        transport.copy_limit(destination[at], source[at], self._length, self._threads)
        return time.perf_counter_ns() - begin


class Sockets:
    """A plain socket stream of as many bytes as a batch has."""

    def __init__(self, port: int) -> None:
        self._stream = Stream("127.0.0.1", port)
        self._memory: Bytes = np.empty(0, np.uint8)

    def move(self, size_bytes: int, *, fetch: bool) -> int:
        """Nanoseconds that it takes to move bytes here (`fetch`) or there; long batches in parts."""
        taken = 0
        for start in range(0, size_bytes, PART_BYTES):
            part = self._part(min(PART_BYTES, size_bytes - start))
            taken += self._stream.fetch(part) if fetch else self._stream.store(part)
        return taken

    def round_trips(self, count: int, size_bytes: int) -> int:
        """Nanoseconds that requests of so many bytes and answers of one byte take, one after the other."""
        part = self._part(size_bytes)
        return sum(self._stream.store(part) for _ in range(count))

    def _part(self, size_bytes: int) -> Bytes:
        if self._memory.size < size_bytes:
            self._memory = aligned(size_bytes)
        return self._memory[:size_bytes]

    def close(self) -> None:
        """End the stream."""
        self._stream.__exit__(None, None, None)


class Clock:
    """Collects durations without holding more than a few thousand."""

    def __init__(self) -> None:
        self._recent: list[int] = []
        self._histogram = Histogram()
        self._count = 0
        self._total_ns = 0

    def note(self, taken_ns: int) -> None:
        """One more operation."""
        self._recent.append(taken_ns)
        if len(self._recent) == _FLUSH:
            self._flush()

    def _flush(self) -> None:
        self._histogram.add(self._recent)
        self._count += len(self._recent)
        self._total_ns += sum(self._recent)
        self._recent.clear()

    def ran(self, blocks: int, size_bytes: int, busy_ns: int | None = None) -> messages.Ran:
        """The sum.

        Args:
            blocks, size_bytes: of one operation. busy_ns: None: the sum of the durations, where none overlap.
        """
        self._flush()
        return messages.Ran(
            ops=self._count,
            blocks=self._count * blocks,
            size_bytes=self._count * size_bytes,
            busy_ns=self._total_ns if busy_ns is None else busy_ns,
            counts=sorted(self._histogram.counts.items()),
            least_ns=self._histogram.least_ns,
            most_ns=self._histogram.most_ns,
        )


def await_start(start_ns: int) -> None:
    """Sleep until an instant on CLOCK_MONOTONIC."""
    while (left_ns := start_ns - time.monotonic_ns()) > 0:
        time.sleep(left_ns / 1e9)


def repeat(action: object, start_ns: int, end_ns: int, blocks: int, size_bytes: int) -> messages.Ran:
    """Call ``action(turn)``, which returns its own nanoseconds, until the time is up; once at least."""
    assert callable(action)
    clock = Clock()
    await_start(start_ns)
    turn = 0
    while not turn or time.monotonic_ns() < end_ns:
        clock.note(action(turn))
        turn += 1
    return clock.ran(blocks, size_bytes)
