"""Places that are known from before, so that a read needs no request.

A bounded cache from key to (region slot, block, generation); when it is full, the oldest entries are
overwritten. Nothing in it is ever trusted: a place is where to look, and the block's header says whether it
is still the one. Thread-safe.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from memfabric._native import PlaceTable, first_positions
from memfabric.core.keys import KEY_BYTES, KeyArray
from memfabric.core.messages import MAX_KEYS_PER_REQUEST

DEFAULT_CAPACITY = 1 << 20
"""Entries; about 45 bytes each, taken as entries come."""
MAX_TOUCHED_KEYS = 32_768
"""Reuse kept for the next pings; what is beyond is not reported (eviction then sees a little less)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where blocks are: parallel columns. `slot` is the client's slot of the region (see `regions`)."""

    slot: npt.NDArray[np.int32]
    block: npt.NDArray[np.uint32]
    generation: npt.NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.slot)

    def select(self, positions: npt.NDArray[np.intp] | npt.NDArray[np.bool_]) -> Place:
        """Some of them."""
        return Place(self.slot[positions], self.block[positions], self.generation[positions])


class Places:
    """The known places of one namespace, and which of them were used without the server's knowledge.

    Attributes:
        table: the native table, for `QuickReader`.
    """

    def __init__(self, capacity: int = DEFAULT_CAPACITY) -> None:
        self.table = PlaceTable(capacity, MAX_TOUCHED_KEYS)

    def __len__(self) -> int:
        return len(self.table)

    def find(self, keys: KeyArray) -> tuple[npt.NDArray[np.bool_] | None, Place]:
        """Which keys are known (None: all of them), and the places of those that are."""
        count, known, slot, block, generation = self.table.find(keys)
        if count == len(keys):
            return None, Place(slot, block, generation)
        return known, Place(slot[known], block[known], generation[known])

    def learn(self, keys: KeyArray, place: Place) -> None:
        """Remember; what is known already is brought up to date."""
        self.table.learn(np.ascontiguousarray(keys), place.slot, place.block, place.generation)

    def forget(self, keys: KeyArray) -> None:
        """Drop keys; unknown ones are ignored."""
        self.table.forget(np.ascontiguousarray(keys))

    def forget_regions(self, slots: npt.NDArray[np.int32]) -> None:
        """Drop all places in regions that are gone."""
        if len(slots):
            self.table.forget_regions(slots)

    def touch(self, keys: KeyArray) -> None:
        """Note an optimistic read for the server's eviction order."""
        self.table.touch(np.ascontiguousarray(keys))

    def take_touched(self) -> bytes:
        """Keys of optimistic reads since the last time, each once, at most a request's worth."""
        raw = self.table.take_touched(MAX_KEYS_PER_REQUEST)
        if not raw:
            return b""
        keys = np.frombuffer(raw, np.uint8).reshape(-1, KEY_BYTES)
        once: KeyArray = keys[first_positions(keys) == np.arange(len(keys), dtype=np.int32)]
        return once.tobytes()
