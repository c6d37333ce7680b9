"""UCX: regions on other hosts, over InfiniBand, RoCE, TCP, or another process's memory on this one.

libucp is chosen and opened when a transport is made (`_ucx_library`), never at import. An owner listens; every client
connection has a worker of its own there, so that one client can be fenced and a region withdrawn: the owner destroys
the worker, and what was sent before is not carried out any more. A client's connection is cut the same way when a
batch runs out of time; the next batch connects anew.

What UCX's transports can do differs: RDMA and CMA leave the target's processor alone, TCP needs the owner's progress
thread. A write over TCP is applied by address in the owner's process; bounds are checked by the client.

Invariants:
- No call of UCX happens with the interpreter lock held for longer than a check.
- A descriptor names one life of one owner and one registration; the owner confirms both before a handle exists.
"""

from __future__ import annotations

import functools
import ipaddress
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Annotated, Any

import msgspec

from transport import _digests, _ucx_library, base
from transport._lent import LentRegion
from transport._pending import Posted
from transport.base import Batch, Capabilities, Exchange, Pending, Transport, UInt8Column
from transport.errors import (
    DescriptorError,
    NotConnectedError,
    OutOfMemoryError,
    TransportError,
    UnreachableError,
    UnsupportedError,
)

DEFAULT_LIMIT_NS = 30_000_000_000
"""Deadline of a batch or a connection that was given none."""
MAX_LANES = 16
_MAX_REGION_BYTES = 1 << 46
_NO_MEMORY, _EXCEEDS_LIMIT = -4, -21
_TCP_SEGMENTS = {"TCP_TX_SEG_SIZE": "256k", "TCP_RX_SEG_SIZE": "256k"}
"""Source: measured; UCX's default of 8 KiB costs TCP more than half of its bandwidth on large blocks."""
_ONE_SIDED = ("rc", "dc", "ud", "cma")


class _Descriptor(msgspec.Struct, frozen=True, array_like=True):
    """What stands in a descriptor."""

    transport: str
    version: int
    owner: bytes
    targets: list[tuple[str, Annotated[int, msgspec.Meta(ge=1, le=65535)]]]
    region_id: Annotated[int, msgspec.Meta(ge=0)]
    serial: Annotated[int, msgspec.Meta(ge=0)]
    base: Annotated[int, msgspec.Meta(ge=0)]
    size_bytes: Annotated[int, msgspec.Meta(ge=1, le=_MAX_REGION_BYTES)]
    key: bytes


_VERSION = 1
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Descriptor)


class UcxRegion(LentRegion):
    """Memory that this process lends over UCX."""


class UcxTransport(Transport):
    """See the module. Thread-safe; not usable in a forked child.

    Args:
        library: Path of a libucp; default: `$MEMFABRIC_UCX_LIBRARY`, the system's, that of PyPI's wheel.
        tls: UCX transports to use, as in `UCX_TLS` (``"tcp"``, ``"rc"``, ``"cma,tcp"``); default: UCX's own choice.
        devices: Network devices, as in `UCX_NET_DEVICES`.
        addresses: Owner: numeric IP addresses to listen on and to put into descriptors; default: all of this host's.
        port: Owner: the port; 0: a free one.
        lanes: Client: connections to each owner that one batch may use, 1 to 16.
        spin: Client: wait by polling. Only where a core is free for each waiting thread.
        limit_ns: Deadline of batches and connections that are given none.
        settings: Further UCX settings by name without ``UCX_``; they win over everything but ``tls`` and ``devices``.

    Raises:
        UnsupportedError: No libucp can be used here; the message says what was tried and what to install.
        ValueError: A bad argument.
    """

    def __init__(
        self,
        *,
        library: str | None = None,
        tls: str | None = None,
        devices: str | None = None,
        addresses: list[str] | None = None,
        port: int = 0,
        lanes: int = 1,
        spin: bool = False,
        limit_ns: int = DEFAULT_LIMIT_NS,
        settings: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= lanes <= MAX_LANES:
            raise ValueError(f"lanes must be 1 to {MAX_LANES}, got {lanes}")
        if not 0 <= port <= 65535:
            raise ValueError(f"port must be 0 to 65535, got {port}")
        if limit_ns <= 0:
            raise ValueError(f"limit_ns must be above 0, got {limit_ns}")
        self._addresses = None if addresses is None else [str(ipaddress.ip_address(each)) for each in addresses]
        self._port = port
        self._tls = tls
        self._context, self._source = _open(library, _settings(tls, devices, settings or {}))
        from transport import _ucx

        self._error = _ucx.UcxError
        self._limit_ns = limit_ns
        self._lanes = lanes
        self._client: Any = None
        self._client = _ucx.Client(self._context, self.identity, lanes, spin, self.capabilities.one_sided, limit_ns)
        self._owner: Any = None
        self._nonce = os.urandom(16)
        self._guard = threading.Lock()
        self._posted = Posted()
        self._closed = False
        self._pid = os.getpid()

    @functools.cached_property
    def _path(self) -> str:
        chosen = self._tls or os.environ.get("UCX_TLS", "") or "all"
        return f"UCX {self._context.version}, {chosen}"

    @property
    def capabilities(self) -> Capabilities:
        """What works here.

        `ordered` and `kinds` tell of the connections that there are now: what travels as messages is ordered, and is
        never device memory.
        """
        chosen = [each.strip() for each in (self._tls or os.environ.get("UCX_TLS", "")).split(",") if each.strip()]
        one_sided = bool(chosen) and all(each.startswith(_ONE_SIDED) or each == "self" for each in chosen)
        return Capabilities(
            name="ucx",
            one_sided=one_sided,
            data_path=self._path,
            hosts=True,
            inline_digest=False,
            ordered=self._client is not None and self._client.in_order(),
            zero_copy=False,
            fences=frozenset({"client", "region"}),
            detects=frozenset({"death"}),
            kinds=frozenset({"cpu", "cuda"} if self._moves_device_memory() else {"cpu"}),
            region_kinds=frozenset({"cpu"}),
            needs_exchange=False,
            max_region_bytes=_MAX_REGION_BYTES,
            max_operation_bytes=_MAX_REGION_BYTES,
        )

    def _moves_device_memory(self) -> bool:
        return "cuda" in self._context.information() and self._client is not None and self._client.remote_access()

    def info(self) -> dict[str, str]:
        """Path, version and source of the libucp, and what it found, for logs and people."""
        return {
            "library": self._context.path,
            "version": self._context.version,
            "source": self._source,
            "transports": self._context.information(),
        }

    # Owner's side

    def register(self, memory: UInt8Column, region_id: int) -> UcxRegion:
        base.check_lent(memory, region_id)
        owner = self._listening()
        address = memory.ctypes.data
        try:
            serial, key = owner.register(region_id, address, memory.size)
        except self._error as error:
            status, why = error.args
            if status in (_NO_MEMORY, _EXCEEDS_LIMIT):
                raise OutOfMemoryError(
                    f"UCX can't register {memory.size} bytes: {why}; raise the limit of locked memory "
                    "(ulimit -l unlimited, LimitMEMLOCK=infinity)"
                ) from None
            raise OutOfMemoryError(f"UCX can't register {memory.size} bytes: {why}") from None
        descriptor = _encoder.encode(
            _Descriptor(
                "ucx",
                _VERSION,
                self._nonce,
                list(zip(self._listens, owner.ports, strict=True)),
                region_id,
                serial,
                address,
                memory.size,
                key,
            )
        )
        return UcxRegion(
            region_id, memory.size, memory, descriptor, functools.partial(self._unregister, region_id, serial)
        )

    def create_region(
        self,
        name: str,
        region_id: int,
        size_bytes: int,
        *,
        mode: int = 0o600,
        progress: Callable[[int], None] | None = None,
    ) -> UcxRegion:
        return self.register(base.private_memory(name, region_id, size_bytes, _MAX_REGION_BYTES, progress), region_id)

    def _listening(self) -> Any:
        from transport import _ucx

        self._check_process()
        with self._guard:
            if self._closed:
                raise TransportError("this transport is closed")
            if self._owner is None:
                self._listens = self._addresses or host_addresses()
                try:
                    self._owner = _ucx.Owner(self._context, self._nonce, self._listens, self._port)
                except RuntimeError as error:
                    raise UnsupportedError(str(error)) from None
            return self._owner

    def _unregister(self, region_id: int, serial: int) -> None:
        if os.getpid() == self._pid and self._owner is not None:
            self._owner.unregister(region_id, serial)

    def fence(self, identity: bytes) -> bool:
        if len(identity) != base.IDENTITY_BYTES:
            raise ValueError(f"an identity is {base.IDENTITY_BYTES} bytes, not {len(identity)}")
        return bool(self._owner is not None and self._owner.fence(identity))

    # Client's side

    def connect(
        self, descriptor: bytes, *, writable: bool, exchange: Exchange | None = None, deadline_ns: int = 0
    ) -> int:
        self._check_process()
        told = _decode(descriptor)
        try:
            handle: int = self._client.connect(
                told.owner,
                told.targets,
                told.region_id,
                told.serial,
                told.base,
                told.size_bytes,
                told.key,
                writable,
                deadline_ns,
            )
        except self._error as error:
            raise UnreachableError(f"region {told.region_id:#x} can't be reached over UCX: {error.args[1]}") from None
        return handle

    def size_of(self, handle: int) -> int:
        return int(self._client.size_of(handle))

    def disconnect(self, handle: int) -> None:
        if not self._client.disconnect(handle):
            raise NotConnectedError(f"handle {handle} is not connected")

    def post_read(self, batch: Batch, deadline_ns: int = 0, threads: int = 0) -> Pending:
        return self._post(False, batch, deadline_ns, threads)

    def post_write(self, batch: Batch, deadline_ns: int = 0, threads: int = 0) -> Pending:
        return self._post(True, batch, deadline_ns, threads)

    def _post(self, write: bool, batch: Batch, deadline_ns: int, threads: int) -> Pending:
        self._check_process()
        if not 0 <= threads <= 64:
            raise ValueError(f"threads must be 0 to 64, got {threads}")
        if batch.kind not in ("cpu", "cuda"):
            raise UnsupportedError(f"ucx moves CPU and CUDA memory, not {batch.kind!r}")
        _digests.check_groups(batch)
        if write and batch.digest is not None:
            batch.digest[:] = _digests.EMPTY
        native = self._client.post(
            write,
            batch.local,
            batch.region,
            batch.offset,
            batch.length,
            batch.status,
            batch.group if write else None,
            batch.digest if write else None,
            deadline_ns,
            threads or self._lanes,
            1 if batch.kind == "cuda" else 0,
        )
        if native.refusal:
            raise base.refusal("write" if write else "read", batch, native.refusal, self.size_of)
        if write and not native.hashed:
            _digests.fill_posted(batch)
        return self._posted.pending(batch, native, write)

    def flush(self, deadline_ns: int = 0) -> bool:
        return self._posted.flush(deadline_ns or time.monotonic_ns() + self._limit_ns)

    def stats(self) -> dict[str, int | str]:
        found: dict[str, int | str] = {
            "connections": self._client.connections(),
            "connects": self._client.connects,
            "cuts": self._client.cuts,
            "lanes": "; ".join(dict.fromkeys(each for each in self._client.lanes() if each)),
            "library": f"{self._context.path} ({self._context.version})",
        }
        if self._owner is not None:
            found["clients"] = self._owner.connections()
            found["clients_accepted"] = self._owner.accepted
        return found

    def close(self) -> None:
        if os.getpid() != self._pid:
            return
        with self._guard:
            self._closed = True
            owner = self._owner
        self._client.close()
        if owner is not None:
            owner.close()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise TransportError("this transport belongs to the parent process; make another one after a fork")


def host_addresses() -> list[str]:
    """Numeric addresses of this host that are up, loopback only where there is nothing else; IPv4 first."""
    import array
    import fcntl
    import struct

    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # SIOCGIFCONF: struct ifreq is 40 bytes on 64-bit Linux, name 16, then a sockaddr_in (netdevice(7)).
        room = array.array("B", bytes(40 * 128))
        pointer, _ = room.buffer_info()
        size = struct.unpack("iP", fcntl.ioctl(probe, 0x8912, struct.pack("iP", len(room), pointer)))[0]
        for at in range(0, size, 40):
            found.append(socket.inet_ntoa(bytes(room[at + 20 : at + 24])))
    outside = [each for each in dict.fromkeys(found) if not ipaddress.ip_address(each).is_loopback]
    return outside[:8] or ["127.0.0.1"]


def _settings(tls: str | None, devices: str | None, more: dict[str, str]) -> list[tuple[str, str]]:
    chosen = {name: value for name, value in _TCP_SEGMENTS.items() if f"UCX_{name}" not in os.environ}
    chosen.update(more)
    if tls is not None:
        chosen["TLS"] = tls
    if devices is not None:
        chosen["NET_DEVICES"] = devices
    return list(chosen.items())


def _open(library: str | None, settings: list[tuple[str, str]]) -> tuple[Any, str]:
    from transport import _ucx

    tried = []
    for choice in _ucx_library.candidates(library):
        try:
            return _ucx.Context(choice.path, settings), choice.source
        except RuntimeError as error:
            tried.append(f"{choice.path} ({choice.source}): {error}")
    if tried:
        raise UnsupportedError(f"UCX can't be used here: {'; '.join(tried)}")
    raise UnsupportedError(f"no libucp was found; {_ucx_library.HOW_TO_GET}")


def _decode(descriptor: bytes) -> _Descriptor:
    try:
        if len(descriptor) > base.MAX_DESCRIPTOR_BYTES:
            raise DescriptorError(f"a descriptor of {len(descriptor)} bytes is too long")
        told = _decoder.decode(descriptor)
    except (msgspec.MsgspecError, UnicodeDecodeError, TypeError, RecursionError) as error:
        raise DescriptorError(f"not a descriptor of a UCX region: {error}") from error
    if told.transport != "ucx":
        raise DescriptorError(f"a descriptor of transport {told.transport[:32]!r}, not of ucx")
    if told.version != _VERSION:
        raise DescriptorError(f"a UCX descriptor of version {told.version}; this program reads version {_VERSION}")
    if len(told.owner) != 16 or not told.targets or not told.key:
        raise DescriptorError("a UCX descriptor without owner, address or key")
    if max(told.region_id, told.serial, told.base + told.size_bytes) >= 1 << 64:
        raise DescriptorError("a UCX descriptor with a number that can't be")
    for address, _ in told.targets:
        try:
            ipaddress.ip_address(address)
        except ValueError as error:
            raise DescriptorError(f"a UCX descriptor with an impossible address: {error}") from None
    return told
