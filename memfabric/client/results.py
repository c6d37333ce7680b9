"""What calls report per block.

Every result has one status per key of the call, in its order, so that partial success is visible. Responsible
for the statuses and their summaries only.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from memfabric.errors import CorruptBlockError, MemfabricError, RefusalCode, RefusedError, UnavailableError

StatusColumn = npt.NDArray[np.uint8]


class MissingBlockError(MemfabricError, LookupError):
    """A block that was asked for is not in the pool. Nothing happened."""


class GetStatus(enum.IntEnum):
    """Per key of a get. Only for `OK` does the output hold the block; elsewhere its bytes are undefined."""

    MISSING = 0
    OK = 1
    CORRUPT = 2
    """Under a valid lease the bytes did not verify, twice. The server was told and no longer serves the
    block."""
    UNREACHABLE = 3
    """The block is there, but this process cannot reach the memory that holds it (another host, or the node
    died)."""
    EXPIRED = 4
    """The lease ended before the bytes had landed, several times over: this process is too slow for its
    leases."""


class PutStatus(enum.IntEnum):
    """Per key of a put."""

    STORED = 0
    EXISTS = 1
    """It is there already; equal keys mean equal bytes, so nothing was written."""
    PENDING = 2
    """Another client is writing it right now; with ``wait=True`` its end is awaited."""
    NO_SPACE = 3
    """Nothing free and nothing evictable; the result's message says what holds the space."""
    QUOTA = 4
    """The namespace is at its quota."""
    LOST = 5
    """Reserved and perhaps written, but not committed: the node died, or the lease ended first. Nobody can
    read it."""
    UNREACHABLE = 6
    """The pool placed the block where this process cannot write; the reservation was given back."""


class RemoveStatus(enum.IntEnum):
    """Per key of a remove."""

    REMOVED = 0
    MISSING = 1
    BUSY = 2
    """Under a lease: it cannot be found any more, and its space is freed when the lease ends."""


def _prefix(mask: npt.NDArray[np.bool_]) -> int:
    return len(mask) if mask.all() else int(np.argmin(mask))


def _summary(status: StatusColumn, kinds: type[enum.IntEnum]) -> str:
    counts = [(kind.name, int((status == kind).sum())) for kind in kinds]
    return ", ".join(f"{count} {name}" for name, count in counts if count) or "no blocks"


@dataclasses.dataclass(slots=True, repr=False, eq=False)  # not frozen: that doubles the time to make one
class GetResult:
    """What a get found.

    Attributes:
        status: uint8 ``[n]`` of `GetStatus`.
        out: what was passed as ``out``, or a fresh uint8 array ``[n, block_bytes]``. Rows that are not OK are
            undefined.
        bytes_read: payload bytes of the blocks that are OK.
        optimistic_count: blocks that were read without asking the server.
        message: why blocks are unreachable or corrupt; empty otherwise.
    """

    status: StatusColumn
    out: Any
    bytes_read: int
    optimistic_count: int
    message: str = ""

    @property
    def ok(self) -> bool:
        """Every block was read (true for an empty batch)."""
        return bool((self.status == GetStatus.OK).all())

    @property
    def found_count(self) -> int:
        """Blocks that were read."""
        return int((self.status == GetStatus.OK).sum())

    @property
    def prefix_count(self) -> int:
        """Leading blocks that were read: what an engine can use of a prompt."""
        return _prefix(self.status == GetStatus.OK)

    def raise_for_status(self) -> None:
        """Raise unless every block was read.

        Raises:
            CorruptBlockError, UnavailableError, RefusedError, MissingBlockError: in this order of precedence;
                names the first such position.
        """
        causes: list[tuple[GetStatus, Callable[[str], MemfabricError]]] = [
            (GetStatus.CORRUPT, CorruptBlockError),
            (GetStatus.UNREACHABLE, UnavailableError),
            (GetStatus.EXPIRED, lambda text: RefusedError(RefusalCode.LEASE_EXPIRED, text, retry_after_s=0.0)),
            (GetStatus.MISSING, MissingBlockError),
        ]
        for kind, make in causes:
            hit = np.nonzero(self.status == kind)[0]
            if len(hit):
                why = f": {self.message}" if self.message and kind is not GetStatus.MISSING else ""
                raise make(f"{len(hit)} of {len(self.status)} blocks {kind.name}, the first at position {hit[0]}{why}")

    def __repr__(self) -> str:
        return f"GetResult({_summary(self.status, GetStatus)}; {self.bytes_read} bytes)"


@dataclasses.dataclass(frozen=True, slots=True, repr=False, eq=False)
class PutResult:
    """What a put did.

    Attributes:
        status: uint8 ``[n]`` of `PutStatus`.
        bytes_written: payload bytes of the blocks that were stored by this call.
        message: the server's or the transport's reason where blocks were not stored; empty otherwise.
        retry_after_s: when a retry makes sense for blocks without space; None when the server gave no hope.
    """

    status: StatusColumn
    bytes_written: int
    message: str = ""
    retry_after_s: float | None = None

    @property
    def ok(self) -> bool:
        """Every block is in the pool now: stored by this call or there before."""
        return bool((self.status <= PutStatus.EXISTS).all())

    @property
    def stored_count(self) -> int:
        """Blocks that this call stored."""
        return int((self.status == PutStatus.STORED).sum())

    def raise_for_status(self) -> None:
        """Raise unless every block is in the pool.

        Raises:
            RefusedError: `no_space`, `quota`, `overloaded` (another writer is at it) or `lease_expired`
                (lost).
            UnavailableError: the place of a block cannot be reached from here.
        """
        codes = {
            PutStatus.UNREACHABLE: "",
            PutStatus.LOST: RefusalCode.LEASE_EXPIRED,
            PutStatus.QUOTA: RefusalCode.QUOTA,
            PutStatus.NO_SPACE: RefusalCode.NO_SPACE,
            PutStatus.PENDING: RefusalCode.OVERLOADED,
        }
        for kind, code in codes.items():
            hit = np.nonzero(self.status == kind)[0]
            if not len(hit):
                continue
            why = f": {self.message}" if self.message else ""
            text = f"{len(hit)} of {len(self.status)} blocks {kind.name}, the first at position {hit[0]}{why}"
            if not code:
                raise UnavailableError(text)
            raise RefusedError(code, text, retry_after_s=self.retry_after_s)

    def __repr__(self) -> str:
        why = f"; {self.message}" if self.message else ""
        return f"PutResult({_summary(self.status, PutStatus)}; {self.bytes_written} bytes{why})"


@dataclasses.dataclass(frozen=True, slots=True, repr=False, eq=False)
class RemoveResult:
    """What a remove did. `status`: uint8 ``[n]`` of `RemoveStatus`."""

    status: StatusColumn

    @property
    def removed_count(self) -> int:
        """Blocks that were there and cannot be found any more (REMOVED or BUSY)."""
        return int((self.status != RemoveStatus.MISSING).sum())

    def __repr__(self) -> str:
        return f"RemoveResult({_summary(self.status, RemoveStatus)})"


@dataclasses.dataclass(frozen=True, slots=True, repr=False, eq=False)
class PinResult:
    """What a pin or unpin did. `found`: bool ``[n]``: the block is there, and pinned or not as asked."""

    found: npt.NDArray[np.bool_]

    @property
    def found_count(self) -> int:
        """Blocks that are there."""
        return int(self.found.sum())

    def __repr__(self) -> str:
        return f"PinResult({self.found_count} of {len(self.found)} found)"


@dataclasses.dataclass(frozen=True, slots=True, repr=False, eq=False)
class PrefetchResult:
    """What a prefetch learned. `found`: bool ``[n]``: the next get of this block needs no request."""

    found: npt.NDArray[np.bool_]

    @property
    def found_count(self) -> int:
        """Blocks whose place is known now."""
        return int(self.found.sum())

    @property
    def prefix_count(self) -> int:
        """Leading blocks whose place is known now."""
        return _prefix(self.found)

    def __repr__(self) -> str:
        return f"PrefetchResult({self.found_count} of {len(self.found)} known)"
