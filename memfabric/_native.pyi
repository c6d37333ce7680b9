"""Native parts of memfabric. All arrays are C-contiguous; what is not in the shape or dtype named is refused."""

from typing import Any

import numpy as np
import numpy.typing as npt

_U8 = npt.NDArray[np.uint8]
_U32 = npt.NDArray[np.uint32]
_U64 = npt.NDArray[np.uint64]
_I32 = npt.NDArray[np.int32]
_I64 = npt.NDArray[np.int64]

# --- blocks.cpp: operation plans and block headers -------------------------------------------------------------

def digest(buffer: Any) -> int:
    """The 64-bit segment digest of a contiguous buffer."""

def buffer_info(buffer: Any) -> tuple[int, int, int, bool, bool, bool]:
    """(address, bytes, item size, writable, C-contiguous, holds Python objects) of anything with the buffer protocol.

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
    """Expand blocks × fragments to operation columns; neighbours that go on on both sides become one operation.

    Args:
        fragments: ``[F, 6]`` base address, stride per block id, bytes, segment, and the extent ``[low, high)`` that
            base + id × stride … + bytes must stay in; ordered by segment, then by place within the segment.
        regions: ``[R, 3]`` handle (-1: not mapped), data offset, block count, by region slot.
        slot, block: where each of the ``n`` blocks is.
        block_base: added to every address of a block; None for 0.
        block_id: which block of the tensors; None for 0, 1, 2, ….
        first_segment, segment_count: the segments that `fragments` covers.
        groups: give each (block, segment) its own digest group; without, all operations have group -1.
        merge_bytes: no operation grows beyond this by merging.
        header_local, header_stride, header_bytes: where the header operations, which come last with group -1, put
            ``header_bytes`` each; 0 bytes for none.
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
        ``payload_bytes`` and ``tokens`` u32, ``valid`` bool. Not valid: the check value, version, state or segment count
        is wrong; the other columns are zero there. A header of zeros is valid and empty.

    Raises:
        ValueError: the table is shorter than count × stride, or the stride cannot be one.
    """
