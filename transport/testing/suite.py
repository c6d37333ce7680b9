"""The tests of the conformance suite; see the package."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest

from transport._native import digest
from transport.base import (
    DONE,
    NOT_DONE,
    NOT_WRITABLE,
    OUT_OF_BOUNDS,
    REGION_GONE,
    Batch,
    Outcome,
    Transport,
    UInt8Column,
    outcome,
)
from transport.errors import (
    BoundsError,
    NotConnectedError,
    NotWritableError,
    TransportError,
    UnreachableError,
    UnsupportedError,
)
from transport.testing.owner import Owner, OwnerProcess, make, pattern

KIB, MIB = 1 << 10, 1 << 20
SECOND_NS = 1_000_000_000
SENTINEL = 0xA5


def after(seconds: float) -> int:
    """An instant on CLOCK_MONOTONIC."""
    return time.monotonic_ns() + int(seconds * SECOND_NS)


def operations(
    buffer: UInt8Column, handle: int, rows: list[tuple[int, int, int]], groups: list[int] | None = None
) -> Batch:
    """A batch of (local offset, remote offset, length) over one buffer and one handle."""
    columns = np.array(rows, np.int64).reshape(-1, 3)
    local = (columns[:, 0] + buffer.ctypes.data).astype(np.uint64)
    group = None if groups is None else np.array(groups, np.int32)
    digests = None if groups is None else np.zeros(max(groups, default=-1) + 2, np.uint64)
    region = np.full(len(rows), handle, np.int32)
    return Batch(local, region, columns[:, 1].astype(np.uint64), columns[:, 2].astype(np.uint64), group, digests)


def blocks(buffer: UInt8Column, handle: int, size: int) -> Batch:
    """A batch over the whole buffer, in blocks, to or from the same offsets."""
    return operations(buffer, handle, [(at, at, size) for at in range(0, buffer.size, size)])


class ConformanceSuite:
    """Subclass it in a test module; see the package.

    Attributes:
        factory: ``module:attribute`` that makes the transport.
        options, owner_options, client_options: keyword arguments of it: of both sides, of one.
        region_bytes: of most regions. large_bytes: of one region, 0 to skip; over 4 GiB to test 64-bit offsets.
        slow: factor on deadlines, for emulated machines.
    """

    factory: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {}
    owner_options: ClassVar[dict[str, Any]] = {}
    client_options: ClassVar[dict[str, Any]] = {}
    region_bytes: ClassVar[int] = 8 * MIB
    large_bytes: ClassVar[int] = 0
    slow: ClassVar[float] = 1.0

    # --- what tests stand on ---

    def make_client(self) -> Transport:
        return make(self.factory, {**self.options, **self.client_options})

    def make_owner(self) -> Owner:
        return OwnerProcess(self.factory, {**self.options, **self.owner_options})

    @pytest.fixture
    def owner(self) -> Iterator[Owner]:
        with self.make_owner() as made:
            yield made

    @pytest.fixture
    def client(self) -> Iterator[Transport]:
        with self.make_client() as made:
            yield made

    def needs(self, client: Transport, good: bool, what: str) -> None:
        if not good:
            pytest.skip(f"transport {client.capabilities.name} as configured does not claim {what}")

    def join(self, client: Transport, owner: Owner, descriptor: bytes, *, writable: bool = True) -> int:
        exchange = owner.exchange(client.identity) if client.capabilities.needs_exchange else None
        return client.connect(descriptor, writable=writable, exchange=exchange, deadline_ns=self.after(20 * self.slow))

    def now_ns(self) -> int:
        """The clock of deadlines; another one for transports that live in simulated time."""
        return time.monotonic_ns()

    def sleep(self, seconds: float) -> None:
        """Let time pass on it."""
        time.sleep(seconds)

    def after(self, seconds: float) -> int:
        """An instant on it."""
        return self.now_ns() + int(seconds * SECOND_NS)

    def long(self) -> int:
        return self.after(60 * self.slow)

    # --- integrity ---

    def test_bytes_of_all_sizes_and_alignments(self, owner: Owner, client: Transport) -> None:
        size = self.region_bytes
        handle = self.join(client, owner, owner.create(1, size, seed=1))
        want = pattern(1, size)
        lengths = [1, 2, 3, 7, 8, 9, 63, 64, 65, 255, 4095, 4096, 4097, 65535, 65537, 256 * KIB + 1, MIB - 1, MIB + 1]
        rows, at = [], 0
        for number, length in enumerate(lengths):
            rows.append((at + number % 13, (number * 7919) % 1021 + number * 1000, length))
            at += length + 32
        buffer = np.full(at + 64, SENTINEL, np.uint8)
        batch = operations(buffer, handle, rows)
        assert client.read(batch, self.long()) == len(rows), batch.error
        expected = np.full_like(buffer, SENTINEL)
        for local, remote, length in rows:
            expected[local : local + length] = want[remote : remote + length]
        assert (buffer == expected).all(), "wrong bytes, or bytes beside an operation were touched"

    def test_writes_arrive_and_nothing_else_changes(self, owner: Owner, client: Transport) -> None:
        size = min(self.region_bytes, 4 * MIB)
        handle = self.join(client, owner, owner.create(1, size, seed=2))
        expected = pattern(2, size)
        data = pattern(3, size)
        random = np.random.default_rng(4)
        for _ in range(6):
            rows, at = [], int(random.integers(0, 50))
            while at < size - 300 * KIB:
                length = int(random.choice([1, 5, 64, 1000, 4096, 70_000, 262_145]))
                rows.append((int(random.integers(0, size - length)), at, length))
                at += length + int(random.integers(0, 9000))
            batch = operations(data, handle, rows)
            assert client.write(batch, self.long()) == len(rows), batch.error
            for local, remote, length in rows:
                expected[remote : remote + length] = data[local : local + length]
            assert owner.digest_of(1) == digest(expected)

    def test_what_is_written_is_read(self, owner: Owner, client: Transport) -> None:
        handle = self.join(client, owner, owner.create(1, self.region_bytes))
        data = pattern(5, self.region_bytes)
        assert client.write(blocks(data, handle, 64 * KIB), self.long()) == data.size // (64 * KIB)
        back = np.zeros_like(data)
        assert client.read(blocks(back, handle, 32 * KIB), self.long()) == data.size // (32 * KIB)
        assert (back == data).all()

    def test_offsets_beyond_4_gib(self, owner: Owner, client: Transport) -> None:
        if not self.large_bytes:
            pytest.skip("needs a region of over 4 GiB of memory; set large_bytes")
        handle = self.join(client, owner, owner.create(1, self.large_bytes))
        offsets = [0, (1 << 31) - 5, (1 << 32) - 7, (1 << 32) + 10_011, self.large_bytes - 5000]
        data = pattern(6, 5000 * len(offsets))
        batch = operations(data, handle, [(n * 5000, at, 5000) for n, at in enumerate(offsets)])
        assert client.write(batch, self.long()) == len(offsets), batch.error
        for number, at in enumerate(offsets):
            assert (owner.bytes_of(1, at, 5000) == data[number * 5000 : (number + 1) * 5000]).all()
        back = np.zeros_like(data)
        batch = operations(back, handle, [(n * 5000, at, 5000) for n, at in enumerate(offsets)])
        assert client.read(batch, self.long()) == len(offsets)
        assert (back == data).all()

    def test_many_small_operations(self, owner: Owner, client: Transport) -> None:
        count, size = 5000, 512
        handle = self.join(client, owner, owner.create(1, count * size, seed=7))
        order = np.random.default_rng(8).permutation(count)
        buffer = np.zeros(count * size, np.uint8)
        rows = [(int(n) * size, int(n) * size, size) for n in order]
        batch = operations(buffer, handle, rows)
        assert client.read(batch, self.long()) == count, batch.error
        assert (buffer == pattern(7, count * size)).all()

    def test_digests_are_of_the_bytes(self, owner: Owner, client: Transport) -> None:
        handle = self.join(client, owner, owner.create(1, MIB, seed=9))
        want = pattern(9, MIB)
        rows = [(0, 100, 5000), (5000, 9000, 1), (6000, 0, 64 * KIB), (100_000, 7, 0), (90_000, 70_000, 777)]
        for write in (False, True):
            buffer = pattern(10, MIB)
            batch = operations(buffer, handle, rows, groups=[0, 0, -1, 1, 3])
            call = client.write if write else client.read
            assert call(batch, self.long()) == len(rows), batch.error
            source = buffer if write else want
            pieces = [source[a if write else b :][:n] for a, b, n in rows]
            assert batch.digest is not None
            assert int(batch.digest[0]) == digest(np.concatenate(pieces[:2]))
            assert int(batch.digest[1]) == int(batch.digest[2]) == digest(b"")
            assert int(batch.digest[3]) == digest(np.ascontiguousarray(pieces[4]))

    # --- order and visibility ---

    def test_operations_become_visible_in_order(self, owner: Owner, client: Transport) -> None:
        descriptor = owner.create(1, 64 * KIB)
        handle = self.join(client, owner, descriptor)
        self.needs(client, client.capabilities.ordered, "order")
        rows = [(0, 0, 8), (8, 32 * KIB, 8)]
        rounds = np.zeros(2, np.uint64)
        stop = threading.Event()

        def write() -> None:
            for number in itertools.count(1):
                if stop.is_set():
                    return
                rounds[:] = number
                client.write(operations(rounds.view(np.uint8), handle, rows), self.long(), 1)

        with self.make_client() as watcher:
            seen = self.join(watcher, owner, descriptor, writable=False)
            thread = threading.Thread(target=write)
            thread.start()
            try:
                got = np.zeros(2, np.uint64)
                for _ in range(300):
                    # The second before the first: it was written after it, so it can never be ahead.
                    back = operations(got.view(np.uint8), seen, [(8, 32 * KIB, 8), (0, 0, 8)])
                    assert watcher.read(back, self.long(), 1) == 2
                    assert got[1] <= got[0], "the second operation was visible before the first"
            finally:
                stop.set()
                thread.join()

    def test_a_write_that_returned_is_visible_to_others(self, owner: Owner, client: Transport) -> None:
        descriptor = owner.create(1, MIB)
        mine = self.join(client, owner, descriptor)
        with self.make_client() as other:
            theirs = self.join(other, owner, descriptor, writable=False)
            for number in range(30):
                data = pattern(number, 20_000)
                assert client.write(operations(data, mine, [(0, number, 20_000)]), self.long()) == 1
                back = np.zeros(20_000, np.uint8)
                assert other.read(operations(back, theirs, [(0, number, 20_000)]), self.long()) == 1
                assert (back == data).all()

    # --- batches ---

    def test_a_bad_operation_gets_the_whole_batch_refused(self, owner: Owner, client: Transport) -> None:
        size = 64 * KIB
        descriptor = owner.create(1, size, seed=11)
        handle = self.join(client, owner, descriptor)
        reader = self.join(client, owner, descriptor, writable=False)
        before = owner.digest_of(1)
        data = pattern(12, size)
        good = (0, 0, 100)
        cases: list[tuple[Any, int, type[TransportError]]] = [
            ((0, size - 99, 100), OUT_OF_BOUNDS, BoundsError),
            ((0, size + 1, 0), OUT_OF_BOUNDS, BoundsError),
            ((0, (1 << 62), 100), OUT_OF_BOUNDS, BoundsError),
            ((0, 0, 1 << 62), OUT_OF_BOUNDS, BoundsError),
        ]
        for row, status, error in cases:
            batch = operations(data, handle, [good, row, good])
            with pytest.raises(error, match="operation 1 of 3"):
                client.write(batch, self.long())
            assert batch.status.tolist() == [NOT_DONE, status, NOT_DONE]
        batch = operations(data, handle, [good, good])
        batch.local[1] = 0
        with pytest.raises(BoundsError):
            client.read(batch, self.long())
        for bad in (-1, 999, 1 << 30):
            batch = operations(data, handle, [good, good])
            batch.region[0] = bad
            with pytest.raises(NotConnectedError):
                client.write(batch, self.long())
            assert batch.status.tolist() == [REGION_GONE, NOT_DONE]
        batch = operations(data, reader, [good, good])
        with pytest.raises(NotWritableError):
            client.write(batch, self.long())
        assert batch.status.tolist() == [NOT_WRITABLE, NOT_WRITABLE]
        assert owner.digest_of(1) == before, "a refused batch changed bytes"
        assert (data == pattern(12, size)).all()
        batch = operations(data, reader, [good])
        assert client.read(batch, self.long()) == 1, "reading by a read-only handle"

    def test_columns_of_another_shape_are_refused(self, owner: Owner, client: Transport) -> None:
        handle = self.join(client, owner, owner.create(1, 4096))
        data = np.zeros(4096, np.uint8)
        for name, column in (
            ("length", np.zeros(2, np.uint64)),
            ("offset", np.zeros(1, np.int32)),
            ("region", np.zeros(1, np.int64)),
            ("status", np.zeros(3, np.uint8)),
            ("local", np.zeros((1, 1), np.uint64)),
        ):
            batch = operations(data, handle, [(0, 0, 10)])
            setattr(batch, name, column)
            with pytest.raises((ValueError, TypeError, BufferError)):
                client.read(batch, self.long())
        batch = operations(data, handle, [(0, 0, 10), (10, 10, 10)], groups=[1, 0])
        with pytest.raises(ValueError):
            client.read(batch, self.long())

    def test_empty_batches_and_empty_operations(self, owner: Owner, client: Transport) -> None:
        handle = self.join(client, owner, owner.create(1, 4096, seed=13))
        data = np.full(100, SENTINEL, np.uint8)
        assert client.read(operations(data, handle, []), self.long()) == 0
        batch = operations(data, handle, [(0, 0, 0), (0, 4096, 0)])
        assert client.write(batch, self.long()) == 2
        batch.local[:] = 0
        assert client.read(batch, self.long()) == 2
        assert (data == SENTINEL).all()

    def test_several_batches_in_flight(self, owner: Owner, client: Transport) -> None:
        handle = self.join(client, owner, owner.create(1, self.region_bytes, seed=14))
        want, part = pattern(14, self.region_bytes), self.region_bytes // 8
        buffers = [np.zeros(part, np.uint8) for _ in range(8)]
        pending = []
        for number, buffer in enumerate(buffers):
            rows = [(at, number * part + at, part // 4) for at in range(0, part, part // 4)]
            pending.append(client.post_read(operations(buffer, handle, rows), self.long()))
        for each in reversed(pending):
            assert each.wait() == 4
            assert each.poll()
            assert each.wait() == 4, "waiting again says the same"
        assert (np.concatenate(buffers) == want[: 8 * part]).all()
        assert client.flush(self.long())

    def test_polling_brings_a_batch_to_its_end(self, owner: Owner, client: Transport) -> None:
        handle = self.join(client, owner, owner.create(1, MIB, seed=15))
        buffer = np.zeros(MIB, np.uint8)
        pending = client.post_read(blocks(buffer, handle, 16 * KIB), self.long())
        end_s = time.monotonic() + 60 * self.slow
        while not pending.poll():
            assert time.monotonic() < end_s
            self.sleep(0.001)
        assert (buffer == pattern(15, MIB)).all()
        assert pending.wait() == 64

    def test_a_deadline_that_has_passed_begins_nothing(self, owner: Owner, client: Transport) -> None:
        handle = self.join(client, owner, owner.create(1, 64 * KIB, seed=16))
        before = owner.digest_of(1)
        data = pattern(17, 64 * KIB)
        batch = blocks(data, handle, 4 * KIB)
        assert client.write(batch, self.now_ns() - 1) == 0
        assert (batch.status == NOT_DONE).all()
        assert batch.error is not None
        assert owner.digest_of(1) == before
        assert client.write(batch, self.long()) == 16, "and the next batch works"
        assert batch.error is None

    def test_abandoned_batches_leave_memory_alone(self, owner: Owner, client: Transport) -> None:
        handle = self.join(client, owner, owner.create(1, self.region_bytes, seed=18))
        for _ in range(4):
            buffer = np.zeros(self.region_bytes, np.uint8)
            batch = blocks(buffer, handle, 256 * KIB)
            pending = client.post_read(batch, self.long())
            done = pending.abandon()
            buffer[:] = SENTINEL
            assert done == int((batch.status == DONE).sum())
            assert pending.abandon() == done
            self.sleep(0.05)
            assert (buffer == SENTINEL).all(), "memory changed after abandon had returned"
        back = np.zeros(4096, np.uint8)
        batch = operations(back, handle, [(0, 0, 4096)])
        assert client.read(batch, self.long()) == 1, f"and the next batch works: {batch.error}"
        assert (back == pattern(18, self.region_bytes)[:4096]).all()

    def test_an_operation_of_unknown_memory_is_refused(self, owner: Owner, client: Transport) -> None:
        handle = self.join(client, owner, owner.create(1, 4096))
        batch = operations(np.zeros(8, np.uint8), handle, [(0, 0, 8)])
        batch.kind = "papyrus"
        with pytest.raises(UnsupportedError):
            client.read(batch, self.long())

    # --- handles and descriptors ---

    def test_garbage_is_no_descriptor(self, owner: Owner, client: Transport) -> None:
        good = owner.create(1, 4096)
        random = np.random.default_rng(19)
        cases = [b"", b"\0", b"garbage", bytes(random.bytes(300)), good[: len(good) // 2], good + b"x", good * 20]
        for descriptor in cases:
            with pytest.raises(UnreachableError):
                client.connect(descriptor, writable=False, exchange=self._exchange(client, owner))
        for _ in range(40):
            damaged = bytearray(good)
            damaged[int(random.integers(len(damaged)))] ^= 1 << int(random.integers(8))
            self._connect_or_typed_error(client, owner, bytes(damaged))
        handle = self.join(client, owner, good)
        assert client.read(operations(np.zeros(8, np.uint8), handle, [(0, 0, 8)]), self.long()) == 1

    def _exchange(self, client: Transport, owner: Owner) -> Any:
        return owner.exchange(client.identity) if client.capabilities.needs_exchange else None

    def _connect_or_typed_error(self, client: Transport, owner: Owner, descriptor: bytes) -> None:
        """A flipped bit may leave a descriptor that works (in an address that is not used, say); never a crash."""
        try:
            handle = client.connect(
                descriptor,
                writable=False,
                exchange=self._exchange(client, owner),
                deadline_ns=self.after(2.0 * self.slow),
            )
        except TransportError:
            return
        client.disconnect(handle)

    def test_disconnected_handles_are_refused(self, owner: Owner, client: Transport) -> None:
        descriptor = owner.create(1, 4096)
        handle = self.join(client, owner, descriptor)
        client.disconnect(handle)
        with pytest.raises(NotConnectedError):
            client.disconnect(handle)
        with pytest.raises(NotConnectedError):
            client.read(operations(np.zeros(8, np.uint8), handle, [(0, 0, 8)]), self.long())
        again = self.join(client, owner, descriptor)
        assert client.read(operations(np.zeros(8, np.uint8), again, [(0, 0, 8)]), self.long()) == 1

    def test_nothing_works_after_close(self, owner: Owner) -> None:
        client = self.make_client()
        descriptor = owner.create(1, 4096)
        handle = self.join(client, owner, descriptor)
        client.close()
        client.close()
        with pytest.raises(TransportError):
            client.read(operations(np.zeros(8, np.uint8), handle, [(0, 0, 8)]), self.long())

    def test_handles_of_several_regions(self, owner: Owner, client: Transport) -> None:
        count, size = 5, 64 * KIB
        handles = [self.join(client, owner, owner.create(n, size, seed=n)) for n in range(count)]
        assert len(set(handles)) == count
        buffer = np.zeros(count * size, np.uint8)
        batch = operations(buffer, 0, [(n * size, 0, size) for n in range(count)])
        batch.region[:] = handles
        assert client.read(batch, self.long()) == count, batch.error
        for n in range(count):
            assert (buffer[n * size : (n + 1) * size] == pattern(n, size)).all()
        # One more, when all connections are there already.
        late = self.join(client, owner, owner.create(count, size, seed=count))
        data = np.zeros(size, np.uint8)
        batch = blocks(data, late, 4 * KIB)
        assert client.read(batch, self.long()) == len(batch), batch.error
        assert (data == pattern(count, size)).all()

    def test_a_mapped_region_is_the_region(self, owner: Owner, client: Transport) -> None:
        handle = self.join(client, owner, owner.create(1, 64 * KIB, seed=20))
        if not client.capabilities.zero_copy:
            with pytest.raises(UnsupportedError):
                client.mapped(handle)
            return
        view = client.mapped(handle)
        assert (view == pattern(20, 64 * KIB)).all()
        assert not view.flags.writeable

    # --- many at once ---

    def test_threads_share_a_transport(self, owner: Owner, client: Transport) -> None:
        parts, size = 4, 256 * KIB
        handle = self.join(client, owner, owner.create(1, parts * size))
        wrong: list[str] = []

        def work(number: int) -> None:
            for turn in range(12):
                data = pattern(number * 100 + turn, size)
                rows = [(at, number * size + at, 32 * KIB) for at in range(0, size, 32 * KIB)]
                back = np.zeros(size, np.uint8)
                if client.write(operations(data, handle, rows), self.long()) != len(rows):
                    wrong.append("write")
                if client.read(operations(back, handle, rows), self.long()) != len(rows):
                    wrong.append("read")
                if not (back == data).all():
                    wrong.append("bytes")

        threads = [threading.Thread(target=work, args=(n,)) for n in range(parts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_many_clients_come_and_go(self, owner: Owner) -> None:
        descriptor = owner.create(1, 64 * KIB, seed=21)
        for _ in range(3):
            clients = [self.make_client() for _ in range(6)]
            for client in clients:
                handle = self.join(client, owner, descriptor)
                buffer = np.zeros(64 * KIB, np.uint8)
                assert client.read(blocks(buffer, handle, 8 * KIB), self.long()) == 8
                assert (buffer == pattern(21, 64 * KIB)).all()
            for client in clients:
                client.close()

    # --- owners that end, stop, restart, withdraw ---

    def test_a_killed_owner_ends_batches_in_time(self, owner: Owner, client: Transport) -> None:
        self.needs(client, "death" in client.capabilities.detects, "to notice an owner's death")
        handle = self.join(client, owner, owner.create(1, self.region_bytes, seed=22))
        want = pattern(22, self.region_bytes)
        buffer = np.zeros(self.region_bytes, np.uint8)
        timer = threading.Timer(0.05, owner.kill)
        timer.start()
        end_s = time.monotonic() + 30 * self.slow
        while True:
            assert time.monotonic() < end_s, "the death of the owner was not noticed"
            batch = blocks(buffer, handle, 64 * KIB)
            begun_s = time.monotonic()
            done = client.read(batch, self.after(5.0 * self.slow))
            assert time.monotonic() - begun_s < 15 * self.slow, "a batch did not end by its deadline"
            for at in np.nonzero(batch.status == DONE)[0].tolist():
                start = at * 64 * KIB
                assert (buffer[start : start + 64 * KIB] == want[start : start + 64 * KIB]).all(), "wrong bytes as DONE"
            if done < len(batch):
                break
        timer.join()
        assert batch.error is not None
        buffer[:] = SENTINEL
        self.sleep(0.05)
        assert (buffer == SENTINEL).all(), "memory changed after the batch had ended"
        batch = blocks(buffer, handle, 64 * KIB)
        assert client.write(batch, self.after(2.0 * self.slow)) == 0
        assert all(outcome(int(status)) is not Outcome.APPLIED for status in batch.status)

    def test_a_restarted_owner_is_another(self, owner: Owner, client: Transport) -> None:
        descriptor = owner.create(1, 64 * KIB, seed=23)
        handle = self.join(client, owner, descriptor)
        owner.kill()
        owner.start()
        fresh = owner.create(1, 64 * KIB, seed=24)
        before = owner.digest_of(1)
        if "death" in client.capabilities.detects:
            with pytest.raises(TransportError), self.make_client() as other:
                self.join(other, owner, descriptor)
            batch = blocks(pattern(25, 64 * KIB), handle, 8 * KIB)
            assert client.write(batch, self.after(3.0 * self.slow)) == 0, "an old handle reached another owner"
        assert owner.digest_of(1) == before
        again = self.join(client, owner, fresh)
        buffer = np.zeros(64 * KIB, np.uint8)
        assert client.read(blocks(buffer, again, 8 * KIB), self.long()) == 8
        assert (buffer == pattern(24, 64 * KIB)).all()

    def test_a_stopped_owner(self, owner: Owner, client: Transport) -> None:
        """One-sided means that it does not matter; others end by the deadline, and work when it goes on."""
        handle = self.join(client, owner, owner.create(1, MIB, seed=26))
        want = pattern(26, MIB)
        buffer = np.zeros(MIB, np.uint8)
        assert client.read(blocks(buffer, handle, 64 * KIB), self.long()) == 16
        owner.freeze()
        try:
            buffer[:] = 0
            batch = blocks(buffer, handle, 64 * KIB)
            begun_s = time.monotonic()
            done = client.read(batch, self.after(1.0 if not client.capabilities.one_sided else 30.0 * self.slow))
            taken_s = time.monotonic() - begun_s
            if client.capabilities.one_sided:
                assert done == 16, batch.error
                assert (buffer == want).all()
                assert client.write(operations(want, handle, [(0, 0, 4096)]), self.long()) == 1
                return
            assert taken_s < 10 * self.slow, "a batch did not end by its deadline"
            for at in np.nonzero(batch.status == DONE)[0].tolist():
                start = at * 64 * KIB
                assert (buffer[start : start + 64 * KIB] == want[start : start + 64 * KIB]).all()
            buffer[:] = SENTINEL
        finally:
            owner.thaw()
        self.sleep(0.2)
        assert (buffer == SENTINEL).all(), "memory changed after the batch had ended"
        end_s = time.monotonic() + 30 * self.slow
        while client.read(blocks(buffer, handle, 64 * KIB), self.after(5.0 * self.slow)) != 16:
            assert time.monotonic() < end_s, "the client does not come back"
        assert (buffer == want).all()

    def test_a_withdrawn_region_can_no_longer_be_changed(self, owner: Owner, client: Transport) -> None:
        self.needs(client, "region" in client.capabilities.fences, "the fence 'region'")
        handle = self.join(client, owner, owner.create(1, self.region_bytes))
        other = self.join(client, owner, owner.create(2, 64 * KIB, seed=27))
        stream = _Stream(client, handle, self.region_bytes, self.after)
        with stream:
            while stream.running and not stream.rounds:
                self.sleep(0.05)
            assert stream.rounds
            owner.close_region(1)
            before = owner.digest_of(1)
            self.sleep(0.5 * self.slow)
            assert owner.digest_of(1) == before, "a byte changed after the region was withdrawn"
        batch = blocks(np.zeros(64 * KIB, np.uint8), handle, 8 * KIB)
        assert client.write(batch, self.after(3.0 * self.slow)) == 0
        buffer = np.zeros(64 * KIB, np.uint8)
        end_s = time.monotonic() + 20 * self.slow
        while client.read(blocks(buffer, other, 8 * KIB), self.after(5.0 * self.slow)) != 8:
            assert time.monotonic() < end_s, "other regions do not go on"
        assert (buffer == pattern(27, 64 * KIB)).all()

    def test_a_fenced_client_can_no_longer_write(self, owner: Owner, client: Transport) -> None:
        self.needs(client, "client" in client.capabilities.fences, "the fence 'client'")
        descriptor = owner.create(1, self.region_bytes)
        handle = self.join(client, owner, descriptor)
        reader_descriptor = owner.create(2, 64 * KIB, seed=28)
        with self.make_client() as bystander:
            theirs = self.join(bystander, owner, reader_descriptor)
            warm = np.zeros(64 * KIB, np.uint8)
            assert bystander.read(blocks(warm, theirs, 8 * KIB), self.long()) == 8
            connects = bystander.stats().get("connects")
            for round_ in range(12):
                data = np.full(self.region_bytes, round_ + 1, np.uint8)
                batch = blocks(data, handle, 64 * KIB)
                pending = client.post_write(batch, self.after(20.0 * self.slow))
                self.sleep(0.0005 * round_)
                assert owner.fence(client.identity)
                before = owner.digest_of(1)
                self.sleep(0.1 * self.slow)
                assert owner.digest_of(1) == before, "a byte changed after the fence"
                pending.wait()
                assert owner.digest_of(1) == before, "a byte changed after the fence"
                buffer = np.zeros(64 * KIB, np.uint8)
                assert bystander.read(blocks(buffer, theirs, 8 * KIB), self.long()) == 8, "others go on"
                batch = operations(pattern(29, 4096), handle, [(0, 0, 4096)])
                end_s = time.monotonic() + 20 * self.slow
                while client.write(batch, self.after(5.0 * self.slow)) != 1:
                    assert time.monotonic() < end_s, "a fenced client cannot come back"
            assert bystander.stats().get("connects") == connects, "fencing one client disturbed another"
        assert not owner.fence(bytes(16)), "nobody has this identity"

    # --- claims ---

    def test_capabilities_are_consistent(self, client: Transport) -> None:
        claims = client.capabilities
        assert claims.name
        assert claims.data_path
        assert claims.kinds >= {"cpu"}
        assert claims.max_region_bytes > 0
        assert claims.max_operation_bytes > 0
        assert claims.fences <= {"client", "region"}
        assert len(client.identity) == 16
        assert self.make_client().identity != client.identity

    def test_unclaimed_fences_are_refused(self, owner: Owner, client: Transport) -> None:
        if "client" in client.capabilities.fences:
            pytest.skip("the fence is claimed")
        with pytest.raises(TransportError, match="fence"):
            owner.fence(bytes(16))

    def test_registering_memory_that_exists(self) -> None:
        with self.make_client() as transport:
            memory = np.zeros(64 * KIB, np.uint8)
            if "cpu" not in transport.capabilities.region_kinds:
                with pytest.raises(UnsupportedError):
                    transport.register(memory, 1)
                return
            whole = transport.register(memory, 1)
            part = transport.register(memory[4096:8192], 2)
            assert part.size_bytes == 4096
            part.close()
            part.close()
            whole.close()


class _Stream:
    """Writes without pause, each round another byte, in a thread; ends at the first batch that is not done."""

    def __init__(self, client: Transport, handle: int, size: int, after: Callable[[float], int] = after) -> None:
        self._client, self._handle, self._size, self._after = client, handle, size, after
        self._stop = threading.Event()
        self.rounds = 0
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        data = np.zeros(self._size, np.uint8)
        while not self._stop.is_set():
            data[:] = self.rounds % 251
            batch = blocks(data, self._handle, 64 * KIB)
            if self._client.write(batch, self._after(10.0)) != len(batch):
                return
            self.rounds += 1

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        self._stop.set()

    def __enter__(self) -> _Stream:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join()
