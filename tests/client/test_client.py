"""The blocking client against a real pool."""

from __future__ import annotations

import gc
import os
import socket
import threading
import time
import weakref
from typing import Any

import numpy as np
import pytest

import memfabric
from memfabric import Fingerprint, GetStatus, NamespaceSpec, PagedBlocks, PagedLayout, PutStatus, RemoveStatus
from memfabric.core.keys import BlockKeys
from memfabric.core.layout import HEADER_DTYPE, plan_region
from memfabric.errors import (
    CorruptBlockError,
    RefusalCode,
    RefusedError,
    UnavailableError,
    UsageError,
)
from tests.client.conftest import BLOCK_BYTES, SPEC, blocks, tokens
from tests.client.pool import MIB, TRANSPORT, ThreadPool, wait_for


def corrupt(pool: ThreadPool, client: memfabric.Client, key: bytes, *, in_header: bool = False) -> None:
    """Flip a bit of a block in the pool's memory, behind everybody's back."""
    for node, _ in pool.nodes.values():
        for region in node._arena._regions.values():
            layout = plan_region(region.size_bytes, BLOCK_BYTES, SPEC.segments)
            table = region.buffer[4096 : 4096 + layout.headers_bytes].reshape(-1, layout.header_stride)
            headers = np.ascontiguousarray(table[:, :64]).view(HEADER_DTYPE)[:, 0]
            for index in range(layout.block_count):
                if headers["key"][index].tobytes() == key and headers["state"][index] == 2:
                    at = layout.header_offset(index) + 20 if in_header else layout.block_offset(index) + 5000
                    region.buffer[at] ^= 1
                    return
    raise AssertionError("the block is nowhere")


# --- round trips ------------------------------------------------------------------------------------------


def test_what_is_put_is_read(client: memfabric.Client, other: memfabric.Client) -> None:
    keys, data = client.block_keys(tokens(40)), blocks(40)
    result = client.put(keys, data)
    assert result.ok and result.stored_count == 40 and result.bytes_written == data.nbytes
    assert client.put(keys, data).status.tolist() == [PutStatus.EXISTS] * 40
    assert other.match(keys) == 40
    first = other.get(keys)
    assert first.ok and first.found_count == first.prefix_count == 40 and first.optimistic_count == 0
    assert np.array_equal(first.out, data)
    for leased in (False, True):
        out = np.zeros_like(data)
        again = other.get(keys, out, leased=leased)
        assert again.out is out and np.array_equal(out, data)
        assert again.optimistic_count == (0 if leased else 40)
        again.raise_for_status()
    assert client.get(keys).optimistic_count == 40, "a writer knows its own places"


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("count", [1, 3, 33, 200])
def test_batches_of_all_sizes_and_modes(pool: ThreadPool, client: memfabric.Client, count: int, verify: bool) -> None:
    keys, data = client.block_keys(tokens(count, count)), blocks(count, count)
    assert client.put(keys, data).ok
    with pool.connect(verify=verify, copy_threads=1 if count == 33 else 0) as reader:
        for _ in range(3):
            result = reader.get(keys)
            assert result.ok and np.array_equal(result.out, data)


def test_partial_results_are_reported_per_block(client: memfabric.Client, other: memfabric.Client) -> None:
    keys, data = client.block_keys(tokens(10)), blocks(10)
    client.put(keys[:4], data[:4])
    client.put(keys[6:8], data[6:8])
    expected = [GetStatus.OK] * 4 + [GetStatus.MISSING] * 2 + [GetStatus.OK] * 2 + [GetStatus.MISSING] * 2
    for _ in range(2):
        result = other.get(keys)
        assert result.status.tolist() == expected
        assert (result.found_count, result.prefix_count, result.ok) == (6, 4, False)
        assert np.array_equal(result.out[result.status == GetStatus.OK], data[[0, 1, 2, 3, 6, 7]])
        assert result.bytes_read == 6 * BLOCK_BYTES
    assert other.match(keys) == 4
    with pytest.raises(memfabric.MissingBlockError, match="4 of 10 blocks MISSING, the first at position 4"):
        result.raise_for_status()
    assert client.put(keys, data).status.tolist() == [
        PutStatus.EXISTS if status == GetStatus.OK else PutStatus.STORED for status in expected
    ]
    assert np.array_equal(other.get(keys).out, data)


def test_a_key_may_be_read_twice_in_a_batch(client: memfabric.Client, other: memfabric.Client) -> None:
    keys, data = client.block_keys(tokens(3)), blocks(3)
    client.put(keys, data)
    picked = keys.keys[[2, 0, 2, 2, 1, 0]]
    for _ in range(2):
        result = other.get(picked)
        assert result.ok and np.array_equal(result.out, data[[2, 0, 2, 2, 1, 0]])


def test_all_kinds_of_memory(client: memfabric.Client) -> None:
    keys, data = client.block_keys(tokens(4)), blocks(4)
    assert client.put(keys, [bytes(row) for row in data]).ok
    whole = bytearray(4 * BLOCK_BYTES)
    assert client.get(list(keys), whole).ok and whole == data.tobytes()
    rows = [np.zeros(BLOCK_BYTES // 4, np.float32) for _ in range(4)]
    assert client.get(keys, rows).ok and all(row.tobytes() == data[i].tobytes() for i, row in enumerate(rows))
    halves = np.zeros((4, BLOCK_BYTES // 2), np.float16)
    assert client.get(keys.keys, memoryview(halves)).ok and halves.tobytes() == data.tobytes()


def test_paged_layouts_scatter_and_gather(client: memfabric.Client) -> None:
    layers, pages, half = 4, 16, BLOCK_BYTES // 8
    kv = [np.random.default_rng(i).integers(0, 256, (2, pages, half), dtype=np.uint8) for i in range(layers)]
    layout = PagedLayout.from_tensors([[(t, 0, half, half), (t, pages * half, half, half)] for t in kv])
    keys, pages_used = client.block_keys(tokens(5)), [3, 15, 0, 7, 8]
    assert client.put(keys, PagedBlocks(layout, pages_used)).ok
    expected = np.stack([np.concatenate([t[:, page].reshape(-1) for t in kv]) for page in pages_used])
    assert np.array_equal(client.get(keys).out, expected)
    fresh = [np.zeros_like(t) for t in kv]
    target = PagedLayout.from_tensors([[(t, 0, half, half), (t, pages * half, half, half)] for t in fresh])
    for leased in (False, True):
        assert client.get(keys, PagedBlocks(target, [1, 2, 4, 5, 6]), leased=leased).ok
        for source, copy in zip(kv, fresh, strict=True):
            assert np.array_equal(copy[:, [1, 2, 4, 5, 6]], source[:, pages_used])
            assert not copy[:, [0, 3, 7, 8, 9, 10, 11, 12, 13, 14, 15]].any()
            copy[:] = 0


def test_a_hundred_thousand_keys_in_one_batch(directory: Any) -> None:
    pool = ThreadPool(directory, memory_bytes=64 * MIB, region_bytes=16 * MIB)
    try:
        pool.add_node("n0")
        spec = NamespaceSpec(name="tiny", block_bytes=64, block_tokens=1)
        with pool.connect("tiny", create=spec) as writer, pool.connect("tiny") as reader:
            count = 100_000
            keys, data = writer.block_keys(np.arange(count)), blocks(count, block_bytes=64)
            assert writer.put(keys, data, timeout_s=60).ok
            assert reader.match(keys) == count
            assert reader.prefetch(keys).found_count == count
            result = reader.get(keys, timeout_s=60)
            assert result.ok and result.optimistic_count == count and np.array_equal(result.out, data)
            assert reader.get(keys, leased=True, timeout_s=60).ok
            with reader.acquire(keys) as lease:
                assert lease.count == count and np.array_equal(lease.read().out, data)
            assert sum(len(page) for page in reader.list_blocks(page=5000)) == count
            assert reader.remove(keys, timeout_s=60).removed_count == count
    finally:
        pool.close()


def test_an_empty_batch_asks_nobody(client: memfabric.Client) -> None:
    requests = client.stats()["requests"]
    assert client.get([]).ok and client.get([]).out.shape == (0, BLOCK_BYTES)
    assert client.put([], b"").ok and client.put([], []).bytes_written == 0
    assert client.match([]) == 0
    assert client.remove([]).removed_count == 0
    assert client.prefetch([]).found_count == 0
    with client.acquire([]) as lease:
        assert len(lease) == 0 and lease.read().ok
    with client.reserve([]) as lease:
        assert lease.write(b"") == 0 and lease.commit().ok
    assert client.stats()["requests"] == requests


# --- known places ------------------------------------------------------------------------------------------


def test_prefetch_saves_the_request(client: memfabric.Client, other: memfabric.Client) -> None:
    keys, data = client.block_keys(tokens(6)), blocks(6)
    client.put(keys[:5], data[:5])
    found = other.prefetch(keys)
    assert found.found.tolist() == [True] * 5 + [False] and found.prefix_count == 5
    result = other.get(keys[:5])
    assert result.ok and result.optimistic_count == 5 and np.array_equal(result.out, data[:5])


def test_memory_can_be_registered(client: memfabric.Client) -> None:
    keys, data = client.block_keys(tokens(6)), blocks(6)
    client.put(keys, data)
    out = np.zeros_like(data)
    with client.register(out) as one, client.register([out, bytearray(64)]) as two:
        assert (one.size_bytes, two.size_bytes) == (out.nbytes, out.nbytes + 64)
        assert client.get(keys, out).ok and np.array_equal(out, data)
        two.close()
        two.close()
    assert one.size_bytes == 0
    out.flags.writeable = False
    for bad in (out, b"read-only", np.zeros(0, np.uint8), [np.zeros(4, np.uint8), object()]):
        with pytest.raises(UsageError):
            client.register(bad)


def test_a_block_that_was_replaced_is_noticed(client: memfabric.Client, other: memfabric.Client) -> None:
    keys, data = client.block_keys(tokens(3)), blocks(3)
    client.put(keys, data)
    other.get(keys)
    places = other._engine.places.find(keys.keys)[1]
    client.remove(keys)
    wait_for(lambda: len(other._engine.places) == 0)
    fresh = client.block_keys(tokens(400, 7))
    client.put(fresh, blocks(400, 7))
    other._engine.places.learn(keys.keys, places)  # as if the event had not come yet
    result = other.get(keys)
    assert result.status.tolist() == [GetStatus.MISSING] * 3
    assert len(other._engine.places) == 0
    client.put(keys, data)
    assert np.array_equal(other.get(keys).out, data)


def test_reuse_reaches_the_server(client: memfabric.Client, other: memfabric.Client) -> None:
    keys = client.block_keys(tokens(2))
    client.put(keys, blocks(2))
    other.get(keys)
    for _ in range(50):
        assert other.get(keys).optimistic_count == 2
    wait_for(lambda: next(client.list_blocks()).reuse.tolist() >= [2, 2], 5)


# --- corruption ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_header", [False, True])
@pytest.mark.parametrize("leased", [False, True])
def test_damaged_bytes_are_never_a_success(
    pool: ThreadPool, client: memfabric.Client, leased: bool, in_header: bool
) -> None:
    keys, data = client.block_keys(tokens(5)), blocks(5)
    client.put(keys, data)
    corrupt(pool, client, keys[2], in_header=in_header)
    result = client.get(keys, leased=leased)
    assert result.status.tolist() == [GetStatus.OK, GetStatus.OK, GetStatus.CORRUPT, GetStatus.OK, GetStatus.OK]
    assert np.array_equal(result.out[[0, 1, 3, 4]], data[[0, 1, 3, 4]])
    with pytest.raises(CorruptBlockError, match="position 2"):
        result.raise_for_status()
    stats = client.stats()
    assert stats["corrupt_blocks"] == 1 and stats["verification_retries"] == 1
    assert client.get(keys).status[2] == GetStatus.MISSING, "the server was told"
    assert client.match(keys) == 2
    assert client.put(keys, data).stored_count == 1
    assert np.array_equal(client.get(keys).out, data)


def test_damage_in_one_segment_spoils_only_reads_of_it(pool: ThreadPool, client: memfabric.Client) -> None:
    keys, data = client.block_keys(tokens(1)), blocks(1)
    client.put(keys, data)
    corrupt(pool, client, keys[0])  # at byte 5000: segment 1
    with client.acquire(keys) as lease:
        for segment in (0, 2, 3):
            result = lease.read(segments=slice(segment, segment + 1))
            assert result.ok and np.array_equal(result.out[0], data[0].reshape(4, -1)[segment])
        assert lease.check(0) is False
        assert lease.read(segments=slice(1, 2)).status.tolist() == [GetStatus.CORRUPT]


# --- writers ------------------------------------------------------------------------------------------


def test_two_writers_of_one_key(client: memfabric.Client, other: memfabric.Client) -> None:
    keys, data = client.block_keys(tokens(2)), blocks(2)
    with client.reserve(keys) as lease:
        assert lease.granted.all()
        assert other.put(keys, data).status.tolist() == [PutStatus.PENDING] * 2
        assert other.get(keys).status.tolist() == [GetStatus.MISSING] * 2, "nobody reads half"
        start = time.monotonic()
        waited = other.put(keys, data, wait=True, timeout_s=0.3)
        assert waited.status.tolist() == [PutStatus.PENDING] * 2 and 0.25 < time.monotonic() - start < 2
        with pytest.raises(RefusedError):
            waited.raise_for_status()
    assert other.put(keys, data, wait=True).stored_count == 2, "the first one gave up"
    assert client.put(keys, data).status.tolist() == [PutStatus.EXISTS] * 2


def test_a_full_pool_says_what_holds_the_space(client: memfabric.Client) -> None:
    keys = client.block_keys(tokens(2500))
    data = blocks(2500)
    result = client.put(keys, data)
    stored = result.stored_count
    assert 1500 < stored < 2500, "leaves go first, and a chain that is being put has one leaf"
    with client.acquire(keys):
        more = client.block_keys(tokens(2100, 5))
        full = client.put(more, data[:2100])
        assert (full.status == PutStatus.NO_SPACE).any() and not full.ok
        assert "demo" in full.message and "nothing is evictable" in full.message
        with pytest.raises(RefusedError, match="nothing is evictable") as caught:
            full.raise_for_status()
        assert caught.value.code == RefusalCode.NO_SPACE


def test_pinned_blocks_outlive_the_flood_and_their_client(pool: ThreadPool, other: memfabric.Client) -> None:
    with pool.connect() as client:
        keys = client.block_keys(np.arange(16 * 4))
        client.put(keys, np.full((4, BLOCK_BYTES), 7, np.uint8)).raise_for_status()
        absent = client.block_keys(np.arange(1000, 1016))
        assert client.pin(keys).found.all()
        assert client.pin(absent).found_count == 0
        assert client.pin([]).found_count == 0
    for start in range(0, 6000, 500):
        flood = other.block_keys(np.arange(10**6 + 16 * start, 10**6 + 16 * (start + 500)))
        other.put(flood, np.zeros((500, BLOCK_BYTES), np.uint8))
    assert other.get(keys, leased=True).ok
    assert other.unpin(keys).found.all()
    assert other.explain(keys[3])["evictable"]


def test_a_quota_is_kept(pool: ThreadPool) -> None:
    spec = NamespaceSpec(name="small", block_bytes=BLOCK_BYTES, quota_bytes=10 * BLOCK_BYTES)
    with pool.connect("small", create=spec) as client:
        keys = client.block_keys(tokens(20))
        with client.reserve(keys) as lease:
            assert lease.granted.sum() == 10
            assert set(lease.status[10:].tolist()) == {PutStatus.QUOTA}
            assert "quota of 10 blocks" in lease.message


def test_partial_blocks(pool: ThreadPool, client: memfabric.Client) -> None:
    keys, data = client.block_keys(tokens(2)), blocks(2)
    with pytest.raises(RefusedError, match="whole blocks only"):
        client.put(keys, data, token_counts=[16, 7])
    spec = NamespaceSpec(name="partial", block_bytes=BLOCK_BYTES, partial=True)
    with pool.connect("partial", create=spec) as partial:
        assert partial.put(keys, data, token_counts=[16, 7]).ok
        assert next(partial.list_blocks()).tokens.tolist() == [16, 7]


def test_a_put_that_is_refused_half_way_says_what_was_stored(
    client: memfabric.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memfabric.client.writing.PART_BYTES", 2 * BLOCK_BYTES)
    keys, data = client.block_keys(tokens(4)), blocks(4)
    result = client.put(keys, data, token_counts=[16, 16, 16, 7])  # the second part is refused
    assert result.status.tolist() == [PutStatus.STORED, PutStatus.STORED, PutStatus.LOST, PutStatus.LOST]
    assert "whole blocks only" in result.message
    assert client.match(keys) == 2
    with pytest.raises(RefusedError, match="whole blocks only"):
        client.put(keys[2:], data[2:], token_counts=[7, 16])


def test_remove(client: memfabric.Client, other: memfabric.Client) -> None:
    keys, data = client.block_keys(tokens(4)), blocks(4)
    client.put(keys[:3], data[:3])
    with other.acquire(keys[:1]) as lease:
        status = client.remove(keys).status.tolist()
        assert status == [RemoveStatus.BUSY, RemoveStatus.REMOVED, RemoveStatus.REMOVED, RemoveStatus.MISSING]
        assert np.array_equal(lease.read().out[0], data[0]), "held blocks stay as they are"
    assert client.get(keys).found_count == 0 and client.match(keys) == 0


def test_removals_are_pushed_to_those_who_know_the_place(client: memfabric.Client, other: memfabric.Client) -> None:
    keys = client.block_keys(tokens(4))
    client.put(keys, blocks(4)).raise_for_status()
    assert other.get(keys).ok and other.stats()["known_places"] == 4
    client.remove(keys)
    deadline = time.monotonic() + 30
    while other.stats()["known_places"]:  # without asking: only the pushed event can empty it
        assert time.monotonic() < deadline, "the removal was never pushed"
        time.sleep(0.01)


# --- bad input ------------------------------------------------------------------------------------------


def test_bad_input_changes_nothing(client: memfabric.Client) -> None:
    keys, data = client.block_keys(tokens(2)), blocks(2)
    requests = client.stats()["requests"]
    twice = BlockKeys.chain(np.ascontiguousarray(keys.keys[[0, 1, 0]]))
    for call, why in [
        (lambda: client.put(twice, blocks(3)), "twice, at positions 0 and 2"),
        (lambda: client.reserve(twice), "twice"),
        (lambda: client.remove(twice), "twice"),
        (lambda: client.put([b"short"], data[:1]), "must be 16 bytes"),
        (lambda: client.get([b"x" * 16, 5]), "key 1"),  # type: ignore[list-item]
        (lambda: client.get(keys, data[:1]), "16384 bytes, expected 32768"),
        (lambda: client.put(keys, blocks(4)), "65536 bytes, expected 32768"),
        (lambda: client.get(keys, data.tobytes()), "read-only"),
        (lambda: client.get(keys, np.zeros((4, BLOCK_BYTES), np.uint8)[::2]), "not C-contiguous"),
        (lambda: client.put(keys, data, token_counts=[1]), "token_counts"),
        (lambda: client.get(keys, timeout_s=0), "timeout_s"),
        (lambda: client.acquire(keys, ttl_s=-1), "ttl_s"),
        (lambda: client.block_keys([1.5, 2]), "integers"),  # type: ignore[list-item]
        (lambda: client.block_keys([1], parent=b"x"), "parent must be 16"),
        (lambda: client.explain("zz"), "not hexadecimal"),
        (lambda: client.explain(b"x"), "16 bytes"),
        (lambda: list(client.list_blocks(page=0)), "page must be"),
    ]:
        with pytest.raises(UsageError, match=why):
            call()
    assert client.stats()["requests"] == requests


def test_connecting_to_nothing_ends_in_time() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(UnavailableError, match=f"{address} within 0.3 s.*memfabric up"):
            memfabric.connect(address, namespace="x", timeout_s=0.3)
        assert time.monotonic() - start < 2
        taken.listen(1)  # accepts, and never says a word
        with pytest.raises(UnavailableError, match=address):
            memfabric.connect(address, namespace="x", timeout_s=0.3)


@pytest.mark.parametrize(
    "address", ["", "localhost:1", "http://x:1", "tcp://", "tcp://host", "tcp://h:99999", "tcp://h:0"]
)
def test_addresses_that_are_none_are_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMFABRIC_ADDRESS", "nonsense")
    with pytest.raises(UsageError, match=address or "nonsense"):
        memfabric.connect(address, namespace="x", timeout_s=0.2)


def test_refusals_at_connect(pool: ThreadPool, client: memfabric.Client) -> None:
    with pytest.raises(RefusedError, match="nowhere") as caught:
        pool.connect("nowhere")
    assert caught.value.code == RefusalCode.UNKNOWN_NAMESPACE
    with pytest.raises(RefusedError, match="dtype: 'bfloat16' asked, '' stored") as caught:
        pool.connect(fingerprint=Fingerprint(dtype="bfloat16"))
    assert caught.value.code == RefusalCode.FINGERPRINT
    with pytest.raises(RefusedError, match="block_bytes: 64 asked, 16384 stored"):
        pool.connect(create=NamespaceSpec(name="demo", block_bytes=64))
    for arguments in ({"namespace": ""}, {"copy_threads": -1}, {"timeout_s": 0}, {"timeout_s": -1}):
        with pytest.raises(UsageError):
            pool.connect(**arguments)


# --- life ------------------------------------------------------------------------------------------


def test_a_closed_client_says_so_and_close_is_quick(pool: ThreadPool) -> None:
    client = pool.connect(create=SPEC)
    keys = client.block_keys(tokens(1))
    lease = client.acquire(keys)
    start = time.monotonic()
    client.close()
    client.close()
    assert time.monotonic() - start < 1.5
    for call in (lambda: client.get(keys), lambda: client.match(keys), lambda: lease.read(), lambda: lease.view(0)):
        with pytest.raises(UsageError, match="closed"):
            call()
    assert "closed" in repr(client)


def test_close_gives_leases_back(pool: ThreadPool, client: memfabric.Client) -> None:
    keys = client.block_keys(tokens(3))
    second = pool.connect()
    assert second.reserve(keys).granted.all()
    second.close()
    assert client.put(keys, blocks(3)).ok, "aborted and flushed: free at once"
    third = pool.connect()
    assert third.acquire(keys).granted.all()
    third.close()
    wait_for(lambda: pool.server.core.state.leases.all() == [])


def test_close_gives_up_on_a_server_that_is_gone(pool: ThreadPool) -> None:
    client = pool.connect(create=SPEC)
    assert client.reserve(client.block_keys(tokens(1))).granted.all()
    pool.stop_server()
    start = time.monotonic()
    client.close()
    assert time.monotonic() - start < 4


def test_a_dropped_client_is_closed(pool: ThreadPool) -> None:
    client = pool.connect(create=SPEC)
    engine = weakref.ref(client._engine)
    del client
    gc.collect()
    wait_for(lambda: engine() is None or engine().closed)  # type: ignore[union-attr]


def test_a_forked_child_is_told_to_connect_again(client: memfabric.Client) -> None:
    keys = client.block_keys(tokens(1))
    client.put(keys, blocks(1))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            client.get(keys)
        except UsageError as error:
            code = 0 if "fork" in str(error) else 2
        finally:
            client.close()
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert client.get(keys).ok, "the parent's client goes on"


def test_looking_at_the_pool(client: memfabric.Client) -> None:
    keys = client.block_keys(tokens(7))
    client.put(keys, blocks(7))
    pages = list(client.list_blocks(page=3))
    listed = {page.keys[i]: page.keys.parents[i].tobytes() for page in pages for i in range(len(page))}
    assert listed == {keys[i]: keys.parents[i].tobytes() for i in range(7)}
    explained = client.explain(keys[3]), client.explain(keys[3].hex())
    assert explained[0].keys() == explained[1].keys() >= {"key"}
    assert {doc["key"] for doc in explained} == {keys[3].hex()}
    assert "demo" in repr(client) and client.namespace.name == "demo"
    stats = client.stats()
    assert (
        stats["transport"] == ("shm" if TRANSPORT == "auto" else TRANSPORT)
        and stats["put_blocks"] == 7
        and stats["known_places"] == 7
    )


def test_administration(pool: ThreadPool) -> None:
    with memfabric.AdminClient(pool.address) as admin:
        assert {node["name"] for node in admin.nodes()} == {"n0", "n1"}
        info = admin.namespace_create(SPEC)
        assert info.spec == SPEC and admin.namespace_show("demo").id == info.id
        assert [info.spec.name for info in admin.namespaces()] == ["demo"]
        with pytest.raises(RefusedError) as caught:
            admin.namespace_create(NamespaceSpec(name="demo", block_bytes=64))
        assert caught.value.code == RefusalCode.NAMESPACE_EXISTS
        admin.drain("n0")
        admin.drain("n0", undo=True)
        with pytest.raises(RefusedError) as caught:
            admin.drain("n9")
        assert caught.value.code == RefusalCode.UNKNOWN_NODE
        admin.namespace_delete("demo")
        with pytest.raises(RefusedError, match="there is no namespace 'demo'; there are: none"):
            admin.namespace_show("demo")
        assert pool.address in repr(admin)
    with pytest.raises(UsageError, match="closed"):
        admin.status()


def test_one_client_in_many_threads(client: memfabric.Client) -> None:
    failures: list[str] = []

    def work(seed: int) -> None:
        out = np.zeros((6, BLOCK_BYTES), np.uint8)
        for round_ in range(15):
            keys, data = client.block_keys(tokens(6, 100 * seed + round_)), blocks(6, 100 * seed + round_)
            if not client.put(keys, data).ok:
                failures.append("put")
            for leased in (False, True, False):
                out[:] = 0
                if not client.get(keys, out, leased=leased).ok or not np.array_equal(out, data):
                    failures.append("get")
            with client.acquire(keys) as lease:
                if not np.array_equal(lease.read().out, data):
                    failures.append("read")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert client.stats()["gets"] == 4 * 15 * 4


def test_torch_tensors(client: memfabric.Client) -> None:
    torch = pytest.importorskip("torch")
    keys = client.block_keys(tokens(3))
    data = torch.arange(3 * BLOCK_BYTES // 2, dtype=torch.int16).view(torch.bfloat16).reshape(3, 2, -1)
    assert client.put(keys, data).ok
    out = torch.zeros_like(data)
    assert client.get(keys, out).ok and torch.equal(out.view(torch.int16), data.view(torch.int16))
    assert client.get(keys, list(torch.zeros_like(data))).ok
    with pytest.raises(UsageError, match="not C-contiguous"):
        client.get(keys, torch.zeros(3, BLOCK_BYTES, 2, dtype=torch.uint8)[..., 0])
    with pytest.raises(UsageError, match="tensor on meta"):
        client.get(keys, torch.zeros(3, BLOCK_BYTES, dtype=torch.uint8, device="meta"))


def test_numbers_of_another_epoch_are_other_regions(client: memfabric.Client) -> None:
    client.put(client.block_keys(tokens(2)), blocks(2))
    regions, epoch = client._engine.regions, client.stats()["epoch"]
    numbers = np.arange(100, dtype=np.uint32)
    assert (regions.slots_of(numbers, epoch) >= 0).sum() == len(regions)
    assert (regions.slots_of(numbers, epoch + 1) == -1).all()
