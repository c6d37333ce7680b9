"""Batches: what lands where, what is refused, deadlines, threads, implementations."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.transport.conftest import i32, one, random_bytes, u64
from transport import (
    Batch,
    BoundsError,
    NotConnectedError,
    NotWritableError,
    ShmTransport,
    copy_limit,
    digest,
    implementations,
)
from transport._native import Mapping, Mappings
from transport.base import DONE, NOT_DONE, NOT_WRITABLE, OUT_OF_BOUNDS, REGION_GONE

REGION_BYTES = 1 << 17
U64_MAX = (1 << 64) - 1
KERNELS = [(name, stream) for name in implementations() for stream in (0, 1)]

property_test = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def fragments(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], list[int], int]:
    """(starts on the side written to, never overlapping; starts on the side read from; lengths; groups; groups)"""
    sizes = st.integers(0, 300) | st.sampled_from([64, 1023, 1024, 1088, 4095, 4096, 4097, 9000])
    count = draw(st.integers(0, 10))
    to, source, length, at = [], [], [], 0
    for _ in range(count):
        at += draw(st.integers(0, 130) | st.sampled_from([0, 16, 64]))
        length.append(draw(sizes))
        to.append(at)
        source.append(draw(st.integers(0, REGION_BYTES - length[-1])))
        at += length[-1]
    groups = draw(st.integers(1, 4))
    group = sorted(draw(st.integers(0, groups - 1)) for _ in range(count))
    return to, source, length, [-1 if draw(st.integers(0, 3)) == 0 else g for g in group], groups


def anonymous_region(directory: Path) -> Mapping:
    path = directory / "plain"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.ftruncate(fd, REGION_BYTES)
        return Mapping(fd, REGION_BYTES, True)
    finally:
        os.close(fd)
        path.unlink()


@pytest.mark.parametrize(("name", "stream_bytes"), KERNELS)
@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
@given(plan=fragments(), shift=st.integers(0, 63))
@property_test
def test_exactly_the_named_bytes_move(
    directory: Path,
    name: str,
    stream_bytes: int,
    write: bool,
    plan: tuple[list[int], list[int], list[int], list[int], int],
    shift: int,
) -> None:
    to, source, length, group, groups = plan
    mapping = anonymous_region(directory)
    mappings = Mappings(name, stream_bytes)
    handle = mappings.attach(mapping)
    local = random_bytes(REGION_BYTES + 64, 1)[shift:][:REGION_BYTES]
    remote = mapping.array(True)
    remote[:] = random_bytes(REGION_BYTES, 2)
    before_local, before_remote = local.copy(), remote.copy()
    near, far = (source, to) if write else (to, source)
    out, status = np.full(groups, 99, np.uint64), np.full(len(to), 99, np.uint8)
    done = mappings.copy(
        write,
        u64(*(local.ctypes.data + n for n in near)),
        np.full(len(to), handle, np.int32),
        u64(*far),
        u64(*length),
        i32(*group),
        out,
        status,
        0,
        1,
    )
    assert done == len(to)
    assert not status.any()
    have, want, given_ = (remote, before_remote, before_local) if write else (local, before_local, before_remote)
    for t, s, n in zip(to, source, length, strict=True):
        want[t : t + n] = given_[s : s + n]
    assert np.array_equal(have, want)
    assert np.array_equal(local if write else remote, given_)
    for g in range(groups):
        parts = [given_[s : s + n].tobytes() for s, n, k in zip(source, length, group, strict=True) if k == g]
        assert int(out[g]) == digest(b"".join(parts))


def test_round_trip_with_and_without_digests(shm: ShmTransport) -> None:
    with shm.create_region("node", 7, 1 << 20) as region:
        handle = shm.connect(region.descriptor, writable=True)
        data = random_bytes(300_001)
        batch = one(data, handle, 12345, digest=True)
        assert shm.write(batch) == 1
        assert batch.digest is not None
        assert int(batch.digest[0]) == digest(data)
        assert np.array_equal(region.buffer[12345 : 12345 + data.size], data)
        assert np.array_equal(shm.mapped(handle)[12345 : 12345 + data.size], data)
        landed = np.zeros_like(data)
        assert shm.read(one(landed, handle, 12345)) == 1
        assert np.array_equal(landed, data)


def test_status_column_may_be_given_and_batches_are_reusable(shm: ShmTransport) -> None:
    with shm.create_region("node", 0, 4096) as region:
        handle = shm.connect(region.descriptor, writable=False)
        into, status = np.zeros(10, np.uint8), np.full(1, 9, np.uint8)
        batch = Batch(u64(into.ctypes.data), i32(handle), u64(0), u64(10), status=status)
        for value in (3, 4):
            region.buffer[:10] = value
            assert shm.read(batch) == 1
            assert into.tolist() == [value] * 10
        assert status.tolist() == [DONE]
        assert len(batch) == 1


def test_empty_batches_and_zero_lengths_are_legal(shm: ShmTransport) -> None:
    with shm.create_region("node", 0, 4096) as region:
        handle = shm.connect(region.descriptor, writable=True)
        assert shm.read(Batch(u64(), i32(), u64(), u64())) == 0
        batch = Batch(u64(0, 0), i32(handle, handle), u64(4096, 0), u64(0, 0), i32(1, 1), u64(5, 5))
        assert shm.write(batch) == 2
        assert batch.digest is not None
        assert batch.digest.tolist() == [digest(b"")] * 2


BAD = [
    ({"offset": 4097, "length": 0}, OUT_OF_BOUNDS),
    ({"offset": 4096, "length": 1}, OUT_OF_BOUNDS),
    ({"offset": 0, "length": 4097}, OUT_OF_BOUNDS),
    ({"offset": U64_MAX, "length": 1}, OUT_OF_BOUNDS),
    ({"offset": 1, "length": U64_MAX}, OUT_OF_BOUNDS),
    ({"offset": U64_MAX - 7, "length": 16}, OUT_OF_BOUNDS),
    ({"local": 0}, OUT_OF_BOUNDS),
    ({"local": U64_MAX}, OUT_OF_BOUNDS),
    ({"region": -1}, REGION_GONE),
    ({"region": 1}, REGION_GONE),
    ({"region": 2**31 - 1}, REGION_GONE),
    ({"region": -(2**31)}, REGION_GONE),
]


@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
@pytest.mark.parametrize(("change", "status"), BAD)
def test_one_bad_operation_refuses_the_batch(
    shm: ShmTransport, write: bool, change: dict[str, int], status: int
) -> None:
    with shm.create_region("node", 0, 4096) as region:
        handle = shm.connect(region.descriptor, writable=True)
        local = random_bytes(64)
        before, remote_before = local.copy(), region.buffer.copy()
        batch = Batch(
            u64(*([local.ctypes.data] * 3)),
            np.full(3, handle, np.int32),
            u64(0, 0, 0),
            u64(64, 8, 64),
            i32(0, 0, 1),
            u64(0, 0),
        )
        for column, value in change.items():
            getattr(batch, column)[1] = value
        expected = BoundsError if status == OUT_OF_BOUNDS else NotConnectedError
        with pytest.raises(expected, match="operation 1 of 3"):
            (shm.write if write else shm.read)(batch)
        assert batch.status.tolist() == [NOT_DONE, status, NOT_DONE]
        assert np.array_equal(local, before)
        assert np.array_equal(region.buffer, remote_before)


def test_write_to_a_read_only_connection_is_refused(shm: ShmTransport) -> None:
    with shm.create_region("node", 0, 4096) as region:
        writable = shm.connect(region.descriptor, writable=True)
        readable = shm.connect(region.descriptor, writable=False)
        local = random_bytes(64)
        batch = Batch(u64(*[local.ctypes.data] * 2), i32(writable, readable), u64(0, 64), u64(64, 64))
        with pytest.raises(NotWritableError, match="operation 1 of 2"):
            shm.write(batch)
        assert batch.status.tolist() == [NOT_DONE, NOT_WRITABLE]
        assert not region.buffer.any()
        with pytest.raises(ValueError, match="read-only"):
            shm.mapped(readable)[0] = 1


MALFORMED = {
    "local": np.zeros(2, np.int64),
    "region": np.zeros(2, np.int64),
    "offset": np.zeros(2, np.float64),
    "length": np.zeros(3, np.uint64),
    "group": np.array([1, 0], np.int32),
    "digest": np.zeros(1, np.uint32),
    "status": np.zeros(1, np.uint8),
}


@pytest.mark.parametrize("column", MALFORMED)
def test_malformed_columns_are_refused(shm: ShmTransport, column: str) -> None:
    with shm.create_region("node", 0, 4096) as region:
        handle = shm.connect(region.descriptor, writable=True)
        local = random_bytes(64)
        batch = Batch(u64(*[local.ctypes.data] * 2), i32(handle, handle), u64(0, 64), u64(64, 64), i32(0, 1), u64(0, 0))
        setattr(batch, column, MALFORMED[column])
        with pytest.raises(ValueError, match=f"column {column}"):
            shm.write(batch)
        assert not region.buffer.any()


@pytest.mark.parametrize("group", [i32(0, 2), i32(-2, 0), i32(1, 0)])
def test_groups_out_of_range_or_order_are_refused(shm: ShmTransport, group: np.ndarray) -> None:
    with shm.create_region("node", 0, 4096) as region:
        handle = shm.connect(region.descriptor, writable=True)
        local = random_bytes(64)
        batch = Batch(u64(*[local.ctypes.data] * 2), i32(handle, handle), u64(0, 64), u64(64, 64), group, u64(0, 0))
        with pytest.raises(ValueError, match="column group"):
            shm.write(batch)
        assert not region.buffer.any()


def test_columns_that_are_no_plain_arrays_are_refused(shm: ShmTransport) -> None:
    with shm.create_region("node", 0, 4096) as region:
        handle = shm.connect(region.descriptor, writable=True)
        local = random_bytes(64)
        every_second = np.full(4, 32, np.uint64)[::2]
        batch = Batch(u64(*[local.ctypes.data] * 2), i32(handle, handle), u64(0, 32), every_second)
        with pytest.raises((ValueError, BufferError)):
            shm.write(batch)
        batch = one(random_bytes(64), handle)
        batch.status.flags.writeable = False
        with pytest.raises((ValueError, BufferError)):
            shm.write(batch)
        batch.status = None  # type: ignore[assignment]
        with pytest.raises(TypeError):
            shm.write(batch)
        with pytest.raises(ValueError, match="threads"):
            shm.write(one(random_bytes(64), handle), threads=65)
        assert not region.buffer.any()


def test_passed_deadline_does_nothing(shm: ShmTransport) -> None:
    with shm.create_region("node", 0, 4096) as region:
        handle = shm.connect(region.descriptor, writable=True)
        data = random_bytes(4096)
        batch = one(data, handle, digest=True)
        assert shm.write(batch, deadline_ns=1) == 0
        assert batch.status.tolist() == [NOT_DONE]
        assert batch.digest is not None
        assert batch.digest.tolist() == [0]
        assert not region.buffer.any()


@pytest.mark.parametrize("threads", [1, 3])
def test_deadline_midway_leaves_every_operation_whole_or_undone(shm: ShmTransport, threads: int) -> None:
    block, count = 64 << 10, 256
    with shm.create_region("node", 0, block * count) as region:
        handle = shm.connect(region.descriptor, writable=True)
        data = random_bytes(block * count)
        at = np.arange(count, dtype=np.uint64) * np.uint64(block)
        region.buffer[:] = 0
        # Groups of two operations, so that a deadline can cut a group in half.
        batch = Batch(
            at + np.uint64(data.ctypes.data),
            np.full(count, handle, np.int32),
            at,
            np.full(count, block, np.uint64),
            np.arange(count, dtype=np.int32) // 2,
            np.zeros(count // 2, np.uint64),
        )
        done = count
        for wait_ns in (50_000_000, 1_000_000, 500_000, 200_000, 50_000, 0):
            region.buffer[:] = 0
            done = shm.write(batch, time.monotonic_ns() + wait_ns, threads)
            assert done == int((batch.status == DONE).sum())
            assert set(batch.status.tolist()) <= {DONE, NOT_DONE}
            if threads == 1:
                assert not batch.status[:done].any()
            assert batch.digest is not None
            for i in range(count):
                there = region.buffer[i * block : (i + 1) * block]
                if batch.status[i] == DONE:
                    assert np.array_equal(there, data[i * block : (i + 1) * block])
                else:
                    assert not there.any()
            for g in range(count // 2):
                whole = not batch.status[2 * g : 2 * g + 2].any()
                assert int(batch.digest[g]) == (digest(data[2 * g * block : (2 * g + 2) * block]) if whole else 0)
        assert done == 0


@pytest.mark.parametrize("threads", [0, 1, 2, 4, 64])
def test_threads_change_nothing(shm: ShmTransport, threads: int) -> None:
    rng = np.random.default_rng(5)
    length = rng.integers(0, 200_000, 300).astype(np.uint64)
    offset = np.concatenate([[0], np.cumsum(length)[:-1]]).astype(np.uint64)
    group = np.sort(rng.integers(0, 60, 300)).astype(np.int32)
    group[rng.integers(0, 300, 20)] = -1
    size = int(length.sum())
    with shm.create_region("node", 0, size) as region:
        handle = shm.connect(region.descriptor, writable=False)
        region.buffer[:] = random_bytes(size)
        local = np.zeros(size, np.uint8)
        batch = Batch(
            offset + np.uint64(local.ctypes.data),
            np.full(300, handle, np.int32),
            offset,
            length,
            group,
            np.zeros(60, np.uint64),
        )
        assert shm.read(batch, threads=threads) == 300
        assert batch.digest is not None
        for g in range(60):
            parts = [
                region.buffer[int(o) : int(o + n)].tobytes()
                for o, n in zip(offset[group == g], length[group == g], strict=True)
            ]
            assert int(batch.digest[g]) == digest(b"".join(parts))
        assert np.array_equal(local, region.buffer)


def test_many_threads_at_once(shm: ShmTransport) -> None:
    size = 12 << 20
    with shm.create_region("node", 0, size) as region:
        region.buffer[:] = random_bytes(size)
        handle = shm.connect(region.descriptor, writable=False)
        want = [digest(region.buffer[i << 20 : (i + 1) << 20]) for i in range(12)]
        wrong: list[object] = []

        def work(threads: int) -> None:
            local = np.zeros(size, np.uint8)
            at = np.arange(12, dtype=np.uint64) << np.uint64(20)
            batch = Batch(
                at + np.uint64(local.ctypes.data),
                np.full(12, handle, np.int32),
                at,
                np.full(12, 1 << 20, np.uint64),
                np.arange(12, dtype=np.int32),
                np.zeros(12, np.uint64),
            )
            for _ in range(5):
                assert batch.digest is not None
                if shm.read(batch, threads=threads) != 12 or batch.digest.tolist() != want:
                    wrong.append(batch.digest.tolist())

        workers = [threading.Thread(target=work, args=(1 + k % 3,)) for k in range(6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not wrong


def test_copy_limit_copies(directory: Path) -> None:
    source, target = random_bytes(1 << 16), np.zeros(1 << 16, np.uint8)
    at = np.arange(16, dtype=np.uint64) * np.uint64(4096)
    for threads in (0, 1, 2):
        target[:] = 0
        copy_limit(
            at + np.uint64(target.ctypes.data),
            at + np.uint64(source.ctypes.data),
            np.full(16, 4096, np.uint64),
            threads,
        )
        assert np.array_equal(source, target)
