"""Leases: zero-copy, layer-wise, in time and after it."""

from __future__ import annotations

import time

import numpy as np
import pytest

import memfabric
from memfabric import GetStatus, PagedBlocks, PagedLayout, PutStatus
from memfabric.core.keys import BlockKeys
from memfabric.core.messages import Release
from memfabric.errors import RefusalCode, RefusedError, UsageError
from tests.client.conftest import BLOCK_BYTES, SPEC, blocks, tokens
from tests.client.pool import ThreadPool

SEGMENT = BLOCK_BYTES // SPEC.segments


@pytest.fixture
def keys(client: memfabric.Client) -> BlockKeys:
    """Six keys of which the first four are stored."""
    keys = client.block_keys(tokens(6))
    client.put(keys[:4], blocks(4))
    return keys


def test_held_blocks_are_read_whole_and_in_layers(client: memfabric.Client, keys: BlockKeys) -> None:
    data = blocks(4)
    with client.acquire(keys) as lease:
        assert lease.status.tolist() == [1, 1, 1, 1, 0, 0] and lease.count == 4 and len(lease) == 6
        assert lease.deadline_ns > time.monotonic_ns()
        whole = lease.read()
        assert whole.status.tolist() == [GetStatus.OK] * 4 + [GetStatus.MISSING] * 2
        assert np.array_equal(whole.out[:4], data) and whole.prefix_count == 4
        for segment in range(4):
            out = np.zeros((6, SEGMENT), np.uint8)
            layer = lease.read(out, segments=slice(segment, segment + 1))
            assert layer.bytes_read == 4 * SEGMENT
            assert np.array_equal(out[:4], data[:, segment * SEGMENT : (segment + 1) * SEGMENT])
        last_two = lease.read(segments=slice(-2, None))
        assert np.array_equal(last_two.out[:4], data[:, 2 * SEGMENT :])


def test_a_prefix_is_held_up_to_the_first_gap(client: memfabric.Client, keys: BlockKeys) -> None:
    client.put(keys[5:], blocks(1, 9))
    with client.acquire(keys) as lease:
        assert lease.granted.tolist() == [True] * 4 + [False, True] and lease.count == 4
    with client.acquire(keys, prefix=True) as lease:
        assert lease.granted.tolist() == [True] * 4 + [False, False]


def test_views_are_the_pool_itself(client: memfabric.Client, keys: BlockKeys) -> None:
    data = blocks(4)
    with client.acquire(keys) as lease:
        view = lease.view(2)
        assert view.readonly and view.nbytes == BLOCK_BYTES and bytes(view) == data[2].tobytes()
        assert bytes(lease.view(2, segments=slice(1, 2))) == data[2, SEGMENT : 2 * SEGMENT].tobytes()
        assert lease.check(2)
        for index in (4, -1, 6):
            with pytest.raises(UsageError):
                lease.view(index)
            with pytest.raises(UsageError):
                lease.check(index)
    with pytest.raises(UsageError, match="ended already"):
        lease.check(2)
    assert bytes(view) == data[2].tobytes(), "the mapping lives as long as its views"


def test_a_lease_ends_in_time(client: memfabric.Client, keys: BlockKeys) -> None:
    lease = client.acquire(keys, ttl_s=0.15)
    assert lease.read().found_count == 4
    time.sleep(0.2)
    for call in (lease.read, lambda: lease.view(0), lease.renew, lambda: lease.check(0)):
        with pytest.raises(RefusedError, match="expired") as caught:
            call()
        assert caught.value.code == RefusalCode.LEASE_EXPIRED
    lease.release()


def test_a_renewed_lease_goes_on(client: memfabric.Client, keys: BlockKeys) -> None:
    with client.acquire(keys, ttl_s=0.3) as lease:
        first_ns = lease.deadline_ns
        assert lease.renew(5.0) == lease.deadline_ns > first_ns + 10**9
        time.sleep(0.4)
        assert lease.read().found_count == 4


def test_renewing_what_the_server_ended_is_refused(client: memfabric.Client, keys: BlockKeys) -> None:
    with client.acquire(keys) as lease:
        body = Release(leases=lease._held.lease_ids)
        client._engine.link.submit(body, time.monotonic_ns() + 10**9).result()
        with pytest.raises(RefusedError, match="expired"):
            lease.renew()
        with pytest.raises(RefusedError, match="expired"):
            lease.read()


def test_layers_are_written_one_by_one(client: memfabric.Client, other: memfabric.Client) -> None:
    keys, data = client.block_keys(tokens(3, 3)), blocks(3, 3)
    with client.reserve(keys) as lease:
        assert lease.granted.all()
        for segment in (2, 0, 3, 1):
            part = np.ascontiguousarray(data[:, segment * SEGMENT : (segment + 1) * SEGMENT])
            assert lease.write(part, segments=slice(segment, segment + 1)) == 3
        assert other.get(keys).found_count == 0, "not before the commit"
        assert lease.commit().stored_count == 3
    assert np.array_equal(other.get(keys).out, data)
    assert client.get(keys).optimistic_count == 3


def test_paged_layers(client: memfabric.Client, other: memfabric.Client) -> None:
    layers = [np.random.default_rng(i).integers(0, 256, (8, SEGMENT), dtype=np.uint8) for i in range(4)]
    layout = PagedLayout.from_tensors([[(layer, 0, SEGMENT, SEGMENT)] for layer in layers])
    keys = client.block_keys(tokens(3, 3))
    with client.reserve(keys) as lease:
        for segment in range(4):
            lease.write(PagedBlocks(layout, [6, 1, 2]), segments=slice(segment, segment + 1))
        assert lease.commit().ok
    fresh = [np.zeros_like(layer) for layer in layers]
    target = PagedLayout.from_tensors([[(layer, 0, SEGMENT, SEGMENT)] for layer in fresh])
    with other.acquire(keys) as lease:
        for segment in range(4):
            lease.read(PagedBlocks(target, [0, 1, 7]), segments=slice(segment, segment + 1)).raise_for_status()
            assert not any(layer.any() for layer in fresh[segment + 1 :])
    assert all(np.array_equal(fresh[i][[0, 1, 7]], layers[i][[6, 1, 2]]) for i in range(4))


def test_a_segment_may_be_written_again(client: memfabric.Client, other: memfabric.Client) -> None:
    keys, data = client.block_keys(tokens(2, 3)), blocks(2, 3)
    with client.reserve(keys) as lease:
        lease.write(blocks(2, 8))
        lease.write(np.ascontiguousarray(data[:, :SEGMENT]), segments=slice(0, 1))
        lease.write(np.ascontiguousarray(data[:, SEGMENT:]), segments=slice(1, 4))
        assert lease.commit().ok
    assert np.array_equal(other.get(keys).out, data)


def test_only_what_was_written_whole_is_committed(client: memfabric.Client, other: memfabric.Client) -> None:
    keys, data = client.block_keys(tokens(3, 3)), blocks(3, 3)
    with client.reserve(keys) as lease:
        lease.write(np.ascontiguousarray(data[:, : 3 * SEGMENT]), segments=slice(0, 3))
        result = lease.commit()
    assert result.status.tolist() == [PutStatus.LOST] * 3 and not result.ok
    assert "not written whole" in result.message
    assert other.get(keys).found_count == 0
    assert other.put(keys, data, wait=True).ok, "and the space is free again"


def test_leaving_without_commit_aborts(client: memfabric.Client, other: memfabric.Client) -> None:
    keys, data = client.block_keys(tokens(3, 3)), blocks(3, 3)
    with pytest.raises(RuntimeError, match="my own"), client.reserve(keys) as lease:
        lease.write(data)
        raise RuntimeError("my own")
    assert other.put(keys, data, wait=True).stored_count == 3
    for call in (lambda: lease.write(data), lease.commit, lease.renew):
        with pytest.raises(UsageError, match="ended already"):
            call()
    lease.abort()


def test_what_is_there_or_pending_is_not_granted(client: memfabric.Client, keys: BlockKeys) -> None:
    data = blocks(6)
    with client.reserve(keys[4:5]) as pending, client.reserve(keys) as lease:
        assert pending.granted.tolist() == [True]
        assert lease.status.tolist() == [PutStatus.EXISTS] * 4 + [PutStatus.PENDING, PutStatus.STORED]
        assert lease.granted.tolist() == [False] * 5 + [True]
        assert lease.write(data) == 1
        result = lease.commit()
        assert result.stored_count == 1 and result.status[5] == PutStatus.STORED
    assert client.get(keys).status.tolist() == [GetStatus.OK] * 4 + [GetStatus.MISSING, GetStatus.OK]


def test_a_writer_that_is_too_late_is_refused_and_nothing_appears(
    client: memfabric.Client, other: memfabric.Client
) -> None:
    keys, data = client.block_keys(tokens(3, 3)), blocks(3, 3)
    lease = client.reserve(keys, ttl_s=0.15)
    lease.write(data)
    time.sleep(0.2)
    for call in (lambda: lease.write(data), lease.commit):
        with pytest.raises(RefusedError) as caught:
            call()
        assert caught.value.code == RefusalCode.LEASE_EXPIRED
    assert other.get(keys).found_count == 0


def test_a_lease_of_another_client_is_refused(
    pool: ThreadPool, client: memfabric.Client, other: memfabric.Client
) -> None:
    keys = client.block_keys(tokens(1, 3))
    lease, foreign = client.reserve(keys), other.reserve(other.block_keys(tokens(1, 4)))
    foreign.write(blocks(1))
    foreign._held.reservations[0][1].lease = lease._held.lease_ids[0]
    with pytest.raises(RefusedError) as caught:
        foreign.commit()
    assert caught.value.code == RefusalCode.NOT_YOUR_LEASE
    lease.write(blocks(1))
    assert lease.commit().ok


def test_wrong_sizes_for_segments(client: memfabric.Client, keys: BlockKeys) -> None:
    with client.acquire(keys) as lease:
        with pytest.raises(UsageError, match="expected 24576"):
            lease.read(np.zeros((6, BLOCK_BYTES), np.uint8), segments=slice(0, 1))
        with pytest.raises(UsageError, match="non-empty slice"):
            lease.read(segments=slice(4, 5))
    with client.reserve(keys[4:]) as write, pytest.raises(UsageError, match="expected 8192"):
        write.write(blocks(2), segments=slice(0, 1))
