"""The asyncio client: the same operations, awaited. The event loop is never blocked by a request or a large
copy."""

from __future__ import annotations

import asyncio
import functools
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from memfabric.client import leases, listing, reading, registered, writing
from memfabric.client.buffers import Keys, chained_keys, distinct_keys, key_array, new_output, resolve, token_column
from memfabric.client.effects import Operation, run_async
from memfabric.client.engine import Engine
from memfabric.client.listing import BlockPage
from memfabric.client.options import open_engine
from memfabric.client.registered import Registration
from memfabric.client.results import GetResult, PinResult, PrefetchResult, PutResult, RemoveResult, StatusColumn
from memfabric.client.sync import describe, make_keys
from memfabric.core.fingerprint import Fingerprint
from memfabric.core.keys import BlockKeys
from memfabric.core.messages import NamespaceSpec

T = TypeVar("T")
COPY_WORKERS = 2


async def connect_async(
    address: str | None = None,
    *,
    namespace: str,
    fingerprint: Fingerprint | None = None,
    create: NamespaceSpec | None = None,
    timeout_s: float = 5.0,
    verify: bool = True,
    copy_threads: int = 0,
    name: str | None = None,
    shm_directory: str | None = None,
    transport: str | Sequence[str] | None = None,
    transport_options: Mapping[str, Mapping[str, Any]] | None = None,
) -> AsyncClient:
    """Open a namespace of a pool; arguments and errors as `sync.connect`."""
    opening = asyncio.get_running_loop().run_in_executor(
        None,
        functools.partial(
            open_engine,
            address,
            namespace,
            fingerprint,
            create,
            timeout_s,
            verify,
            copy_threads,
            name,
            shm_directory,
            transport,
            transport_options,
        ),
    )
    try:
        return AsyncClient(await asyncio.shield(opening))
    except asyncio.CancelledError:
        opening.add_done_callback(_discard)
        raise


class AsyncClient:
    """As `sync.Client`, with awaitable methods; used from any event loop. An asynchronous context manager.

    A cancelled call gives its leases back. If a copy is running, the cancellation waits for it: the buffers
    belong to the call until then.
    """

    def __init__(self, engine: Engine) -> None:
        """Use `connect_async`."""
        self._engine = engine
        self._executor = ThreadPoolExecutor(COPY_WORKERS, thread_name_prefix="memfabric-copy")
        self._closer = weakref.finalize(self, _close, engine, self._executor)

    @property
    def namespace(self) -> NamespaceSpec:
        """See `Client.namespace`."""
        return self._engine.namespace

    def block_keys(self, token_ids: Sequence[int] | npt.NDArray[Any], parent: bytes | None = None) -> BlockKeys:
        """See `Client.block_keys`. Computes; asks nobody."""
        return make_keys(self._engine, token_ids, parent)

    async def match(self, keys: Keys, *, timeout_s: float | None = None) -> int:
        """See `Client.match`."""
        return await self._run(lambda e: reading.match(e, key_array(keys), e.deadline_ns(timeout_s)))

    async def get(
        self, keys: Keys, out: Any = None, *, leased: bool = False, timeout_s: float | None = None
    ) -> GetResult:
        """See `Client.get`."""

        def make(engine: Engine) -> Operation[GetResult]:
            array = key_array(keys)
            target = new_output(len(array), engine.shape, engine.shape.segments) if out is None else out
            memory = resolve(target, len(array), engine.shape, writable=True)
            return reading.get(engine, array, memory, target, leased, engine.deadline_ns(timeout_s))

        return await self._run(make)

    async def put(
        self,
        keys: Keys,
        blocks: Any,
        *,
        token_counts: Sequence[int] | npt.NDArray[Any] | None = None,
        wait: bool = False,
        timeout_s: float | None = None,
    ) -> PutResult:
        """See `Client.put`."""

        def make(engine: Engine) -> Operation[PutResult]:
            chain = chained_keys(keys)
            distinct_keys(chain.keys)
            tokens = token_column(token_counts, len(chain), engine.namespace.block_tokens)
            memory = resolve(blocks, len(chain), engine.shape, writable=False)
            return writing.put(engine, chain, memory, tokens, wait, engine.deadline_ns(timeout_s))

        return await self._run(make)

    async def acquire(
        self, keys: Keys, *, ttl_s: float | None = None, prefix: bool = False, timeout_s: float | None = None
    ) -> AsyncReadLease:
        """See `Client.acquire`: ``async with await client.acquire(keys) as lease``."""
        held = await self._run(lambda e: leases.hold_read(e, key_array(keys), ttl_s, prefix, e.deadline_ns(timeout_s)))
        return AsyncReadLease(held, self)

    async def reserve(
        self,
        keys: Keys,
        *,
        token_counts: Sequence[int] | npt.NDArray[Any] | None = None,
        ttl_s: float | None = None,
        timeout_s: float | None = None,
    ) -> AsyncWriteLease:
        """See `Client.reserve`."""

        def make(engine: Engine) -> Operation[leases.HeldWrite]:
            chain = chained_keys(keys)
            distinct_keys(chain.keys)
            tokens = token_column(token_counts, len(chain), engine.namespace.block_tokens)
            return leases.hold_write(engine, chain, tokens, ttl_s, engine.deadline_ns(timeout_s))

        return AsyncWriteLease(await self._run(make), self)

    async def remove(self, keys: Keys, *, timeout_s: float | None = None) -> RemoveResult:
        """See `Client.remove`."""

        def make(engine: Engine) -> Operation[RemoveResult]:
            array = key_array(keys)
            distinct_keys(array)
            return reading.remove(engine, array, engine.deadline_ns(timeout_s))

        return await self._run(make)

    async def pin(self, keys: Keys, *, timeout_s: float | None = None) -> PinResult:
        """See `Client.pin`."""
        return await self._run(lambda e: reading.pin(e, key_array(keys), True, e.deadline_ns(timeout_s)))

    async def unpin(self, keys: Keys, *, timeout_s: float | None = None) -> PinResult:
        """See `Client.unpin`."""
        return await self._run(lambda e: reading.pin(e, key_array(keys), False, e.deadline_ns(timeout_s)))

    async def prefetch(self, keys: Keys, *, timeout_s: float | None = None) -> PrefetchResult:
        """See `Client.prefetch`."""
        return await self._run(lambda e: reading.prefetch(e, key_array(keys), e.deadline_ns(timeout_s)))

    async def register(self, memory: Any) -> Registration:
        """See `Client.register`."""
        return await self._run(lambda e: registered.register(e, memory))

    async def explain(self, key: bytes | str, *, timeout_s: float | None = None) -> dict[str, Any]:
        """See `Client.explain`."""
        return await self._run(lambda e: listing.explain(e, key, e.deadline_ns(timeout_s)))

    async def list_blocks(self, *, page: int = 1000, timeout_s: float | None = None) -> AsyncIterator[BlockPage]:
        """See `Client.list_blocks`."""
        cursor: int | None = 0
        while cursor is not None:
            at = cursor
            found, cursor = await self._run(lambda e, at=at: listing.page(e, at, page, e.deadline_ns(timeout_s)))  # type: ignore[misc]
            yield found

    def stats(self) -> dict[str, Any]:
        """See `Client.stats`."""
        return self._engine.stats()

    async def close(self) -> None:
        """See `Client.close`."""
        if self._closer.detach() is not None:
            await asyncio.get_running_loop().run_in_executor(None, _close, self._engine, self._executor)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return describe("AsyncClient", self._engine)

    async def _run(self, make: Callable[[Engine], Operation[T]]) -> T:
        self._engine.check_open()
        return await run_async(make(self._engine), self._engine.link, self._executor)


def _discard(opened: asyncio.Future[Engine]) -> None:
    """A client that nobody waits for any more."""
    if not opened.cancelled() and opened.exception() is None:
        opened.result().close()


def _close(engine: Engine, executor: ThreadPoolExecutor) -> None:
    engine.close()
    executor.shutdown(wait=False)


class AsyncReadLease:
    """See `sync.ReadLease`. An asynchronous context manager."""

    def __init__(self, held: leases.HeldRead, client: AsyncClient) -> None:
        """Use `AsyncClient.acquire`."""
        self._held = held
        self._client = client
        self.granted = held.granted

    @property
    def status(self) -> StatusColumn:
        """See `ReadLease.status`."""
        return self.granted.astype(np.uint8)

    @property
    def count(self) -> int:
        """See `ReadLease.count`."""
        return len(self.granted) if self.granted.all() else int(np.argmin(self.granted))

    @property
    def deadline_ns(self) -> int:
        """See `ReadLease.deadline_ns`."""
        return self._held.deadline_ns

    async def read(
        self, out: Any = None, *, segments: slice | None = None, timeout_s: float | None = None
    ) -> GetResult:
        """See `ReadLease.read`."""
        return await self._client._run(lambda e: self._held.read(out, segments, e.deadline_ns(timeout_s)))

    def view(self, index: int, *, segments: slice | None = None) -> memoryview:
        """See `ReadLease.view`."""
        return self._held.view(index, segments)

    def check(self, index: int) -> bool:
        """See `ReadLease.check`. Reads one block in the calling thread."""
        return self._held.verify(index)

    async def renew(self, ttl_s: float | None = None, *, timeout_s: float | None = None) -> int:
        """See `ReadLease.renew`."""
        return await self._client._run(lambda e: self._held.renew(ttl_s, e.deadline_ns(timeout_s)))

    def release(self) -> None:
        """See `ReadLease.release`."""
        self._held.end()

    async def __aenter__(self) -> AsyncReadLease:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __len__(self) -> int:
        return len(self.granted)


class AsyncWriteLease:
    """See `sync.WriteLease`. An asynchronous context manager."""

    def __init__(self, held: leases.HeldWrite, client: AsyncClient) -> None:
        """Use `AsyncClient.reserve`."""
        self._held = held
        self._client = client
        self.granted = held.granted

    @property
    def status(self) -> StatusColumn:
        """See `WriteLease.status`."""
        return self._held.status

    @property
    def message(self) -> str:
        """See `WriteLease.message`."""
        return self._held.message

    @property
    def deadline_ns(self) -> int:
        """See `WriteLease.deadline_ns`."""
        return self._held.deadline_ns

    async def write(self, blocks: Any, *, segments: slice | None = None) -> int:
        """See `WriteLease.write`."""
        return await self._client._run(lambda e: self._held.write(blocks, segments))

    async def commit(self, *, timeout_s: float | None = None) -> PutResult:
        """See `WriteLease.commit`."""
        return await self._client._run(lambda e: self._held.commit(e.deadline_ns(timeout_s)))

    async def renew(self, ttl_s: float | None = None, *, timeout_s: float | None = None) -> int:
        """See `WriteLease.renew`."""
        return await self._client._run(lambda e: self._held.renew(ttl_s, e.deadline_ns(timeout_s)))

    def abort(self) -> None:
        """See `WriteLease.abort`."""
        self._held.end()

    async def __aenter__(self) -> AsyncWriteLease:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def __len__(self) -> int:
        return len(self.granted)
