"""memfabric: a pool of memory nodes that keeps the attention keys and values of LLM serving.

    import memfabric
    with memfabric.connect(namespace="demo") as client:
        keys = client.block_keys(token_ids)
        hit = client.match(keys)
        result = client.get(keys[:hit])

Names are loaded when they are first used: importing the package is cheap, starts nothing and reads no environment.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "memfabric.client": (
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
        "PinResult",
        "PrefetchResult",
        "PutResult",
        "PutStatus",
        "ReadLease",
        "RemoveResult",
        "RemoveStatus",
        "WriteLease",
        "connect",
        "connect_async",
    ),
    "memfabric.core.fingerprint": ("Fingerprint",),
    "memfabric.core.keys": ("BlockKeys", "block_keys"),
    "memfabric.core.messages": ("NamespaceInfo", "NamespaceSpec"),
    "memfabric.errors": (
        "CorruptBlockError",
        "MemfabricError",
        "OutcomeUnknownError",
        "RefusalCode",
        "RefusedError",
        "UnavailableError",
        "UsageError",
    ),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

if TYPE_CHECKING:
    from memfabric.client import (
        AdminClient,
        AsyncClient,
        AsyncReadLease,
        AsyncWriteLease,
        BlockPage,
        Client,
        GetResult,
        GetStatus,
        MissingBlockError,
        PagedBlocks,
        PagedLayout,
        PinResult,
        PrefetchResult,
        PutResult,
        PutStatus,
        ReadLease,
        RemoveResult,
        RemoveStatus,
        WriteLease,
        connect,
        connect_async,
    )
    from memfabric.core.fingerprint import Fingerprint
    from memfabric.core.keys import BlockKeys, block_keys
    from memfabric.core.messages import NamespaceInfo, NamespaceSpec
    from memfabric.errors import (
        CorruptBlockError,
        MemfabricError,
        OutcomeUnknownError,
        RefusalCode,
        RefusedError,
        UnavailableError,
        UsageError,
    )

__all__ = [
    "AdminClient",
    "AsyncClient",
    "AsyncReadLease",
    "AsyncWriteLease",
    "BlockKeys",
    "BlockPage",
    "Client",
    "CorruptBlockError",
    "Fingerprint",
    "GetResult",
    "GetStatus",
    "MemfabricError",
    "MissingBlockError",
    "NamespaceInfo",
    "NamespaceSpec",
    "OutcomeUnknownError",
    "PagedBlocks",
    "PagedLayout",
    "PinResult",
    "PrefetchResult",
    "PutResult",
    "PutStatus",
    "ReadLease",
    "RefusalCode",
    "RefusedError",
    "RemoveResult",
    "RemoveStatus",
    "UnavailableError",
    "UsageError",
    "WriteLease",
    "block_keys",
    "connect",
    "connect_async",
]


def __getattr__(name: str) -> object:
    module = _HOME_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'memfabric' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
