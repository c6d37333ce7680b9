"""Native plans: every byte goes where a plain model says, nothing leaves its extent."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfabric import _native
from memfabric.client.buffers import resolve
from memfabric.client.memory import BlockShape, Memory, PagedBlocks, PagedLayout
from memfabric.errors import UsageError

REGIONS = np.array([[7, 8192, 100], [3, 12288, 50], [-1, 4096, 10]], np.int64)


@dataclasses.dataclass
class Plan:
    """Operations as rows."""

    local: npt.NDArray[np.uint64]
    region: npt.NDArray[np.int32]
    offset: npt.NDArray[np.uint64]
    length: npt.NDArray[np.uint64]
    group: npt.NDArray[np.int32]

    def moves(self) -> dict[tuple[int, int], tuple[int, int]]:
        """(handle, offset) of every byte -> (local address, group)."""
        found: dict[tuple[int, int], tuple[int, int]] = {}
        for i in range(len(self.local)):
            for byte in range(int(self.length[i])):
                at = (int(self.region[i]), int(self.offset[i]) + byte)
                assert at not in found, "a byte is moved twice"
                found[at] = (int(self.local[i]) + byte, int(self.group[i]))
        return found


def plan(memory: Memory, shape: BlockShape, slot: Any, block: Any, **options: Any) -> Plan:
    n = memory.count
    most = options.pop("most", n * (len(memory.fragments) + 1))
    columns = Plan(
        np.zeros(most, np.uint64),
        np.zeros(most, np.int32),
        np.zeros(most, np.uint64),
        np.zeros(most, np.uint64),
        np.zeros(most, np.int32),
    )
    settings: dict[str, Any] = {
        "groups": True,
        "merge_bytes": 1 << 30,
        "header_local": 0,
        "header_stride": 64,
        "header_bytes": 0,
        **options,
    }
    count = _native.plan(
        memory.fragments,
        REGIONS,
        np.asarray(slot, np.int32),
        np.asarray(block, np.uint32),
        memory.block_base,
        memory.block_id,
        shape.block_bytes,
        shape.segment_bytes,
        memory.first_segment,
        memory.segment_count,
        **settings,
        **vars(columns),
    )
    return Plan(**{name: column[:count] for name, column in vars(columns).items()})


@st.composite
def cases(draw: st.DrawFn) -> tuple[BlockShape, int, int, int, list[int], list[int]]:
    """(shape, n, first segment, segment count, region slots, blocks)."""
    segments = draw(st.integers(1, 4))
    shape = BlockShape(segments * draw(st.integers(1, 20)), segments)
    n = draw(st.integers(1, 5))
    first = draw(st.integers(0, segments - 1))
    places = draw(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 49)), min_size=n, max_size=n, unique=True))
    count = draw(st.integers(1, segments - first))
    return shape, n, first, count, [slot for slot, _ in places], [block for _, block in places]


def expected_moves(
    shape: BlockShape, first: int, count: int, slots: list[int], blocks: list[int], address: Any
) -> dict[tuple[int, int], tuple[int, int]]:
    """The model: byte b of block i of the selected segments lies at ``address(i, b)`` here."""
    size = shape.segment_bytes
    return {
        (int(REGIONS[slots[i], 0]), int(REGIONS[slots[i], 1]) + blocks[i] * shape.block_bytes + first * size + b): (
            address(i, b),
            i * count + b // size,
        )
        for i in range(len(slots))
        for b in range(count * size)
    }


@given(cases(), st.booleans())
def test_contiguous_blocks(case: Any, as_list: bool) -> None:
    shape, n, first, count, slots, blocks = case
    size = count * shape.segment_bytes
    data = np.zeros((n, size), np.uint8)
    value = list(data) if as_list else data
    memory = resolve(value, n, shape, writable=True, first=first, segment_count=count)
    base = data.ctypes.data
    expected = expected_moves(shape, first, count, slots, blocks, lambda i, b: base + i * size + b)
    assert plan(memory, shape, slots, blocks).moves() == expected
    merged = plan(memory, shape, slots, blocks, groups=False)
    assert {at: local for at, (local, _) in merged.moves().items()} == {
        at: local for at, (local, _) in expected.items()
    }
    assert len(merged.local) <= n
    assert (merged.group == -1).all()


@given(cases(), st.data())
def test_paged_blocks(case: Any, data: st.DataObject) -> None:
    shape, n, first, count, slots, blocks = case
    pages = 8
    segments, where = [], []
    for segment in range(shape.segments):
        left, fragments = shape.segment_bytes, []
        while left:
            part = data.draw(st.integers(1, left))
            stride, gap = part + data.draw(st.integers(0, 5)), data.draw(st.integers(0, 7))
            tensor = np.zeros(gap + pages * stride, np.uint8)
            fragments.append((tensor, gap, stride, part))
            where += [(segment, tensor.ctypes.data + gap, stride, at) for at in range(part)]
            left -= part
        segments.append(fragments)
    layout = PagedLayout.from_tensors(segments)
    assert (layout.block_bytes, layout.segments, layout.min_id, layout.max_id) == (
        *dataclasses.astuple(shape),
        0,
        pages - 1,
    )
    ids = data.draw(st.lists(st.integers(0, pages - 1), min_size=n, max_size=n))
    memory = resolve(PagedBlocks(layout, ids), n, shape, writable=True, first=first, segment_count=count)
    bytes_of = [row for row in where if first <= row[0] < first + count]
    expected = expected_moves(
        shape, first, count, slots, blocks, lambda i, b: bytes_of[b][1] + ids[i] * bytes_of[b][2] + bytes_of[b][3]
    )
    assert plan(memory, shape, slots, blocks).moves() == expected
    picked = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, unique=True)))
    some = plan(memory.select(picked), shape, np.array(slots)[picked], np.array(blocks)[picked]).moves()
    assert {at: local for at, (local, _) in some.items()}.items() <= {
        at: local for at, (local, _) in expected.items()
    }.items()


def test_headers_come_last_and_apart() -> None:
    shape = BlockShape(32, 2)
    memory = resolve(np.zeros((3, 32), np.uint8), 3, shape, writable=True)
    found = plan(memory, shape, [0, 1, 0], [0, 1, 1], header_local=1000, header_stride=128, header_bytes=72)
    assert len(found.local) == 3 * 2 + 3
    assert found.local[6:].tolist() == [1000, 1128, 1256]
    assert found.offset[6:].tolist() == [4096, 4096 + 128, 4096 + 128]
    assert found.length[6:].tolist() == [72] * 3
    assert found.region[6:].tolist() == [7, 3, 7]
    assert found.group.tolist() == [0, 1, 2, 3, 4, 5, -1, -1, -1]


def test_neighbours_merge_up_to_the_limit() -> None:
    shape = BlockShape(1000, 1)
    memory = resolve(np.zeros((6, 1000), np.uint8), 6, shape, writable=True)
    place = ([0] * 6, [4, 5, 6, 7, 9, 10])
    assert plan(memory, shape, *place, groups=False).length.tolist() == [4000, 2000]
    assert plan(memory, shape, *place, groups=False, merge_bytes=2500).length.tolist() == [2000, 2000, 2000]
    assert plan(memory, shape, *place).length.tolist() == [1000] * 6


@pytest.mark.parametrize(
    ("slot", "block", "why"),
    [(2, 0, "not mapped"), (3, 0, "not known"), (-1, 0, "not known"), (0, 100, "outside"), (1, 2**32 - 1, "outside")],
)
def test_places_outside_are_refused(slot: int, block: int, why: str) -> None:
    shape = BlockShape(32, 1)
    memory = resolve(np.zeros((2, 32), np.uint8), 2, shape, writable=True)
    with pytest.raises(IndexError, match=why):
        plan(memory, shape, [0, slot], [0, block])


ANY64 = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(st.tuples(*[ANY64] * 6), min_size=1, max_size=3), ANY64, st.integers(0, 2**64 - 1))
def test_no_numbers_lead_outside_the_extent(rows: list[tuple[int, ...]], block_id: int, base: int) -> None:
    fragments = np.array(rows, np.int64)
    memory = Memory(fragments, np.array([base], np.uint64), np.array([block_id], np.int64), 1, 0, 1, ())
    try:
        found = plan(memory, BlockShape(4096, 1), [0], [0])
    except (IndexError, ValueError):
        return
    for i in range(len(found.local)):
        start, end = int(found.local[i]) - base, int(found.local[i]) - base + int(found.length[i])
        assert any(low <= start and end <= high for *_, low, high in rows)


def test_columns_that_are_too_short_are_refused() -> None:
    shape = BlockShape(32, 4)
    memory = resolve(np.zeros((2, 32), np.uint8), 2, shape, writable=True)
    with pytest.raises(ValueError, match="too short"):
        plan(memory, shape, [0, 0], [0, 1], most=7)
    with pytest.raises(ValueError, match="length"):
        plan(memory, shape, [0], [0, 1])


@pytest.mark.parametrize("count", [1, 2, 100, 5000])
def test_first_positions(count: int) -> None:
    keys = np.random.default_rng(0).integers(0, 4, (count, 16), dtype=np.uint8) * np.uint8(0)
    keys[:, 15] = np.random.default_rng(1).integers(0, 20, count)
    seen: dict[bytes, int] = {}
    expected = [seen.setdefault(key.tobytes(), i) for i, key in enumerate(keys)]
    assert _native.first_positions(keys).tolist() == expected


def test_a_layout_must_make_sense() -> None:
    tensor = np.zeros(100, np.uint8)
    for segments, why in [
        ([], "F >= 1"),
        ([[(tensor, 0, 10, 10)], [(tensor, 0, 10, 5)]], "equal"),
        ([[(tensor, 0, 10, 0)]], "at least 1"),
        ([[(tensor, 101, 10, 10)]], "no block id"),
        ([[(tensor, 0, 0, 101)]], "no block id"),
        ([[(tensor, 0, 10, 10)], [(tensor, 0, -10, 10), (tensor, 90, 0, 0)]], "at least 1"),
    ]:
        with pytest.raises(UsageError, match=why):
            PagedLayout.from_tensors(segments)
    backwards = PagedLayout.from_tensors([[(tensor, 90, -10, 10)]])
    assert (backwards.min_id, backwards.max_id) == (0, 9)
