"""The region format: superblock, header table, blocks. Little-endian, versioned.

Pure. It owns sizes, offsets and the superblock; the header's bytes are packed and parsed by
`memfabric._native` (``headers.cpp``), which mirrors `HEADER_DTYPE`. A region describes itself: whoever
reads the superblock and the header table knows every block in it.

    superblock 4 KiB | header table: block_count × header_stride | pad to 4 KiB | blocks
"""

from __future__ import annotations

import dataclasses
import enum
import struct

import numpy as np

from memfabric import _native

LAYOUT_VERSION = 1
MAGIC = b"MEMFABR1"
SUPERBLOCK_BYTES = 4096
OS_PAGE_BYTES = 4096
HEADER_BASE_BYTES = 64
MAX_SEGMENTS = 4096
MAX_BLOCK_BYTES = 1 << 30
MAX_REGION_BLOCKS = 1 << 22
"""Blocks of one region: bounds what a server allocates at once for it (under 200 bytes a block)."""

_SUPERBLOCK = struct.Struct("<8sIIQQQQ16s64s64sIIIII")
"""magic, layout version, crc, region id, incarnation, epoch, namespace id, fingerprint digest, node name, namespace
name
(both UTF-8, zero-padded), block_bytes, block_count, segments_per_block, header_stride, state."""
_CRC_OFFSET = 12
_NAME_BYTES = 64


class BlockState(enum.IntEnum):
    """State of a block, in its header and in the server's table."""

    EMPTY = 0
    WRITING = 1
    COMPLETE = 2


class RegionState(enum.IntEnum):
    """What a superblock says of its region."""

    UNASSIGNED = 0
    ACTIVE = 1


HEADER_DTYPE = np.dtype(
    {
        "names": [
            "crc",
            "state",
            "version",
            "segments",
            "generation",
            "key",
            "parent",
            "payload_bytes",
            "token_count",
            "digest0",
        ],
        "formats": ["<u4", "u1", "u1", "<u2", "<u8", "V16", "V16", "<u4", "<u4", "<u8"],
        "offsets": [0, 4, 5, 6, 8, 16, 32, 48, 52, 56],
        "itemsize": HEADER_BASE_BYTES,
    }
)


class LayoutError(ValueError):
    """Bytes that are not a valid superblock, or sizes that cannot make a region."""


@dataclasses.dataclass(frozen=True, slots=True)
class RegionLayout:
    """Where things are in a region of `region_bytes`.

    Attributes:
        block_bytes: payload bytes of a block.
        block_count: blocks that fit.
        segments: independently readable parts of a block, each with its own digest.
        header_stride: bytes from one header to the next.
        data_offset: byte offset of block 0.
    """

    region_bytes: int
    block_bytes: int
    block_count: int
    segments: int
    header_stride: int
    data_offset: int

    @property
    def headers_bytes(self) -> int:
        """Bytes of the header table."""
        return self.block_count * self.header_stride

    def header_offset(self, block_index: int) -> int:
        """Byte offset of a block's header in the region."""
        return SUPERBLOCK_BYTES + block_index * self.header_stride

    def block_offset(self, block_index: int) -> int:
        """Byte offset of a block's payload in the region."""
        return self.data_offset + block_index * self.block_bytes


def header_stride(segments: int) -> int:
    """64 bytes plus 8 for each digest beyond the first, rounded up to 64."""
    return (HEADER_BASE_BYTES + 8 * (segments - 1) + 63) // 64 * 64


def plan_region(region_bytes: int, block_bytes: int, segments: int) -> RegionLayout:
    """Fit as many blocks as possible into a region.

    Raises:
        LayoutError: a size is out of range, not even one block fits, or more than `MAX_REGION_BLOCKS` would.
    """
    check_block_shape(block_bytes, segments)
    stride = header_stride(segments)
    count = max(0, (region_bytes - SUPERBLOCK_BYTES) // (block_bytes + stride))
    if count > MAX_REGION_BLOCKS:
        raise LayoutError(
            f"a region of {region_bytes} bytes would hold {count} blocks of {block_bytes} bytes, over the limit of "
            f"{MAX_REGION_BLOCKS}; use smaller regions (memfabric node --region) or larger blocks"
        )
    while count and _data_offset(count, stride) + count * block_bytes > region_bytes:
        count -= 1
    if count < 1:
        raise LayoutError(
            f"a region of {region_bytes} bytes holds no block of {block_bytes} bytes; "
            "use larger regions (memfabric node --region) or smaller blocks"
        )
    return RegionLayout(region_bytes, block_bytes, count, segments, stride, _data_offset(count, stride))


def check_block_shape(block_bytes: int, segments: int) -> None:
    """Refuse block sizes that no region can have.

    Raises:
        LayoutError: says which number is wrong and what it may be.
    """
    if not 1 <= block_bytes <= MAX_BLOCK_BYTES:
        raise LayoutError(f"block_bytes must be 1 to {MAX_BLOCK_BYTES}, got {block_bytes}")
    if not 1 <= segments <= MAX_SEGMENTS:
        raise LayoutError(f"segments must be 1 to {MAX_SEGMENTS}, got {segments}")
    if block_bytes % segments:
        raise LayoutError(f"block_bytes {block_bytes} is not a multiple of segments {segments}")


def _data_offset(count: int, stride: int) -> int:
    raw = SUPERBLOCK_BYTES + count * stride
    return (raw + OS_PAGE_BYTES - 1) // OS_PAGE_BYTES * OS_PAGE_BYTES


@dataclasses.dataclass(frozen=True, slots=True)
class Superblock:
    """The first 4 KiB of a region: whose it is and how it is cut.

    `node` is the node's name, `incarnation` that life of it, `epoch` the last metadata epoch that assigned the region,
    `namespace` empty while unassigned.
    """

    region_id: int
    node: str
    incarnation: int
    epoch: int
    state: RegionState = RegionState.UNASSIGNED
    namespace: str = ""
    namespace_id: int = 0
    fingerprint_digest: bytes = bytes(16)
    block_bytes: int = 0
    block_count: int = 0
    segments: int = 0
    header_stride: int = 0

    def pack(self) -> bytes:
        """4,096 bytes with their own check value.

        Raises:
            LayoutError: a name is too long.
        """
        names = {"namespace": self.namespace.encode(), "node": self.node.encode()}
        for what, name in names.items():
            if len(name) > _NAME_BYTES:
                raise LayoutError(f"{what} name {name.decode()!r} is longer than {_NAME_BYTES} bytes")
        body = bytearray(SUPERBLOCK_BYTES)
        _SUPERBLOCK.pack_into(
            body,
            0,
            MAGIC,
            LAYOUT_VERSION,
            0,
            self.region_id,
            self.incarnation,
            self.epoch,
            self.namespace_id,
            self.fingerprint_digest,
            names["node"],
            names["namespace"],
            self.block_bytes,
            self.block_count,
            self.segments,
            self.header_stride,
            self.state,
        )
        struct.pack_into("<I", body, _CRC_OFFSET, _superblock_crc(body))
        return bytes(body)

    @classmethod
    def parse(cls, raw: bytes, region_bytes: int) -> Superblock:
        """Read a superblock; every field is checked against the region's size.

        Raises:
            LayoutError: wrong magic, version, check value or sizes; says which.
        """
        if len(raw) < SUPERBLOCK_BYTES:
            raise LayoutError(f"superblock is {len(raw)} bytes, needs {SUPERBLOCK_BYTES}")
        raw = raw[:SUPERBLOCK_BYTES]
        fields = _SUPERBLOCK.unpack_from(raw, 0)
        magic, version, crc, region_id, incarnation, epoch, namespace_id, fingerprint = fields[:8]
        node, name, block_bytes, block_count, segments, stride, state = fields[8:]
        if magic != MAGIC:
            raise LayoutError(f"not a memfabric region: magic {magic!r}")
        if version != LAYOUT_VERSION:
            raise LayoutError(f"region layout version {version}; this program reads {LAYOUT_VERSION}")
        if crc != _superblock_crc(raw):
            raise LayoutError("superblock is damaged: its check value does not match")
        try:
            block = cls(
                region_id=region_id,
                node=node.rstrip(b"\0").decode(),
                incarnation=incarnation,
                epoch=epoch,
                state=RegionState(state),
                namespace=name.rstrip(b"\0").decode(),
                namespace_id=namespace_id,
                fingerprint_digest=fingerprint,
                block_bytes=block_bytes,
                block_count=block_count,
                segments=segments,
                header_stride=stride,
            )
        except ValueError as error:
            raise LayoutError(f"superblock holds a value that cannot be: {error}") from None
        if block.state is RegionState.ACTIVE:
            expected = plan_region(region_bytes, block_bytes, segments)
            if (expected.block_count, expected.header_stride) != (block_count, stride):
                raise LayoutError(
                    f"superblock says {block_count} blocks of stride {stride}; "
                    f"a region of {region_bytes} bytes has {expected.block_count} of {expected.header_stride}"
                )
        return block

    def layout(self, region_bytes: int) -> RegionLayout:
        """The layout of an active region."""
        return plan_region(region_bytes, self.block_bytes, self.segments)


def _superblock_crc(raw: bytes | bytearray) -> int:
    """Low 32 bits of the segment digest over the 4 KiB with the check value's own bytes as zeros."""
    clean = bytearray(raw[:SUPERBLOCK_BYTES])
    clean[_CRC_OFFSET : _CRC_OFFSET + 4] = bytes(4)
    return _native.digest(bytes(clean)) & 0xFFFFFFFF
