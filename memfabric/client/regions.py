"""Regions as this client sees them: which exist, how to reach them, where their blocks lie.

A region keeps one *slot* for as long as its node lives, whatever number the server gives it in this epoch; so
places stay known over a restart of the server. Mapped on first use, for reading and for writing apart, so
that a process that only reads cannot damage the pool. Thread-safe: tables are replaced, never changed, so
that readers need no lock.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from memfabric.client.memory import BlockShape
from memfabric.core import layout
from memfabric.core.messages import NodeState, RegionView, View
from transport.auto import AutoTransport
from transport.base import UInt8Column
from transport.errors import TransportError

Slots = npt.NDArray[np.int32]
RegionTable = npt.NDArray[np.int64]
"""``[slots, 3]``: handle (-1: not mapped), data offset, block count."""

Introduce: TypeAlias = Callable[[RegionView, bytes, int], bytes]
"""``introduce(region, hello, deadline_ns)``: has the server carry a hello to a region's node; the welcome. Raises
`TransportError`."""
RETRY_NS = 500_000_000
"""Wait before a region that could not be reached is tried again."""

_HANDLE, _DATA_OFFSET, _BLOCK_COUNT = 0, 1, 2


@dataclasses.dataclass(slots=True)
class _Known:
    """A region in the current view or one before. `error`: why it could not be mapped."""

    view: RegionView
    error: str = ""
    retry_ns: int = 0
    """Not to be tried again before."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Numbering:
    """The server's numbers of regions, in one epoch: rising, with the slot of each."""

    epoch: int
    numbers: npt.NDArray[np.uint32]
    slots: Slots


def _identity(view: RegionView) -> tuple[str, int, int, int, int, int, bytes]:
    return (
        view.node,
        view.incarnation,
        view.region_id,
        view.size_bytes,
        view.block_bytes,
        view.segments,
        view.descriptor,
    )


class Regions:
    """All regions of the client's namespace."""

    def __init__(self, transport: AutoTransport, shape: BlockShape, introduce: Introduce) -> None:
        self._transport = transport
        self._introduce = introduce
        self._shape = shape
        self._lock = threading.Lock()
        self._known: list[_Known] = []
        self._live: dict[tuple[str, int, int, int, int, int, bytes], int] = {}
        self._tables: dict[bool, RegionTable] = {w: np.zeros((0, 3), np.int64) for w in (False, True)}
        self._numbering = _Numbering(-1, np.zeros(0, np.uint32), np.zeros(0, np.int32))
        self._version = (-1, -1)
        self._closed = False

    def table(self, writable: bool) -> RegionTable:
        """The current table; rows of regions that are gone or not mapped yet have handle -1."""
        return self._tables[writable]

    def apply(self, view: View, *, joined: bool = False) -> Slots | None:
        """Take a view if it is newer (or the first of a session: `joined`); returns the slots of regions that
        are gone.

        None: the view is older than what is known.
        """
        with self._lock:
            version = (view.epoch, view.version)
            if self._closed or (not joined and version <= self._version):
                return None
            self._version = version
            dead = {(node.name, node.incarnation) for node in view.nodes if node.state is NodeState.DEAD}
            seen = {}
            for region in view.regions:
                if (region.node, region.incarnation) not in dead and self._fits(region):
                    seen[_identity(region)] = region
            gone = [slot for key, slot in self._live.items() if key not in seen]
            for key in [key for key in self._live if key not in seen]:
                del self._live[key]
            for key, region in seen.items():
                if key not in self._live:
                    self._live[key] = self._add(region)
            self._renumber(view.epoch, [(region.number, self._live[key]) for key, region in seen.items()])
            dropped = self._unmap(gone)
        for handle in dropped:
            self._transport.disconnect(handle)
        return np.array(gone, np.int32)

    def slots_of(self, numbers: npt.NDArray[np.uint32], epoch: int) -> Slots:
        """Slots of region numbers that a server of some epoch gave; -1 for those that the current view does
        not have.

        Numbers of another epoch mean other regions: none of them is known.
        """
        now = self._numbering
        if now.epoch != epoch or not len(now.numbers):
            return np.full(len(numbers), -1, np.int32)
        at = np.searchsorted(now.numbers, numbers)
        at[at == len(now.numbers)] = 0
        found: Slots = np.where(now.numbers[at] == numbers, now.slots[at], np.int32(-1)).astype(np.int32)
        return found

    def ready(self, slots: Slots, writable: bool) -> bool:
        """Whether all can be used as they are."""
        return bool((self._tables[writable][slots, _HANDLE] >= 0).all())

    def map(self, slots: Slots, writable: bool, deadline_ns: int = 0) -> npt.NDArray[np.bool_]:
        """Make regions usable; returns which of `slots` are. The reasons of the others: `why_not`.

        May wait for another host, until the deadline (0: the transport's own limit); what failed is not tried again
        for `RETRY_NS`. Views are taken meanwhile.
        """
        handles = self._tables[writable][slots, _HANDLE]
        for slot in np.unique(slots[handles < 0]).tolist():
            with self._lock:
                row, known = self._tables[writable][slot], self._known[slot]
                wanted = row[_HANDLE] < 0 and row[_BLOCK_COUNT] and slot in self._live.values()
                if self._closed or not wanted or time.monotonic_ns() < known.retry_ns:
                    continue
            self._connect(slot, known, writable, deadline_ns)
        usable: npt.NDArray[np.bool_] = self._tables[writable][slots, _HANDLE] >= 0
        return usable

    def node_of(self, owner: bytes) -> str:
        """Name of the node that lends under this owner's name; empty when no region of it was ever seen."""
        incarnation = int.from_bytes(owner, "little")
        return next((known.view.node for known in self._known if known.view.incarnation == incarnation), "")

    def why_not(self, slots: Slots) -> str:
        """Why regions cannot be used, each reason once."""
        reasons = [self._known[slot].error or "its node is gone" for slot in np.unique(slots).tolist()]
        return "; ".join(dict.fromkeys(reasons))

    def zero_copy(self, slot: int) -> bool:
        """Whether `mapped` has a view of a region that is usable for reading."""
        return self._transport.zero_copy(int(self._tables[False][slot, _HANDLE]))

    def mapped(self, slot: int) -> UInt8Column:
        """A read-only view of a region that `map` made usable for reading.

        Raises:
            TransportError: it is gone.
        """
        return self._transport.mapped(int(self._tables[False][slot, _HANDLE]))

    def close(self) -> None:
        """Unmap everything, once running copies are over; nothing can be mapped again."""
        with self._lock:
            self._closed = True
            handles = self._unmap(list(range(len(self._known))))
        for handle in handles:
            self._transport.disconnect(handle)

    def __len__(self) -> int:
        return len(self._live)

    @property
    def version(self) -> tuple[int, int]:
        """(epoch, version) of the current view."""
        return self._version

    # --- inside, under the lock ---

    def _fits(self, region: RegionView) -> bool:
        return (region.block_bytes, region.segments) == (self._shape.block_bytes, self._shape.segments)

    def _add(self, region: RegionView) -> int:
        try:
            plan = layout.plan_region(region.size_bytes, region.block_bytes, region.segments)
            row, error = [-1, plan.data_offset, plan.block_count], ""
        except layout.LayoutError as raised:
            row, error = [-1, 0, 0], str(raised)
        self._known.append(_Known(region, error))
        for writable, table in self._tables.items():
            self._tables[writable] = np.vstack([table, np.array([row], np.int64)])
        return len(self._known) - 1

    def _renumber(self, epoch: int, pairs: list[tuple[int, int]]) -> None:
        pairs = sorted(pair for pair in pairs if 0 <= pair[0] < 1 << 32)
        numbers = np.array([number for number, _ in pairs], np.uint32)
        self._numbering = _Numbering(epoch, numbers, np.array([slot for _, slot in pairs], np.int32))

    def _unmap(self, slots: list[int]) -> list[int]:
        dropped = []
        for writable, table in self._tables.items():
            if slots:
                table = table.copy()
                dropped += [handle for handle in table[slots, _HANDLE].tolist() if handle >= 0]
                table[slots, _HANDLE] = -1
                self._tables[writable] = table
        return dropped

    # --- inside, without the lock ---

    def _connect(self, slot: int, known: _Known, writable: bool, deadline_ns: int) -> None:
        try:
            view, introduce = known.view, self._introduce
            handle = self._transport.connect(
                view.descriptor,
                writable=writable,
                exchange=lambda hello, end_ns: introduce(view, hello, end_ns),
                deadline_ns=deadline_ns,
            )
        except TransportError as error:
            known.error = f"node {known.view.node}: {error}"
            known.retry_ns = time.monotonic_ns() + RETRY_NS
            return
        known.error = ""
        with self._lock:
            table = self._tables[writable]
            # Another thread may have been first, or the region may have gone meanwhile.
            if not self._closed and table[slot, _HANDLE] < 0 and slot in self._live.values():
                table = table.copy()
                table[slot, _HANDLE] = handle
                self._tables[writable] = table
                return
        self._transport.disconnect(handle)
