"""Namespaces: isolation, quota, eviction policy, counters.

Pure. Responsible for what a namespace is and which of its blocks go first; it knows no sessions and no nodes.
Policies:

* ``lru``: leaf-first least recently used. A use touches a chain from tail to head, so a parent is never older than its
  children and leaves go first.
* ``window-lru``: new blocks enter a window that may hold `window_ratio` of the namespace; a block that is used again
moves to the
  main part. Victims come from the window while it is over its share. One pass over a huge prompt thus cannot flush what
  is reused (as in segmented LRU).
* ``ttl``: in the order in which they were written; a use does not prolong a life.

Any policy may have a `ttl_ns`: what was not used (``ttl``: written) for that long is no longer served, and is dropped.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

import numpy as np
import numpy.typing as npt

from memfabric._native import KeyIndex
from memfabric.core import layout
from memfabric.core.messages import MAX_NAME_BYTES, NamespaceSpec
from memfabric.core.table import NO_SLOTS, PINNED, BlockTable, Slots, SlotState
from memfabric.errors import RefusalCode, RefusedError

POLICIES = ("lru", "window-lru", "ttl")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def check_name(what: str, name: str) -> None:
    """Refuse names that could be taken for paths, options, topics or other names.

    Raises:
        RefusedError: with the rule.
    """
    if len(name.encode()) > MAX_NAME_BYTES or not _NAME.fullmatch(name):
        raise RefusedError(
            RefusalCode.BAD_REQUEST,
            f"{what} name {name[:80]!r} is not allowed: 1 to {MAX_NAME_BYTES} of letters, digits, '.', '_' and '-', "
            "starting with a letter, digit or '_'",
        )


def check_spec(spec: NamespaceSpec) -> None:
    """Refuse a specification that cannot work.

    Raises:
        RefusedError: says which field and why.
    """
    check_name("namespace", spec.name)
    try:
        layout.check_block_shape(spec.block_bytes, spec.segments)
    except layout.LayoutError as error:
        raise RefusedError(RefusalCode.BAD_REQUEST, str(error)) from None
    problems = []
    if not 1 <= spec.block_tokens <= 1 << 20:
        problems.append(f"block_tokens must be 1 to {1 << 20}, got {spec.block_tokens}")
    if spec.policy not in POLICIES:
        problems.append(f"policy must be one of {', '.join(POLICIES)}, got {spec.policy!r}")
    if spec.policy == "ttl" and spec.ttl_ns <= 0:
        problems.append("policy ttl needs a ttl")
    if not 0 <= spec.ttl_ns < 2**62:
        problems.append(f"ttl_ns must be 0 or positive, got {spec.ttl_ns}")
    if not 0 <= spec.quota_bytes < 2**62:
        problems.append(f"quota_bytes must be 0 or positive, got {spec.quota_bytes}")
    if spec.quota_bytes and spec.quota_bytes < spec.block_bytes:
        problems.append(f"quota_bytes {spec.quota_bytes} is less than one block of {spec.block_bytes} bytes")
    if not 0.0 < spec.window_ratio <= 1.0:
        problems.append(f"window_ratio must be in (0, 1], got {spec.window_ratio}")
    if not 0.0 < spec.low_ratio <= spec.high_ratio <= 1.0:
        problems.append(f"0 < low_ratio <= high_ratio <= 1 must hold, got {spec.low_ratio}, {spec.high_ratio}")
    if problems:
        raise RefusedError(RefusalCode.BAD_REQUEST, f"namespace {spec.name!r}: " + "; ".join(problems))


@dataclasses.dataclass
class Namespace:
    """A namespace's state. Slots in `index` are WRITING or COMPLETE and belong to its regions."""

    id: int
    spec: NamespaceSpec
    table: BlockTable
    index: KeyIndex = dataclasses.field(default_factory=KeyIndex)
    counters: Counter[str] = dataclasses.field(default_factory=Counter)
    regions: set[int] = dataclasses.field(default_factory=set)
    writing: int = 0
    doomed: int = 0
    quarantined: int = 0
    events: int = 0
    view_version: int = 0
    main_list: int = -1
    window_list: int = -1

    def __post_init__(self) -> None:
        if self.main_list < 0:
            self.main_list = self.table.recency.add_list()
            self.window_list = self.table.recency.add_list()

    @property
    def readable(self) -> int:
        """Blocks that can be read."""
        return self.table.recency.count(self.main_list) + self.table.recency.count(self.window_list)

    @property
    def used(self) -> int:
        """Blocks that are not free."""
        return self.readable + self.writing + self.doomed + self.quarantined

    @property
    def quota_blocks(self) -> int | None:
        """The quota in blocks; None for no limit."""
        return self.spec.quota_bytes // self.spec.block_bytes if self.spec.quota_bytes else None

    def find(self, keys: npt.NDArray[np.uint8]) -> Slots:
        """Slot of each key, WRITING or COMPLETE; -1 where there is none."""
        return self.index.find(keys, self.table.key)

    def stale_before_ns(self, now_ns: int) -> int:
        """What was last used before this instant is no longer served; 0 without a ttl."""
        return max(0, now_ns - self.spec.ttl_ns) if self.spec.ttl_ns else 0

    def readable_mask(self, slots: Slots, now_ns: int) -> npt.NDArray[np.bool_]:
        """Which of the found slots may be served now."""
        mask: npt.NDArray[np.bool_] = (slots >= 0) & (self.table.state[slots] == SlotState.COMPLETE)
        if self.spec.ttl_ns:
            fresh = self.table.last_use_ns[slots] >= np.uint64(self.stale_before_ns(now_ns))
            mask &= fresh | (self.table.pins[slots] >= PINNED)
        return mask

    def completed(self, slots: Slots, now_ns: int) -> None:
        """The slots became COMPLETE; they enter the recency order, and so does the use of their parents."""
        self.table.last_use_ns[slots] = now_ns
        self.table.recency.touch(self.window_list if self.spec.policy == "window-lru" else self.main_list, slots)

    def touch(self, slots: Slots, now_ns: int) -> None:
        """A use of readable blocks, given from head to tail of their chain."""
        self.table.reuse[slots] += np.uint32(1)
        if self.spec.policy == "ttl":
            return
        self.table.last_use_ns[slots] = now_ns
        self.table.recency.touch(self.main_list, slots)

    def victims(self, want: int) -> Slots:
        """Up to `want` blocks to evict, out of their lists; fewer when the rest is pinned or interior."""
        table = self.table
        if self.spec.policy != "window-lru":
            return table.evict(self.main_list, want)
        window = table.recency.count(self.window_list)
        over = window - int(self.spec.window_ratio * (window + table.recency.count(self.main_list)))
        taken = table.evict(self.window_list, min(want, max(0, over)))
        for recency_list in (self.main_list, self.window_list, self.main_list):
            if len(taken) >= want:
                break
            taken = np.concatenate([taken, table.evict(recency_list, want - len(taken))])
        return taken

    def expired(self, now_ns: int, limit: int) -> Slots:
        """Up to `limit` blocks past their ttl, out of their lists."""
        before = self.stale_before_ns(now_ns)
        if not before:
            return NO_SLOTS
        taken = self.table.evict(self.window_list, limit, before)
        return np.concatenate([taken, self.table.evict(self.main_list, limit - len(taken), before)])

    def over_high_watermark(self, capacity_blocks: int) -> int:
        """How many blocks to evict ahead of need: down to low once above high, 0 otherwise."""
        limit = capacity_blocks
        if self.quota_blocks is not None:
            limit = min(limit, self.quota_blocks)
        if not limit or self.used <= self.spec.high_ratio * limit:
            return 0
        return self.used - int(self.spec.low_ratio * limit)

    def check_invariants(self) -> None:
        """Raise AssertionError when index, lists and counts contradict each other. O(blocks); for tests."""
        table = self.table
        in_lists = [table.recency.order(i) for i in (self.main_list, self.window_list)]
        listed = np.concatenate(in_lists)
        assert (table.state[listed] == SlotState.COMPLETE).all()
        assert len(self.index) == len(listed) + self.writing, "index must hold exactly complete and writing blocks"
        assert np.array_equal(self.find(np.ascontiguousarray(table.key[listed])), listed), "index points elsewhere"
        for order in in_lists:
            uses = table.last_use_ns[order]
            assert (uses[1:] >= uses[:-1]).all(), "a recency list is out of order"
        regions = np.fromiter(self.regions, np.uint32)
        mine = np.isin(table.region, regions) & (table.state != SlotState.FREE)
        states = np.bincount(table.state[mine], minlength=5)
        assert states[SlotState.WRITING] == self.writing, "count of writing blocks"
        assert states[SlotState.DOOMED] == self.doomed, "count of doomed blocks"
        assert states[SlotState.QUARANTINED] == self.quarantined, "count of quarantined blocks"
        assert states[SlotState.COMPLETE] == len(listed), "count of complete blocks"
