"""The region format: sizes that fit, superblocks that survive the round trip, and any damage found."""

from __future__ import annotations

import dataclasses
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfabric import _native
from memfabric.core import layout
from memfabric.core.layout import LayoutError, RegionState, Superblock

SEGMENTS = st.integers(1, 64)
NAMES = st.text("abcXYZ019._-é", min_size=0, max_size=30)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int]:
    """(region_bytes, block_bytes, segments) of a region with at least one block."""
    segments = draw(SEGMENTS)
    block_bytes = segments * draw(st.integers(1, 1 << 16))
    blocks = draw(st.integers(1, 300))
    least = layout.SUPERBLOCK_BYTES + layout.OS_PAGE_BYTES
    region_bytes = least + blocks * (block_bytes + layout.header_stride(segments)) + draw(st.integers(0, 9999))
    return region_bytes, block_bytes, segments


@given(shapes())
def test_a_plan_fits_does_not_overlap_and_wastes_less_than_a_block_and_a_page(shape: tuple[int, int, int]) -> None:
    region_bytes, block_bytes, segments = shape
    plan = layout.plan_region(*shape)
    assert plan.header_stride % 64 == 0
    assert plan.header_stride >= 64 + 8 * (segments - 1)
    assert plan.header_offset(0) == layout.SUPERBLOCK_BYTES
    assert plan.header_offset(plan.block_count) <= plan.data_offset
    assert plan.data_offset % layout.OS_PAGE_BYTES == 0
    end = plan.block_offset(plan.block_count)
    assert end <= region_bytes
    assert region_bytes - end < block_bytes + plan.header_stride + 2 * layout.OS_PAGE_BYTES


@pytest.mark.parametrize(
    "shape",
    [
        (1 << 20, 0, 1),
        (1 << 20, -4096, 1),
        (1 << 40, (1 << 30) + 1, 1),
        (1 << 20, 4096, 0),
        (1 << 20, 4096, 3),
        (1 << 30, 1 << 20, 8192),
        (4096, 64, 1),
        (-5, 64, 1),
    ],
)
def test_impossible_shapes_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(LayoutError):
        layout.plan_region(*shape)


@st.composite
def superblocks(draw: st.DrawFn) -> tuple[Superblock, int]:
    region_bytes, block_bytes, segments = draw(shapes())
    words = st.integers(0, 2**64 - 1)
    block = Superblock(region_id=draw(words), node=draw(NAMES), incarnation=draw(words), epoch=draw(words))
    if draw(st.booleans()):
        plan = layout.plan_region(region_bytes, block_bytes, segments)
        block = dataclasses.replace(
            block,
            state=RegionState.ACTIVE,
            namespace=draw(NAMES),
            namespace_id=draw(words),
            fingerprint_digest=draw(st.binary(min_size=16, max_size=16)),
            block_bytes=block_bytes,
            block_count=plan.block_count,
            segments=segments,
            header_stride=plan.header_stride,
        )
    return block, region_bytes


@given(superblocks())
def test_a_superblock_survives_the_round_trip(given_block: tuple[Superblock, int]) -> None:
    block, region_bytes = given_block
    raw = block.pack()
    assert len(raw) == layout.SUPERBLOCK_BYTES
    assert Superblock.parse(raw, region_bytes) == block
    assert Superblock.parse(raw + b"more", region_bytes) == block


@given(superblocks(), st.integers(0, layout.SUPERBLOCK_BYTES - 1), st.integers(1, 255))
def test_any_changed_byte_is_found(given_block: tuple[Superblock, int], at: int, change: int) -> None:
    block, region_bytes = given_block
    raw = bytearray(block.pack())
    raw[at] ^= change
    with pytest.raises(LayoutError):
        Superblock.parse(bytes(raw), region_bytes)


@given(st.binary(max_size=5000), st.booleans(), st.booleans())
def test_any_bytes_give_a_superblock_or_a_layout_error(raw: bytes, magic: bool, crc: bool) -> None:
    block = bytearray(raw)
    if magic and len(block) >= 12:
        block[:12] = layout.MAGIC + struct.pack("<I", layout.LAYOUT_VERSION)
    if crc and len(block) >= 16:
        block = block.ljust(layout.SUPERBLOCK_BYTES, b"\0")[: layout.SUPERBLOCK_BYTES]
        block[12:16] = bytes(4)
        block[12:16] = struct.pack("<I", _native.digest(bytes(block)) & 0xFFFFFFFF)
    try:
        Superblock.parse(bytes(block), 1 << 20)
    except LayoutError:
        pass


def test_another_version_and_a_truncated_block_are_named() -> None:
    raw = bytearray(Superblock(region_id=1, node="n", incarnation=1, epoch=1).pack())
    with pytest.raises(LayoutError, match="4095 bytes"):
        Superblock.parse(bytes(raw[:-1]), 1 << 20)
    raw[8] = 9
    with pytest.raises(LayoutError, match="version 9"):
        Superblock.parse(bytes(raw), 1 << 20)
    raw[0] = 0
    with pytest.raises(LayoutError, match="not a memfabric region"):
        Superblock.parse(bytes(raw), 1 << 20)


def test_sizes_that_contradict_the_region_are_found() -> None:
    plan = layout.plan_region(1 << 20, 4096, 1)
    block = Superblock(
        region_id=1,
        node="n",
        incarnation=1,
        epoch=1,
        state=RegionState.ACTIVE,
        namespace="x",
        block_bytes=4096,
        block_count=plan.block_count + 1,
        segments=1,
        header_stride=plan.header_stride,
    )
    with pytest.raises(LayoutError, match="blocks of stride"):
        Superblock.parse(block.pack(), 1 << 20)


def test_names_that_do_not_fit_are_refused() -> None:
    with pytest.raises(LayoutError, match="longer than 64"):
        Superblock(region_id=1, node="n" * 65, incarnation=1, epoch=1).pack()
