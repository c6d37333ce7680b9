"""The client: blocks in and out of a pool, and the pool's administration.

`connect` gives the blocking `Client`, `connect_async` the awaitable `AsyncClient`; `AdminClient` looks after
nodes and namespaces. Importing this starts nothing and reads no environment.
"""

from memfabric.client.admin import AdminClient
from memfabric.client.aio import AsyncClient, AsyncReadLease, AsyncWriteLease, connect_async
from memfabric.client.handles import ReadLease, WriteLease
from memfabric.client.listing import BlockPage
from memfabric.client.memory import PagedBlocks, PagedLayout
from memfabric.client.registered import Registration
from memfabric.client.results import (
    GetResult,
    GetStatus,
    MissingBlockError,
    PinResult,
    PrefetchResult,
    PutResult,
    PutStatus,
    RemoveResult,
    RemoveStatus,
)
from memfabric.client.sync import Client, connect

__all__ = [
    "AdminClient",
    "AsyncClient",
    "AsyncReadLease",
    "AsyncWriteLease",
    "BlockPage",
    "Client",
    "GetResult",
    "GetStatus",
    "MissingBlockError",
    "PagedBlocks",
    "PagedLayout",
    "PinResult",
    "PrefetchResult",
    "PutResult",
    "PutStatus",
    "ReadLease",
    "Registration",
    "RemoveResult",
    "RemoveStatus",
    "WriteLease",
    "connect",
    "connect_async",
]
