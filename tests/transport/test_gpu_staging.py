"""Batches from and to a device's memory, on a device made of threads: real copies, real overtaking, real kernels."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transport.conftest import i32, random_bytes, u64
from transport import ShmTransport, digest
from transport.base import (
    DONE,
    NOT_DONE,
    NOT_WRITABLE,
    OUT_OF_BOUNDS,
    PEER_LOST,
    REGION_GONE,
    TIMED_OUT,
    Batch,
    Capabilities,
    Pending,
    Region,
    Transport,
    UInt8Column,
)
from transport.errors import (
    BoundsError,
    NotConnectedError,
    NotWritableError,
    PeerLostError,
    TimedOutError,
    TransportError,
    UnsupportedError,
)
from transport.gpu import DeviceError, HostDevice, Stager, parts

PART_BYTES = parts.MIN_PART_BYTES
REGION_BYTES = 4 << 20


class Later(Transport):
    """Shared memory whose batches are performed by another thread, some time after they were posted.

    Attributes:
        delay_s: Drawn for each batch, at most. fail: Called with the number of a batch that has operations of some
            length; True: it is lost instead of performed. lose: Operations of each batch that are lost.
    """

    def __init__(self, inner: ShmTransport, seed: int = 0) -> None:
        super().__init__()
        self.inner, self._random = inner, random.Random(seed)
        self.delay_s, self.kinds = 0.0005, frozenset({"cpu"})
        self.fail: Callable[[int], bool] = lambda number: False
        self.lose = slice(0, 0)
        self.posted: list[Batch] = []
        self.second = threading.Event()
        self.prepared: set[tuple[int, int]] = set()
        self.at_once = 0
        self.guard = threading.Lock()

    @property
    def capabilities(self) -> Capabilities:
        import dataclasses

        return dataclasses.replace(self.inner.capabilities, kinds=self.kinds)

    def create_region(self, *arguments: Any, **options: Any) -> Region:
        return self.inner.create_region(*arguments, **options)

    def connect(self, *arguments: Any, **options: Any) -> int:
        return self.inner.connect(*arguments, **options)

    def disconnect(self, handle: int) -> None:
        self.inner.disconnect(handle)

    def size_of(self, handle: int) -> int:
        return self.inner.size_of(handle)

    def prepare(self, address: int, length: int) -> None:
        self.prepared.add((address, length))

    def forget(self, address: int, length: int) -> None:
        self.prepared.discard((address, length))

    def post_read(self, batch: Batch, deadline_ns: int = 0, threads: int = 0) -> Pending:
        return self._post(self.inner.read, batch, deadline_ns)

    def post_write(self, batch: Batch, deadline_ns: int = 0, threads: int = 0) -> Pending:
        return self._post(self.inner.write, batch, deadline_ns)

    def _post(self, call: Callable[[Batch, int], int], batch: Batch, deadline_ns: int) -> Pending:
        assert batch.kind in self.kinds
        plain = Batch(batch.local, batch.region, batch.offset, batch.length, status=batch.status)
        if not batch.length.any():
            call(plain, deadline_ns)  # refuses, or does nothing
        self.posted += [batch] if batch.length.any() else []
        if len(self.posted) == 2:
            self.second.set()
        return _Later(self, call, batch, plain, deadline_ns, len(self.posted) - 1)

    def close(self) -> None:
        self.inner.close()


class _Later(Pending):
    def __init__(self, transport: Later, call: Any, batch: Batch, plain: Batch, deadline_ns: int, number: int) -> None:
        self._transport, self._batch = transport, batch
        self._cancelled = False
        self._delay_s = transport._random.random() * transport.delay_s
        self._thread = threading.Thread(target=self._perform, args=(call, plain, deadline_ns, number), daemon=True)
        self._thread.start()

    def _perform(self, call: Any, plain: Batch, deadline_ns: int, number: int) -> None:
        transport, real = self._transport, bool(plain.length.any())
        with transport.guard:
            transport.at_once += real
        time.sleep(self._delay_s)
        if self._cancelled or (real and transport.fail(number)):
            plain.status[:] = PEER_LOST
            self._batch.error = PeerLostError("lost on purpose")
        elif real and len(plain.length[transport.lose]):
            kept = np.ones(len(plain), np.bool_)
            kept[transport.lose] = False
            some = Batch(plain.local[kept], plain.region[kept], plain.offset[kept], plain.length[kept])
            call(some, deadline_ns)
            plain.status[kept], plain.status[~kept] = some.status, PEER_LOST
            self._batch.error = PeerLostError("lost on purpose")
        else:
            call(plain, deadline_ns)
            self._batch.error = plain.error
        with transport.guard:
            transport.at_once -= real

    def poll(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> int:
        self._thread.join()
        return int((self._batch.status == DONE).sum())

    def abandon(self) -> int:
        self._cancelled = True
        return self.wait()


class Bench:
    """A region, its handle, and "device" memory, of which every byte is known."""

    def __init__(self, transport: Transport, region: Region) -> None:
        self.transport, self.region = transport, region
        self.handle = transport.connect(region.descriptor, writable=True)
        self.read_only = transport.connect(region.descriptor, writable=False)
        region.buffer[:] = random_bytes(REGION_BYTES, 1)
        self.memory = random_bytes(REGION_BYTES + 64, 2)
        self.before = self.memory.copy(), region.buffer.copy()

    def batch(self, at: list[int], offset: list[int], length: list[int], group: list[int] | None, groups: int) -> Batch:
        return Batch(
            np.array(at, np.uint64) + np.uint64(self.memory.ctypes.data),
            np.full(len(at), self.handle, np.int32),
            np.array(offset, np.uint64),
            np.array(length, np.uint64),
            None if group is None else np.array(group, np.int32),
            np.zeros(groups, np.uint64) if group is not None else None,
            kind="cuda",
        )

    def check(self, write: bool, batch: Batch, done: list[bool] | None = None) -> None:
        """What was to be moved was moved, nothing else was touched, and the digests are of those bytes."""
        memory, region = self.before[0].copy(), self.before[1].copy()
        base = self.memory.ctypes.data
        data: dict[int, list[UInt8Column]] = {}
        for i in range(len(batch)):
            a, o, n = int(batch.local[i]) - base, int(batch.offset[i]), int(batch.length[i])
            data.setdefault(-1 if batch.group is None else int(batch.group[i]), []).append(
                self.before[0][a : a + n] if write else self.before[1][o : o + n]
            )
            if done is None or done[i]:
                if write:
                    region[o : o + n] = self.before[0][a : a + n]
                else:
                    memory[a : a + n] = self.before[1][o : o + n]
        assert np.array_equal(memory, self.memory)
        assert np.array_equal(region, self.region.buffer)
        if batch.digest is not None:
            assert batch.group is not None
            for g, found in enumerate(batch.digest.tolist()):
                of = batch.group == g
                whole = done is None or all(np.array(done)[of])
                assert found == (digest(b"".join(p.tobytes() for p in data.get(g, []))) if whole else 0), g


@pytest.fixture(params=["at once", "later"])
def bench(request: pytest.FixtureRequest, shm: ShmTransport) -> Iterator[Bench]:
    transport = shm if request.param == "at once" else Later(shm)
    with shm.create_region("gpu", 1, REGION_BYTES) as region:
        yield Bench(transport, region)


def fresh(bench: Bench) -> None:
    bench.memory[:], bench.region.buffer[:] = bench.before


@pytest.fixture
def device() -> Iterator[HostDevice]:
    made = HostDevice(fill=0xA5)
    yield made
    made.close()


def slow(seed: int) -> Callable[[], None]:
    """Streams dawdle now and then, so that whoever doesn't wait for them sees it."""
    draw = random.Random(seed)
    return lambda: time.sleep(draw.choice([0, 0, 0.001, 0.003]))


def scattered(seed: int, count: int, sizes: list[int], unit: int = 1, grouped: bool = True) -> Any:
    """Operations of the given sizes: disjoint, anywhere in memory and region, in random order on both sides."""
    draw = np.random.default_rng(seed)
    length = draw.choice(sizes, count)
    if draw.integers(0, 2):
        length[draw.integers(0, count)] = 0
    room = REGION_BYTES - int(length.sum())
    assert room > count * unit

    def places(run: bool) -> list[int]:
        order = np.arange(count) if run else draw.permutation(count)
        gaps = np.sort(draw.integers(0, room // unit, count)) * unit * (0 if run else 1)
        at = np.zeros(count, np.int64)
        at[order] = np.cumsum(length[order]) - length[order] + gaps
        return at.tolist()

    group = np.sort(draw.integers(0, max(1, count // 3), count)).astype(np.int32)
    group[draw.random(count) < 0.1] = -1
    return (
        places(False),
        places(bool(draw.integers(0, 2))),
        length.tolist(),
        group.tolist() if grouped else None,
        max(1, count // 3) + 1,
    )


@pytest.mark.parametrize("write", [True, False], ids=["write", "read"])
@pytest.mark.parametrize("seed", range(12))
def test_scattered_batches(bench: Bench, write: bool, seed: int) -> None:
    """Many parts, every alignment, groups across parts, with streams that dawdle."""
    sizes, count = ([1, 7, 64, 4096, 4097, 300_000], 40) if seed % 2 else ([16, 256, 2048], 700)
    device = HostDevice(slow(seed), fill=0xA5)
    stager = Stager(bench.transport, device, part_bytes=PART_BYTES, slots=1 + seed % 3)
    if seed % 2:
        count = 40 if seed < 6 else 12
    batch = bench.batch(*scattered(seed, min(count, 12) if 300_000 in sizes else count, sizes, 1 if seed % 2 else 16))
    call = stager.write if write else stager.read
    assert call(batch) == len(batch)
    assert batch.error is None and (batch.status == DONE).all()
    bench.check(write, batch)
    assert stager.stats()["staged_bytes"] == int(batch.length.sum())
    stager.close()
    device.close()


@pytest.mark.parametrize("write", [True, False], ids=["write", "read"])
@pytest.mark.parametrize("grouped", [True, False])
def test_one_long_operation_goes_in_parts_that_overlap(
    bench: Bench, device: HostDevice, write: bool, grouped: bool
) -> None:
    stager = Stager(bench.transport, device, part_bytes=PART_BYTES)
    later = bench.transport
    if isinstance(later, Later):  # the first part arrives once the second is on its way, or never
        later.fail = lambda number: number == 0 and not later.second.wait(10)
    batch = bench.batch([13], [4097], [REGION_BYTES - 5000], [0] if grouped else None, 2)
    assert (stager.write if write else stager.read)(batch) == 1
    bench.check(write, batch)
    assert int(stager.stats()["parts"]) >= 8
    stager.close()


def test_scattered_memory_travels_in_few_operations(bench: Bench, device: HostDevice) -> None:
    """Fragments that lie side by side in the region are one operation for the transport."""
    if not isinstance(bench.transport, Later):
        pytest.skip("looks into the posted batches")
    n = 1024
    order = np.random.default_rng(0).permutation(n)
    stager = Stager(bench.transport, device)
    batch = bench.batch((order * 256).tolist(), (np.arange(n) * 256).tolist(), [256] * n, list(range(n)), n)
    assert stager.read(batch) == n
    bench.check(False, batch)
    assert [len(each) for each in bench.transport.posted] == [1]
    stager.close()
    assert not bench.transport.prepared, "what was prepared is forgotten"


@pytest.mark.parametrize("write", [True, False], ids=["write", "read"])
def test_direct_where_the_transport_takes_device_memory(bench: Bench, device: HostDevice, write: bool) -> None:
    if not isinstance(bench.transport, Later):
        pytest.skip("shared memory takes the processor's memory only")
    bench.transport.kinds = frozenset({"cpu", "cuda"})
    stager = Stager(bench.transport, device)
    batch = bench.batch(*scattered(3, 30, [1, 100, 5000]))
    assert (stager.write if write else stager.read)(batch) == len(batch)
    bench.check(write, batch)
    assert [each.kind for each in bench.transport.posted] == ["cuda"]
    assert stager.stats()["direct_bytes"] == int(batch.length.sum()) and stager.stats()["staged_bytes"] == 0
    assert "directly" in str(stager.stats()["path"])
    bench.transport.fail = lambda number: True
    assert (stager.write if write else stager.read)(batch) == int((batch.length == 0).sum())
    assert "lost on purpose" in str(batch.error)
    stager.close()


# --- refusals ---


@pytest.mark.parametrize("write", [True, False], ids=["write", "read"])
def test_a_batch_is_refused_whole(bench: Bench, device: HostDevice, write: bool) -> None:
    stager = Stager(bench.transport, device, part_bytes=PART_BYTES)
    call = stager.write if write else stager.read

    def refused(error: type[Exception], status: int, text: str, **change: Any) -> None:
        at, size = [0, 100, 2_000_000], [10, 10, 1_000_000]
        batch = bench.batch(at, at, size, [0, 1, 2], 3)
        for name, value in change.items():
            getattr(batch, name)[1] = value
        with pytest.raises(error, match=text):
            call(batch)
        assert batch.status.tolist() == [NOT_DONE, status, NOT_DONE]
        bench.check(write, batch, [False] * 3)

    refused(BoundsError, OUT_OF_BOUNDS, "operation 1 of 3.*offset 4194300, length 10", offset=REGION_BYTES - 4)
    refused(BoundsError, OUT_OF_BOUNDS, "operation 1 of 3", offset=(1 << 64) - 5)
    refused(BoundsError, OUT_OF_BOUNDS, "operation 1 of 3.*local address 0x0", local=0)
    refused(BoundsError, OUT_OF_BOUNDS, "operation 1 of 3", local=(1 << 64) - 5)
    refused(NotConnectedError, REGION_GONE, "handle 77", region=77)
    if write:
        refused(NotWritableError, NOT_WRITABLE, "for reading", region=bench.read_only)
    stager.close()


def test_malformed_batches_are_refused(bench: Bench, device: HostDevice) -> None:
    stager = Stager(bench.transport, device)
    with pytest.raises(UnsupportedError, match="not 'cpu'"):
        stager.read(Batch(u64(0), i32(0), u64(0), u64(0)))
    with pytest.raises(ValueError, match="column offset"):
        stager.read(Batch(u64(0), i32(0), u64(), u64(0), kind="cuda"))
    with pytest.raises(ValueError, match="groups must not decrease"):
        stager.read(bench.batch([0, 0], [0, 0], [1, 1], [1, 0], 2))
    with pytest.raises(ValueError, match="at least 524288"):
        Stager(bench.transport, device, part_bytes=4096)
    with pytest.raises(ValueError, match="slots"):
        Stager(bench.transport, device, slots=0)
    assert stager.read(bench.batch([], [], [], [], 2)) == 0
    batch = bench.batch([0], [0], [0], [0], 2)
    assert stager.read(batch) == 1 and batch.digest is not None and batch.digest.tolist() == [digest(b"")] * 2
    stager.close()
    with pytest.raises(TransportError, match="closed"):
        stager.read(batch)
    stager.close()


# --- failures ---


@pytest.mark.parametrize("write", [True, False], ids=["write", "read"])
def test_a_lost_part_is_not_taken_for_done(bench: Bench, device: HostDevice, write: bool) -> None:
    if not isinstance(bench.transport, Later):
        pytest.skip("shared memory loses nothing")
    bench.transport.fail = lambda number: number == 1
    stager = Stager(bench.transport, device, part_bytes=PART_BYTES)
    n, size = 12, 200_000
    batch = bench.batch([i * size for i in range(n)], [i * size for i in range(n)], [size] * n, list(range(n)), n)
    done = (stager.write if write else stager.read)(batch)
    assert "lost on purpose" in str(batch.error)
    assert 0 < done == int((batch.status == DONE).sum()) < n
    assert set(batch.status.tolist()) == {DONE, PEER_LOST}
    assert batch.digest is not None
    assert [value == 0 for value in batch.digest.tolist()] == [status != DONE for status in batch.status.tolist()]
    # What did not arrive leaves its whole part of the caller's memory as it was; its neighbours' pieces may be there.
    for i in np.nonzero(batch.status == DONE)[0]:
        part = slice(i * size, (i + 1) * size)
        expected = bench.before[0] if write else bench.before[1]
        assert np.array_equal((bench.region.buffer if write else bench.memory)[part], expected[part])
        assert batch.digest[i] == digest(expected[part])
    bench.transport.fail = lambda number: False
    fresh(bench)
    assert (stager.write if write else stager.read)(batch) == n and batch.error is None
    bench.check(write, batch)
    stager.close()


@pytest.mark.parametrize("write", [True, False], ids=["write", "read"])
@pytest.mark.parametrize("size", [100, 4096])
def test_lost_operations_within_a_part(bench: Bench, device: HostDevice, write: bool, size: int) -> None:
    """Some of a part's operations are lost: those alone are not done, and their groups alone have no digest."""
    if not isinstance(bench.transport, Later):
        pytest.skip("shared memory loses nothing")
    bench.transport.lose = slice(0, None, 7)
    stager = Stager(bench.transport, device, part_bytes=PART_BYTES)
    n = 300
    at = [i * 2 * size for i in range(n)]
    batch = bench.batch(at, at, [size] * n, [i // 10 for i in range(n)], n // 10)
    posted = bench.transport.posted
    done = (stager.write if write else stager.read)(batch)
    assert done == n - sum(len(each.length[::7]) for each in posted) and "lost on purpose" in str(batch.error)
    assert set(batch.status.tolist()) == {DONE, PEER_LOST}
    bench.check(write, batch, (batch.status == DONE).tolist())
    stager.close()


@pytest.mark.parametrize("write", [True, False], ids=["write", "read"])
@pytest.mark.parametrize("fails_at", [0, 1, 3, 6, 11, 17])
def test_a_device_that_fails(bench: Bench, write: bool, fails_at: int) -> None:
    """The call ends with statuses, the slots are not used again, and the next call works."""
    steps = iter(range(10_000))

    def hook() -> None:
        if next(steps) == fails_at:
            raise RuntimeError("an illegal address, say")

    device = HostDevice(hook)
    stager = Stager(bench.transport, device, part_bytes=PART_BYTES, pipelines=1)
    n, size = 8, 300_000
    at = [i * size for i in range(n)]
    batch = bench.batch(at, at, [size] * n, list(range(n)), n)
    done = (stager.write if write else stager.read)(batch)
    assert done < n and isinstance(batch.error, DeviceError) and "illegal address" in str(batch.error)
    good = batch.status == DONE
    assert done == good.sum()
    assert set(batch.status[~good].tolist()) <= {NOT_DONE, PEER_LOST}
    for i in np.nonzero(good)[0]:
        part = slice(i * size, (i + 1) * size)
        expected = bench.before[0] if write else bench.before[1]
        assert np.array_equal((bench.region.buffer if write else bench.memory)[part], expected[part])
    if write:  # what is reported as not applied was not
        for i in np.nonzero(batch.status == NOT_DONE)[0]:
            part = slice(i * size, (i + 1) * size)
            assert np.array_equal(bench.region.buffer[part], bench.before[1][part])
    fresh(bench)
    assert (stager.write if write else stager.read)(batch) == n
    bench.check(write, batch)
    stager.close()
    device.close()


@pytest.mark.parametrize("write", [True, False], ids=["write", "read"])
def test_an_interrupt_leaves_nothing_on_its_way(bench: Bench, device: HostDevice, write: bool) -> None:
    if not isinstance(bench.transport, Later):
        pytest.skip("interrupts the waiting for a batch")
    stager = Stager(bench.transport, device, part_bytes=PART_BYTES, pipelines=1)
    batch = bench.batch([0], [0], [REGION_BYTES], [0], 1)
    waits = iter(range(100))
    real = _Later.wait

    def interrupted(pending: _Later) -> int:
        if pending._batch.length.any() and next(waits) == 2:
            raise KeyboardInterrupt
        return real(pending)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Later, "wait", interrupted)
        patch.setattr(_Later, "abandon", lambda pending: setattr(pending, "_cancelled", True) or real(pending))
        with pytest.raises(KeyboardInterrupt):
            (stager.write if write else stager.read)(batch)
    seen = bench.memory.copy(), bench.region.buffer.copy()
    time.sleep(0.02)
    assert np.array_equal(seen[0], bench.memory) and np.array_equal(seen[1], bench.region.buffer)
    assert bench.transport.at_once == 0
    fresh(bench)
    assert (stager.write if write else stager.read)(batch) == 1
    bench.check(write, batch)
    stager.close()


@pytest.mark.parametrize("write", [True, False], ids=["write", "read"])
def test_deadlines(bench: Bench, device: HostDevice, write: bool) -> None:
    stager = Stager(bench.transport, device, part_bytes=PART_BYTES)
    call = stager.write if write else stager.read
    n, size = 8, 300_000
    at = [i * size for i in range(n)]
    batch = bench.batch(at, at, [size] * n, list(range(n)), n)
    assert call(batch, time.monotonic_ns() - 1) == 0
    assert isinstance(batch.error, TimedOutError) and set(batch.status.tolist()) == {NOT_DONE}
    bench.check(write, batch, [False] * n)

    device.hook = None
    slow_device = HostDevice(lambda: time.sleep(0.02))
    late = Stager(bench.transport, slow_device, part_bytes=PART_BYTES)
    call = late.write if write else late.read
    done = call(batch, time.monotonic_ns() + 60_000_000)
    assert done < n and isinstance(batch.error, TimedOutError)
    assert set(batch.status.tolist()) <= {DONE, NOT_DONE, TIMED_OUT}
    stager.close()
    late.close()
    slow_device.close()


def test_calls_wait_for_their_turn_until_the_deadline(bench: Bench) -> None:
    gate = threading.Event()
    device = HostDevice(lambda: gate.wait() and None)
    stager = Stager(bench.transport, device, pipelines=1)
    first, second = bench.batch([0], [0], [10], [0], 1), bench.batch([20], [20], [10], [0], 1)
    thread = threading.Thread(target=stager.read, args=(first,))
    thread.start()
    while not stager._made or stager._idle:
        time.sleep(0.001)
    assert stager.read(second, time.monotonic_ns() + 20_000_000) == 0
    assert isinstance(second.error, TimedOutError) and "other calls" in str(second.error)
    closer = threading.Thread(target=stager.close)
    gate.set()
    closer.start()
    thread.join()
    closer.join()
    assert first.status.tolist() == [DONE]
    bench.check(False, first)
    device.close()


def test_many_threads(bench: Bench) -> None:
    device = HostDevice(slow(5))
    stager = Stager(bench.transport, device, part_bytes=PART_BYTES, pipelines=2)
    n = 6
    share = REGION_BYTES // n
    batches = [bench.batch([i * share], [i * share], [share], [0], 1) for i in range(n)]
    threads = [threading.Thread(target=stager.read, args=(batch,)) for batch in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, batch in enumerate(batches):
        assert batch.status.tolist() == [DONE]
        assert batch.digest is not None and batch.digest[0] == digest(bench.before[1][i * share : (i + 1) * share])
    assert np.array_equal(bench.memory[: n * share], bench.before[1][: n * share])
    stager.close()
    device.close()


def test_no_memory_for_staging(bench: Bench) -> None:
    device = HostDevice(limit_bytes=1 << 20)
    stager = Stager(bench.transport, device)
    batch = bench.batch([0], [0], [10], [0], 1)
    with pytest.raises(DeviceError, match="were asked for"):
        stager.read(batch)
    assert batch.status.tolist() == [NOT_DONE]
    bench.check(False, batch, [False])
    stager.close()


def test_the_stand_ins_memory_is_given_back_whatever_is_locked() -> None:
    """Finalizers run anywhere, so also in a thread that holds the device's lock."""
    device = HostDevice(limit_bytes=1000)
    memory = device.allocate(900)
    with device._lock:
        del memory
    device.allocate(1000)


@pytest.mark.parametrize("write", [True, False], ids=["write", "read"])
def test_the_callers_stream_comes_first(bench: Bench, device: HostDevice, write: bool) -> None:
    """What the caller's stream still has to do to the memory is done before it is gathered from, or scattered to."""
    gate = threading.Event()
    mine = device.stream()
    late = random_bytes(1000, 9)
    mine._put(lambda: gate.wait() and None)
    mine.copy(bench.memory.ctypes.data, late.ctypes.data, 1000)
    stager = Stager(bench.transport, device)
    batch = bench.batch([0], [0], [1000], [0], 1)
    thread = threading.Thread(
        target=(stager.write if write else stager.read), args=(batch,), kwargs={"follow": [mine.number]}
    )
    thread.start()
    try:
        thread.join(0.3)
        assert thread.is_alive(), "it waits for the caller's stream"
    finally:
        gate.set()
        thread.join()
    if write:
        assert np.array_equal(bench.region.buffer[:1000], late)
    else:
        assert np.array_equal(bench.memory[:1000], bench.before[1][:1000])
    assert batch.digest is not None and batch.digest[0] == digest(late if write else bench.before[1][:1000])
    stager.close()


# --- how batches are cut ---


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_parts_fit_and_cover_everything_once(data: st.DataObject) -> None:
    count = data.draw(st.integers(0, 40))
    length = [data.draw(st.sampled_from([0, 1, 63, 4096, 5000, 70_000, 600_000])) for _ in range(count)]
    group = np.array(sorted(data.draw(st.integers(0, 9)) for _ in range(count)), np.int32)
    group[[data.draw(st.booleans()) for _ in range(count)]] = -1
    joined = [data.draw(st.booleans()) for _ in range(count)]
    offset, at = [], 0
    for n, join in zip(length, joined, strict=True):
        at += 0 if join else 10
        offset.append(at)
        at += n
    batch = Batch(
        np.array(offset, np.uint64) + np.uint64(7), np.zeros(count, np.int32), np.array(offset, np.uint64),
        np.array(length, np.uint64), group, np.zeros(10, np.uint64), kind="cuda",
    )  # fmt: skip
    cell = parts.cell_bytes(PART_BYTES)
    pieces = parts.cut(batch, cell)
    covered: dict[int, int] = {}
    for i, o, n, a in zip(pieces.operation, pieces.offset, pieces.length, pieces.local, strict=True):
        assert int(o) == offset[i] + covered.get(int(i), 0) and int(a) == int(o) + 7
        covered[int(i)] = covered.get(int(i), 0) + int(n)
    assert covered == {i: n for i, n in enumerate(length) if n}
    cuts = parts.pack(pieces, PART_BYTES, cell)
    assert [edge for part in cuts for edge in (part.start, part.stop)] == sorted(
        edge for part in cuts for edge in (part.start, part.stop)
    )
    assert sum(part.stop - part.start for part in cuts) == len(pieces)
    for part in cuts:
        layout = parts.lay_out(pieces.region[part], pieces.offset[part], pieces.length[part])
        assert 0 < layout.size_bytes <= PART_BYTES and part.stop - part.start <= cell
        ends = layout.position + pieces.length[part]
        assert (layout.position[1:] >= ends[:-1]).all()
        assert layout.run_length.sum() == pieces.length[part].sum()
        assert np.array_equal(layout.run_offset[layout.run] - layout.run_position[layout.run],
                              pieces.offset[part] - layout.position)  # fmt: skip
        first = part.start
        if pieces.group[first] >= 0 and first and pieces.group[first - 1] == pieces.group[first]:
            assert int(pieces.start[first]) % 4096 == 0, "a group is cut where its digest can be"


def test_a_part_of_nothing_but_single_bytes() -> None:
    """The worst case: each piece a run of its own."""
    n = 40_000
    batch = Batch(
        np.arange(1, n + 1, dtype=np.uint64), np.zeros(n, np.int32), np.arange(n, dtype=np.uint64) * np.uint64(3),
        np.ones(n, np.uint64), np.zeros(n, np.int32), np.zeros(1, np.uint64), kind="cuda",
    )  # fmt: skip
    cell = parts.cell_bytes(PART_BYTES)
    pieces = parts.cut(batch, cell)
    for part in parts.pack(pieces, PART_BYTES, cell):
        layout = parts.lay_out(pieces.region[part], pieces.offset[part], pieces.length[part])
        assert layout.size_bytes <= PART_BYTES and part.stop - part.start <= cell


def test_importing_needs_nothing(tmp_path: Path) -> None:
    import subprocess
    import sys

    source = "import sys, transport.gpu; assert 'cupy' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", source], check=True, timeout=60)
