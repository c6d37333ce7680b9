"""Native parts of memfabric. All arrays are C-contiguous; what is not in the shape or dtype named is
refused."""

from typing import Any

import numpy as np
import numpy.typing as npt

_U8 = npt.NDArray[np.uint8]
_U32 = npt.NDArray[np.uint32]
_U64 = npt.NDArray[np.uint64]
_I32 = npt.NDArray[np.int32]
_I64 = npt.NDArray[np.int64]

# --- blocks.cpp: operation plans and block headers
# -------------------------------------------------------------

def digest(buffer: Any) -> int:
    """The 64-bit segment digest of a contiguous buffer."""

def buffer_info(buffer: Any) -> tuple[int, int, int, bool, bool, bool]:
    """(address, bytes, item size, writable, C-contiguous, holds Python objects) of anything with the buffer
    protocol.

    Raises:
        TypeError, BufferError, ValueError: the object has no buffer protocol, or its type cannot be exported.
    """

def first_positions(keys: _U8) -> _I32:
    """For each of ``keys [n, 16]`` the position of the first key that equals it."""

def plan(
    fragments: _I64,
    regions: _I64,
    slot: _I32,
    block: _U32,
    block_base: _U64 | None,
    block_id: _I64 | None,
    block_bytes: int,
    segment_bytes: int,
    first_segment: int,
    segment_count: int,
    groups: bool,
    merge_bytes: int,
    header_local: int,
    header_stride: int,
    header_bytes: int,
    local: _U64,
    region: _I32,
    offset: _U64,
    length: _U64,
    group: _I32,
) -> int:
    """Expand blocks × fragments to operation columns; neighbours that go on on both sides become one
    operation.

    Args:
        fragments: ``[F, 6]`` base address, stride per block id, bytes, segment, and the extent ``[low,
            high)`` that base + id × stride … + bytes must stay in; ordered by segment, then by place within
            the segment.
        regions: ``[R, 3]`` handle (-1: not mapped), data offset, block count, by region slot.
        slot, block: where each of the ``n`` blocks is.
        block_base: added to every address of a block; None for 0.
        block_id: which block of the tensors; None for 0, 1, 2, ….
        first_segment, segment_count: the segments that `fragments` covers.
        groups: give each (block, segment) its own digest group; without, all operations have group -1.
        merge_bytes: no operation grows beyond this by merging.
        header_local, header_stride, header_bytes: where the header operations, which come last with group -1,
            put ``header_bytes`` each; 0 bytes for none.
        local, region, offset, length, group: out; at least n × F (+ n with headers) long.

    Returns:
        The number of operations.

    Raises:
        IndexError: an address outside its extent, a region not known or mapped, a block outside its region.
        ValueError: columns that do not fit together.
    """

def pack_headers(
    out: _U8,
    stride: int,
    segments: int,
    keys: _U8,
    parents: _U8,
    generation: _U64,
    tokens: _U32,
    payload_bytes: int,
    state: int,
    digests: _U64 | None = None,
) -> None:
    """Write n block headers with their check values to ``out``, `stride` bytes apart.

    Raises:
        ValueError: columns differ in length or `out` is too small.
    """

def check_headers(
    headers: _U8,
    stride: int,
    segments: int,
    payload_bytes: int,
    keys: _U8,
    generation: _U64,
    first_segment: int,
    segment_count: int,
    digests: _U64 | None,
    status: _U8,
) -> int:
    """Hold headers (any bytes) against what is expected; status is a `client.verify.HeaderCheck` per block.

    Args:
        digests: ``n × segment_count`` digests of what was read, or None to leave the payload unchecked.

    Returns:
        How many are good.
    """

def parse_headers(table: Any, stride: int, count: int) -> dict[str, npt.NDArray[Any]]:
    """Read a header table of any bytes.

    Returns:
        ``state`` u8, ``segments`` u16, ``generation`` u64, ``keys`` and ``parents`` u8 ``[count, 16]``,
        ``payload_bytes`` and ``tokens`` u32, ``valid`` bool. Not valid: the check value, version, state or
        segment count is wrong; the other columns are zero there. A header of zeros is valid and empty.

    Raises:
        ValueError: the table is shorter than count × stride, or the stride cannot be one.
    """

# --- places.cpp: places known from before
# ------------------------------------------------------------------------

class PlaceTable:
    """A bounded map from key to (region slot, block, generation), oldest overwritten first. Thread-safe.

    It also collects up to `touched_limit` keys of reads that the server has not heard of.
    """

    def __init__(self, capacity: int, touched_limit: int) -> None: ...
    def __len__(self) -> int: ...
    def find(self, keys: _U8) -> tuple[int, npt.NDArray[np.bool_], _I32, _U32, _U64]:
        """(how many are known, known, slot, block, generation); slot is -1 where the key is not known."""
    def learn(self, keys: _U8, slot: _I32, block: _U32, generation: _U64) -> None:
        """Enter or update; of a key that is there twice, the last counts."""
    def forget(self, keys: _U8) -> None:
        """Drop keys; unknown ones are ignored."""
    def forget_regions(self, slots: _I32) -> None:
        """Drop all entries in these regions."""
    def touch(self, keys: _U8) -> None:
        """Note a use, unless the same keys were the last that were noted."""
    def take_touched(self, limit: int) -> bytes:
        """Up to `limit` noted keys, oldest first, once."""
    @property
    def quick_gets(self) -> int:
        """Reads that `QuickReader.check` found good."""
    @property
    def quick_blocks(self) -> int:
        """Blocks of those reads."""

class QuickReader:
    """Plans and checks reads of exactly `n` blocks of known places into contiguous memory; allocates nothing
    per read.

    It fills the operation columns of the caller's transport batches: n × segments payload operations with a
    digest group each (with `verify`) or n without, and then n header operations into `headers`. One thread at
    a time.
    """

    def __init__(
        self,
        table: PlaceTable,
        n: int,
        block_bytes: int,
        segments: int,
        header_stride: int,
        verify: bool,
        local: _U64,
        region: _I32,
        offset: _U64,
        length: _U64,
        group: _I32,
        headers: _U8,
        digests: _U64,
    ) -> None: ...
    def prepare(self, keys: _U8, out: Any, regions: _I64) -> bool:
        """Fill the columns; False when a place is not known or mapped, or `out` is not n writable contiguous
        blocks."""
    def check(self) -> bool:
        """Whether headers (and digests) are what the places promise, for all blocks; then the use is
        noted."""

# --- index.cpp: from keys to slots
# ------------------------------------------------------------------------------

class KeyIndex:
    """From 16-byte keys to int32 slots; the keys stay in the caller's column ``[capacity, 16]``. 8 bytes /
    load per key."""

    def __init__(self, capacity_hint: int = 0) -> None: ...
    def __len__(self) -> int: ...
    def memory_bytes(self) -> int:
        """Bytes of the hash table."""
    def find(self, keys: _U8, column: _U8) -> _I32:
        """Slot of each of ``keys [n, 16]``, -1 where there is none."""
    def insert(self, column: _U8, slots: _I32) -> None:
        """Enter slots under the keys that the column holds for them.

        Raises:
            ValueError: a key is there already (those before it in the batch were entered).
            IndexError: a slot is outside the column (nothing was entered).
        """
    def erase(self, column: _U8, slots: _I32) -> int:
        """Remove slots by the keys that the column still holds for them; returns how many were there."""
    def clear(self) -> None:
        """Forget everything."""

# --- recency.cpp: recency lists and eviction
# ---------------------------------------------------------------------

class Recency:
    """Intrusive lists over slots, most recently used first; a slot is in at most one. 12 bytes a slot."""

    def __init__(self) -> None: ...
    def resize(self, slots: int) -> None:
        """Grow to this many slots."""
    def add_list(self) -> int:
        """A new, empty list."""
    def count(self, list: int) -> int:
        """Slots in a list."""
    def oldest(self, list: int) -> int:
        """The least recently used slot; -1 if the list is empty."""
    def list_of(self, slots: _I32) -> _I32:
        """Which list each slot is in; -1 for none."""
    def touch(self, list: int, slots: _I32) -> None:
        """Move slots to the front of a list, the last one first: of a chain, the head ends up most recent."""
    def remove(self, slots: _I32) -> None:
        """Take slots out of whatever list they are in."""
    def order(self, list: int) -> _I32:
        """All slots of a list, least recently used first."""
    def evict(
        self,
        list: int,
        want: int,
        before_ns: int,
        last_use: _U64,
        pins: _U32,
        children: _I32,
        parent: _I32,
        parent_generation: _U64,
        generation: _U64,
    ) -> _I32:
        """Take up to `want` victims out of a list: unpinned, childless, last used before an instant, oldest
        first.

        Each victim's valid parent loses a child (in `children`) and may follow it in the same call; the
        victim's `parent` becomes -1.
        """

def pin(pins: _U32, slots: _I32) -> None:
    """``pins[slot] += 1`` for each, repeated slots each time."""

def unpin(pins: _U32, slots: _I32, pinned_generation: _U64, generation: _U64) -> _I32:
    """``pins[slot] -= 1`` where the slot still has the pinned generation; returns the slots that became
    unpinned."""

def count_children(children: _I32, parents: _I32, delta: int) -> None:
    """``children[parent] += delta`` for each parent that is not -1."""
