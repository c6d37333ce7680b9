"""The block table: one slot per block of every region, in columns.

Pure. Responsible for slots, their generations, parent links and recency; it knows no namespaces' names, no sessions and
no clock. Invariants (`check_invariants`): only COMPLETE slots are in a recency list; only READABLE and WRITING slots
are in an index; a FREE slot has no pins and no parent; `children` counts exactly the valid parent links.
"""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
import numpy.typing as npt

from memfabric import _native
from memfabric.core.keys import KEY_BYTES

Slots = npt.NDArray[np.int32]
NO_SLOTS: Slots = np.empty(0, np.int32)
FOREVER_NS = 2**64 - 1
PINNED = np.uint32(1 << 31)
"""Bit of `BlockTable.pins` that a user's pin sets; the bits below count read leases."""


class SlotState(enum.IntEnum):
    """Where a slot is in its life. FREE → WRITING → COMPLETE → FREE, with two detours."""

    FREE = 0
    WRITING = 1
    COMPLETE = 2
    DOOMED = 3
    """Removed while readers hold a lease: invisible, freed with the last lease."""
    QUARANTINED = 4
    """Its writer vanished and may still write: freed when the quarantine ends."""


_COLUMNS: dict[str, tuple[Any, int]] = {
    "generation": (np.uint64, 0),
    "last_use_ns": (np.uint64, 0),
    "parent_generation": (np.uint64, 0),
    "parent": (np.int32, -1),
    "children": (np.int32, 0),
    "pins": (np.uint32, 0),
    "reuse": (np.uint32, 0),
    "tokens": (np.uint32, 0),
    "depth": (np.uint32, 0),
    "region": (np.uint32, 0),
    "stripe": (np.uint16, 0),
    "state": (np.uint8, 0),
}


class BlockTable:
    """Columns over slots; slots of one region are consecutive.

    Attributes (all ``[capacity]`` unless said otherwise):
        key: uint8 ``[capacity, 16]``.
        generation: uint64, ``epoch << 32 | counter``; changes at every allocation, never goes back.
        parent, parent_generation: slot of the block before this one in its chain; valid only while that slot still has
            that generation.
        children: number of valid links to this slot.
        pins: number of read leases, plus `PINNED`. Not 0: cannot be evicted.
        depth, stripe: place in the chain and a hash of the chain's first block; placement uses both.
    """

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.capacity = 0
        self.recency = _native.Recency()
        self.key: npt.NDArray[np.uint8] = np.zeros((0, KEY_BYTES), np.uint8)
        self.generation: npt.NDArray[np.uint64]
        self.last_use_ns: npt.NDArray[np.uint64]
        self.parent_generation: npt.NDArray[np.uint64]
        self.parent: npt.NDArray[np.int32]
        self.children: npt.NDArray[np.int32]
        self.pins: npt.NDArray[np.uint32]
        self.reuse: npt.NDArray[np.uint32]
        self.tokens: npt.NDArray[np.uint32]
        self.depth: npt.NDArray[np.uint32]
        self.region: npt.NDArray[np.uint32]
        self.stripe: npt.NDArray[np.uint16]
        self.state: npt.NDArray[np.uint8]
        for name, (dtype, _) in _COLUMNS.items():
            setattr(self, name, np.zeros(0, dtype))
        self._spare: list[tuple[int, int]] = []
        self._grow(
            1
        )  # slot 0 is never used, so that a column can be indexed with "none" (-1) before there is any region

    def add_range(self, count: int, region: int) -> int:
        """Slots for a region of `count` blocks; returns the first. All FREE, with generations that only rise."""
        for i, (base, size) in enumerate(self._spare):
            if size >= count:
                if size == count:
                    del self._spare[i]
                else:
                    self._spare[i] = (base + count, size - count)
                break
        else:
            base = self.capacity
            self._grow(base + count)
        self.region[base : base + count] = region
        return base

    def drop_range(self, base: int, count: int) -> None:
        """The region is gone. Slots must be FREE; their numbers are reused, their generations go on."""
        assert not self.state[base : base + count].any(), "dropping slots that are in use"
        self._spare.append((base, count))

    def _grow(self, capacity: int) -> None:
        grown = capacity - self.capacity
        for name, (dtype, fill) in _COLUMNS.items():
            setattr(self, name, np.concatenate([getattr(self, name), np.full(grown, fill, dtype)]))
        self.key = np.concatenate([self.key, np.zeros((grown, KEY_BYTES), np.uint8)])
        self.capacity = capacity
        self.recency.resize(capacity)

    def allocate(self, slots: Slots) -> None:
        """FREE → WRITING with a fresh generation. The caller fills key, tokens, links."""
        base = np.uint64(self.epoch << 32)
        old = self.generation[slots]
        self.generation[slots] = np.maximum(old, base) + np.uint64(1)
        self.state[slots] = SlotState.WRITING
        self.pins[slots] = 0
        self.reuse[slots] = 0
        self.children[slots] = 0
        self.parent[slots] = -1

    def link(self, slots: Slots, parents: Slots) -> None:
        """Set parent links; -1 for none. Parents must be live and must not descend from the slots."""
        linked = parents >= 0
        self.parent[slots] = parents
        self.parent_generation[slots[linked]] = self.generation[parents[linked]]
        _native.count_children(self.children, np.ascontiguousarray(parents[linked]), 1)

    def valid_parents(self, slots: Slots) -> Slots:
        """Parent slots, -1 where there is none or it is another block by now."""
        parents = self.parent[slots]
        valid = (parents >= 0) & (self.generation[parents] == self.parent_generation[slots])
        return np.where(valid, parents, np.int32(-1)).astype(np.int32)

    def unlink(self, slots: Slots) -> None:
        """The slots stop being children of their parents."""
        _native.count_children(self.children, self.valid_parents(slots), -1)
        self.parent[slots] = -1

    def free(self, slots: Slots) -> None:
        """Any state → FREE. Out of recency lists, links and pins gone; the caller erases keys and returns the
        blocks."""
        self.recency.remove(slots)
        self.unlink(slots)
        self.state[slots] = SlotState.FREE
        self.pins[slots] = 0

    def revoke(self, slots: Slots) -> None:
        """Make every right over the slots void: leases and quarantines that name the old generation no longer apply."""
        self.generation[slots] += np.uint64(1)

    def evict(self, recency_list: int, want: int, before_ns: int = FOREVER_NS) -> Slots:
        """Up to `want` victims, out of their list and unlinked, still COMPLETE: the caller erases and frees them."""
        return self.recency.evict(
            recency_list,
            want,
            before_ns,
            self.last_use_ns,
            self.pins,
            self.children,
            self.parent,
            self.parent_generation,
            self.generation,
        )

    def memory_bytes(self) -> int:
        """Bytes of the columns and the recency links."""
        columns = sum(getattr(self, name).nbytes for name in _COLUMNS)
        return int(columns + self.key.nbytes + 12 * self.capacity)

    def check_invariants(self) -> None:
        """Raise AssertionError when the columns contradict each other. O(capacity); for tests."""
        everything = np.arange(self.capacity, dtype=np.int32)
        lists = self.recency.list_of(everything)
        complete = self.state == SlotState.COMPLETE
        assert np.array_equal(lists >= 0, complete), "recency lists must hold exactly the complete slots"
        free = self.state == SlotState.FREE
        assert not self.pins[free].any(), "a free slot is pinned"
        assert (self.parent[free] == -1).all(), "a free slot has a parent"
        pinned = self.pins > 0
        assert ((self.state[pinned] == SlotState.COMPLETE) | (self.state[pinned] == SlotState.DOOMED)).all(), (
            "pins on a slot that is not readable"
        )
        expected = np.zeros(self.capacity, np.int32)
        parents = self.valid_parents(everything)
        np.add.at(expected, parents[parents >= 0], 1)
        live = self.state != SlotState.FREE
        assert np.array_equal(expected[live], self.children[live]), "children do not match the parent links"
