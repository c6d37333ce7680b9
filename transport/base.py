"""The surface every transport offers: regions, connections, batches of one-sided reads and writes.

A transport moves bytes between this process's memory and regions that memory nodes lend. It knows nothing of blocks,
keys, leases or servers. A node creates regions and hands out their descriptors; a client connects to a descriptor, gets
a handle, and names it in batches.

Invariants:
- A batch is checked whole before a byte moves: it is refused entirely, or every operation in it is admitted.
- Every operation of an admitted batch ends with a definite status (`outcome` says what it means), by the deadline. The
  local memory belongs to the batch until it is terminal: when `wait` or `abandon` has returned, nothing touches it.
- The bytes whose digest a batch gives are the bytes at the destination. A transport that can't hash what it stores in
  the same pass hashes local memory after a read and before a write.
- A handle stays with the transport and the owner's life that it was connected to. A broken connection is made anew by
  the next batch; an owner that was restarted in the meantime is another owner, and never reached by an old handle.
"""

from __future__ import annotations

import abc
import enum
import mmap
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from transport._memory import available_memory
from transport.errors import (
    BoundsError,
    NotConnectedError,
    NotWritableError,
    OutOfMemoryError,
    TransportError,
    UnsupportedError,
)

UInt64Column: TypeAlias = npt.NDArray[np.uint64]
Int32Column: TypeAlias = npt.NDArray[np.int32]
UInt8Column: TypeAlias = npt.NDArray[np.uint8]

_SomeRegion = TypeVar("_SomeRegion", bound="Region")
_SomeTransport = TypeVar("_SomeTransport", bound="Transport")

Exchange: TypeAlias = Callable[[bytes, int], bytes]
"""Carries a hello to the region's owner and brings back its welcome, through whatever channel the caller has (the
metadata server's sockets): ``exchange(hello, deadline_ns)``. Blocks; raises `TransportError` without an answer."""

IDENTITY_BYTES = 16
NAME_PATTERN = r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}"
NAME = re.compile(NAME_PATTERN, re.ASCII)
_STEP_BYTES = 64 << 20
MAX_DESCRIPTOR_BYTES = 2048

DONE = 0
"""Status: the operation was performed."""
NOT_DONE = 1
"""Status: not begun, because the deadline had passed, a connection was lost before, or the batch was refused."""
OUT_OF_BOUNDS = 2
"""Status: refused; the range lies outside the region, or the local address is null or wraps."""
REGION_GONE = 3
"""Status: refused; the handle isn't connected."""
NOT_WRITABLE = 4
"""Status: refused; a write to a region that was connected for reading."""
PEER_LOST = 5
"""Status: begun, and the connection broke; a write may or may not have been applied, what a read left is undefined."""
DENIED = 6
"""Status: the other side refused it: the region was withdrawn, or its key is stale. Not applied."""
TIMED_OUT = 7
"""Status: begun, not finished by the deadline, and cut off; otherwise as `PEER_LOST`."""


class Outcome(enum.Enum):
    """What is known of an operation's effect."""

    APPLIED = "applied"
    NOT_APPLIED = "not applied"
    UNKNOWN = "unknown"


def outcome(status: int) -> Outcome:
    """The effect that a status stands for."""
    if status == DONE:
        return Outcome.APPLIED
    return Outcome.UNKNOWN if status in (PEER_LOST, TIMED_OUT) else Outcome.NOT_APPLIED


@dataclass(frozen=True)
class Capabilities:
    """What a transport can do, so that callers choose before they post and nothing is emulated silently."""

    name: str
    """The transport's name as it stands in descriptors."""
    one_sided: bool
    """The node's processor takes no part in reads and writes."""
    data_path: str
    """How bytes travel, in words for people, as far as it is known: `"memory copy"`, `"RDMA, rc on mlx5_0:1"`, …"""
    hosts: bool
    """Reaches regions on other hosts."""
    inline_digest: bool
    """Digests are computed in the same pass as the copy. Where False they cost another pass over local memory."""
    ordered: bool
    """With `threads=1` the operations of a batch become visible to every other process in the order given, each whole
    before the next begins. With other values of `threads` parts of a batch may overtake one another. Whatever
    `threads` is, a batch that returned is visible before anything this thread writes or sends afterwards, and a batch
    sees everything that was visible when it was posted."""
    zero_copy: bool
    """`mapped` gives direct views of a region."""
    fences: frozenset[str]
    """Proofs that a late writer can't write any more; empty: there is none, only waiting and checking."""
    detects: frozenset[str]
    """Failures of the other side that operations notice by themselves."""
    kinds: frozenset[str]
    """Kinds of local memory that operations take: `"cpu"`, `"cuda"`."""
    region_kinds: frozenset[str]
    """Kinds of memory that `register` takes for regions; empty where regions can only be created."""
    needs_exchange: bool
    """`connect` needs an `Exchange` with the region's owner."""
    max_region_bytes: int
    """Largest region, in bytes."""
    max_operation_bytes: int
    """Longest single operation, in bytes."""


class Batch:
    """Operations as columns: one-dimensional C-contiguous arrays of equal length n, kept as they are given.

    Making one checks nothing; transports check types, lengths and ranges natively each time it is posted. A batch may
    be posted any number of times, and its columns changed between posts, but not by two threads at once.

    Attributes:
        local: uint64 [n]; address in this process. The memory must stay valid until the call returns, and must not
            overlap the region's range. May be 0 where the length is 0, which is legal and does nothing.
        region: int32 [n]; handle from `connect`.
        offset: uint64 [n]; bytes from the start of the region.
        length: uint64 [n]; bytes.
        group: int32 [n] or None; digest group of each operation, or -1. Non-decreasing apart from -1. The operations
            of a group are hashed in order as one stream.
        digest: uint64 [groups] or None; out: the segment digest of each group's bytes as they were stored at the
            destination. The digest of the empty stream for a group without operations, 0 for one that was not
            finished before the deadline.
        status: uint8 [n]; out: one of the statuses above.
        error: out: why an operation of the admitted batch is not `DONE`, if one is not; the first that was noticed.
        kind: Kind of the local memory, `"cpu"` or `"cuda"`; one for the whole batch.
    """

    __slots__ = ("digest", "error", "group", "kind", "length", "local", "offset", "region", "status")

    def __init__(
        self,
        local: UInt64Column,
        region: Int32Column,
        offset: UInt64Column,
        length: UInt64Column,
        group: Int32Column | None = None,
        digest: UInt64Column | None = None,
        status: UInt8Column | None = None,
        kind: str = "cpu",
    ) -> None:
        self.local = local
        self.region = region
        self.offset = offset
        self.length = length
        self.group = group
        self.digest = digest
        self.status: UInt8Column = np.empty(len(local), np.uint8) if status is None else status
        self.error: TransportError | None = None
        self.kind = kind

    def __len__(self) -> int:
        return len(self.local)


class Region(abc.ABC):
    """One registered range of a memory node, as its owner sees it. Closing is idempotent and thread-safe.

    Attributes:
        region_id: The node's number for it.
        size_bytes: Its length.
        buffer: uint8 [size_bytes], writable: the node's own view. Valid as long as somebody refers to it.
        descriptor: What a client needs to connect, exported; opaque bytes, at most `MAX_DESCRIPTOR_BYTES`.
    """

    region_id: int
    size_bytes: int
    buffer: UInt8Column
    descriptor: bytes

    @abc.abstractmethod
    def close(self, unlink: bool = True) -> None:
        """Gives the region up.

        Where the transport has the fence `"region"`, nobody can write or read it from the moment this returns;
        operations of clients end as `DENIED` or `PEER_LOST`. Otherwise clients that are connected keep what they have
        until they disconnect.

        Args:
            unlink: Also withdraw it, so that nobody can connect any more.
        """

    def __enter__(self: _SomeRegion) -> _SomeRegion:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Pending(abc.ABC):
    """A batch that was posted. It must be brought to an end by `wait` or `abandon`, by one thread at a time."""

    @abc.abstractmethod
    def poll(self) -> bool:
        """Makes what progress can be made without blocking; whether every operation is terminal.

        When True, the status and digest columns are final and the local memory is the caller's again.
        """

    @abc.abstractmethod
    def wait(self) -> int:
        """Blocks, without the interpreter lock, until every operation is terminal, which is by the batch's deadline.

        Returns:
            The number of operations done. Where it is less than the batch's length, `Batch.error` says why and the
            status column which.
        """

    @abc.abstractmethod
    def abandon(self) -> int:
        """Ends the batch now, tearing down connections where that is what it takes. Idempotent.

        When it has returned, nothing touches the local memory; operations that were begun have the outcome unknown.

        Returns:
            The number of operations that were done nevertheless.
        """


class Finished(Pending):
    """What transports return that do all of the work in the posting call."""

    __slots__ = ("_done",)

    def __init__(self, done: int) -> None:
        self._done = done

    def poll(self) -> bool:
        return True

    def wait(self) -> int:
        return self._done

    def abandon(self) -> int:
        return self._done


class Transport(abc.ABC):
    """One way to move bytes. Thread-safe; `close` and leaving the context disconnect everything.

    One object may serve as owner of regions (`register`, `create_region`, `accept`, `fence`), as client (`connect` and
    what follows), or as both.

    Attributes:
        identity: 16 bytes drawn for this object; how owners know which client to `fence`.
    """

    def __init__(self) -> None:
        self.identity: bytes = os.urandom(IDENTITY_BYTES)

    @property
    @abc.abstractmethod
    def capabilities(self) -> Capabilities:
        """What works here."""

    # Owner's side

    def register(self, memory: UInt8Column, region_id: int) -> Region:
        """Lends memory that exists already. The caller keeps it alive and mapped until the region is closed.

        Part of another region may be registered again: closing that registration is then a fence for those alone who
        were given its descriptor.

        Args:
            memory: uint8 [size_bytes], C-contiguous, writable. (GPU memory: see `transport.gpu`.)
            region_id: 0 to 2^64 - 1.

        Raises:
            UnsupportedError: The transport lends only memory that it makes; not applied.
            OutOfMemoryError: The memory can't be registered (locked-memory limit, device limit); not applied.
            ValueError: A bad argument; not applied.
        """
        raise UnsupportedError(f"transport {self.capabilities.name} lends only memory that it makes itself")

    @abc.abstractmethod
    def create_region(
        self,
        name: str,
        region_id: int,
        size_bytes: int,
        *,
        mode: int = 0o600,
        progress: Callable[[int], None] | None = None,
    ) -> Region:
        """Makes and registers fully backed, zeroed memory. Blocks for as long as the system takes to provide it.

        Args:
            name: 1 to 64 of `A-Z a-z 0-9 . _ -`, no leading dot; the same for all regions of a node.
            region_id: 0 to 2^64 - 1, unique under the name.
            size_bytes: At least 1.
            mode: Permission bits of who may connect, where the transport has such.
            progress: Called with the number of bytes backed so far, from time to time and at the end; what it raises
                ends the creation and is passed on. So is KeyboardInterrupt. Nothing is left behind then.

        Raises:
            OutOfMemoryError: Not enough memory; not applied.
            RegionExistsError: A live owner has this name and id; not applied.
            ValueError: A bad argument; not applied.
        """

    def sweep(self) -> list[str]:
        """Removes what this user's dead owners left behind. Returns the names of what was removed."""
        return []

    def accept(self, hello: bytes, identity: bytes) -> bytes:
        """Answers a client's hello that came through an `Exchange`; returns the welcome.

        Args:
            hello: What the client's `connect` gave out. Anything may be in it.
            identity: The client's `identity`, as the channel knows it.

        Raises:
            UnsupportedError: This transport needs no exchange.
            DescriptorError: The hello is malformed, of another version, or for another life of this owner.
        """
        raise UnsupportedError(f"transport {self.capabilities.name} needs no exchange")

    def fence(self, identity: bytes) -> bool:
        """Makes it impossible for one client to write any more with the connections that it has; others go on.

        When it has returned, no byte of any region changes through what that client posted before. The client may
        connect again.

        Returns:
            Whether the client was connected.

        Raises:
            UnsupportedError: The transport has no fence `"client"`.
        """
        raise UnsupportedError(f"transport {self.capabilities.name} can't fence a client")

    # Client's side

    @abc.abstractmethod
    def connect(
        self, descriptor: bytes, *, writable: bool, exchange: Exchange | None = None, deadline_ns: int = 0
    ) -> int:
        """Makes a region reachable.

        Args:
            descriptor: From `Region.descriptor`. Anything may be in it.
            writable: Also for writing.
            exchange: For transports whose capabilities say `needs_exchange`. Kept, to connect anew after a loss.
            deadline_ns: Instant on CLOCK_MONOTONIC; 0: the transport's own limit (seconds).

        Returns:
            Its handle: a small integer from 0, used again only after `disconnect`.

        Raises:
            DescriptorError: The bytes are no descriptor of this transport.
            UnreachableError: It can't be reached from here; the message says why.
            NotWritableError: It may only be read.
        """

    @abc.abstractmethod
    def disconnect(self, handle: int) -> None:
        """Ends a connection: later use of the handle is refused. Batches under way that use it end as they would have;
        this may wait for them.

        Views from `mapped` stay valid for as long as somebody refers to them.

        Raises:
            NotConnectedError: No such handle.
        """

    @abc.abstractmethod
    def size_of(self, handle: int) -> int:
        """Bytes of the region behind a handle; 0 where it isn't connected."""

    def mapped(self, handle: int) -> UInt8Column:
        """A read-only uint8 view [size_bytes] of the region itself. Its bytes change under the reader's eyes.

        Raises:
            NotConnectedError: No such handle.
            UnsupportedError: The transport has no `zero_copy`.
        """
        raise UnsupportedError(f"transport {self.capabilities.name} can't map a region")

    def prepare(self, address: int, length: int) -> None:  # noqa: B027  # advice that most need not take
        """Advice: operations from or to this local memory will follow; it stays valid until `forget` or `close`.

        Transports that register local memory do it now rather than with each batch. Best effort: where it fails,
        batches are staged through memory of the transport's own.
        """

    def forget(self, address: int, length: int) -> None:  # noqa: B027  # as `prepare`
        """Ends what `prepare` began; batches under way keep what they use of it. Unknown ranges are ignored."""

    @abc.abstractmethod
    def post_read(self, batch: Batch, deadline_ns: int = 0, threads: int = 0) -> Pending:
        """Begins to copy from regions to local memory.

        A transport may do part or all of the work before it returns.

        Args:
            batch: The operations; its status, digest and error are filled in the end. Not to be changed until then.
            deadline_ns: Instant on CLOCK_MONOTONIC (`time.monotonic_ns`) by which the batch ends, done or not. Where
                the calling thread copies (shm), no operation is begun after it, and it is looked at every 256 KiB or
                so, never inside an operation. 0: the transport's own limit, if it needs one.
            threads: 1: the operations are performed in order. 0: as many threads or connections as pay. Otherwise 1 to
                64. Digests and bytes are the same whatever it is.

        Raises:
            BoundsError, NotConnectedError: The batch was refused, nothing applied; the status column says which
                operations are at fault.
            UnsupportedError: The local memory is of a kind that this transport doesn't take; not applied.
            ValueError, TypeError, BufferError: A column is malformed; nothing applied.
        """

    @abc.abstractmethod
    def post_write(self, batch: Batch, deadline_ns: int = 0, threads: int = 0) -> Pending:
        """Begins to copy from local memory to regions; otherwise as `post_read`.

        An operation that is done is visible to whoever reads the region from then on. Where the capabilities say
        `ordered`, batches that are posted with `threads=1` by one thread, to the same regions, are performed in the
        order of their posting. Without `inline_digest` the digests are there when this returns, whatever becomes of
        the operations.

        Raises:
            NotWritableError: A region of the batch was connected for reading; refused, nothing applied.
        """

    def read(self, batch: Batch, deadline_ns: int = 0, threads: int = 0) -> int:
        """`post_read` and `wait`."""
        return self.post_read(batch, deadline_ns, threads).wait()

    def write(self, batch: Batch, deadline_ns: int = 0, threads: int = 0) -> int:
        """`post_write` and `wait`."""
        return self.post_write(batch, deadline_ns, threads).wait()

    def flush(self, deadline_ns: int = 0) -> bool:
        """Waits until every batch that was posted before is terminal; False when the deadline came first."""
        return True

    def info(self) -> dict[str, str]:
        """What it is made of, for logs and people: libraries, versions, devices."""
        return {}

    def stats(self) -> dict[str, int | str]:
        """Counters and facts for people, such as `reconnects`, `connections`, `staged_bytes`."""
        return {}

    @abc.abstractmethod
    def close(self) -> None:
        """Disconnects everything; idempotent. Regions that were created stay, they have their own `close`."""

    def __enter__(self: _SomeTransport) -> _SomeTransport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_lent(memory: UInt8Column, region_id: int) -> None:
    """Refuses what `register` cannot lend.

    Raises:
        ValueError: A bad argument.
    """
    if not 0 <= region_id < 1 << 64:
        raise ValueError(f"region_id {region_id} must be from 0 to 2^64 - 1")
    if memory.dtype != np.uint8 or memory.ndim != 1 or not memory.flags.c_contiguous or not memory.flags.writeable:
        raise ValueError("memory must be a writable one-dimensional contiguous array of uint8")
    if not memory.size:
        raise ValueError("memory must have at least 1 byte")


def private_memory(
    name: str, region_id: int, size_bytes: int, most_bytes: int, progress: Callable[[int], None] | None = None
) -> UInt8Column:
    """Fully backed, zeroed memory of this process alone, for transports that lend any memory; see `create_region`.

    Raises:
        ValueError: A bad argument. OutOfMemoryError: Not enough memory.
    """
    if not NAME.fullmatch(name):
        raise ValueError(f"region name {name!r} must be 1 to 64 of A-Z a-z 0-9 . _ - without a leading dot")
    if not 0 <= region_id < 1 << 64:
        raise ValueError(f"region_id {region_id} must be from 0 to 2^64 - 1")
    if not 1 <= size_bytes <= most_bytes:
        raise ValueError(f"size_bytes {size_bytes} must be from 1 to {most_bytes}")
    room = available_memory()
    if room is not None and room.free_bytes < size_bytes:
        raise OutOfMemoryError(
            f"a region of {size_bytes} bytes was asked for, but {room.source} allows only {room.free_bytes}; "
            f"{room.advice}"
        )
    memory: UInt8Column = np.frombuffer(mmap.mmap(-1, size_bytes), np.uint8)
    for start in range(0, size_bytes, _STEP_BYTES):
        memory[start : start + _STEP_BYTES] = 0  # the system gives it on first touch
        if progress is not None:
            progress(min(size_bytes, start + _STEP_BYTES))
    return memory


def refusal(verb: str, batch: Batch, status: int, size_of: Callable[[int], int]) -> TransportError:
    """The error for a batch that was refused, with the first operation at fault.

    Args:
        verb: What was tried. size_of: Bytes of a handle's region; 0 where it is not connected.
    """
    at = int((batch.status == status).argmax())
    handle = int(batch.region[at])
    which = f"{verb} refused, nothing was copied: operation {at} of {len(batch)}"
    if status == REGION_GONE:
        return NotConnectedError(f"{which} names handle {handle}, which is not connected")
    if status == NOT_WRITABLE:
        return NotWritableError(f"{which} names handle {handle}, which was connected for reading")
    return BoundsError(
        f"{which} has local address {int(batch.local[at]):#x}, offset {int(batch.offset[at])}, length "
        f"{int(batch.length[at])} in handle {handle} of {size_of(handle) or 'unknown'} bytes"
    )
