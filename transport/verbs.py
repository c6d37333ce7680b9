"""verbs: regions on other hosts over InfiniBand or RoCE by RDMA reads and writes, with libibverbs itself.

libibverbs is opened when a transport is made, never at import, and its headers are needed nowhere. A client has one
reliable connection (queue pair) to each owner for reading and one for writing; batches become work requests with
neighbours merged, completions are waited for on a channel. The owner's processor takes no part in reads and writes. The
two sides meet through an `Exchange`: keys and queue pairs travel there, never in descriptors.

Fences: `fence` destroys a client's queue pairs at the owner, closing a region deregisters its memory. Both were
measured to hold under a stream of writes (`tests/rdma`); putting a queue pair into the error state was not.

Invariants:
- What a connection may do is a right of its queue pair at the owner; keys alone give nobody anything.
- A batch that runs out of time, or is abandoned, takes its connection with it: destroyed, it can no longer touch
  memory. The next batch connects anew.
- Local memory that was not `prepare`d travels through registered staging memory, and is counted (`stats`).
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from collections.abc import Callable

import numpy as np

from transport import _digests, base
from transport._lent import LentRegion
from transport._pending import Posted
from transport._verbs_devices import Device, choose, devices, list_devices, open_library
from transport._verbs_messages import MAX_REGION_BYTES, VERSION, Descriptor, decode, encode
from transport._verbs_owner import Link, Owner
from transport._verbs_peers import Peers
from transport.base import Batch, Capabilities, Exchange, Pending, Transport, UInt8Column
from transport.errors import (
    NotWritableError,
    TransportError,
    UnreachableError,
    UnsupportedError,
)

__all__ = ["Device", "VerbsRegion", "VerbsTransport", "devices"]

DEFAULT_LIMIT_NS = 30_000_000_000
"""Deadline of a batch or a connection that was given none."""
DEFAULT_CHUNK_BYTES = 1 << 30
DEFAULT_STAGING_BYTES = 4 << 20
_SEGMENTS = 16
_RECONNECT_NS = 2_000_000_000
"""What a batch waits at most for a lost connection to be made anew; an owner that lives answers in milliseconds."""
_log = logging.getLogger("memfabric.transport.verbs")


class VerbsRegion(LentRegion):
    """Memory that this process lends over verbs."""


class VerbsTransport(Transport):
    """See the module. Thread-safe; not usable in a forked child.

    Args:
        library: Path of libibverbs; default: ``$MEMFABRIC_VERBS_LIBRARY``, then the system's ``libibverbs.so.1``.
        device, port, gid_index: Which device; default: the first port that is active, and on Ethernet a RoCE v2 GID,
            of IPv4 where there is one. See `devices`.
        timeout: Time until a packet without acknowledgement is sent again, as 4.096 us x 2^timeout (InfiniBand
            specification, 9.7.6.1.3); 14 is 67 ms. Devices wait up to four times as long.
        retries: How often, 0 to 6. After that the connection is lost: by default after about half a second.
        service_level, traffic_class, hop_limit: For the fabric's quality of service (RoCE: traffic_class is DSCP x 4).
        depth: Work requests outstanding on a connection.
        staging_bytes: Registered memory of each connection, through which batches go whose memory is not registered.
        chunk_bytes: Owner: longest single registration; larger regions get several.
        spin: Wait by polling. Only where a core is free for each waiting thread.
        limit_ns: Deadline of batches and connections that are given none.

    Raises:
        UnsupportedError: No libibverbs, or no device that fits; the message goes through what there is.
        ValueError: A bad argument.
    """

    def __init__(
        self,
        *,
        library: str | None = None,
        device: str | None = None,
        port: int | None = None,
        gid_index: int | None = None,
        timeout: int = 14,
        retries: int = 6,
        service_level: int = 0,
        traffic_class: int = 0,
        hop_limit: int = 64,
        depth: int = 128,
        staging_bytes: int = DEFAULT_STAGING_BYTES,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        spin: bool = False,
        limit_ns: int = DEFAULT_LIMIT_NS,
    ) -> None:
        super().__init__()
        for name, value, least, most in (
            ("depth", depth, 4, 1 << 14),
            ("staging_bytes", staging_bytes, 1 << 16, 1 << 30),
            ("chunk_bytes", chunk_bytes, 4096, MAX_REGION_BYTES),
            ("limit_ns", limit_ns, 1, 1 << 62),
        ):
            if not least <= value <= most:
                raise ValueError(f"{name} must be {least} to {most}, got {value}")
        if chunk_bytes % 4096:
            raise ValueError(f"chunk_bytes must be a multiple of 4096, got {chunk_bytes}")
        self._link = Link(timeout, retries, service_level, traffic_class, hop_limit)
        opened = open_library(library)
        self._choice = choose(list_devices(opened), device, port, gid_index)
        from transport import _verbs

        self._error = _verbs.VerbsError
        limits = self._choice.device.limits
        gid = self._choice.gid.index if self._choice.gid else -1
        try:
            self._device = _verbs.Device(opened, self._choice.device.name, self._choice.port.number, gid)
        except _verbs.VerbsError as error:
            raise UnsupportedError(f"{self._choice} can't be used: {error.args[1]}") from None
        self._client = _verbs.Client(
            self._device,
            depth=min(depth, limits["max_work_requests"]),
            segments=max(1, min(_SEGMENTS, limits["max_segments"], limits["max_read_segments"])),
            staging_bytes=staging_bytes,
            spin=spin,
            limit_ns=limit_ns,
        )
        self._library = opened.path
        self._limit_ns = limit_ns
        self._nonce = os.urandom(16)
        self._owner = Owner(self._device, self._choice, self._nonce, self._link, chunk_bytes)
        self._guard = threading.Lock()
        self._peers = Peers(self._device, self._choice, self._link, self._client)
        self._unregistered = 0
        self._posted = Posted()
        self._pid = os.getpid()

    @property
    def capabilities(self) -> Capabilities:
        """What works here."""
        return Capabilities(
            name="verbs",
            one_sided=True,
            data_path=f"RDMA, {self._choice}",
            hosts=True,
            inline_digest=False,
            ordered=False,  # reads may be answered in any order from memory, and PCIe promises none between writes
            zero_copy=False,
            fences=frozenset({"client", "region"}),
            detects=frozenset({"death"}),
            kinds=frozenset({"cpu"}),
            region_kinds=frozenset({"cpu"}),
            needs_exchange=True,
            max_region_bytes=MAX_REGION_BYTES,
            max_operation_bytes=MAX_REGION_BYTES,
        )

    def info(self) -> dict[str, str]:
        return {"library": self._library, "device": str(self._choice), "firmware": self._choice.device.firmware}

    # Owner's side

    def register(self, memory: UInt8Column, region_id: int, *, writable: bool = True) -> VerbsRegion:
        """As `Transport.register`. With ``writable=False`` no client can write by this registration: the strict form,
        where parts that are to be written are registered again, each for its writer and as long as it may write."""
        base.check_lent(memory, region_id)
        self._check_process()
        serial = self._owner.register(region_id, memory.ctypes.data, memory.size, writable)
        return self._region(region_id, serial, memory.size, memory, writable)

    def register_dmabuf(
        self, fd: int, offset: int, size_bytes: int, region_id: int, *, writable: bool = True
    ) -> VerbsRegion:
        """Lends device memory (a GPU's) that a driver exported as a dma-buf.

        Args:
            fd: The dma-buf; may be closed afterwards. offset, size_bytes: Which part of it.

        Raises:
            OutOfMemoryError: Kernel, device or driver can't; the message says what it takes. Not applied.
        """
        if not 0 <= region_id < 1 << 64 or offset < 0 or not 1 <= size_bytes <= MAX_REGION_BYTES:
            raise ValueError(f"no such part of a dma-buf: offset {offset}, {size_bytes} bytes, region {region_id}")
        self._check_process()
        serial = self._owner.register_dmabuf(region_id, fd, offset, size_bytes, writable)
        return self._region(region_id, serial, size_bytes, np.zeros(0, np.uint8), writable)

    def _region(self, region_id: int, serial: int, size_bytes: int, memory: UInt8Column, writable: bool) -> VerbsRegion:
        ethernet = self._choice.port.link_layer == "Ethernet"
        descriptor = encode(
            Descriptor("verbs", VERSION, self._nonce, region_id, serial, size_bytes, writable, ethernet)
        )
        withdraw = functools.partial(self._unregister, region_id, serial)
        return VerbsRegion(region_id, size_bytes, memory, descriptor, withdraw)

    def create_region(
        self,
        name: str,
        region_id: int,
        size_bytes: int,
        *,
        mode: int = 0o600,
        progress: Callable[[int], None] | None = None,
    ) -> VerbsRegion:
        return self.register(base.private_memory(name, region_id, size_bytes, MAX_REGION_BYTES, progress), region_id)

    def _unregister(self, region_id: int, serial: int) -> None:
        if os.getpid() == self._pid:
            self._owner.unregister(region_id, serial)

    def accept(self, hello: bytes, identity: bytes) -> bytes:
        self._check_process()
        _check_identity(identity)
        return self._owner.accept(hello, identity)

    def fence(self, identity: bytes) -> bool:
        _check_identity(identity)
        return self._owner.fence(identity)

    # Client's side

    def connect(
        self, descriptor: bytes, *, writable: bool, exchange: Exchange | None = None, deadline_ns: int = 0
    ) -> int:
        self._check_process()
        told = decode(Descriptor, descriptor)
        if exchange is None:
            raise UnreachableError("verbs connects through an exchange with the owner, and none was given")
        if writable and not told.writable:
            raise NotWritableError(f"region {told.region_id:#x} is lent for reading")
        if told.ethernet != (self._choice.port.link_layer == "Ethernet"):
            theirs = "RoCE (Ethernet)" if told.ethernet else "InfiniBand"
            raise UnreachableError(f"region {told.region_id:#x} is on {theirs}, this client uses {self._choice}")
        return self._peers.connect(told, writable, exchange, deadline_ns or time.monotonic_ns() + self._limit_ns)

    def size_of(self, handle: int) -> int:
        return int(self._client.size_of(handle))

    def disconnect(self, handle: int) -> None:
        self._peers.disconnect(handle)

    def prepare(self, address: int, length: int) -> None:
        self._check_process()
        if not length or not address:
            return
        try:
            self._client.prepare(address, length)
        except self._error as error:
            with self._guard:
                self._unregistered += 1
            _log.warning("%d bytes are not registered and will be copied on their way: %s", length, error.args[1])

    def forget(self, address: int, length: int) -> None:
        self._client.forget(address, length)

    def post_read(self, batch: Batch, deadline_ns: int = 0, threads: int = 0) -> Pending:
        return self._post(False, batch, deadline_ns, threads)

    def post_write(self, batch: Batch, deadline_ns: int = 0, threads: int = 0) -> Pending:
        return self._post(True, batch, deadline_ns, threads)

    def _post(self, write: bool, batch: Batch, deadline_ns: int, threads: int) -> Pending:
        self._check_process()
        if not 0 <= threads <= 64:
            raise ValueError(f"threads must be 0 to 64, got {threads}")
        if batch.kind != "cpu":
            raise UnsupportedError(f"verbs moves CPU memory, not {batch.kind!r}")
        _digests.check_groups(batch)
        end_ns = deadline_ns or time.monotonic_ns() + self._limit_ns
        native = self._client.post(write, batch.local, batch.region, batch.offset, batch.length, batch.status, end_ns)
        if native.refusal:
            raise base.refusal("write" if write else "read", batch, native.refusal, self.size_of)
        if write:
            _digests.fill_posted(batch)
        why = ""
        missing = native.missing()
        for number in missing:
            # No owner that hangs takes all of the time from the others.
            now_ns = time.monotonic_ns()
            share_ns = min((end_ns - now_ns) // (2 * len(missing)), _RECONNECT_NS)
            why = self._peers.reconnect(number, now_ns + share_ns) or why
        native.begin(why)
        return self._posted.pending(batch, native, write)

    def flush(self, deadline_ns: int = 0) -> bool:
        return self._posted.flush(deadline_ns or time.monotonic_ns() + self._limit_ns)

    def stats(self) -> dict[str, int | str]:
        return {
            "connections": self._client.connections(),
            "connects": self._peers.connects,
            "staged_bytes": self._client.staged_bytes(),
            "prepare_failures": self._unregistered,
            "clients": self._owner.connections(),
            "clients_accepted": self._owner.accepted,
            "device": str(self._choice),
        }

    def close(self) -> None:
        if os.getpid() != self._pid:
            return
        self._peers.close()
        self._client.close()
        self._owner.close()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise TransportError("this transport belongs to the parent process; make another one after a fork")


def _check_identity(identity: bytes) -> None:
    if len(identity) != base.IDENTITY_BYTES:
        raise ValueError(f"an identity is {base.IDENTITY_BYTES} bytes, not {len(identity)}")
