"""Reads of known places with as little Python as possible.

The same reading and checking as `copying.read_blocks`, for the case that matters most: some blocks, all of
known places, into one contiguous buffer. Everything is allocated once per thread and batch size. Whatever is
not this case, and every read that does not verify, is left to `reading.get`, which starts over and says what
is wrong.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from memfabric._native import QuickReader
from memfabric.client.engine import Engine
from memfabric.client.results import StatusColumn
from memfabric.core.keys import KeyArray
from transport.base import Batch
from transport.errors import TransportError

MAX_BLOCKS = 1024
MAX_OPERATIONS = 8192
"""Payload and header operations of one batch; about 60 bytes each are kept."""
ONE_THREAD_BYTES = 8 << 20
"""More threads do not pay below (see the transport), so nothing is lost by reading in order."""
MAX_PREPARED = 16
"""Batch sizes kept per thread."""

_OK = np.ones(MAX_BLOCKS, np.uint8)
"""`GetStatus.OK` for every block."""


class _Prepared:
    """A reader for batches of n blocks, and the batches it fills."""

    def __init__(self, engine: Engine, n: int) -> None:
        shape, verify = engine.shape, engine.settings.verify
        payload = n * (shape.segments if verify else 1)
        local, offset, length = (np.zeros(payload + n, np.uint64) for _ in range(3))
        region, group = np.zeros(payload + n, np.int32), np.zeros(payload + n, np.int32)
        digests = np.zeros(n * shape.segments, np.uint64)
        self.reader = QuickReader(
            engine.places.table,
            n,
            shape.block_bytes,
            shape.segments,
            engine.header_stride,
            verify,
            local,
            region,
            offset,
            length,
            group,
            np.zeros(n * engine.header_stride, np.uint8),
            digests,
        )
        threads = engine.settings.copy_threads
        if verify:
            self.batches = [(Batch(local, region, offset, length, group, digests), threads)]
        # Without, the headers after the payload: see `copying.read_blocks`.
        elif threads <= 1 and n * shape.block_bytes < ONE_THREAD_BYTES:
            self.batches = [(Batch(local, region, offset, length), 1)]  # one thread copies in order
        else:
            self.batches = [
                (Batch(local[part], region[part], offset[part], length[part]), threads)
                for part in (slice(0, payload), slice(payload, None))
            ]


class Quick(threading.local):
    """The prepared readers of a thread, by batch size."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._most = min(MAX_BLOCKS, MAX_OPERATIONS // (engine.shape.segments + 1))
        self._prepared: dict[int, _Prepared] = {}

    def get(self, keys: KeyArray, out: Any, deadline_ns: int) -> StatusColumn | None:
        """Read all blocks, or None: then nothing is known, and `out` may have been written to."""
        n = len(keys)
        prepared = self._prepared.get(n)
        if prepared is None:
            if not 0 < n <= self._most:
                return None
            if len(self._prepared) >= MAX_PREPARED:
                self._prepared.clear()
            prepared = self._prepared[n] = _Prepared(self._engine, n)
        engine = self._engine
        if not prepared.reader.prepare(keys, out, engine.regions.table(False)):
            return None
        try:
            for batch, threads in prepared.batches:
                if engine.transport.read(batch, deadline_ns, threads) < len(batch):
                    return None  # too late
        except TransportError:
            return None  # a region went away this moment
        return _OK[:n].copy() if prepared.reader.check() else None
