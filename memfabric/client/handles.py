"""Leases in the caller's hands, for the blocking client. The logic is in `leases`."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import numpy as np

from memfabric.client import leases
from memfabric.client.effects import run
from memfabric.client.results import GetResult, PutResult, StatusColumn


class ReadLease:
    """Blocks held for reading; see `Client.acquire`.

    Attributes:
        granted: bool ``[n]``: held. Blocks that are not in the pool are not.
    """

    def __init__(self, held: leases.HeldRead) -> None:
        """Use `Client.acquire`."""
        self._held = held
        self.granted = held.granted

    @property
    def status(self) -> StatusColumn:
        """uint8 ``[n]`` of `core.messages.AcquireStatus`: MISSING or GRANTED."""
        return self.granted.astype(np.uint8)

    @property
    def count(self) -> int:
        """Leading blocks that are held."""
        return len(self.granted) if self.granted.all() else int(np.argmin(self.granted))

    @property
    def deadline_ns(self) -> int:
        """When the lease ends (CLOCK_MONOTONIC, `time.monotonic_ns`); 0 when nothing was granted."""
        return self._held.deadline_ns

    def read(self, out: Any = None, *, segments: slice | None = None, timeout_s: float | None = None) -> GetResult:
        """Read the held blocks, or some segments of each (layer-wise).

        Args:
            out: as for `Client.get`, for all n keys; with `segments` a block has only the selected segments'
                bytes (in `PagedBlocks` the layout's fragments of those segments are used).
            segments: a slice over the block's segments.

        Raises:
            RefusedError: the lease expired before the bytes had landed; they must not be used.
        """
        held = self._held
        return run(held.read(out, segments, held.engine.deadline_ns(timeout_s)), held.engine.link)

    def view(self, index: int, *, segments: slice | None = None) -> memoryview:
        """The block's own memory in the pool, read-only and without a copy.

        It is what was committed only until the lease ends; nothing was verified. Use it, then ask `check`.

        Raises:
            UsageError: not granted. UnavailableError: it cannot be mapped here.
        """
        return self._held.view(index, segments)

    def check(self, index: int) -> bool:
        """After using a view: whether it was right, i.e. the block still verifies and the lease is still
        valid."""
        return self._held.verify(index)

    def renew(self, ttl_s: float | None = None, *, timeout_s: float | None = None) -> int:
        """Prolong the lease; returns the new `deadline_ns`.

        Raises:
            RefusedError: it has ended.
        """
        held = self._held
        return run(held.renew(ttl_s, held.engine.deadline_ns(timeout_s)), held.engine.link)

    def release(self) -> None:
        """End the lease. Idempotent; waits for nothing."""
        self._held.end()

    def __enter__(self) -> ReadLease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __len__(self) -> int:
        return len(self.granted)

    def __repr__(self) -> str:
        return f"<ReadLease of {int(self.granted.sum())} of {len(self)} blocks>"


class WriteLease:
    """Fresh blocks held for writing; see `Client.reserve`.

    Attributes:
        granted: bool ``[n]``: to be written. The others: `status` says why not.
    """

    def __init__(self, held: leases.HeldWrite) -> None:
        """Use `Client.reserve`."""
        self._held = held
        self.granted = held.granted

    @property
    def status(self) -> StatusColumn:
        """uint8 ``[n]`` of `PutStatus`; STORED stands for granted until the commit."""
        return self._held.status

    @property
    def message(self) -> str:
        """Why blocks were not granted or not written."""
        return self._held.message

    @property
    def deadline_ns(self) -> int:
        """When the lease ends (CLOCK_MONOTONIC); 0 when nothing was granted."""
        return self._held.deadline_ns

    def write(self, blocks: Any, *, segments: slice | None = None) -> int:
        """Write the granted blocks, or some segments of each (layer-wise); any number of times, in any order.

        Args:
            blocks: as for `Client.put`, for all n keys; those that were not granted are skipped.
            segments: a slice over the block's segments; a block in `blocks` then has only those bytes.

        Returns:
            How many blocks were written.

        Raises:
            RefusedError: the lease expired; the blocks cannot be committed.
        """
        held = self._held
        return run(held.write(blocks, segments), held.engine.link)

    def commit(self, *, timeout_s: float | None = None) -> PutResult:
        """Make readable what was written whole, i.e. in all its segments; the rest is given back. Ends the
        lease.

        Raises:
            RefusedError: the lease has ended; nothing became readable.
        """
        held = self._held
        return run(held.commit(held.engine.deadline_ns(timeout_s)), held.engine.link)

    def renew(self, ttl_s: float | None = None, *, timeout_s: float | None = None) -> int:
        """Prolong the lease; returns the new `deadline_ns`.

        Raises:
            RefusedError: it has ended.
        """
        held = self._held
        return run(held.renew(ttl_s, held.engine.deadline_ns(timeout_s)), held.engine.link)

    def abort(self) -> None:
        """Give everything back. Idempotent; waits for nothing."""
        self._held.end()

    def __enter__(self) -> WriteLease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def __len__(self) -> int:
        return len(self.granted)

    def __repr__(self) -> str:
        return f"<WriteLease of {int(self.granted.sum())} of {len(self)} blocks>"
