"""Known places against a plain model, and quick reads from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from memfabric import _native
from memfabric.client.places import Place, Places
from memfabric.core.layout import header_stride

CAPACITY = 12
KEYS = np.random.default_rng(5).integers(0, 256, (40, 16), dtype=np.uint8)
SOME = st.lists(st.integers(0, 39), max_size=15)


def place(numbers: list[int], slot: int) -> Place:
    column = np.array(numbers, np.uint32)
    return Place(np.full(len(numbers), slot, np.int32), column, column.astype(np.uint64) * np.uint64(10))


class PlacesMachine(RuleBasedStateMachine):
    """What is known is true; the newest are known; never more than fit."""

    def __init__(self) -> None:
        super().__init__()
        self.places = Places(CAPACITY)
        self.truth: dict[int, tuple[int, int]] = {}
        self.newest = -1
        self.touched: list[int] = []

    @rule(which=SOME, slot=st.integers(0, 3), shift=st.integers(0, 5))
    def learn(self, which: list[int], slot: int, shift: int) -> None:
        self.places.learn(KEYS[which], place([number + shift for number in which], slot))
        for number in which:
            self.newest = number
            self.truth[number] = (slot, number + shift)

    @rule(which=SOME)
    def forget(self, which: list[int]) -> None:
        self.places.forget(KEYS[which])
        for number in which:
            self.truth.pop(number, None)

    @rule(slots=st.lists(st.integers(0, 3), max_size=2))
    def forget_regions(self, slots: list[int]) -> None:
        self.places.forget_regions(np.array(slots, np.int32))
        self.truth = {number: at for number, at in self.truth.items() if at[0] not in slots}

    @rule(which=SOME)
    def touch(self, which: list[int]) -> None:
        self.places.touch(KEYS[which])
        self.touched += which

    @rule()
    def take_touched(self) -> None:
        raw = self.places.take_touched()
        found = [raw[i : i + 16] for i in range(0, len(raw), 16)]
        assert found == [KEYS[number].tobytes() for number in dict.fromkeys(self.touched)]
        self.touched = []

    @invariant()
    def what_is_known_is_true(self) -> None:
        known, found = self.places.find(KEYS)
        positions = np.arange(40) if known is None else np.nonzero(known)[0]
        assert len(positions) == len(found) == len(self.places) <= CAPACITY
        for i, number in enumerate(positions.tolist()):
            slot, block = self.truth[number]
            assert (found.slot[i], found.block[i], found.generation[i]) == (slot, block, 10 * block)
        assert self.newest not in self.truth or self.newest in positions


TestPlaces = PlacesMachine.TestCase
TestPlaces.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_many_keys_and_one_slot_over() -> None:
    places = Places(1000)
    keys = np.random.default_rng(1).integers(0, 256, (5000, 16), dtype=np.uint8)
    numbers = np.arange(5000, dtype=np.uint32)
    for start in range(0, 5000, 700):
        part = slice(start, start + 700)
        some = numbers[part]
        places.learn(keys[part], Place(some.astype(np.int32), some, some.astype(np.uint64)))
    known, found = places.find(keys)
    assert known is not None and np.nonzero(known)[0].tolist() == list(range(4000, 5000))
    assert np.array_equal(found.block, numbers[4000:])


def test_reuse_is_bounded_and_not_repeated() -> None:
    places = Places(10)
    for _ in range(1000):
        places.touch(KEYS[:3])
    assert len(places.take_touched()) == 3 * 16
    many = np.random.default_rng(1).integers(0, 256, (50_000, 16), dtype=np.uint8)
    for start in range(0, 50_000, 100):
        places.touch(many[start : start + 100])
    taken = 0
    while raw := places.take_touched():
        assert len(raw) <= 8192 * 16
        taken += len(raw) // 16
    assert taken == 32_700 or taken == 32_768


class Reader:
    """A quick reader with its columns, and a region in plain memory to read from by hand."""

    def __init__(self, n: int, segments: int, verify: bool) -> None:
        self.n, self.segments, self.block_bytes = n, segments, segments * 128
        self.stride = header_stride(segments)
        payload = n * (segments if verify else 1)
        self.columns: dict[str, Any] = {
            "local": np.zeros(payload + n, np.uint64),
            "region": np.zeros(payload + n, np.int32),
            "offset": np.zeros(payload + n, np.uint64),
            "length": np.zeros(payload + n, np.uint64),
            "group": np.zeros(payload + n, np.int32),
            "headers": np.zeros(n * self.stride, np.uint8),
            "digests": np.zeros(n * segments, np.uint64),
        }
        self.table = _native.PlaceTable(100, 100)
        self.reader = _native.QuickReader(
            self.table, n, self.block_bytes, segments, self.stride, verify, **self.columns
        )


REGIONS = np.array([[5, 8192, 20], [-1, 8192, 20]], np.int64)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("segments", [1, 3])
def test_a_quick_read_is_planned_like_any_other(verify: bool, segments: int) -> None:
    reader = Reader(2, segments, verify)
    size = reader.block_bytes
    out = np.zeros((2, size), np.uint8)
    blocks = np.array([7, 3], np.uint32)
    reader.table.learn(KEYS[:2], np.zeros(2, np.int32), blocks, np.array([70, 30], np.uint64))
    assert reader.reader.prepare(KEYS[:2], out, REGIONS)
    operations = list(zip(*(reader.columns[name].tolist() for name in ("local", "offset", "length")), strict=True))
    step = size // segments if verify else size
    base, headers = out.ctypes.data, reader.columns["headers"].ctypes.data
    expected = [
        (base + i * size + at, 8192 + int(blocks[i]) * size + at, step) for i in range(2) for at in range(0, size, step)
    ]
    used = 64 + 8 * (segments - 1)
    expected += [(headers + i * reader.stride, 4096 + int(blocks[i]) * reader.stride, used) for i in range(2)]
    assert operations == expected
    assert set(reader.columns["region"].tolist()) == {5}
    digests = np.arange(2 * segments, dtype=np.uint64)
    reader.columns["digests"][:] = digests
    _native.pack_headers(
        reader.columns["headers"],
        reader.stride,
        segments,
        KEYS[:2],
        KEYS[2:4],
        np.array([70, 30], np.uint64),
        np.array([16, 16], np.uint32),
        size,
        2,
        digests,
    )
    assert reader.reader.check()
    assert (reader.table.quick_gets, reader.table.quick_blocks) == (1, 2)
    assert reader.table.take_touched(10) == KEYS[:2].tobytes()
    reader.columns["digests"][-1] += np.uint64(1)
    assert reader.reader.check() is not verify
    reader.columns["headers"][reader.stride + 5] ^= 1
    assert not reader.reader.check()


def test_what_is_not_a_quick_read_is_declined() -> None:
    reader = Reader(2, 1, True)
    out = np.zeros((2, 128), np.uint8)
    prepare = reader.reader.prepare
    assert not prepare(KEYS[:2], out, REGIONS), "not known"
    reader.table.learn(KEYS[:2], np.array([0, 0], np.int32), np.array([1, 2], np.uint32), np.zeros(2, np.uint64))
    assert prepare(KEYS[:2], out, REGIONS)
    read_only = out.copy()
    read_only.flags.writeable = False
    for wrong in (out[:1], out.repeat(2, axis=1)[:, ::2], read_only, [out], np.zeros(32, object), bytes(256)):
        assert not prepare(KEYS[:2], wrong, REGIONS)
    assert not prepare(KEYS[:1], out, REGIONS)
    assert not prepare(KEYS[:3], out, REGIONS)
    for slot, block in [(1, 0), (2, 0), (-1, 0), (0, 20)]:
        reader.table.learn(KEYS[:1], np.array([slot], np.int32), np.array([block], np.uint32), np.zeros(1, np.uint64))
        assert not prepare(KEYS[:2], out, REGIONS)


def test_a_quick_reader_takes_only_columns_that_fit() -> None:
    for name in ("local", "headers", "digests"):
        with pytest.raises(ValueError):
            reader = Reader(2, 1, True)
            columns = {**reader.columns, name: reader.columns[name][:-1]}
            _native.QuickReader(reader.table, 2, 128, 1, 64, True, **columns)
    with pytest.raises(ValueError):
        _native.PlaceTable(0, 0)
