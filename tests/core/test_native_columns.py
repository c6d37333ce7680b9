"""The native key index and recency lists against plain Python models."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from memfabric import _native

CAPACITY = 64
# Few distinct first bytes, so that hash buckets collide and keys differ late.
KEYS = np.array([[i % 3] * 8 + [0] * 7 + [i] for i in range(CAPACITY)], np.uint8)


class IndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.column = np.zeros((CAPACITY, 16), np.uint8)
        self.index = _native.KeyIndex()
        self.model: dict[bytes, int] = {}
        self.free = list(range(CAPACITY))

    @rule(names=st.lists(st.integers(0, CAPACITY - 1), unique=True, max_size=20))
    def insert(self, names: list[int]) -> None:
        fresh = [name for name in names if KEYS[name].tobytes() not in self.model][: len(self.free)]
        slots = np.array([self.free.pop() for _ in fresh], np.int32)
        self.column[slots] = KEYS[fresh] if fresh else np.empty((0, 16), np.uint8)
        self.index.insert(self.column, slots)
        self.model.update({KEYS[name].tobytes(): int(slot) for name, slot in zip(fresh, slots, strict=True)})

    @rule(names=st.lists(st.integers(0, CAPACITY - 1), unique=True, max_size=20))
    def erase(self, names: list[int]) -> None:
        held = [self.model.pop(KEYS[name].tobytes()) for name in names if KEYS[name].tobytes() in self.model]
        absent = self.free[:2]
        assert self.index.erase(self.column, np.array(held + absent, np.int32)) == len(held)
        self.free += held

    @rule(name=st.integers(0, CAPACITY - 1))
    def insert_again(self, name: int) -> None:
        if KEYS[name].tobytes() in self.model and self.free:
            self.column[self.free[0]] = KEYS[name]
            with pytest.raises(ValueError, match="there already"):
                self.index.insert(self.column, np.array([self.free[0]], np.int32))

    @invariant()
    def same(self) -> None:
        found = self.index.find(KEYS, self.column)
        assert found.tolist() == [self.model.get(key.tobytes(), -1) for key in KEYS]
        assert len(self.index) == len(self.model)


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_index_of_many_random_keys_grows_and_shrinks() -> None:
    keys = np.random.default_rng(1).integers(0, 256, (20_000, 16), dtype=np.uint8)
    index = _native.KeyIndex()
    everything = np.arange(20_000, dtype=np.int32)
    index.insert(keys, everything)
    assert np.array_equal(index.find(keys, keys), everything)
    index.erase(keys, everything[::2])
    found = index.find(keys, keys)
    assert (found[::2] == -1).all()
    assert np.array_equal(found[1::2], everything[1::2])


@pytest.mark.parametrize("slots", [[-1], [64], [2**31 - 1]])
def test_slots_outside_the_columns_are_refused(slots: list[int]) -> None:
    bad = np.array(slots, np.int32)
    index, recency = _native.KeyIndex(), _native.Recency()
    recency.resize(CAPACITY)
    recency.add_list()
    for call in (
        lambda: index.insert(KEYS, bad),
        lambda: index.erase(KEYS, bad),
        lambda: recency.touch(0, bad),
        lambda: recency.remove(bad),
        lambda: recency.list_of(bad),
        lambda: _native.pin(np.zeros(CAPACITY, np.uint32), bad),
    ):
        with pytest.raises(IndexError):
            call()
    with pytest.raises(IndexError):
        recency.touch(1, np.array([0], np.int32))


def test_columns_that_are_written_are_never_copies_of_another_type() -> None:
    with pytest.raises(TypeError):
        _native.pin(np.zeros(4, np.int64), np.array([1], np.int32))
    with pytest.raises(TypeError):
        _native.count_children(np.zeros(4, np.int64), np.array([1], np.int32), 1)


@given(
    st.lists(
        st.tuples(st.sampled_from(["touch", "remove"]), st.integers(0, 1), st.lists(st.integers(0, 15), max_size=6)),
        max_size=40,
    )
)
def test_recency_order_is_that_of_an_ordered_dict(steps: list[tuple[str, int, list[int]]]) -> None:
    recency = _native.Recency()
    recency.resize(16)
    model: list[OrderedDict[int, None]] = [OrderedDict(), OrderedDict()]
    recency.add_list()
    recency.add_list()
    for what, target, slots in steps:
        array = np.array(slots, np.int32)
        if what == "touch":
            recency.touch(target, array)
        else:
            recency.remove(array)
        for slot in reversed(slots):
            for order in model:
                order.pop(slot, None)
            if what == "touch":
                model[target][slot] = None
        for i in (0, 1):
            assert recency.order(i).tolist() == list(model[i])
            assert recency.count(i) == len(model[i])
            assert recency.oldest(i) == next(iter(model[i]), -1)


@given(st.data())
def test_eviction_takes_evictable_leaves_first_and_leaves_counts_right(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 20))
    parent = np.array([data.draw(st.integers(-1, i - 1)) for i in range(count)], np.int32)
    children = np.bincount(parent[parent >= 0], minlength=count).astype(np.int32)
    pins = np.array(data.draw(st.lists(st.integers(0, 1), min_size=count, max_size=count)), np.uint32)
    order = data.draw(st.permutations(range(count)))
    recency = _native.Recency()
    recency.resize(count)
    recency.add_list()
    uses = np.zeros(count, np.uint64)
    for now, slot in enumerate(order):
        recency.touch(0, np.array([slot], np.int32))
        uses[slot] = now
    want = data.draw(st.integers(0, count))
    generation = np.ones(count, np.uint64)
    links = parent.copy()
    victims = recency.evict(0, want, 2**63, uses, pins, children, links, generation.copy(), generation)
    gone: set[int] = set()
    for slot in victims.tolist():
        assert pins[slot] == 0
        assert all(child in gone for child in range(count) if parent[child] == slot), "a parent went before its child"
        gone.add(slot)
    left = [child for child in range(count) if child not in gone]
    expected = np.bincount([parent[c] for c in left if parent[c] >= 0], minlength=count)
    assert [children[slot] for slot in left] == [expected[slot] for slot in left]
    if len(victims) < want:  # nothing evictable was left behind
        assert not [s for s in left if pins[s] == 0 and not any(parent[c] == s for c in left)]
