"""The owner's side of verbs: registrations that are lent, and the ends of clients' connections.

One queue pair for each client and right: what a client may do is a right of its queue pair, so a reader cannot write
whatever key it uses, and destroying a writer's queue pair stops that writer alone.
"""

from __future__ import annotations

import errno
import secrets
import threading
import time
from dataclasses import dataclass
from typing import Any

from transport._verbs_devices import Choice
from transport._verbs_messages import VERSION, Hello, Queue, Welcome, decode, encode
from transport.errors import DescriptorError, OutOfMemoryError, TransportError, UnreachableError

MAX_CLIENTS = 8192
"""Ends of connections that an owner keeps at most; each is a queue pair."""
_PROBE_S = 1.0
"""Ends are asked for signs of life at most this often."""


@dataclass(frozen=True)
class Link:
    """How connections are made; see `VerbsTransport` for the meaning."""

    timeout: int = 14
    retries: int = 6
    service_level: int = 0
    traffic_class: int = 0
    hop_limit: int = 64

    def __post_init__(self) -> None:
        for name, most in (
            ("timeout", 31),
            ("retries", 6),
            ("service_level", 15),
            ("traffic_class", 255),
            ("hop_limit", 255),
        ):
            value = getattr(self, name)
            least = 1 if name in ("timeout", "hop_limit") else 0
            if not least <= value <= most:
                raise ValueError(f"{name} must be {least} to {most}, got {value}")

    def queue(self, end: Any, choice: Choice, gid: bytes, reads: int) -> Queue:
        """What to tell the other side of an end."""
        mtu = choice.port.mtu_bytes.bit_length() - 8
        return Queue(end.number, end.sequence, choice.port.lid, gid, mtu, reads)

    def join(self, end: Any, other: Queue, access: int, reads: int) -> None:
        """Connect an end with the other. Raises `VerbsError`."""
        end.join(
            queue=other.number,
            sequence=other.sequence,
            lid=other.lid,
            gid=other.gid,
            mtu=other.mtu,
            access=access,
            timeout=self.timeout,
            retries=self.retries,
            reads=min(reads, other.reads),
            service_level=self.service_level,
            traffic_class=self.traffic_class,
            hop_limit=self.hop_limit,
        )


@dataclass
class _Lent:
    serial: int
    writable: bool
    pieces: list[tuple[int, int, int, int]]
    memories: list[Any]


class Owner:
    """Thread-safe.

    Args:
        device: The open device. choice: What was chosen of it. nonce: 16 bytes, this owner's life.
        chunk_bytes: Longest single registration.
    """

    def __init__(self, device: Any, choice: Choice, nonce: bytes, link: Link, chunk_bytes: int) -> None:
        self._device, self._choice, self._nonce, self._link = device, choice, nonce, link
        most = choice.device.limits["max_registration_bytes"]
        self._chunk_bytes = min(chunk_bytes, most) if most > 0 else chunk_bytes
        self._reads = max(1, min(255, choice.device.limits["max_reads_answered"]))
        self._guard = threading.Lock()
        self._lent: dict[tuple[int, int], _Lent] = {}
        self._ends: dict[tuple[bytes, bool], Any] = {}
        self._probed_s = 0.0
        self._closed = False
        self.accepted = 0

    def register(self, region_id: int, address: int, size_bytes: int, writable: bool) -> int:
        """Lend memory; returns the registration's serial.

        Raises:
            OutOfMemoryError: It cannot be registered; nothing is left registered.
        """
        from transport import _verbs

        access = _verbs.REMOTE_READ | ((_verbs.REMOTE_WRITE | _verbs.LOCAL_WRITE) if writable else 0)
        made: list[Any] = []
        pieces = []
        try:
            for offset in range(0, size_bytes, self._chunk_bytes):
                length = min(self._chunk_bytes, size_bytes - offset)
                memory = _verbs.Memory(self._device, address + offset, length, access)
                made.append(memory)
                pieces.append((offset, length, address + offset, memory.rkey))
        except _verbs.VerbsError as error:
            for each in made:
                each.close()
            code, told = error.args
            raise OutOfMemoryError(
                f"{size_bytes} bytes can't be registered for RDMA: {told}{memlock_advice(code)}"
            ) from None
        return self._lend(region_id, _Lent(secrets.randbits(63), writable, pieces, made))

    def register_dmabuf(self, region_id: int, fd: int, offset: int, size_bytes: int, writable: bool) -> int:
        """Lend device memory behind a dma-buf; as `register`."""
        from transport import _verbs

        access = _verbs.REMOTE_READ | ((_verbs.REMOTE_WRITE | _verbs.LOCAL_WRITE) if writable else 0)
        try:
            memory = _verbs.Memory.from_dmabuf(self._device, fd, offset, size_bytes, offset, access)
        except _verbs.VerbsError as error:
            raise OutOfMemoryError(
                f"{size_bytes} bytes behind dma-buf {fd} can't be registered with {self._choice.device.name}: "
                f"{error.args[1]}; GPU memory needs a kernel with dma-buf support (5.12 or later), an RDMA driver "
                "that offers it (mlx5, irdma, efa, bnxt_re) and a GPU driver that exports it"
            ) from None
        return self._lend(
            region_id, _Lent(secrets.randbits(63), writable, [(0, size_bytes, offset, memory.rkey)], [memory])
        )

    def _lend(self, region_id: int, lent: _Lent) -> int:
        with self._guard:
            closed = self._closed
            if not closed:
                self._lent[region_id, lent.serial] = lent
        if closed:
            for each in lent.memories:
                each.close()
            raise TransportError("this transport is closed")
        return lent.serial

    def unregister(self, region_id: int, serial: int) -> None:
        """Withdraw it. When this has returned, its keys open nothing.

        Raises:
            TransportError: The device refused; the memory may still be reached.
        """
        with self._guard:
            lent = self._lent.get((region_id, serial))
            if lent is None:
                return
            lent.pieces = []  # from here on nobody is told its keys
        codes = [code for code in (each.close() for each in lent.memories) if code]
        if codes:
            raise TransportError(
                f"region {region_id:#x} can't be withdrawn, it may still be written: deregistering failed with "
                f"{errno.errorcode.get(codes[0], codes[0])}"
            )
        with self._guard:
            self._lent.pop((region_id, serial), None)

    def accept(self, raw: bytes, identity: bytes) -> bytes:
        """As `Transport.accept`."""
        hello = decode(Hello, raw)
        if hello.owner != self._nonce:
            raise DescriptorError("a hello for another owner, or for an earlier life of this one")
        with self._guard:
            lent = [self._lent.get((region_id, serial)) for region_id, serial in hello.regions]
        regions = [each.pieces if each and (each.writable or not hello.writable) else [] for each in lent]
        queue = self._connect(hello, identity) if hello.queue is not None else None
        return encode(Welcome(VERSION, queue, regions))

    def _connect(self, hello: Hello, identity: bytes) -> Queue:
        from transport import _verbs

        assert hello.queue is not None
        self._drop_dead()
        access = _verbs.REMOTE_READ | (_verbs.REMOTE_WRITE if hello.writable else 0)
        try:
            end = _verbs.End.of_owner(self._device)
            self._link.join(end, hello.queue, access, self._reads)
        except _verbs.VerbsError as error:
            raise UnreachableError(f"{self._choice} can't connect to the client: {error.args[1]}") from None
        key = (identity, hello.writable)
        with self._guard:
            refused = self._closed or (key not in self._ends and len(self._ends) >= MAX_CLIENTS)
            last = end if refused else self._ends.get(key)
            if not refused:
                self._ends[key] = end
                self.accepted += 1
        if last is not None:
            last.sever()
        if refused:
            raise UnreachableError(f"the owner keeps no more than {MAX_CLIENTS} connections, or is closed")
        return self._link.queue(end, self._choice, self._device.gid, self._reads)

    def _drop_dead(self) -> None:
        """Ends whose other side does not answer go away, found when somebody new comes."""
        with self._guard:
            if time.monotonic() < self._probed_s + _PROBE_S:
                return
            self._probed_s = time.monotonic()
            ends = list(self._ends.items())
        dead = [(key, end) for key, end in ends if not end.probe()]
        with self._guard:
            for key, end in dead:
                if self._ends.get(key) is end:
                    del self._ends[key]
        for _, end in dead:
            end.sever()

    def fence(self, identity: bytes) -> bool:
        """As `Transport.fence`."""
        with self._guard:
            ends = [self._ends.pop((identity, writable), None) for writable in (False, True)]
        for end in ends:
            if end is not None:
                end.sever()
        return any(end is not None for end in ends)

    def connections(self) -> int:
        """Ends that are kept."""
        with self._guard:
            return len(self._ends)

    def close(self) -> None:
        """Sever all connections. Registrations are their regions' to close."""
        with self._guard:
            self._closed = True
            ends, self._ends = list(self._ends.values()), {}
        for end in ends:
            end.sever()


def memlock_advice(code: int) -> str:
    """What to do about an errno that a limit of locked memory may be the cause of; empty for others."""
    import resource

    if code not in (errno.ENOMEM, errno.EAGAIN, errno.EPERM):
        return ""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "unlimited memory" if soft == resource.RLIM_INFINITY else f"{soft} bytes"
    return (
        f"; this process may lock {limit} (RLIMIT_MEMLOCK). Raise it: ulimit -l unlimited; systemd: "
        "LimitMEMLOCK=infinity; docker: --ulimit memlock=-1"
    )
