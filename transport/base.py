"""The surface every transport offers: regions, connections, batches of one-sided reads and writes.

A transport moves bytes between this process's memory and regions that memory nodes lend. It knows nothing of blocks,
keys, leases or servers. A node creates regions and hands out their descriptors; a client connects to a descriptor, gets
a handle, and names it in batches.

Invariants:
- A batch is checked whole before a byte moves: it is refused entirely, or every operation in it is admitted.
- Every operation of an admitted batch ends with a definite status; the buffers belong to the call until it returns.
- A digest is of the very bytes that were stored at the destination of the copy, not of a second look at the source.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

UInt64Column: TypeAlias = npt.NDArray[np.uint64]
Int32Column: TypeAlias = npt.NDArray[np.int32]
UInt8Column: TypeAlias = npt.NDArray[np.uint8]

_SomeRegion = TypeVar("_SomeRegion", bound="Region")
_SomeTransport = TypeVar("_SomeTransport", bound="Transport")

DONE = 0
"""Status: the operation was performed."""
NOT_DONE = 1
"""Status: not begun, because the deadline had passed or because another operation got the batch refused."""
OUT_OF_BOUNDS = 2
"""Status: refused; the range lies outside the region, or the local address is null or wraps."""
REGION_GONE = 3
"""Status: refused; the handle isn't connected."""
NOT_WRITABLE = 4
"""Status: refused; a write to a region that was connected for reading."""


class TransportError(Exception):
    """Something a transport was asked for did not happen. Unless a subclass says otherwise, nothing was applied."""


class PeerLostError(TransportError):
    """The other side vanished during the operation; whether it was applied is unknown."""


class UnreachableError(TransportError):
    """The region named by a descriptor can't be reached from here: another host, already gone, or not permitted."""


class DescriptorError(UnreachableError, ValueError):
    """A descriptor is malformed, or names something that no region of this transport can be."""


class NotConnectedError(TransportError):
    """A handle is used that this side never connected or has disconnected."""


class BoundsError(TransportError):
    """An operation's range lies outside its region, or its local address is null; the whole batch was refused."""


class NotWritableError(TransportError):
    """A write to a region that was connected, or can only be opened, for reading."""


class OutOfMemoryError(TransportError):
    """A region can't be backed with memory; nothing of it is left behind."""


class RegionExistsError(TransportError):
    """A live owner holds a region of the same name."""


@dataclass(frozen=True)
class Capabilities:
    """What a transport can do, so that callers choose before they post and nothing is emulated silently."""

    name: str
    """The transport's name as it stands in descriptors."""
    one_sided: bool
    """The node's processor takes no part in reads and writes."""
    inline_digest: bool
    """Batches fill their digest column. Where False, use `transport.digest_batch` on what arrived."""
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
    max_region_bytes: int
    """Largest region, in bytes."""


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
        status: uint8 [n]; out: `DONE`, `NOT_DONE`, `OUT_OF_BOUNDS`, `REGION_GONE`, `NOT_WRITABLE`.
    """

    __slots__ = ("digest", "group", "length", "local", "offset", "region", "status")

    def __init__(
        self,
        local: UInt64Column,
        region: Int32Column,
        offset: UInt64Column,
        length: UInt64Column,
        group: Int32Column | None = None,
        digest: UInt64Column | None = None,
        status: UInt8Column | None = None,
    ) -> None:
        self.local = local
        self.region = region
        self.offset = offset
        self.length = length
        self.group = group
        self.digest = digest
        self.status: UInt8Column = np.empty(len(local), np.uint8) if status is None else status

    def __len__(self) -> int:
        return len(self.local)


class Region(abc.ABC):
    """One registered range of a memory node, as its owner sees it. Closing is idempotent and thread-safe.

    Attributes:
        region_id: The node's number for it.
        size_bytes: Its length.
        buffer: uint8 [size_bytes], writable: the node's own view. Valid as long as somebody refers to it.
        descriptor: What a client needs to connect; opaque bytes.
    """

    region_id: int
    size_bytes: int
    buffer: UInt8Column
    descriptor: bytes

    @abc.abstractmethod
    def close(self, unlink: bool = True) -> None:
        """Gives the region up.

        Args:
            unlink: Also withdraw it, so that nobody can connect any more. Clients that are connected keep what they
                have until they disconnect.
        """

    def __enter__(self: _SomeRegion) -> _SomeRegion:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Transport(abc.ABC):
    """One way to move bytes. Thread-safe; `close` and leaving the context disconnect everything."""

    @property
    @abc.abstractmethod
    def capabilities(self) -> Capabilities:
        """What works here."""

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
        """Registers fully backed, zeroed memory (node side). Blocks for as long as the system takes to provide it.

        Args:
            name: 1 to 64 of `A-Z a-z 0-9 . _ -`, no leading dot; the same for all regions of a node.
            region_id: 0 to 2^64 - 1, unique under the name.
            size_bytes: At least 1.
            mode: Permission bits of who may connect.
            progress: Called with the number of bytes backed so far, from time to time and at the end; what it raises
                ends the creation and is passed on. So is KeyboardInterrupt. Nothing is left behind then.

        Raises:
            OutOfMemoryError: Not enough memory; not applied.
            RegionExistsError: A live owner has this name and id; not applied.
            ValueError: A bad argument; not applied.
        """

    @abc.abstractmethod
    def sweep(self) -> list[str]:
        """Removes what this user's dead owners left behind. Returns the names of what was removed."""

    @abc.abstractmethod
    def connect(self, descriptor: bytes, *, writable: bool) -> int:
        """Makes a region reachable (client side).

        Returns:
            Its handle: a small integer from 0, used again only after `disconnect`.

        Raises:
            DescriptorError: The bytes are no descriptor of this transport.
            UnreachableError: It can't be reached from here; the message says why.
            NotWritableError: It may only be read.
        """

    @abc.abstractmethod
    def disconnect(self, handle: int) -> None:
        """Ends a connection: waits for the batches that use it; later use of the handle is refused.

        Views from `mapped` stay valid for as long as somebody refers to them.

        Raises:
            NotConnectedError: No such handle.
        """

    @abc.abstractmethod
    def mapped(self, handle: int) -> UInt8Column:
        """A read-only uint8 view [size_bytes] of the region itself. Its bytes change under the reader's eyes.

        Raises:
            NotConnectedError: No such handle.
            TransportError: The transport has no `zero_copy`.
        """

    @abc.abstractmethod
    def read(self, batch: Batch, deadline_ns: int = 0, threads: int = 0) -> int:
        """Copies from regions to local memory; blocks, without the interpreter lock.

        Args:
            batch: The operations; its status and digest columns are filled.
            deadline_ns: Instant on CLOCK_MONOTONIC (`time.monotonic_ns`) after which no further operation is begun;
                looked at before the first operation and then about every 256 KiB, never inside an operation. 0: none.
            threads: 1: the calling thread only, in order. 0: as many as pay, up to 4. Otherwise 1 to 64. Digests and
                bytes are the same whatever it is.

        Returns:
            The number of operations done; less than `len(batch)` only when the deadline passed.

        Raises:
            BoundsError, NotConnectedError: The batch was refused, nothing applied; the status column says which
                operations are at fault.
            ValueError, TypeError, BufferError: A column is malformed; nothing applied.
        """

    @abc.abstractmethod
    def write(self, batch: Batch, deadline_ns: int = 0, threads: int = 0) -> int:
        """Copies from local memory to regions; otherwise as `read`.

        Raises:
            NotWritableError: A region of the batch was connected for reading; refused, nothing applied.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Disconnects everything; idempotent. Regions that were created stay, they have their own `close`."""

    def __enter__(self: _SomeTransport) -> _SomeTransport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
