"""The asyncio client: same answers, and the loop goes on meanwhile."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from typing import Any

import numpy as np
import pytest

import memfabric
from memfabric import AsyncClient, PutStatus
from memfabric.errors import RefusedError, UnavailableError, UsageError
from tests.client.conftest import BLOCK_BYTES, SPEC, blocks, tokens
from tests.client.pool import ThreadPool, wait_for


async def open_client(pool: ThreadPool, **arguments: Any) -> AsyncClient:
    return await memfabric.connect_async(
        pool.address, namespace="demo", shm_directory=str(pool.directory), create=SPEC, **arguments
    )


def test_the_same_operations_awaited(pool: ThreadPool) -> None:
    async def main() -> None:
        async with await open_client(pool) as client:
            keys, data = client.block_keys(tokens(20)), blocks(20)
            assert (await client.put(keys, data)).stored_count == 20
            assert await client.match(keys) == 20
            for leased in (True, False):
                out = np.zeros_like(data)
                result = await client.get(keys, out, leased=leased)
                assert result.ok and np.array_equal(out, data)
            assert (await client.get(keys[:1])).ok
            async with await client.acquire(keys) as lease:
                assert lease.count == 20 and lease.check(3) and bytes(lease.view(3)) == data[3].tobytes()
                part = await lease.read(segments=slice(1, 2))
                assert np.array_equal(part.out, data[:, BLOCK_BYTES // 4 : BLOCK_BYTES // 2])
                assert await lease.renew(5) > time.monotonic_ns()
            fresh = client.block_keys(tokens(2, 5))
            async with await client.reserve(fresh) as write:
                assert await write.write(data[:2]) == 2
                assert (await write.commit()).ok
            async with await client.reserve(client.block_keys(tokens(1, 6))):
                pass
            assert (await client.prefetch(keys)).found_count == 20
            with await client.register(bytearray(4096)) as registered:
                assert registered.size_bytes == 4096
            assert sum([len(page) async for page in client.list_blocks(page=7)]) == 22
            assert (await client.explain(keys[0]))["key"] == keys[0].hex()
            assert (await client.remove(keys)).removed_count == 20
            assert client.stats()["put_blocks"] == 22 and "demo" in repr(client)
        with pytest.raises(UsageError, match="closed"):
            await client.match(keys)

    asyncio.run(main())


def test_errors_are_the_same(pool: ThreadPool) -> None:
    async def main() -> None:
        async with await open_client(pool) as client:
            keys = client.block_keys(tokens(2))
            with pytest.raises(UsageError, match="expected 32768"):
                await client.put(keys, b"")
            with pytest.raises(UsageError, match="twice"):
                await client.put([keys[0], keys[0]], blocks(2))
        with pytest.raises(RefusedError):
            await memfabric.connect_async(pool.address, namespace="nowhere")
        with pytest.raises(UnavailableError):
            await memfabric.connect_async("tcp://127.0.0.1:1", namespace="x", timeout_s=0.2)

    asyncio.run(main())


def test_the_loop_is_not_blocked_while_the_server_is_silent(pool: ThreadPool) -> None:
    async def main() -> int:
        async with await open_client(pool, timeout_s=0.5) as client:
            keys = client.block_keys(tokens(2))
            await client.put(keys, blocks(2))
            await asyncio.to_thread(pool.stop_server)
            ticks = 0

            async def tick() -> None:
                nonlocal ticks
                while True:
                    await asyncio.sleep(0.01)
                    ticks += 1

            ticker = asyncio.create_task(tick())
            with pytest.raises(UnavailableError):
                await client.match(keys)
            ticker.cancel()
            assert (await client.get(keys)).ok, "known places need no server"
            return ticks

    assert asyncio.run(main()) > 20


def test_many_at_once(pool: ThreadPool) -> None:
    async def main() -> None:
        async with await open_client(pool) as client:
            batches = [(client.block_keys(tokens(8, seed)), blocks(8, seed)) for seed in range(30)]
            results = await asyncio.gather(*(client.put(keys, data) for keys, data in batches))
            assert all(result.ok for result in results)
            reads = await asyncio.gather(*(client.get(keys, leased=True) for keys, _ in batches))
            for result, (_, data) in zip(reads, batches, strict=True):
                assert result.ok and np.array_equal(result.out, data)

    asyncio.run(main())


def test_a_cancelled_call_gives_its_lease_back(pool: ThreadPool) -> None:
    async def main() -> None:
        async with await open_client(pool) as client:
            keys = client.block_keys(tokens(3))
            for delay_s in (0.0, 0.0002, 0.0005, 0.001, 0.003):
                task = asyncio.create_task(client.reserve(keys))
                await asyncio.sleep(delay_s)
                task.cancel()
                try:
                    lease = await task
                    lease.abort()
                except asyncio.CancelledError:
                    pass
            await asyncio.to_thread(wait_for, lambda: not pool.server.core.state.leases.all())
            assert (await client.put(keys, blocks(3))).status.tolist() == [PutStatus.STORED] * 3

    asyncio.run(main())


def test_a_cancelled_copy_is_waited_for(pool: ThreadPool) -> None:
    async def main() -> None:
        async with await open_client(pool) as client:
            started, release = threading.Event(), threading.Event()
            transport = client._engine.transport
            calls = {"write": transport.write, "post_write": transport.post_write}

            def slow(name: str, *arguments: Any) -> Any:
                started.set()
                release.wait(10)
                return calls[name](*arguments)

            for name in calls:
                setattr(transport, name, functools.partial(slow, name))
            task = asyncio.create_task(client.put(client.block_keys(tokens(20)), blocks(20)))
            await asyncio.to_thread(started.wait, 10)
            task.cancel()
            await asyncio.sleep(0.05)
            assert not task.done(), "the buffers still belong to the call"
            release.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            for name in calls:
                delattr(transport, name)
            await asyncio.to_thread(wait_for, lambda: not pool.server.core.state.leases.all())

    asyncio.run(main())
