"""Batches whose local memory is a device's: directly where the transport takes it, else through pinned host memory.

Staged, a batch goes in parts through two (or more) slots, each with a pinned buffer, a buffer on the device and a
stream: while one part travels between pinned memory and the regions, the next one is gathered on the device and copied
down, or the one before copied up and scattered. The kernel hashes what it gathers from, or scatters to, the caller's
memory: a write's digests are of the bytes that were in it, a read's of the bytes that are in it now, and the processor
hashes nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np

from transport import _digests, base
from transport.base import DONE, NOT_DONE, OUT_OF_BOUNDS, Batch, Transport
from transport.errors import (
    BoundsError,
    NotConnectedError,
    NotWritableError,
    TimedOutError,
    TransportError,
    UnsupportedError,
)
from transport.gpu import parts
from transport.gpu.device import Device
from transport.gpu.pipeline import KIND, Call, Pipeline

DEFAULT_PART_BYTES = 8 << 20
"""Of pinned and of device memory for each slot. Source: large enough that a copy over PCIe runs at full speed, small
enough that the first part is soon on its way; not measured yet."""
_REFUSALS = (BoundsError, NotConnectedError, NotWritableError)


class Stager:
    """Moves batches of one device's memory over one transport. Thread-safe: calls beyond `pipelines` wait their turn.

    Args:
        transport: Used, not owned.
        device: The same.
        part_bytes: Size of a staging buffer.
        slots: Staging buffers that one call alternates between: 2 is double buffering.
        pipelines: Calls that run at the same time; each has slots of its own, made when they are first needed.
    """

    def __init__(
        self,
        transport: Transport,
        device: Device,
        *,
        part_bytes: int = DEFAULT_PART_BYTES,
        slots: int = 2,
        pipelines: int = 2,
    ) -> None:
        if not 1 <= slots <= 64 or not 1 <= pipelines <= 64:
            raise ValueError(f"slots and pipelines must be 1 to 64, got {slots} and {pipelines}")
        self._transport, self._device = transport, device
        self._part_bytes, self._cell, self._slots = part_bytes, parts.cell_bytes(part_bytes), slots
        self._idle: list[Pipeline] = []
        self._made, self._most = 0, pipelines
        self._turn = threading.Condition()
        self._closed = False
        self._counters = {"staged_bytes": 0, "direct_bytes": 0, "parts": 0}

    @property
    def direct(self) -> bool:
        """Whether the transport takes the device's memory itself."""
        return KIND in self._transport.capabilities.kinds

    @property
    def path(self) -> str:
        """How bytes travel, for people."""
        if self.direct:
            return f"{self._device.name}, directly"
        megabytes = self._part_bytes / (1 << 20)
        return f"{self._device.name}, through pinned memory ({self._slots} slots of {megabytes:g} MiB)"

    def stats(self) -> dict[str, int | str]:
        """How, and how much."""
        return {"path": self.path, **self._counters}

    def read(self, batch: Batch, deadline_ns: int = 0, threads: int = 0, follow: Iterable[int] = ()) -> int:
        """As `Transport.read`, into device memory (`batch.kind` "cuda").

        Operations of one batch may overtake one another, whatever `threads` is. An operation that the device failed on
        counts as begun: `PEER_LOST`.

        Args:
            follow: Streams of the caller (cudaStream_t as numbers) whose work of now uses the memory; it is waited for
                on the device.

        Raises:
            BoundsError, NotConnectedError, UnsupportedError, ValueError: As the transport; nothing was touched.
            DeviceError: No staging memory is to be had; nothing was touched.
        """
        return self._run(False, batch, deadline_ns, threads, follow)

    def write(self, batch: Batch, deadline_ns: int = 0, threads: int = 0, follow: Iterable[int] = ()) -> int:
        """As `Transport.write`, from device memory; otherwise as `read`.

        Raises:
            NotWritableError: A region was connected for reading; nothing was touched.
        """
        return self._run(True, batch, deadline_ns, threads, follow)

    def close(self) -> None:
        """Give the staging memory back, once running calls are over, which is by their deadlines; idempotent."""
        with self._turn:
            self._closed = True
            self._turn.notify_all()
            while len(self._idle) < self._made:
                self._turn.wait()
            idle, self._idle, self._made = self._idle, [], 0
        for pipeline in idle:
            pipeline.close()

    # --- inside ---

    def _run(self, write: bool, batch: Batch, deadline_ns: int, threads: int, follow: Iterable[int]) -> int:
        if batch.kind != KIND:
            raise UnsupportedError(f"staging moves device memory (kind {KIND!r}), not {batch.kind!r}")
        self._admit(write, batch, deadline_ns)
        pieces = parts.cut(batch, self._cell)
        batch.error = None
        batch.status[:] = np.where(batch.length == 0, DONE, NOT_DONE)
        sums = np.zeros(0 if batch.digest is None else len(batch.digest), np.uint64)
        call = Call(self._transport, write, batch, pieces, sums, deadline_ns, threads, list(follow))
        with self._pipeline(deadline_ns) as pipeline:
            if pipeline is None:
                call.fail(TimedOutError("the deadline passed while other calls used the staging memory"))
            else:
                direct = self.direct
                (pipeline.direct if direct else pipeline.write if write else pipeline.read)(call)
                with self._turn:
                    self._counters["direct_bytes" if direct else "staged_bytes"] += call.done_bytes
                    self._counters["parts"] += call.parts_count
        return call.conclude()

    def _admit(self, write: bool, batch: Batch, deadline_ns: int) -> None:
        """Refuse what is to be refused before anything moves. The transport itself says so: of the end of each range,
        nothing is read or written."""
        n = len(batch)
        for name, kind in (("local", "u8"), ("region", "i4"), ("offset", "u8"), ("length", "u8"), ("status", "u1")):
            column = getattr(batch, name)
            if column.dtype != np.dtype(kind) or column.shape != (n,):
                raise ValueError(f"column {name} must be a one-dimensional array of {n} {np.dtype(kind)}")
        _digests.check_groups(batch)
        end = batch.offset + batch.length
        bad = (batch.length != 0) & ((batch.local == 0) | (batch.local > ~batch.length))
        bad |= end < batch.offset
        probe = Batch(np.zeros(n, np.uint64), batch.region, np.where(bad, ~np.uint64(0), end), np.zeros(n, np.uint64))
        call = self._transport.post_write if write else self._transport.post_read
        try:
            call(probe, deadline_ns, 1).wait()
        except _REFUSALS as error:
            batch.status[:] = probe.status
            status = int(probe.status[(probe.status != NOT_DONE).argmax()])
            raise base.refusal("write" if write else "read", batch, status, self._transport.size_of) from error
        if bad.any():
            batch.status[:] = np.where(bad, OUT_OF_BOUNDS, NOT_DONE)
            raise base.refusal("write" if write else "read", batch, OUT_OF_BOUNDS, self._transport.size_of)

    @contextmanager
    def _pipeline(self, deadline_ns: int) -> Iterator[Pipeline | None]:
        """The use of a pipeline; None when none was free by the deadline. One that failed isn't used again."""
        with self._turn:
            while not self._closed and not self._idle and self._made >= self._most:
                left_s = (deadline_ns - time.monotonic_ns()) / 1e9 if deadline_ns else None
                if left_s is not None and left_s <= 0:
                    break
                self._turn.wait(left_s)
            if self._closed:
                raise TransportError("the staging of device memory is closed")
            pipeline = self._idle.pop() if self._idle else None
            make = pipeline is None and self._made < self._most
            self._made += make
        if pipeline is None and not make:
            yield None
            return
        try:
            if pipeline is None:
                pipeline = Pipeline(self._transport, self._device, self._part_bytes, self._cell, self._slots)
            yield pipeline
        finally:
            drop = pipeline is None or pipeline.broken
            if pipeline is not None and drop:
                pipeline.close()
            with self._turn:
                if pipeline is not None and not drop:
                    self._idle.append(pipeline)
                else:
                    self._made -= 1
                self._turn.notify_all()
